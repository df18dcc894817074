"""Every knob of a run: one YAML file, dotted `key=value` overrides after it, unknown keys refused.

Sections are frozen structs; the text under each field is its documentation, its range is checked, and an error names
the key, the value, the rule and what to do. Megatron's and SGLang's own knobs keep their own names under `megatron:`
and `sglang:` and pass through.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import yaml

from megatron_async_rl.errors import ConfigError


def _at_least(low: float, doc: str) -> msgspec.Meta:
    return msgspec.Meta(ge=low, description=doc)


def _above(low: float, doc: str) -> msgspec.Meta:
    return msgspec.Meta(gt=low, description=doc)


def _doc(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML reads `1e-3` as text, which no writer of a learning rate means."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"{key} stands twice in line {node.start_mark.line + 1} and below; keep one")
    return loader.construct_mapping(node, deep=True)


_YamlLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_YamlLoader)


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
    export_every: Annotated[
        int, _at_least(0, "Also save the policy at every k-th version, as run.dir/policy-vN; 0: never.")
    ] = 0
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
        str, _doc("`math`, or package.module:function of your own: (prompt, response, row) -> float.")
    ] = "math"
    workers: Annotated[int, _at_least(1, "Reward worker processes.")] = 1
    children: Annotated[int, _at_least(1, "Killable children of each reward worker.")] = 1
    timeout_s: Annotated[float, _above(0, "Seconds one verdict may take; then the child is killed.")] = 10.0
    max_attempts: Annotated[int, _at_least(1, "Attempts at one verdict before the group is dropped by name.")] = 3


class AlgorithmConfig(Section, kw_only=True):
    prompts_per_step: Annotated[int, _at_least(1, "Groups in the batch of one step (B of the paper).")]
    samples_per_prompt: Annotated[int, _at_least(1, "Samples of a group.")]
    minibatches: Annotated[int, _at_least(1, "Optimizer steps per training step.")] = 1
    advantage: Annotated[
        Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"],
        _doc(
            "grpo: centered in the group, over its standard deviation; dr_grpo: centered; rloo: less the mean of the "
            "group's others; reinforce_pp: no group, normalised over the batch's tokens."
        ),
    ] = "grpo"
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


class TrainerConfig(Section, kw_only=True):
    data_parallel_size: Annotated[int, _at_least(1, "Replicas of the tensor/pipeline-parallel trainer.")] = 1
    max_tokens_per_microbatch: Annotated[int, _at_least(1, "Token budget of a packed micro-batch.")] = 8192
    packing: Annotated[
        Literal["ffd", "karmarkar_karp"],
        _doc("Samples into micro-batches: first fit decreasing, or micro-batches of equal FLOPs."),
    ] = "ffd"
    precision: Annotated[Literal["fp32", "bf16"], _doc("Parameters' type; gradients and optimizer are fp32.")] = "bf16"
    threads: Annotated[int, _at_least(1, "CPU threads of a trainer rank.")] = 1
    start_timeout_s: Annotated[float, _above(0, "Seconds the ranks may take to come up.")] = 600.0
    collective_timeout_s: Annotated[float, _above(0, "Deadline of every collective among trainer ranks.")] = 600.0


class WeightsConfig(Section, kw_only=True):
    bucket_bytes: Annotated[int, _at_least(1024, "Size of one bucket on the wire; 2 GiB was fastest on NVLink.")] = (
        2 << 30
    )
    verify_every: Annotated[int, _at_least(1, "Compare digests at every k-th update (the first always).")] = 1
    update_timeout_s: Annotated[float, _above(0, "Deadline of one whole update; a late server is fenced.")] = 120.0
    wire: Annotated[
        Literal["bucket", "tensor"], _doc("One broadcast per bucket (slow links), or one per tensor of it (NVLink).")
    ] = "bucket"
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


class Config(Section, kw_only=True):
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    algorithm: AlgorithmConfig
    staleness: StalenessConfig = StalenessConfig()
    reward: RewardConfig = RewardConfig()
    trainer: TrainerConfig = TrainerConfig()
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    monitor: MonitorConfig = MonitorConfig()
    megatron: dict[str, Any] = {}
    sglang: dict[str, Any] = {}

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir)

    def parallel_size(self, name: str) -> int:
        """A parallel size under `megatron:`, such as tensor_model_parallel_size; 1 where it is not set."""
        return int(self.megatron.get(f"{name}_parallel_size", 1))

    @property
    def trainer_ranks(self) -> int:
        sizes = (self.parallel_size(n) for n in ("tensor_model", "pipeline_model", "context"))
        ranks = self.trainer.data_parallel_size
        for size in sizes:
            ranks *= size
        return ranks


def load(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """The configuration in a YAML file, with dotted overrides such as `staleness.eta=0` applied.

    Raises ConfigError: unreadable file, unknown key (names the nearest), wrong type or range.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the configuration {path}: {e}; give the path of a YAML file") from e
    try:
        tree = _read_yaml(text) or {}
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not YAML: {e}") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(tree).__name__}")
    for override in overrides or []:
        _apply_override(tree, override)
    return from_tree(tree)


def from_tree(tree: dict[str, Any]) -> Config:
    """Checks a tree of plain values and makes the configuration of it."""
    _check_values(tree, "")
    try:
        config = msgspec.convert(tree, Config, strict=True)
    except msgspec.ValidationError as e:
        raise ConfigError(_explain(str(e), tree)) from None
    _cross_check(config)
    return config


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back to an equal one."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, such as staleness.eta=0")
    try:
        value = _read_yaml(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"the value of override {override!r} is not YAML: {e}") from e
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    node[last] = value


def _check_values(tree: dict[Any, Any], path: str) -> None:
    """What the sections' types do not say: keys are text, numbers are finite."""
    for key, value in tree.items():
        where = f"{path}.{key}".lstrip(".")
        if not isinstance(key, str):
            raise ConfigError(f"{where}: the key {key!r} is not text; write it in quotes")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where} = {value}: expected a finite number")
        if isinstance(value, dict):
            _check_values(value, where)


def _explain(message: str, tree: dict[str, Any]) -> str:
    """Turns msgspec's words into: key, value, rule, remedy."""
    match = re.fullmatch(r"(?P<rule>.*?)(?: - at `\$\.?(?P<path>.*?)`)?", message, re.S)
    rule, path = match["rule"], match["path"] or ""
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", rule)
    if unknown:
        names = [f.encode_name for f in msgspec.structs.fields(_section_at(path))]
        near = difflib.get_close_matches(unknown[1], names, n=1, cutoff=0.0)
        key = f"{path}.{unknown[1]}".lstrip(".")
        return f"{key} is not a setting; did you mean {'.'.join(filter(None, [path, near[0]]))}? Known here: {', '.join(names)}"
    missing = re.fullmatch(r"Object missing required field `(.*)`", rule)
    if missing:
        key = f"{path}.{missing[1]}".lstrip(".")
        return f"{key} is not set, and has no default. {_description(key)} Set it in the YAML or with {key}=VALUE"
    if "enum value" in rule:
        rule = f"expected one of {', '.join(map(repr, get_args(get_args(_annotation(path))[0])))}"
    value: Any = tree
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return f"{path} = {value!r}: {rule[0].lower() + rule[1:]}. {_description(path)} Set it in the YAML or with {path}=VALUE"


def _section_at(path: str) -> type:
    section: type = Config
    for part in filter(None, path.split(".")):
        section = next(f.type for f in msgspec.structs.fields(section) if f.encode_name == part)
    return section


def _annotation(path: str) -> Any:
    *parents, last = path.split(".")
    return next(f.type for f in msgspec.structs.fields(_section_at(".".join(parents))) if f.encode_name == last)


def _description(path: str) -> str:
    try:
        return msgspec.inspect.type_info(_annotation(path)).extra_json_schema["description"]
    except (AttributeError, StopIteration, TypeError, KeyError):
        return ""


def _cross_check(config: Config) -> None:
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
    if a.prompts_per_step * a.samples_per_prompt < a.minibatches * config.trainer.data_parallel_size:
        raise ConfigError(
            f"algorithm.minibatches = {a.minibatches} is more than each data-parallel replica has samples; lower it"
        )
    if a.advantage == "grpo" and a.group_normalize and a.samples_per_prompt == 1:
        raise ConfigError(
            "algorithm.group_normalize = true needs algorithm.samples_per_prompt >= 2 (a group of one has no spread); "
            "set samples_per_prompt, or group_normalize=false"
        )
    if a.advantage in ("dr_grpo", "rloo") and a.samples_per_prompt == 1:
        raise ConfigError(
            f"algorithm.advantage = {a.advantage} needs algorithm.samples_per_prompt >= 2 (a group of one has no "
            "others); set samples_per_prompt, or advantage=reinforce_pp"
        )
    if a.overlong_buffer_tokens > r.max_new_tokens:
        raise ConfigError(
            f"algorithm.overlong_buffer_tokens = {a.overlong_buffer_tokens} is more than rollout.max_new_tokens = "
            f"{r.max_new_tokens}; lower it"
        )
    whole_samples = {
        "algorithm.loss = gspo": a.loss == "gspo",
        "algorithm.behavior_weight_level = sequence": a.behavior_weight_level == "sequence",
        "algorithm.kl_in = reward": a.kl_in == "reward" and a.kl_coef > 0,
    }
    for setting, chosen in whole_samples.items():
        if chosen and config.megatron.get("context_parallel_size", 1) != 1:
            raise ConfigError(
                f"{setting} needs whole samples on a rank, but megatron.context_parallel_size = "
                f"{config.megatron['context_parallel_size']} cuts them; set that to 1, or choose another"
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
