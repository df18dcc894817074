"""data.filter: leaves out prompts that an earlier run solved too rarely or too often.

A prompt is recognized by its text, since ids may be row numbers of another file. The rates are
measured once, when a run is started, and kept in its folder: the earlier run may continue.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.datasets import DataFilterConfig
from megatron_async_rl.data.digests import changed_data
from megatron_async_rl.data.sources import read_rows, training_sources
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.observability.sample_log import SAMPLES_FILE, read_samples
from megatron_async_rl.protocol.types import Prompt
from megatron_async_rl.storage import files

RATES_FILE = "success_rates.json"  # in run.dir


class SuccessRates(msgspec.Struct, frozen=True):
    run: str  # where they were measured: data.filter.run
    rates: dict[str, float]  # by the text of the prompt


def record(run_dir: Path, config: Config) -> None:
    """Measures the success rates for a new run and keeps them in its folder."""
    if (run := config.data.filter.run) and _kept(run_dir, run) is None:
        found = SuccessRates(run, measure(config))
        files.write_atomic(run_dir / RATES_FILE, msgspec.json.encode(found))


def recorded(config: Config) -> dict[str, float]:
    """Returns the success rates kept by `record`; {} without data.filter.run."""
    kept = _kept(config.run_dir, config.data.filter.run)
    return measure(config) if kept is None else kept


def _kept(run_dir: Path, run: str | None) -> dict[str, float] | None:
    path = run_dir / RATES_FILE
    if not path.exists():
        return None
    lost = "the success rates that data.filter uses"
    found = files.read_json(path, SuccessRates, lost, "delete it to measure them again")
    return found.rates if found.run == run else None


def measure(config: Config) -> dict[str, float]:
    """Returns the mean reward of each prompt in data.filter.run; {} if that is not set.

    Raises ConfigError or DataError if that run, its samples or its datasets cannot be read.
    """
    if not config.data.filter.run:
        return {}
    setting, run_dir = f"data.filter.run = {config.data.filter.run}", Path(config.data.filter.run)
    for name in ("config.yaml", SAMPLES_FILE):
        if not (run_dir / name).exists():
            raise ConfigError(f"{setting} has no {name}", "name the run.dir of a run that trained")
    try:
        earlier = load.load_run(run_dir)
        if changed := changed_data(run_dir, earlier):
            raise DataError(changed)
        texts = _texts(earlier)
    except (ConfigError, DataError) as e:
        raise type(e)(f"{setting}: {e.problem}", e.remedy) from None
    rewards: dict[str, list[float]] = {}
    for line in read_samples(run_dir):
        if line.prompt_id in texts:
            rewards.setdefault(texts[line.prompt_id], []).append(line.reward)
    return {text: sum(values) / len(values) for text, values in rewards.items()}


def keep(
    prompts: list[Prompt],
    rates: dict[str, float],
    band: DataFilterConfig,
    name: str,
    report: Callable[[str], None],
) -> list[Prompt]:
    """Returns the prompts in the band and those without a rate, and reports the numbers.

    Raises DataError if none is left. `name`: the source, for messages.
    """
    found = [rates.get(prompt_text(prompt.row["prompt"])) for prompt in prompts]
    hard = sum(rate is not None and rate < band.min for rate in found)
    easy = sum(rate is not None and rate > band.max for rate in found)
    counts = (
        f"data.filter leaves out {hard:,} prompts with a success rate below {band.min:g} and "
        f"{easy:,} above {band.max:g} of {len(prompts):,} in {name}; {found.count(None):,} were "
        f"not sampled in {band.run}"
    )
    if hard + easy == len(prompts):
        raise DataError(f"{counts}: none is left", "widen data.filter.min and data.filter.max")
    report(counts)
    return [
        prompt
        for prompt, rate in zip(prompts, found, strict=True)
        if rate is None or band.min <= rate <= band.max
    ]


def prompt_text(prompt: str | list[Any]) -> str:
    """Returns the key of a prompt: its text, or its messages without system messages."""
    if isinstance(prompt, str):
        return prompt
    rest = [m for m in prompt if not (isinstance(m, dict) and m.get("role") == "system")]
    if len(rest) == 1 and isinstance(rest[0], dict) and isinstance(rest[0].get("content"), str):
        return rest[0]["content"]
    return msgspec.json.encode(rest).decode()


def _texts(config: Config) -> dict[str, str]:
    """Returns the text of each training prompt of a run by its id."""
    sources = training_sources(config)
    return {
        f"{index}:{prompt_id}" if len(sources) > 1 else prompt_id: prompt_text(fields["prompt"])
        for index, (setting, source) in enumerate(sources)
        for _, prompt_id, fields in read_rows(source, setting, config)
    }
