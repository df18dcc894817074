"""`plan`: predicts step time and throughput for N GPUs, and the best split of trainer and servers.

Needs no GPU: it simulates the run with the controller's own core (planning/). docs/planning.md
describes costs and accuracy.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model import layout, memory
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.planning import analytic, calibration, hardware
from megatron_async_rl.planning.calibration import Calibration
from megatron_async_rl.planning.costs import Costs
from megatron_async_rl.planning.hardware import GIB, Gpu
from megatron_async_rl.planning.lengths import log_normal
from megatron_async_rl.planning.predict import Load
from megatron_async_rl.planning.search import Candidate, gpus_of, search, splits

SILENT_S = 5.0  # a search that takes longer shows its progress
DEFAULT_MEAN_SHARE = 3  # without --mean-tokens: rollout.max_new_tokens over this
DEFAULT_PROMPT_TOKENS = 256
_COLUMNS = (
    "trainer",
    "servers",
    "in flight",
    "step s",
    "trained/s",
    "generated/s",
    "staleness",
    "trainer idle",
    "servers idle",
    "KV",
    "bound",
    "trainer GiB",
)
MIN_WIDTH = 132  # of the table, also where the terminal is narrower


@dataclass(frozen=True)
class Options:
    num_gpus: int | None = None  # None: those of the configured split
    gpu: str = "h100"
    mean_tokens: int | None = None  # of a response
    prompt_tokens: int | None = None
    calibrate: Path | None = None


def run(config: Config, options: Options) -> int:
    """Prints the predictions of the best splits, the best first. Raises ConfigError."""
    if not config.has_trainer:
        raise ConfigError(
            f"run.mode = {config.run.mode} has no trainer, and plan predicts training steps",
            "set run.mode=train",
        )
    hf = HfConfig(config.model.path)
    shape = hf.shape()
    layout.check_engine(layout.Layout.from_config(config), shape)
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, MIN_WIDTH)
    gpu = None if config.on_cpu else hardware.gpu(options.gpu)
    costs_of: Callable[[Config], Costs]
    if options.calibrate is not None:
        measured = calibration.read(options.calibrate)
        _check_same(config, measured.config)
        _show_calibration(console, options.calibrate, measured)
        costs_of, load = measured.costs_of, measured.load
    else:
        costs_of, load = _analytic(console, config, hf, gpu, options)
    found = [config]
    if options.num_gpus is not None:
        found = splits(config, hf, options.num_gpus, gpu)
    candidates = search(found, costs_of, load, _progress())
    console.print(_table(candidates, hf))
    best = candidates[0]
    console.print(
        f"best: trainer.data_parallel_size={best.config.trainer.data_parallel_size} "
        f"rollout.servers={best.config.rollout.servers} "
        f"rollout.max_concurrent_samples={best.config.rollout.max_concurrent_samples}"
    )
    for note in _notes(best, costs_of(best.config), load, options.num_gpus):
        console.print(note)
    return 0


def _analytic(
    console: Console, config: Config, hf: HfConfig, gpu: Gpu | None, options: Options
) -> tuple[Callable[[Config], Costs], Load]:
    if gpu is None:
        raise ConfigError(
            f"sglang.device = {config.sglang['device']} is in no table of hardware",
            "take the costs from a finished run with --calibrate RUN_DIR",
        )
    longest = config.rollout.max_new_tokens
    room = config.model.context_tokens - longest
    mean, prompt = options.mean_tokens, options.prompt_tokens
    mean = longest // DEFAULT_MEAN_SHARE if mean is None else mean
    prompt = min(DEFAULT_PROMPT_TOKENS, room) if prompt is None else prompt
    if not 1 <= mean <= longest:
        raise ConfigError(
            f"--mean-tokens = {mean} is not from 1 to rollout.max_new_tokens = {longest}",
            "give the mean length of a response",
        )
    if not 1 <= prompt <= room:
        raise ConfigError(
            f"--prompt-tokens = {prompt} is not from 1 to {room}, the room that "
            f"rollout.max_new_tokens = {longest} leaves in model.context_tokens = "
            f"{config.model.context_tokens}",
            "give the mean length of a prompt",
        )
    console.print(
        f"{gpu.name}; responses: log-normal, mean {mean}, at most {longest} tokens; prompts: "
        f"{prompt} tokens (--mean-tokens, --prompt-tokens, or --calibrate RUN_DIR)"
    )
    lengths = log_normal(mean, longest, prompt)
    return (lambda one: analytic.costs(one, hf, gpu)), Load(lengths)


def _check_same(config: Config, measured: Config) -> None:
    """Raises ConfigError if costs of one run do not apply to the other."""
    names = ("tensor_model", "pipeline_model", "context", "expert_model")
    pairs: list[tuple[str, object, object]] = [
        (f"megatron.{name}_parallel_size", config.parallel_size(name), measured.parallel_size(name))
        for name in names
    ]
    pairs.append(("sglang.tp_size", config.engine_tp, measured.engine_tp))
    shapes = [HfConfig(one.model.path).shape() for one in (config, measured)]
    if shapes[0] != shapes[1]:
        pairs.append(("model.path", config.model.path, measured.model.path))
    for setting, value, other in pairs:
        if value != other:
            raise ConfigError(
                f"{setting} = {value} differs from {other} of the run in --calibrate, whose costs "
                "hold for its model and parallel sizes only",
                "calibrate with a run of the same sizes, or leave --calibrate out",
            )


def _show_calibration(console: Console, run_dir: Path, measured: Calibration) -> None:
    predicted = measured.predict_itself()
    error = predicted.step_s / measured.step_s - 1
    rate_error = predicted.trained_tokens_per_s / measured.trained_tokens_per_s - 1
    console.print(
        f"costs of {run_dir}; simulated again, its step takes {predicted.step_s:.2f} s, measured "
        f"{measured.step_s:.2f} s ({error:+.0%}); trained tokens/s "
        f"{predicted.trained_tokens_per_s:,.0f}, measured "
        f"{measured.trained_tokens_per_s:,.0f} ({rate_error:+.0%})"
    )


def _table(candidates: list[Candidate], hf: HfConfig) -> Table:
    table = Table(*_COLUMNS, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for candidate in candidates:
        config, predicted = candidate.config, candidate.prediction
        trains = candidate.training_bound < candidate.generation_bound
        ranks, dp = config.trainer_ranks, config.trainer.data_parallel_size
        table.add_row(
            f"{ranks} (dp {dp})",
            f"{config.rollout.servers} x {config.engine_tp}",
            str(config.rollout.max_concurrent_samples),
            f"{predicted.step_s:.1f}",
            f"{predicted.trained_tokens_per_s:,.0f}",
            f"{predicted.generated_tokens_per_s:,.0f}",
            f"{predicted.mean_staleness:.1f} (max {predicted.max_staleness})",
            f"{predicted.trainer_idle:.0%}",
            f"{predicted.server_idle:.0%}",
            f"{predicted.kv_use:.0%}",
            "training" if trains else "generation",
            f"{memory.trainer_memory(config, hf).peak / GIB:.0f}",
        )
    return table


def _notes(best: Candidate, costs: Costs, load: Load, num_gpus: int | None) -> list[str]:
    config, notes = best.config, []
    if num_gpus is not None and (idle := num_gpus - gpus_of(config)):
        notes.append(f"{idle} of {num_gpus} GPUs are left over")
    if best.prediction.part < 1:
        notes.append(f"simulated: {best.prediction.part:.1%} of the fleet and the batch")
    running = min(
        config.rollout.max_concurrent_samples, costs.kv_tokens / load.lengths.mean_context
    )
    longest_s = config.rollout.max_new_tokens * costs.decode.seconds(
        running, running * load.lengths.mean_context
    )
    if longest_s > config.rollout.lease_timeout_s:
        notes.append(
            f"warning: rollout.lease_timeout_s = {config.rollout.lease_timeout_s:g} is less than "
            f"the {longest_s:.0f} s that a response of rollout.max_new_tokens = "
            f"{config.rollout.max_new_tokens} takes; raise it"
        )
    return notes


def _progress() -> Callable[[str], None]:
    started = time.monotonic()

    def report(text: str) -> None:
        if time.monotonic() - started > SILENT_S:
            sys.stderr.write(f"simulating {text}\n")

    return report
