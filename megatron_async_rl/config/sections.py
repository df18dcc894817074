"""The sections of the configuration; below each field is its documentation.

Error messages quote that text, and docs/configuration.md is generated from it (documentation.py).
Rules between settings are in checks.py. The sections `data` and `evaluation` are in datasets.py,
`algorithm` and `critic` in algorithm.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

Text = Annotated[str, msgspec.Meta(min_length=1)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
NonNegativeInt = Annotated[int, msgspec.Meta(ge=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
AboveOne = Annotated[float, msgspec.Meta(gt=1)]

MAX_RESTART_PAUSE_S = 60.0


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One section of the configuration."""


class RunConfig(Section, frozen=True, kw_only=True):
    """Location, length and mode of a run."""

    dir: Text
    """Folder of the run: journal, checkpoints, logs, TensorBoard, samples and the exported
    policy."""
    seed: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)] = 1
    """Seed of prompt order, sampling and initialisation."""
    steps: NonNegativeInt
    """Number of training steps; each step produces one weight version. 0 only evaluates, which the
    command `eval` uses."""
    mode: Literal["train", "rollout_only"] = "train"
    """`rollout_only` starts no trainer: batches sampled from model.path are written to
    run.dir/batches for `replay`."""
    export_every: NonNegativeInt = 0
    """Also export the policy at every k-th version, as run.dir/policy-vN. 0 disables it."""
    host: Text = "127.0.0.1"
    """Address on which the controller listens. A loopback address restricts the run to this
    host."""
    no_progress_timeout_s: PositiveFloat = 600.0
    """The run ends, and names the component that waits, after this many seconds without
    progress."""


class ModelConfig(Section, frozen=True, kw_only=True):
    """The starting policy."""

    path: Text
    """Hugging Face folder of the starting policy."""
    context_tokens: Annotated[int, msgspec.Meta(ge=8)]
    """Maximum length of prompt and response together, in tokens."""
    random_init: bool = False
    """Start from random weights, for benchmarks. model.path then needs config.json and the
    tokenizer only."""


class RolloutConfig(Section, frozen=True, kw_only=True):
    """Generation: servers, sampling and leases."""

    servers: PositiveInt = 1
    """Number of SGLang servers. Each has one rollout worker."""
    max_new_tokens: PositiveInt
    """Maximum number of response tokens."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The trainer divides its logits by the same value."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Sample from the fewest tokens that together have this probability; 1 samples from all. Needs
    `run.mode: rollout_only`, as `top_k` and `min_p` do: training needs the whole distribution."""
    top_k: NonNegativeInt = 0
    """Sample from this many most probable tokens; 0 samples from all."""
    min_p: Fraction = 0.0
    """Sample from tokens with at least this fraction of the largest probability; 0 samples from
    all."""
    stop: Annotated[tuple[Text, ...], msgspec.Meta(max_length=32)] = ()
    """Texts that end a response. The tokens of the text are part of the response: they are trained,
    and the reward function sees them."""
    routing_replay: bool = False
    """Train each token with the experts that the engine chose for it, instead of those that the
    trainer's router would choose. For models with experts; `top_k` bytes per token and layer."""
    max_concurrent_samples: PositiveInt = 256
    """Maximum number of samples in flight per server."""
    kv_lease_limit: PositiveFloat | None = 0.9
    """A server gets samples until the tokens that they are expected to hold, by the lengths of
    earlier samples, reach this fraction of its KV cache. Null leaves it to `max_concurrent_samples`
    alone: samples that do not fit then queue in the server."""
    workflow: str = "single_turn"
    """`single_turn`, `multi_turn_math`, `python_tool`, or package.module:Class of a user-defined
    workflow (docs/workflows.md)."""
    workflow_options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Keyword arguments of the workflow's constructor, such as `max_turns: 3`."""
    agent: str | None = None
    """package.module:function(row, client): an agent that uses OpenAI's or Anthropic's API. Each
    sample is an episode of it, instead of `workflow` (docs/agents.md)."""
    agent_command: str | None = None
    """A command that is an agent, in any language: gets the row as JSON on stdin."""
    agent_timeout_s: PositiveFloat = 300.0
    """Seconds that an episode of an agent may take."""
    agent_max_requests: PositiveInt = 256
    """Requests that an episode of an agent may make."""
    agent_host: Text = "127.0.0.1"
    """Address of the HTTP server that agents of a rollout worker talk to."""
    lease_timeout_s: PositiveFloat = 600.0
    """Seconds until an unfinished sample is leased to another server."""
    max_attempts: PositiveInt = 3
    """Attempts at one group before it is dropped."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds that a server may take to start."""
    request_timeout_s: PositiveFloat = 120.0
    """Deadline of one control request to a server, in seconds."""


class StalenessConfig(Section, frozen=True, kw_only=True):
    """How far generation may run ahead of training."""

    max_staleness: NonNegativeInt = 4
    """eta: how many weight versions a trained token may lag. 0 is synchronous RL, 1 one-step
    overlap."""
    straggler_policy: Literal["wait", "drop"] = "wait"
    """Unfinished groups that the next version would make too stale: wait for them, or drop them."""
    straggler_timeout_s: NonNegativeFloat = 120.0
    """Longest wait under `straggler_policy: wait`; after it the stale groups are dropped."""


class RewardConfig(Section, frozen=True, kw_only=True):
    """How responses are scored."""

    function: str = "math"
    """`math`, `code` (unit tests), `reasoning_gym`, or package.module:function with the signature
    (prompt, response, row) -> float."""
    workers: PositiveInt = 1
    """Number of reward worker processes."""
    processes_per_worker: PositiveInt = 1
    """Scoring processes of each reward worker. A timeout kills one of these, not the worker."""
    timeout_s: PositiveFloat = 10.0
    """Seconds that scoring one response may take before its scoring process is killed."""
    max_attempts: PositiveInt = 3
    """Attempts to score one response before its group is dropped."""
    thinking_tags: tuple[Text, ...] = ("<think>", "</think>")
    """Opening and closing tags of thinking, alternating. `math` and `code` read the text after the
    last closing tag; a response whose thinking is not closed has no answer, also if the prompt
    opened it. An empty list: no tags."""


class SandboxConfig(Section, frozen=True, kw_only=True):
    """How `reward.function: code`, `rollout.workflow: python_tool` and agents run programs."""

    python: str = "/usr/bin/python3"
    """Python interpreter that runs the programs, version 3.9 or newer."""
    isolation: Literal["namespaces", "landlock"] = "namespaces"
    """Required isolation besides resource limits, Landlock and seccomp. `landlock` accepts a host
    without namespaces."""
    memory_mb: Annotated[int, msgspec.Meta(ge=64)] = 1024
    """Address space limit of a program, in MiB."""
    test_timeout_s: PositiveFloat = 4.0
    """Seconds that one execution may take: one test of a program, or all calls of a function."""


class TrainerConfig(Section, frozen=True, kw_only=True):
    """The Megatron-Core trainer; parallel sizes and optimizer settings are in `megatron`."""

    data_parallel_size: PositiveInt = 1
    """Number of data-parallel replicas."""
    hosts: PositiveInt = 1
    """Hosts over which the ranks are spread evenly, in order. With more than 1, `run` or `join`
    starts trainer-0, trainer-1, ..."""
    max_tokens_per_microbatch: PositiveInt = 8192
    """Token budget of one packed micro-batch."""
    packing: Literal["ffd", "karmarkar_karp"] = "ffd"
    """How samples are packed: first-fit decreasing by tokens, or Karmarkar-Karp for micro-batches
    of equal FLOPs."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Parameter type. Gradients and optimizer state are fp32. fp16 scales the loss by Megatron's
    *_loss_scale settings."""
    cpu_threads: PositiveInt = 1
    """CPU threads of each trainer rank."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds that the ranks may take to start."""
    collective_timeout_s: PositiveFloat = 600.0
    """Deadline of every collective among trainer ranks, in seconds."""


class WeightsConfig(Section, frozen=True, kw_only=True):
    """Weight updates from the trainer to the servers."""

    bucket_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 2 << 30
    """Size of one transfer bucket. 2 GiB was fastest over NVLink."""
    verify_every: PositiveInt = 4
    """Compare digests at every k-th update, and whenever groups or servers are new."""
    update_timeout_s: PositiveFloat = 120.0
    """Deadline of one update. A server that misses it is fenced and restarted."""
    kv_cache: Literal["recompute", "keep"] = "recompute"
    """`recompute` drops the KV cache at an update and prefills again. `keep` continues on it;
    tokens are labelled."""
    interrupt: Literal["abort", "retract", "finish"] = "abort"
    """With `kv_cache: recompute`: `abort` returns requests to the worker; `retract` (SGLang >=
    0.5.21) requeues them in the engine, which is faster but loses their tokens if that server
    dies. `finish` interrupts nothing: the update waits until all requests have ended, for at most
    0.9 of update_timeout_s, and holds new ones back meanwhile."""
    broadcast_unit: Literal["bucket", "tensor"] = "bucket"
    """One broadcast per bucket (slow links), or one per tensor of it (NVLink)."""
    transport: Literal["network", "disk"] = "network"
    """`network` broadcasts over NCCL or gloo. `disk` goes through run.dir/weights, which all hosts
    must see."""
    snapshot_every: NonNegativeInt = 0
    """With `transport: network`: also write every k-th version to run.dir/weights, so that a
    restarted server can load weights without the trainer. The last two are kept. 0 disables it."""
    dtype: Literal["as_trained", "float32", "bfloat16", "float16"] = "as_trained"
    """Element type sent to the servers, cast at the source. `as_trained` sends that of
    trainer.precision."""
    quantization: Literal["fp8_block"] | None = None
    """`fp8_block` quantizes the decoder's linear layers at the source, to float8 e4m3 with a scale
    per 128 x 128 elements, and the servers compute with them (docs/weights.md). Null sends all
    weights as `dtype`."""


class CheckpointConfig(Section, frozen=True, kw_only=True):
    """Checkpoints of model, optimizer and position in the data."""

    every: NonNegativeInt = 10
    """Save every k-th step, and at the end. 0 disables checkpoints."""
    keep: Annotated[int, msgspec.Meta(ge=2)] = 2
    """Number of checkpoints kept. If the newest is damaged, the one before it is loaded."""
    asynchronous: bool = True
    """Write in the background while the next steps train."""


class FaultsConfig(Section, frozen=True, kw_only=True):
    """Failure detection, restarts and shutdown."""

    max_restarts: NonNegativeInt = 5
    """Restarts of one process before it is given up. With 0 the first failure ends the run."""
    restart_reset_s: PositiveFloat = 600.0
    """A process that has run this long gets its full number of restarts back."""
    restart_backoff_s: NonNegativeFloat = 1.0
    """Pause before a restart. It doubles with each further restart, up to 60 s."""
    min_servers: PositiveInt = 1
    """The run ends when fewer servers than this are left."""
    max_failed_groups: PositiveInt = 64
    """The run ends when this many groups in a row could not be generated and scored, as with a
    workflow or reward function that always raises."""
    max_filtered_groups: PositiveInt = 1024
    """The run ends when this many groups in a row were dropped by algorithm.filters and none passed
    them: it would never train a step."""
    heartbeat_timeout_s: PositiveFloat = 60.0
    """A worker without heartbeat for this long is declared lost, killed and restarted."""
    shutdown_grace_s: PositiveFloat = 60.0
    """Seconds between SIGTERM and the end of the run, to save state. The exit code is then 75
    (requeue)."""

    def restart_pause_s(self, restarts: int) -> float:
        """Returns the pause before the given restart (1: the first); 0 before the first start."""
        pause_s = self.restart_backoff_s * 2 ** (restarts - 1) if restarts else 0.0
        return min(pause_s, MAX_RESTART_PAUSE_S)


class MonitorConfig(Section, frozen=True, kw_only=True):
    """Records of a run for people."""

    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where metrics are written: `tensorboard` (run.dir/tensorboard), `wandb` (run.dir/wandb) and
    `mlflow` (run.dir/mlflow.db), the last two offline and with the package's extra of that name."""
    prometheus_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    """Port at which the controller serves the newest metrics to Prometheus, as /metrics, without
    authentication. Null serves none."""
    prometheus_host: Text = "127.0.0.1"
    """Address of that port. 0.0.0.0 serves other hosts too."""
    sample_texts: NonNegativeInt = 2
    """Number of samples shown as text in TensorBoard at each step."""
    sample_tokens: NonNegativeInt = 16
    """Number of samples of each step whose token ids and logprobs are kept in samples.jsonl."""
    log_texts: NonNegativeInt | None = None
    """Number of samples of each step whose text is kept in samples.jsonl, which grows with the
    length of the run (docs/reliability.md). Null keeps the text of all."""
    logprob_mismatch_alarm: PositiveFloat | None = 0.05
    """Warn when the mean absolute difference between engine and trainer logprobs exceeds this. Null
    disables it."""
    matrix_tflops: PositiveFloat | None = None
    """Measured rate of large bf16 matrix products on a trainer's GPU, in TFLOP/s, of which
    `perf/mfu_of_matrix_rate` is a fraction (docs/metrics.md). Null leaves that metric out."""
    trace_steps: tuple[NonNegativeInt, ...] = ()
    """Versions in training whose step is written as a timeline of all processes, a Chrome trace, to
    run.dir/trace. https://ui.perfetto.dev shows it."""
    mismatch_probe_samples: Annotated[int, msgspec.Meta(ge=0, le=256)] = 4
    """Samples of each step of which 256 tokens are also scored by a server with the weights under
    training, and compared with the trainer. Needs rollout.temperature = 1. 0 disables it. Each
    probe advances the server's random generator (sglang.random_seed) by one number."""
