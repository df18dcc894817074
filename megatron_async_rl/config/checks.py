"""Rules between settings. An error names the settings, their values, the rule and the remedy."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from megatron_async_rl import hooks
from megatron_async_rl.config import algorithm_checks, passed_on
from megatron_async_rl.errors import ConfigError

if TYPE_CHECKING:
    from megatron_async_rl.config.config import Config
    from megatron_async_rl.config.datasets import SourceConfig

# settings of SGLang that decide the largest batch with a decode graph, by version
GRAPH_SIZES = (
    "cuda_graph_max_bs_decode",
    "cuda_graph_max_bs",
    "cuda_graph_bs_decode",
    "cuda_graph_bs",
)
ENGINE_SPARE_TOKENS = 8  # SGLang takes inputs that are 7 tokens shorter than its context

PARALLEL_SIZES = (
    "tensor_model",
    "pipeline_model",
    "virtual_pipeline_model",
    "context",
    "expert_model",
    "expert_tensor",
)


def cross_check(config: Config) -> None:
    """Raises ConfigError for the first rule that is broken."""
    _check_paths(config)
    _check_lengths(config)
    if config.has_trainer:
        algorithm_checks.check_trained_distribution(config)
    _check_data(config)
    _check_evaluation(config)
    _check_thinking_tags(config)
    algorithm_checks.check_batch(config)
    _check_hooks(config)
    _check_agent(config)
    algorithm_checks.check_algorithm(config)
    _check_weights(config)
    _check_servers(config)
    _check_routing(config)
    _check_parallel_sizes(config)


def _check_lengths(config: Config) -> None:
    max_new_tokens, context = config.rollout.max_new_tokens, config.model.context_tokens
    if max_new_tokens >= context:
        raise ConfigError(
            f"rollout.max_new_tokens = {max_new_tokens} leaves no room for a prompt in "
            f"model.context_tokens = {context}",
            "lower the first or raise the second",
        )
    budget = config.trainer.max_tokens_per_microbatch
    if config.has_trainer and context > budget:
        raise ConfigError(
            f"model.context_tokens = {context} is more than trainer.max_tokens_per_microbatch = "
            f"{budget}, so a long sample would fit into no micro-batch",
            "lower the first or raise the second",
        )
    pool = config.sglang.get("max_total_tokens")
    if isinstance(pool, int) and pool < context + ENGINE_SPARE_TOKENS:
        raise ConfigError(
            f"sglang.max_total_tokens = {pool} is less than model.context_tokens = {context} and "
            f"{ENGINE_SPARE_TOKENS} that SGLang keeps free, so a long sample would fit into no "
            "server",
            "raise the first or remove it",
        )
    overlong = config.algorithm.reward_shaping.overlong_buffer_tokens
    if overlong > max_new_tokens:
        raise ConfigError(
            f"algorithm.reward_shaping.overlong_buffer_tokens = {overlong} is more than "
            f"rollout.max_new_tokens = {max_new_tokens}",
            "lower it",
        )


def _check_paths(config: Config) -> None:
    """Refuses ~ and variables, which only a shell expands: a folder named ~ would be made."""
    keys = ("run.dir", "model.path", "data.train", "data.filter.run", "sandbox.python")
    paths = {key: config.value(key) for key in keys}
    paths |= {f"{setting}.path": source.path for setting, source in _sources(config)}
    for setting, path in paths.items():
        if isinstance(path, str) and path.startswith(("~", "$")):
            in_shell = "" if "[" in setting else f", or give it in a shell: {setting}=$HOME/..."
            raise ConfigError(
                f"{setting} = {path}: ~ and variables are not expanded",
                f"write the whole path{in_shell}",
            )


def _sources(config: Config) -> list[tuple[str, SourceConfig]]:
    """Returns the sources that are sections, with their settings."""
    train = config.data.train
    found: list[tuple[str, SourceConfig]] = [
        (f"data.train[{index}]", source)
        for index, source in enumerate(train if isinstance(train, tuple) else ())
    ]
    return found + [(f"evaluation.sets.{name}", s) for name, s in config.evaluation.sets.items()]


def _check_data(config: Config) -> None:
    for setting, source in _sources(config):
        limit = source.max_prompt_tokens
        if limit is not None and limit < source.min_prompt_tokens:
            raise ConfigError(
                f"{setting}.max_prompt_tokens = {limit} is less than {setting}.min_prompt_tokens = "
                f"{source.min_prompt_tokens}",
                "change one of them",
            )
    band = config.data.filter
    if band.min > band.max:
        raise ConfigError(
            f"data.filter.min = {band.min:g} is more than data.filter.max = {band.max:g}",
            "change one of them",
        )


def check_set_name(name: str) -> None:
    """Raises ConfigError for a name that an evaluation set cannot have."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ConfigError(
            f"evaluation.sets: {name!r} cannot name a set: expected letters, digits, _ and -",
            "rename it: files and TensorBoard tags contain it",
        )


def _check_evaluation(config: Config) -> None:
    evaluation, servers = config.evaluation, config.rollout.servers
    if config.run.steps == 0 and config.has_trainer:
        raise ConfigError(
            "run.steps = 0 trains nothing",
            "raise it; to evaluate without training, use the command eval",
        )
    for name, chosen in evaluation.sets.items():
        setting = f"evaluation.sets.{name}"
        check_set_name(name)
        limit = chosen.max_new_tokens or 0
        if limit >= config.model.context_tokens:
            raise ConfigError(
                f"{setting}.max_new_tokens = {limit} leaves no room for a prompt in "
                f"model.context_tokens = {config.model.context_tokens}",
                "lower the first or raise the second",
            )
        if chosen.samples > 1 and chosen.temperature == 0:
            raise ConfigError(
                f"{setting}.samples = {chosen.samples} with temperature = 0 samples the same "
                "response again",
                "set samples=1, or a temperature above 0",
            )
    if evaluation.sets and evaluation.mode == "held_server" and servers < 2:
        raise ConfigError(
            "evaluation.mode = held_server needs rollout.servers >= 2, for one to be held while "
            f"another serves training; it is {servers}",
            "add a server, or set evaluation.mode to pause or mixed",
        )


def _check_thinking_tags(config: Config) -> None:
    tags = config.reward.thinking_tags
    if len(tags) % 2 or len(set(tags)) < len(tags):
        raise ConfigError(
            f"reward.thinking_tags = {list(tags)} must be opening and closing tags in turn, all "
            "different",
            'set it to ["<think>", "</think>"], or to [] for a model that does not think',
        )


def _check_hooks(config: Config) -> None:
    for setting, value in hooks.values(config).items():
        hooks.check_name(setting, value)
    algorithm = config.algorithm
    for setting, value, options in (
        ("advantage.estimator", algorithm.advantage.estimator, algorithm.advantage.options),
        ("loss.objective", algorithm.loss.objective, algorithm.loss.options),
        ("filters.function", algorithm.filters.function, algorithm.filters.options),
    ):
        if options and not hooks.is_custom(value):
            raise ConfigError(
                f"algorithm.{setting.partition('.')[0]}.options = {options} is for a function of "
                f"your own, but algorithm.{setting} = {value}",
                f"remove it, or set algorithm.{setting} to package.module:function",
            )


def _check_weights(config: Config) -> None:
    weights = config.weights
    if weights.kv_cache == "keep" and weights.interrupt in ("retract", "finish"):
        no_cache = {
            "retract": "drops the KV cache that weights.kv_cache = keep keeps",
            "finish": "leaves no request whose KV cache weights.kv_cache = keep could keep",
        }
        raise ConfigError(
            f"weights.interrupt = {weights.interrupt} {no_cache[weights.interrupt]}",
            "leave weights.interrupt out, or set weights.kv_cache=recompute",
        )
    if weights.kv_cache == "keep" and config.sglang.get("disable_overlap_schedule") is not True:
        raise ConfigError(
            "weights.kv_cache = keep needs sglang.disable_overlap_schedule = true: the overlap "
            "scheduler has a batch in flight when the engine pauses, and its tokens would be "
            "labelled with weights that did not sample them",
            "set it, or set weights.kv_cache=recompute",
        )
    if config.has_trainer:
        algorithm_checks.check_quantization(config)
        return
    for setting, is_set in (
        ("model.random_init = true", config.model.random_init),
        ("sglang.load_format = dummy", config.sglang.get("load_format") == "dummy"),
    ):
        if is_set:
            raise ConfigError(
                f"run.mode = rollout_only generates from the weights in model.path, which "
                f"{setting} does not load",
                "remove that setting",
            )


def _check_servers(config: Config) -> None:
    passed_on.check_reserved("megatron", config.megatron)
    passed_on.check_reserved("sglang", config.sglang)
    if config.faults.min_servers > config.rollout.servers:
        raise ConfigError(
            f"faults.min_servers = {config.faults.min_servers} is more than rollout.servers = "
            f"{config.rollout.servers}, so the run would end at its start",
            "lower the first or raise the second",
        )
    if "port" in config.sglang and config.rollout.servers > 1:
        raise ConfigError(
            f"sglang.port = {config.sglang['port']} can be used by one server per host, but "
            f"rollout.servers = {config.rollout.servers}",
            "leave it out: each server then chooses a free port",
        )


def _check_routing(config: Config) -> None:
    if not config.rollout.routing_replay:
        return
    for key, refused, reason in (
        ("moe_router_fusion", True, "the fused router takes no choice from outside"),
        ("moe_router_load_balancing_type", "sinkhorn", "its router takes no choice from outside"),
    ):
        if config.megatron.get(key) == refused:
            raise ConfigError(
                f"rollout.routing_replay = true with megatron.{key} = {refused}: {reason}",
                "remove one of them",
            )


def _check_agent(config: Config) -> None:
    rollout = config.rollout
    if not config.has_agent:
        return
    if rollout.agent is not None and rollout.agent_command is not None:
        raise ConfigError(
            f"rollout.agent = {rollout.agent} and rollout.agent_command = {rollout.agent_command} "
            "exclude each other",
            "set one of them",
        )
    given = "agent" if rollout.agent_command is None else rollout.agent_command
    try:
        command = shlex.split(given)
    except ValueError as e:
        raise ConfigError(
            f"rollout.agent_command = {rollout.agent_command}: {e}", "quote it as in a shell"
        ) from None
    if not command:
        raise ConfigError("rollout.agent_command is empty", "name a program, or remove it")
    if rollout.workflow != "single_turn":
        raise ConfigError(
            f"rollout.workflow = {rollout.workflow} has no effect with an agent",
            "remove it, or rollout.agent and rollout.agent_command",
        )
    if rollout.agent_timeout_s >= rollout.lease_timeout_s:
        raise ConfigError(
            f"rollout.agent_timeout_s = {rollout.agent_timeout_s:g} is not below "
            f"rollout.lease_timeout_s = {rollout.lease_timeout_s:g}: the lease would end first",
            "raise the second",
        )


def _check_parallel_sizes(config: Config) -> None:
    settings = [
        (f"megatron.{name}_parallel_size", config.megatron.get(f"{name}_parallel_size", 1))
        for name in PARALLEL_SIZES
    ]
    for setting, size in (*settings, ("sglang.tp_size", config.sglang.get("tp_size", 1))):
        if type(size) is not int or size < 1:
            raise ConfigError(f"{setting} = {size!r}: expected an integer >= 1")
    hosts, ranks = config.trainer.hosts, config.trainer_ranks
    if ranks % hosts:
        fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise ConfigError(
            f"trainer.hosts = {hosts} does not divide the {ranks} trainer ranks "
            "(trainer.data_parallel_size times megatron's tensor, pipeline and context sizes)",
            f"set trainer.hosts to one of {fitting}, or change a size",
        )
