"""Rules between settings, each refused with the key, the value, the rule and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_async_rl.errors import ConfigError

if TYPE_CHECKING:
    from megatron_async_rl.config.config import Config


def cross_check(config: Config) -> None:
    a, r, m = config.algorithm, config.rollout, config.model
    if r.max_new_tokens >= m.context_tokens:
        raise ConfigError(
            f"rollout.max_new_tokens = {r.max_new_tokens} leaves no room for a prompt in model.context_tokens = "
            f"{m.context_tokens}; lower the first or raise the second"
        )
    if a.samples_per_prompt > r.max_concurrent_samples:
        raise ConfigError(
            f"algorithm.samples_per_prompt = {a.samples_per_prompt} is more than a server takes at once; raise "
            f"rollout.max_concurrent_samples = {r.max_concurrent_samples} to at least that"
        )
    if a.prompts_per_step * a.samples_per_prompt % config.trainer.data_parallel_size:
        raise ConfigError(
            f"algorithm.prompts_per_step * samples_per_prompt = {a.prompts_per_step * a.samples_per_prompt} samples do not "
            f"divide over trainer.data_parallel_size = {config.trainer.data_parallel_size}; change one of them"
        )
    if (
        a.prompts_per_step * a.samples_per_prompt
        < a.minibatches * config.trainer.data_parallel_size
    ):
        raise ConfigError(
            f"algorithm.minibatches = {a.minibatches} is more than each data-parallel replica has samples; lower it"
        )
    if (
        a.advantage.estimator == "grpo"
        and a.advantage.group_normalize
        and a.samples_per_prompt == 1
    ):
        raise ConfigError(
            "algorithm.advantage.group_normalize = true needs algorithm.samples_per_prompt >= 2 (a group of one has no spread); "
            "set samples_per_prompt, or group_normalize=false"
        )
    if a.advantage.estimator in ("dr_grpo", "rloo") and a.samples_per_prompt == 1:
        raise ConfigError(
            f"algorithm.advantage.estimator = {a.advantage.estimator} needs algorithm.samples_per_prompt >= 2 (a group of one has no "
            "others); set samples_per_prompt, or advantage=reinforce_pp"
        )
    if a.reward_shaping.overlong_buffer_tokens > r.max_new_tokens:
        raise ConfigError(
            f"algorithm.reward_shaping.overlong_buffer_tokens = {a.reward_shaping.overlong_buffer_tokens} is more than rollout.max_new_tokens = "
            f"{r.max_new_tokens}; lower it"
        )
    if a.staleness_correction.m2_threshold is not None and (
        a.staleness_correction.proximal != "recompute" or a.loss.objective == "ppo"
    ):
        raise ConfigError(
            f"algorithm.staleness_correction.m2_threshold = {a.staleness_correction.m2_threshold:g} needs every token's proximal logprob before the step, which "
            f"algorithm.staleness_correction.proximal = {a.staleness_correction.proximal} with loss = {a.loss.objective} does not give; set proximal=recompute and a loss other "
            "than ppo"
        )
    if config.weights.kv_cache == "keep" and config.weights.interrupt == "retract":
        raise ConfigError(
            "weights.interrupt = retract drops the KV cache that weights.kv_cache = keep keeps; leave weights.interrupt "
            "out, or set weights.kv_cache=recompute"
        )
    if (
        config.weights.kv_cache == "keep"
        and config.sglang.get("disable_overlap_schedule") is not True
    ):
        raise ConfigError(
            "weights.kv_cache = keep needs sglang.disable_overlap_schedule = true: the overlap scheduler has a batch under "
            "way when the engine pauses, and its tokens would be labelled with weights that did not sample them; set that, "
            "or weights.kv_cache=recompute"
        )
    if not config.has_trainer and (m.random_init or config.sglang.get("load_format") == "dummy"):
        raise ConfigError(
            "run.mode = rollout_only generates from the weights in model.path, which "
            f"{'model.random_init' if m.random_init else 'sglang.load_format = dummy'} leaves unread; remove that"
        )
    if "port" in config.sglang and r.servers > 1:
        raise ConfigError(
            f"sglang.port = {config.sglang['port']} can serve one server of a host, not rollout.servers = {r.servers}; "
            "leave it out: each server then takes a free port"
        )
    for name in (
        "tensor_model",
        "pipeline_model",
        "virtual_pipeline_model",
        "context",
        "expert_model",
        "expert_tensor",
    ):
        size = config.megatron.get(f"{name}_parallel_size", 1)
        if type(size) is not int or size < 1:
            raise ConfigError(f"megatron.{name}_parallel_size = {size!r}: expected an integer >= 1")
    size = config.sglang.get("tp_size", 1)
    if type(size) is not int or size < 1:
        raise ConfigError(f"sglang.tp_size = {size!r}: expected an integer >= 1")
    _check_trainer_hosts(config)


def _check_trainer_hosts(config: Config) -> None:
    hosts, ranks = config.trainer.hosts, config.trainer_ranks
    if ranks % hosts:
        fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise ConfigError(
            f"trainer.hosts = {hosts} does not divide the {ranks} trainer ranks (trainer.data_parallel_size * megatron's "
            f"tensor, pipeline and context sizes) evenly; set trainer.hosts to one of {fitting}, or change a size"
        )


def cross_host_parallelism_warning(config: Config) -> str:
    """A warning where ranks that exchange activations in every layer are on several hosts; else empty."""
    here = config.ranks_per_host
    for name, rest in (("tensor_model", 1), ("context", config.parallel_size("tensor_model"))):
        size = config.parallel_size(name)
        if size > 1 and here % (size * rest):
            return (
                f"megatron.{name}_parallel_size = {size} with {here} ranks a host (trainer.hosts = {config.trainer.hosts}) "
                "puts a group that exchanges activations in every layer on several hosts: slow, unless NVLink joins them; "
                "lower it, or trainer.hosts"
            )
    return ""
