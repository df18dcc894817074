"""The sections `algorithm` and `critic` of the configuration. Formulas: docs/algorithms.md."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from megatron_async_rl.config.sections import (
    AboveOne,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
)


class AdvantageConfig(Section, frozen=True, kw_only=True):
    """From rewards to advantages."""

    estimator: Text = "grpo"
    """`grpo` centers rewards in the group and divides by their standard deviation; `dr_grpo` only
    centers; `rloo` subtracts the mean of the other samples; `reinforce_pp` uses no group and
    normalises over the batch; `gae` estimates advantages per token with a critic that is trained
    beside the policy; `turn_grpo` and `turn_gae` estimate them per turn, from the rewards of turns;
    or package.module:function with the signature (rewards, lengths, config) -> advantages."""
    group_normalize: bool = True
    """With `grpo`: if false, the shaped reward itself is the advantage. With `turn_grpo`: if false,
    the discounted rewards from the turn on are."""
    batch_normalize: bool = False
    """Normalise advantages over all generated tokens of the batch."""
    gamma: Fraction = 1.0
    """Discount factor: with `gae` per token, with `turn_grpo` and `turn_gae` per turn. `turn_grpo`
    with 0 credits a turn with its own reward alone."""
    gae_lambda: Fraction = 1.0
    """With `gae` and `turn_gae`: lambda. 1 uses the observed return, 0 the critic's next value."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Values for a function of your own, which reads them as `config.options`."""

    @property
    def uses_critic(self) -> bool:
        """True if a critic in the trainer turns the shaped rewards into advantages."""
        return self.estimator in ("gae", "turn_gae")


class LossConfig(Section, frozen=True, kw_only=True):
    """The policy objective."""

    objective: Text = "decoupled_ppo"
    """`decoupled_ppo` corrects for staleness; `gspo` uses one ratio per sample; `cispo` uses the
    clipped ratio as a weight only; `ppo` clips against the behavior policy, without correction; or
    package.module:function with the signature (inputs, config) -> loss per token."""
    clip_eps: PositiveFloat = 0.2
    """PPO clip range below 1, and above unless clip_eps_high is set."""
    clip_eps_high: PositiveFloat | None = None
    """PPO clip range above 1. Null uses clip_eps."""
    dual_clip: AboveOne | None = None
    """Bound c of dual-clip PPO for negative advantages. Null disables it."""
    stop_ratio: AboveOne | None = None
    """Skip the optimizer step of a minibatch whose mean ratio of current to old policy exceeds
    this. Null disables it."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Values for a function of your own, which reads them as `config.options`."""


class StalenessCorrectionConfig(Section, frozen=True, kw_only=True):
    """How the objective corrects for tokens that an older policy sampled."""

    proximal: Literal["recompute", "reuse_first_minibatch", "loglinear"] = "recompute"
    """How logprobs under the weights at the start of the step are obtained: `recompute` makes a
    forward pass over the batch; `reuse_first_minibatch` over all minibatches but the first;
    `loglinear` interpolates by staleness, without a pass."""
    behavior_weight_cap: PositiveFloat | None = 5.0
    """Largest ratio of proximal to behavior policy that is accepted. Null disables the limit."""
    behavior_weight_floor: PositiveFloat | None = None
    """Smallest ratio of proximal to behavior policy that is accepted. Null disables the limit."""
    behavior_weight_action: Literal["mask", "truncate"] = "mask"
    """Beyond cap or floor: mask the tokens, or truncate the ratio."""
    behavior_weight_level: Literal["token", "sequence"] = "token"
    """Compute the ratio per token, or as the geometric mean over the sample."""
    m2_threshold: PositiveFloat | None = None
    """M2PO: mask the tokens with the largest log ratio of proximal to behavior policy until its
    mean square over the batch is at most this. The paper uses 0.04 with a wide clip_eps. Null
    disables it."""


class KlConfig(Section, frozen=True, kw_only=True):
    """The KL penalty against the starting policy."""

    coef: NonNegativeFloat = 0.0
    """Weight of the penalty. With 0 no copy of the starting policy is kept."""
    apply_to: Literal["loss", "reward"] = "loss"
    """Add the penalty to the loss, or subtract it from the rewards of the tokens that follow."""
    estimator: Literal["k2", "k3"] = "k3"
    """Estimator in the loss, with d = reference - current logprob: k2 = d^2 / 2, k3 = exp(d) - d -
    1."""


class FilterConfig(Section, frozen=True, kw_only=True):
    """Which groups are not trained on. Their slots are given back to the admission."""

    drop_equal_rewards: bool = False
    """Drop groups whose rewards are all equal."""
    success_rate_min: float | None = None
    """Drop groups whose mean reward is lower. Null disables the limit."""
    success_rate_max: float | None = None
    """Drop groups whose mean reward is higher. Null disables the limit."""
    function: Text | None = None
    """Also drop groups for which package.module:function, with the signature (rewards, lengths,
    row, config) -> bool, returns False."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Values for the function, which reads them as `config.options`."""


class RewardShapingConfig(Section, frozen=True, kw_only=True):
    """From the reward function's value r to the reward that is optimised."""

    scale: PositiveFloat = 1.0
    """The shaped reward is ((r - 0.5) * 2 - bias) * scale."""
    bias: float = 0.0
    """See scale."""
    clip: PositiveFloat | None = None
    """Clip the shaped reward to the range from -clip to clip. Null disables it."""
    overlong_buffer_tokens: NonNegativeInt = 0
    """The penalty for long responses rises linearly over this many last tokens of
    rollout.max_new_tokens. 0 disables it."""
    overlong_penalty: PositiveFloat = 1.0
    """Penalty of a response of full length."""


class AlgorithmConfig(Section, frozen=True, kw_only=True):
    """The batch of one step and the algorithm that trains on it."""

    prompts_per_step: PositiveInt
    """Groups in the batch of one step (B of the paper)."""
    samples_per_prompt: PositiveInt
    """Samples in a group."""
    minibatches: PositiveInt = 1
    """Optimizer steps per training step."""
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    staleness_correction: StalenessCorrectionConfig = StalenessCorrectionConfig()
    kl: KlConfig = KlConfig()
    filters: FilterConfig = FilterConfig()
    reward_shaping: RewardShapingConfig = RewardShapingConfig()


class CriticConfig(Section, frozen=True, kw_only=True):
    """The value model of `algorithm.advantage.estimator: gae` and `turn_gae`."""

    path: str | None = None
    """Hugging Face folder that initialises the critic's body; it must share the vocabulary. Null
    uses model.path."""
    lr: PositiveFloat | None = None
    """Learning rate of the critic, under Megatron's schedule. Null uses megatron.lr."""
    clip_eps: PositiveFloat | None = 0.2
    """Clip range of a value around its value at the start of the step. Null disables clipping."""
