"""Finds settings without effect: another setting excludes them, which may be a mistake.

`run` shows each as one line at its start, `doctor` below its checks. A setting counts as set if its
value is not the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from megatron_async_rl import hooks
from megatron_async_rl.config.checks import GRAPH_SIZES
from megatron_async_rl.config.config import Config

# (settings, whether they have an effect, the reason if they have none)
Rule = tuple[str, bool, str]


def warnings(config: Config) -> list[str]:
    """Returns a text for each setting without effect, and for settings that cost much speed.

    None for an evaluation alone (run.steps = 0), which uses the configuration of a training run.
    """
    if config.run.steps == 0:
        return []
    rules = [*_algorithm(config), *_processes(config)]
    rules += _trainer(config) if config.has_trainer else []
    texts = [
        f"{key} = {_show(config.value(key))} has no effect: {reason}"
        for keys, has_effect, reason in rules
        for key in keys.split()
        if not has_effect and config.value(key) != _default(key)
    ]
    texts += [
        text for text in (_no_trainer(config), cross_host_parallelism_warning(config)) if text
    ]
    return [*texts, *_megatron(config), *_engine(config), *_deadlines(config)]


def _algorithm(config: Config) -> Iterator[Rule]:
    algorithm = config.algorithm
    advantage, loss, kl = algorithm.advantage, algorithm.loss, algorithm.kl
    correction = algorithm.staleness_correction
    # a function of the user's may read each of these
    own_estimator, own_loss = map(hooks.is_custom, (advantage.estimator, loss.objective))
    estimator = f"algorithm.advantage.estimator = {advantage.estimator}"
    gae = advantage.uses_critic
    yield (
        "algorithm.advantage.gamma",
        gae or advantage.estimator == "turn_grpo" or own_estimator,
        f"{estimator} does not discount",
    )
    yield "algorithm.advantage.gae_lambda", gae or own_estimator, f"{estimator} has no critic"
    yield (
        "algorithm.advantage.group_normalize",
        advantage.estimator in ("grpo", "turn_grpo") or own_estimator,
        f"{estimator} does not divide by the standard deviation of a group",
    )
    yield (
        "algorithm.advantage.batch_normalize",
        not gae and advantage.estimator != "reinforce_pp",
        f"{estimator} decides it",
    )
    yield "critic.path critic.lr critic.clip_eps", gae, f"{estimator} has no critic"
    yield (
        "algorithm.loss.dual_clip",
        loss.objective != "cispo",
        "algorithm.loss.objective = cispo has no clipped loss to bound",
    )
    behavior = "algorithm.staleness_correction.behavior_weight_"
    limited = not (correction.behavior_weight_cap is correction.behavior_weight_floor is None)
    yield (
        f"{behavior}cap {behavior}floor {behavior}action {behavior}level",
        loss.objective != "ppo" or own_loss,
        "algorithm.loss.objective = ppo corrects nothing",
    )
    yield (
        f"{behavior}action {behavior}level",
        limited or loss.objective == "ppo",
        f"neither {behavior}cap nor {behavior}floor is set",
    )
    yield (
        "algorithm.staleness_correction.proximal",
        loss.objective != "ppo" or own_loss,
        "algorithm.loss.objective = ppo compares with the behavior policy",
    )
    yield (
        "algorithm.kl.apply_to algorithm.kl.estimator",
        kl.coef > 0,
        "algorithm.kl.coef = 0 disables the penalty",
    )
    yield (
        "algorithm.kl.estimator",
        kl.apply_to == "loss" or kl.coef == 0,
        "algorithm.kl.apply_to = reward has its own",
    )
    yield (
        "algorithm.reward_shaping.overlong_penalty",
        algorithm.reward_shaping.overlong_buffer_tokens > 0,
        "algorithm.reward_shaping.overlong_buffer_tokens = 0 disables the penalty",
    )


def _processes(config: Config) -> Iterator[Rule]:
    yield (
        "staleness.straggler_timeout_s",
        config.staleness.straggler_policy == "wait",
        "staleness.straggler_policy = drop does not wait",
    )
    has_programs = config.has_agent or config.rollout.workflow != "single_turn"
    programs = has_programs or config.reward.function == "code"
    yield (
        "sandbox.python sandbox.isolation sandbox.memory_mb sandbox.test_timeout_s",
        programs,
        f"reward.function = {config.reward.function} runs no programs",
    )
    yield (
        "rollout.agent_timeout_s rollout.agent_max_requests rollout.agent_host",
        config.has_agent,
        "neither rollout.agent nor rollout.agent_command is set",
    )
    yield (
        "reward.thinking_tags",
        config.reward.function in ("math", "code"),
        f"reward.function = {config.reward.function} gets the whole response",
    )
    yield (
        "data.add_bos",
        not config.data.chat_template,
        "the chat template (data.chat_template = true) writes the tokens before a prompt",
    )
    yield (
        "evaluation.before evaluation.after evaluation.every evaluation.mode",
        bool(config.evaluation.sets),
        "evaluation.sets is empty",
    )
    yield (
        "monitor.prometheus_host",
        config.monitor.prometheus_port is not None,
        "monitor.prometheus_port is not set",
    )
    yield (
        "faults.restart_reset_s faults.restart_backoff_s",
        config.faults.max_restarts > 0,
        "faults.max_restarts = 0 restarts nothing",
    )


def _trainer(config: Config) -> Iterator[Rule]:
    steps = config.run.steps
    yield (
        "checkpoint.keep checkpoint.asynchronous",
        config.checkpoint.every > 0,
        "checkpoint.every = 0 disables checkpoints",
    )
    yield (
        "checkpoint.every",
        config.checkpoint.every <= steps,
        f"run.steps = {steps} is less, so only the last version is saved",
    )
    yield "run.export_every", config.run.export_every <= steps, f"run.steps = {steps} is less"
    yield (
        "evaluation.every",
        config.evaluation.every <= steps or not config.evaluation.sets,
        f"run.steps = {steps} is less",
    )
    network = config.weights.transport == "network"
    yield (
        "weights.snapshot_every weights.broadcast_unit",
        network,
        "weights.transport = disk writes every version to the disk and broadcasts none",
    )
    yield (
        "weights.interrupt",
        config.weights.kv_cache == "recompute",
        "weights.kv_cache = keep freezes the requests",
    )


def _no_trainer(config: Config) -> str:
    """Returns one text for all settings that only a trainer uses, "" if there is one."""
    sections = {name: type(getattr(config, name)) for name in ("trainer", "checkpoint", "critic")}
    keys = [
        f"{name}.{field.name}"
        for name, section in sections.items()
        for field in msgspec.structs.fields(section)
        if field.name != "start_timeout_s"  # `join` waits for the controller as long
    ]
    keys += ["run.export_every", "evaluation.after", "evaluation.every"]
    keys += [
        f"weights.{name}"
        for name in ("bucket_bytes verify_every transport dtype quantization").split()
    ]
    found = [key for key in keys if config.value(key) != _default(key)]
    if config.has_trainer or not found:
        return ""
    return f"without effect, because run.mode = rollout_only trains nothing: {', '.join(found)}"


def _megatron(config: Config) -> Iterator[str]:
    """Yields texts for keys of Megatron that other keys of it exclude."""
    megatron = config.megatron
    if not config.has_trainer:
        return
    style = megatron.get("lr_decay_style", "constant")
    for key in ("min_lr", "lr_decay_iters"):
        if key in megatron and style == "constant":
            yield (
                f"megatron.{key} = {_show(megatron[key])} has no effect: "
                "megatron.lr_decay_style = constant does not decay"
            )
    if megatron.get("sequence_parallel") and config.parallel_size("tensor_model") == 1:
        yield (
            "megatron.sequence_parallel = true has no effect: "
            "megatron.tensor_model_parallel_size = 1 splits nothing"
        )


def cross_host_parallelism_warning(config: Config) -> str:
    """Returns a warning if ranks that communicate in every layer are on several hosts, or ""."""
    here = config.ranks_per_host
    for name, rest in (("tensor_model", 1), ("context", config.parallel_size("tensor_model"))):
        size = config.parallel_size(name)
        if size > 1 and here % (size * rest):
            return (
                f"megatron.{name}_parallel_size = {size} with {here} ranks per host (trainer.hosts "
                f"= {config.trainer.hosts}) spreads a group that communicates in every layer over "
                "several hosts: slow, unless NVLink connects them; lower it, or trainer.hosts"
            )
    return ""


def _engine(config: Config) -> Iterator[str]:
    """Yields texts for limits of SGLang below the number of samples in flight."""
    samples = config.rollout.max_concurrent_samples
    running = config.sglang.get("max_running_requests")
    if isinstance(running, int) and running < samples:
        yield (
            f"sglang.max_running_requests = {running} is less than rollout.max_concurrent_samples "
            f"= {samples}: {samples - running} samples wait inside each server, where an update "
            "interrupts them too; set both to the same number"
        )
    for key in GRAPH_SIZES:
        value = config.sglang.get(key)
        sizes = [size for size in (value if isinstance(value, list) else [value]) if size]
        size = max((size for size in sizes if isinstance(size, int)), default=samples)
        if size < samples and not config.on_cpu:
            yield (
                f"sglang.{key} = {size} is less than rollout.max_concurrent_samples = {samples}: "
                "larger batches decode without CUDA graphs, at about a third of the speed; remove "
                "it, and the graphs hold all samples"
            )


def _deadlines(config: Config) -> Iterator[str]:
    """Yields texts for deadlines that a shorter one around them cuts off."""
    inner = ["reward.timeout_s rollout.lease_timeout_s"]
    if config.reward.function == "code":
        inner.append("sandbox.test_timeout_s reward.timeout_s")
    for pair in inner:
        (short, short_s), (long, long_s) = ((key, config.value(key)) for key in pair.split())
        if short_s > long_s:
            yield (
                f"{short} = {short_s:g} is longer than {long} = {long_s:g}, which ends the "
                "attempt before; lower the first or raise the second"
            )


def _default(key: str) -> Any:
    *parents, name = key.split(".")
    section: Any = Config
    for part in parents:
        section = next(f.type for f in msgspec.structs.fields(section) if f.name == part)
    field = next(f for f in msgspec.structs.fields(section) if f.name == name)
    return field.default_factory() if callable(field.default_factory) else field.default


def _show(value: Any) -> str:
    """Returns a value as it is written in the YAML."""
    return msgspec.json.encode(value).decode().strip('"')
