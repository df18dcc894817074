"""The sections of the configuration: frozen structs; the text under each field is its documentation, its range is checked."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


def _at_least(low: float, doc: str) -> msgspec.Meta:
    return msgspec.Meta(ge=low, description=doc)


def _above(low: float, doc: str) -> msgspec.Meta:
    return msgspec.Meta(gt=low, description=doc)


def _doc(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


_Positive = Annotated[float, msgspec.Meta(gt=0)]
_AboveOne = Annotated[float, msgspec.Meta(gt=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the configuration."""


class RunConfig(Section, kw_only=True):
    dir: Annotated[
        str, msgspec.Meta(min_length=1, description="Folder of the run: logs, TensorBoard, samples, export.")
    ]
    seed: Annotated[int, _at_least(0, "Seed of prompt order, sampling and initialisation.")] = 1
    steps: Annotated[int, _at_least(1, "Training steps (one weight version each).")]
    mode: Annotated[
        Literal["train", "rollout_only"],
        _doc(
            "rollout_only: no trainer; batches are written to run.dir/batches, for `replay`, under the model as it is."
        ),
    ] = "train"
    export_every: Annotated[
        int, _at_least(0, "Also save the policy at every k-th version, as run.dir/policy-vN; 0: never.")
    ] = 0
    host: Annotated[
        str,
        msgspec.Meta(min_length=1, description="Address on which the controller listens; loopback: this host alone."),
    ] = "127.0.0.1"
    stall_s: Annotated[
        float, _above(0, "Seconds without any progress after which the run ends and names who waits.")
    ] = 600.0


class ModelConfig(Section, kw_only=True):
    path: Annotated[str, msgspec.Meta(min_length=1, description="Hugging Face folder of the starting policy.")]
    context_tokens: Annotated[int, _at_least(8, "Longest prompt + response, in tokens.")]
    random_init: Annotated[
        bool, _doc("Start from random weights; model.path then needs config.json alone (for benchmarks, not to train).")
    ] = False


class DataConfig(Section, kw_only=True):
    train: Annotated[str, msgspec.Meta(min_length=1, description="JSONL file: a row has `prompt` and `answer`.")]
    eval: Annotated[str | None, _doc("JSONL file for the evaluation before and after; none: no evaluation.")] = None
    eval_temperature: Annotated[float, _at_least(0, "Temperature of the evaluation's samples; 0 is greedy.")] = 0.0
    chat_template: Annotated[bool, _doc("Render `prompt` as a user message with the model's chat template.")] = False
    add_bos: Annotated[bool, _doc("Put the tokenizer's bos token before a prompt without chat template.")] = True


class RolloutConfig(Section, kw_only=True):
    servers: Annotated[int, _at_least(1, "SGLang servers, one rollout worker each.")] = 1
    max_new_tokens: Annotated[int, _at_least(1, "Response tokens at most.")]
    temperature: Annotated[float, _above(0, "Sampling temperature; the trainer divides its logits by it too.")] = 1.0
    max_concurrent_samples: Annotated[int, _at_least(1, "Samples in flight per server at most.")] = 256
    workflow: Annotated[str, _doc("`single_turn`, or package.module:Class of your own.")] = "single_turn"
    lease_timeout_s: Annotated[float, _above(0, "A sample not back by then is given to another server.")] = 600.0
    max_attempts: Annotated[int, _at_least(1, "Attempts at one group before it is dropped by name.")] = 3
    start_timeout_s: Annotated[float, _above(0, "Seconds a server may take to start.")] = 600.0
    request_timeout_s: Annotated[float, _above(0, "Deadline of one control call to a server.")] = 120.0


class StalenessConfig(Section, kw_only=True):
    eta: Annotated[
        int, _at_least(0, "Weight versions a trained token may lag; 0 is synchronous RL, 1 one-step overlap.")
    ] = 4
    straggler: Annotated[
        Literal["wait", "drop"], _doc("A group that would be stale after this step: wait for it (bounded), or drop it.")
    ] = "wait"
    straggler_wait_s: Annotated[
        float, _at_least(0, "Longest wait of `straggler: wait`; then the group is dropped.")
    ] = 120.0


class RewardConfig(Section, kw_only=True):
    function: Annotated[
        str,
        _doc("`math`, `code` (unit tests), or package.module:function of your own: (prompt, response, row) -> float."),
    ] = "math"
    workers: Annotated[int, _at_least(1, "Reward worker processes.")] = 1
    children: Annotated[int, _at_least(1, "Killable children of each reward worker.")] = 1
    timeout_s: Annotated[float, _above(0, "Seconds one verdict may take; then the child is killed.")] = 10.0
    max_attempts: Annotated[int, _at_least(1, "Attempts at one verdict before the group is dropped by name.")] = 3


class SandboxConfig(Section, kw_only=True):
    python: Annotated[str, _doc("Interpreter of the programs that reward.function = code runs; 3.9 or newer.")] = (
        "/usr/bin/python3"
    )
    isolation: Annotated[
        Literal["namespaces", "landlock"],
        _doc("What must hold them beside limits, Landlock and seccomp; landlock: go without where there are none."),
    ] = "namespaces"
    memory_mb: Annotated[int, _at_least(64, "Address space of a program.")] = 1024
    test_timeout_s: Annotated[float, _above(0, "Seconds one run of a program may take: one test, or all calls.")] = 4.0


class AlgorithmConfig(Section, kw_only=True):
    prompts_per_step: Annotated[int, _at_least(1, "Groups in the batch of one step (B of the paper).")]
    samples_per_prompt: Annotated[int, _at_least(1, "Samples of a group.")]
    minibatches: Annotated[int, _at_least(1, "Optimizer steps per training step.")] = 1
    advantage: Annotated[
        Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "gae"],
        _doc(
            "grpo: centered in the group, over its standard deviation; dr_grpo: centered; rloo: less the mean of the "
            "group's others; reinforce_pp: no group, normalised over the batch's tokens; gae: token by token, against a "
            "critic that is trained beside the policy."
        ),
    ] = "grpo"
    gamma: Annotated[float, msgspec.Meta(gt=0, le=1, description="With gae: discount of a reward per token.")] = 1.0
    gae_lambda: Annotated[
        float, msgspec.Meta(ge=0, le=1, description="With gae: 1 trusts what was earned, 0 the critic's next value.")
    ] = 1.0
    loss: Annotated[
        Literal["decoupled_ppo", "ppo", "gspo", "cispo"],
        _doc(
            "decoupled_ppo corrects for staleness; gspo: one ratio a sample; cispo: the clipped ratio only weighs; "
            "ppo is the naive one: against the behavior policy, uncorrected."
        ),
    ] = "decoupled_ppo"
    proximal: Annotated[
        Literal["recompute", "reuse_first_minibatch", "loglinear"],
        _doc(
            "Logprobs under the weights a step begins with. recompute: a pass over the batch; reuse_first_minibatch: "
            "over all minibatches but the first; loglinear: no pass, interpolated by staleness."
        ),
    ] = "recompute"
    clip_eps: Annotated[float, _above(0, "PPO clip range below (and above, unless clip_eps_high).")] = 0.2
    clip_eps_high: Annotated[_Positive | None, _doc("PPO clip range above; none: clip_eps.")] = None
    dual_clip: Annotated[_AboveOne | None, _doc("Bound c of dual-clip PPO for negative advantages; none: off.")] = None
    behavior_weight_cap: Annotated[
        _Positive | None, _doc("Largest proximal/behavior ratio that is trusted; none: any.")
    ] = 5.0
    behavior_weight_floor: Annotated[_Positive | None, _doc("The smallest; none: any.")] = None
    behavior_weight_action: Annotated[
        Literal["mask", "truncate"], _doc("Beyond cap or floor: mask the tokens, or truncate the ratio.")
    ] = "mask"
    behavior_weight_level: Annotated[
        Literal["token", "sequence"], _doc("A ratio for each token, or their geometric mean for the whole sample.")
    ] = "token"
    m2_threshold: Annotated[
        _Positive | None,
        _doc(
            "M2PO: the tokens whose log ratio of proximal to behavior is largest are masked until the mean of its square "
            "over the batch is at most this; the paper's 0.04 goes with a wide clip_eps. None: off."
        ),
    ] = None
    stop_ratio: Annotated[
        _AboveOne | None, _doc("A minibatch whose mean current/old ratio exceeds it makes no step; none: off.")
    ] = None
    entropy_coef: Annotated[float, _at_least(0, "Weight of the entropy bonus.")] = 0.0
    kl_coef: Annotated[float, _at_least(0, "Weight of the KL to the starting policy; 0: none, and no copy kept.")] = 0.0
    kl_in: Annotated[
        Literal["loss", "reward"],
        _doc("KL as a term of the loss, or taken from the advantages as each token's reward to go."),
    ] = "loss"
    kl_estimator: Annotated[
        Literal["k2", "k3"], _doc("Of the KL in the loss, with d = reference - current: d^2 / 2, or exp(d) - d - 1.")
    ] = "k3"
    group_normalize: Annotated[bool, _doc("With grpo; false: the shaped reward is the advantage.")] = True
    batch_normalize: Annotated[bool, _doc("Normalise advantages over all tokens of the batch.")] = False
    drop_equal_rewards: Annotated[
        bool, _doc("Drop groups whose rewards are all equal; their slots are given back.")
    ] = False
    reward_scale: Annotated[float, _above(0, "Rewards are ((r - 0.5) * 2 - reward_bias) * reward_scale.")] = 1.0
    reward_bias: Annotated[float, _doc("See reward_scale.")] = 0.0
    reward_clip: Annotated[_Positive | None, _doc("Scaled rewards are clipped to +- this; none: off.")] = None
    overlong_buffer_tokens: Annotated[
        int, _at_least(0, "The last tokens of rollout.max_new_tokens cost more and more of overlong_penalty; 0: off.")
    ] = 0
    overlong_penalty: Annotated[_Positive, _doc("Taken from the scaled reward at full length.")] = 1.0
    success_rate_min: Annotated[float | None, _doc("Groups of a lower mean reward are dropped; none: any.")] = None
    success_rate_max: Annotated[float | None, _doc("Groups of a higher mean reward are dropped; none: any.")] = None
    mismatch_alarm: Annotated[
        _Positive | None, _doc("Warn where engine and trainer differ by more, mean abs logprob; none: never.")
    ] = 0.05


class CriticConfig(Section, kw_only=True):
    path: Annotated[
        str | None, _doc("Hugging Face folder whose body the critic starts from; none: model.path. Same vocabulary.")
    ] = None
    lr: Annotated[_Positive | None, _doc("Its learning rate, under megatron's schedule; none: megatron.lr.")] = None
    clip_eps: Annotated[
        _Positive | None, _doc("A value's clip range around the one that the step began with; none: off.")
    ] = 0.2


class TrainerConfig(Section, kw_only=True):
    data_parallel_size: Annotated[int, _at_least(1, "Replicas of the tensor/pipeline-parallel trainer.")] = 1
    hosts: Annotated[
        int,
        _at_least(
            1,
            "Hosts over which its ranks are spread evenly, in order. 1: the process `trainer`; more: `trainer-0`, "
            "`trainer-1`, ..., one a host, which `run` or `join` starts.",
        ),
    ] = 1
    max_tokens_per_microbatch: Annotated[int, _at_least(1, "Token budget of a packed micro-batch.")] = 8192
    packing: Annotated[
        Literal["ffd", "karmarkar_karp"],
        _doc("Samples into micro-batches: first fit decreasing, or micro-batches of equal FLOPs."),
    ] = "ffd"
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        _doc(
            "Parameters' type; gradients and optimizer are fp32. fp16 scales the loss, as megatron's *_loss_scale say."
        ),
    ] = "bf16"
    threads: Annotated[int, _at_least(1, "CPU threads of a trainer rank.")] = 1
    start_timeout_s: Annotated[float, _above(0, "Seconds the ranks may take to come up.")] = 600.0
    collective_timeout_s: Annotated[float, _above(0, "Deadline of every collective among trainer ranks.")] = 600.0


class WeightsConfig(Section, kw_only=True):
    bucket_bytes: Annotated[int, _at_least(1024, "Size of one bucket on the wire; 2 GiB was fastest on NVLink.")] = (
        2 << 30
    )
    verify_every: Annotated[
        int, _at_least(1, "Compare digests at every k-th update, and at any through new groups or with a new server.")
    ] = 4
    update_timeout_s: Annotated[float, _above(0, "Deadline of one whole update; a late server is fenced.")] = 120.0
    kv_cache: Annotated[
        Literal["recompute", "keep"],
        _doc("At an update drop all KV, and prefill again under the new weights; or keep it (tokens are labelled)."),
    ] = "recompute"
    interrupt: Annotated[
        Literal["abort", "retract"],
        _doc(
            "With recompute. abort: requests come back with their tokens; retract: they stay in the engine's queue, "
            "which is faster, but a server that dies takes their tokens with it (SGLang >= 0.5.21)."
        ),
    ] = "abort"
    wire: Annotated[
        Literal["bucket", "tensor"], _doc("One broadcast per bucket (slow links), or one per tensor of it (NVLink).")
    ] = "bucket"
    transport: Annotated[
        Literal["network", "disk"],
        _doc(
            "network: broadcast over NCCL or gloo. disk: through run.dir/weights, which servers must see at the same path; "
            "for hosts that can have no process group between them."
        ),
    ] = "network"
    folder_every: Annotated[
        int,
        _at_least(
            0,
            "With transport = network: also write the weights to run.dir/weights at every k-th version, the last two kept, "
            "so that a server that comes (back) need not wait for the trainer. 0: never.",
        ),
    ] = 0
    dtype: Annotated[
        Literal["as_trained", "float32", "bfloat16", "float16"],
        _doc("Element type on the wire, cast at the source; as_trained: that of trainer.precision."),
    ] = "as_trained"


class CheckpointConfig(Section, kw_only=True):
    every: Annotated[int, _at_least(0, "Save model and optimizer every k-th step, and at the end; 0: never.")] = 10
    keep: Annotated[int, _at_least(2, "Generations kept; a damaged one falls back to the one before.")] = 2
    asynchronous: Annotated[bool, _doc("Write in the background while the next steps train.")] = True


class FaultsConfig(Section, kw_only=True):
    max_restarts: Annotated[
        int, _at_least(0, "Restarts of one process before it is given up; 0: the first death ends the run.")
    ] = 5
    healthy_s: Annotated[float, _above(0, "A process that has lived so long starts counting restarts anew.")] = 600.0
    backoff_s: Annotated[float, _at_least(0, "Pause before a restart; doubles with each further one.")] = 1.0
    min_servers: Annotated[int, _at_least(1, "Servers below which the run ends, when others were given up.")] = 1
    silence_s: Annotated[float, _above(0, "A worker not heard of for so long is lost, and killed and restarted.")] = (
        60.0
    )
    grace_s: Annotated[float, _above(0, "Seconds from SIGTERM to the end: spill, save, exit code 75 to requeue.")] = (
        60.0
    )


class MonitorConfig(Section, kw_only=True):
    tensorboard: Annotated[bool, _doc("Write TensorBoard logs below run.dir/tensorboard.")] = True
    sample_texts: Annotated[int, _at_least(0, "Samples shown as text in TensorBoard each step.")] = 2
    sample_tokens: Annotated[
        int, _at_least(0, "Samples of each step whose token ids and logprobs samples.jsonl keeps; it has text of all.")
    ] = 16
