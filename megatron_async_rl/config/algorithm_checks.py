"""Rules between the settings of the algorithm: called by checks.py, in the order of its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_async_rl.errors import ConfigError

if TYPE_CHECKING:
    from megatron_async_rl.config.config import Config


def check_trained_distribution(config: Config) -> None:
    """Raises ConfigError if responses are sampled from another distribution than logprobs are of.

    SGLang returns log softmax(logits / temperature) over the whole vocabulary, before top_p, top_k
    and min_p remove tokens and the rest is renormalised.
    """
    rollout = config.rollout
    for name, value, of_all in (
        ("top_p", rollout.top_p, 1),
        ("top_k", rollout.top_k, 0),
        ("min_p", rollout.min_p, 0),
    ):
        if value != of_all:
            raise ConfigError(
                f"rollout.{name} = {value:g} removes tokens from the distribution that training "
                "samples from, but the logprobs of engine and trainer are of all tokens, so the "
                "ratios of the policy objective would be wrong",
                f"set rollout.{name}={of_all}, and truncate in the evaluation only",
            )


def check_batch(config: Config) -> None:
    algorithm, replicas = config.algorithm, config.trainer.data_parallel_size
    samples = algorithm.prompts_per_step * algorithm.samples_per_prompt
    limit = config.rollout.max_concurrent_samples
    if algorithm.samples_per_prompt > limit:
        raise ConfigError(
            f"algorithm.samples_per_prompt = {algorithm.samples_per_prompt} is more than a server "
            f"runs at once, rollout.max_concurrent_samples = {limit}",
            "lower the first or raise the second",
        )
    if samples % replicas:
        raise ConfigError(
            f"algorithm.prompts_per_step * algorithm.samples_per_prompt = {samples} is not "
            f"divisible by trainer.data_parallel_size = {replicas}",
            "change one of them",
        )
    if samples < algorithm.minibatches * replicas:
        raise ConfigError(
            f"algorithm.minibatches = {algorithm.minibatches} is more than the "
            f"{samples // replicas} samples of a data-parallel replica",
            "lower it",
        )


def check_algorithm(config: Config) -> None:
    algorithm, advantage = config.algorithm, config.algorithm.advantage
    single = algorithm.samples_per_prompt == 1
    if advantage.estimator == "gae" and advantage.gamma == 0:
        raise ConfigError(
            "algorithm.advantage.gamma = 0 with algorithm.advantage.estimator = gae credits a "
            "reward to its last token alone",
            "set gamma to more than 0, or the estimator to turn_gae, which discounts per turn",
        )
    single_turn = config.rollout.workflow == "single_turn" and not config.has_agent
    if single_turn and advantage.estimator in ("turn_grpo", "turn_gae"):
        raise ConfigError(
            f"algorithm.advantage.estimator = {advantage.estimator} needs several turns, but "
            "rollout.workflow = single_turn gives one",
            "set rollout.agent or another workflow, or algorithm.advantage.estimator="
            f"{advantage.estimator.removeprefix('turn_')}",
        )
    if single and advantage.estimator in ("grpo", "turn_grpo") and advantage.group_normalize:
        raise ConfigError(
            "algorithm.advantage.group_normalize = true needs algorithm.samples_per_prompt >= 2: "
            "one sample has no standard deviation",
            "raise samples_per_prompt, or set algorithm.advantage.group_normalize=false",
        )
    if single and advantage.estimator in ("dr_grpo", "rloo"):
        raise ConfigError(
            f"algorithm.advantage.estimator = {advantage.estimator} needs "
            "algorithm.samples_per_prompt >= 2: it compares the samples of a group",
            "raise samples_per_prompt, or set algorithm.advantage.estimator=reinforce_pp",
        )
    normalized = advantage.batch_normalize or advantage.estimator == "reinforce_pp"
    if single and algorithm.prompts_per_step == 1 and normalized and not advantage.uses_critic:
        raise ConfigError(
            "algorithm.prompts_per_step = 1 with algorithm.samples_per_prompt = 1 trains nothing: "
            "advantages normalised over a batch of one sample are 0",
            "raise one of them",
        )
    _check_filters(config)
    correction, loss = algorithm.staleness_correction, algorithm.loss.objective
    cap, floor = correction.behavior_weight_cap, correction.behavior_weight_floor
    if cap is not None and floor is not None and floor > cap:
        raise ConfigError(
            f"algorithm.staleness_correction.behavior_weight_floor = {floor:g} is more than "
            f"behavior_weight_cap = {cap:g}, so no ratio is accepted",
            "lower the first or raise the second",
        )
    has_proximal = correction.proximal == "recompute" and loss != "ppo"
    if correction.m2_threshold is not None and not has_proximal:
        raise ConfigError(
            f"algorithm.staleness_correction.m2_threshold = {correction.m2_threshold:g} needs the "
            "proximal logprobs of all tokens before the step, which "
            f"algorithm.staleness_correction.proximal = {correction.proximal} with "
            f"algorithm.loss.objective = {loss} does not compute",
            "set proximal=recompute and an objective other than ppo",
        )


def _check_filters(config: Config) -> None:
    """Raises ConfigError for filters that no group can pass."""
    filters = config.algorithm.filters
    if filters.drop_equal_rewards and config.algorithm.samples_per_prompt == 1:
        raise ConfigError(
            "algorithm.filters.drop_equal_rewards = true drops every group of "
            "algorithm.samples_per_prompt = 1",
            "raise the second, or set the first to false",
        )
    low, high = filters.success_rate_min, filters.success_rate_max
    if low is not None and high is not None and low > high:
        raise ConfigError(
            f"algorithm.filters.success_rate_min = {low:g} is more than success_rate_max = "
            f"{high:g}, so every group is dropped",
            "lower the first or raise the second",
        )
    own = config.has_agent or ":" in config.reward.function + config.rollout.workflow
    if own or config.algorithm.reward_shaping.overlong_buffer_tokens:
        return  # rewards may be outside of [0, 1]
    equal = filters.drop_equal_rewards
    for name, limit, excluded in (
        ("min", low, low is not None and (low > 1 or (equal and low == 1))),
        ("max", high, high is not None and (high < 0 or (equal and high == 0))),
    ):
        if excluded:
            also = " with algorithm.filters.drop_equal_rewards = true" if equal else ""
            raise ConfigError(
                f"algorithm.filters.success_rate_{name} = {limit:g}{also} drops every group: "
                f"rewards of reward.function = {config.reward.function} are from 0 to 1",
                "choose limits between 0 and 1",
            )


def check_quantization(config: Config) -> None:
    """Raises ConfigError if fp8 servers would sample from a policy that is not corrected for.

    Engine and trainer differ by the rounding of weights and activations, in tokens of any
    staleness, so each needs its weight proximal / behavior, with a bound.
    """
    if (own := config.sglang.get("quantization")) is not None:
        raise ConfigError(
            f"sglang.quantization = {own} quantizes what the servers load, so they would hold "
            "other weights than the trainer sends",
            "remove it; weights.quantization=fp8_block sends fp8 weights",
        )
    if not config.sends_fp8:
        return
    algorithm, correction = config.algorithm, config.algorithm.staleness_correction
    fp8, key = "weights.quantization = fp8_block", "algorithm.staleness_correction"
    bounded = correction.behavior_weight_cap is not None or correction.m2_threshold is not None
    for setting, is_wrong, reason, remedy in (
        (
            "algorithm.loss.objective = ppo",
            algorithm.loss.objective == "ppo",
            "does not weight tokens by trainer over engine, which differ by the quantization",
            "set algorithm.loss.objective=decoupled_ppo",
        ),
        (
            f"{key}.proximal = loglinear",
            correction.proximal == "loglinear",
            "takes the engine's logprobs of fresh tokens for the trainer's, so the quantization "
            "would not be corrected",
            f"set {key}.proximal=recompute",
        ),
        (
            f"{key}.behavior_weight_cap = null",
            not bounded,
            "does not bound the weights trainer over engine, which quantization makes large for a "
            "few tokens",
            f"set {key}.behavior_weight_cap, such as 5.0 or less",
        ),
        (
            "weights.broadcast_unit = tensor",
            config.on_cpu and config.weights.broadcast_unit == "tensor",
            "is a broadcast of fp8 tensors, which gloo does not know",
            "set weights.broadcast_unit=bucket",
        ),
    ):
        if is_wrong:
            raise ConfigError(f"{fp8} with {setting}, which {reason}", remedy)
