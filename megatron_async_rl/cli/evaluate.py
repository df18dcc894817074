"""`eval`: evaluates a model on the sets of a configuration, without a trainer.

It is a run of its own with run.mode = rollout_only and no steps: servers and reward workers start,
the controller evaluates version 0 on all of them (controller/evaluation/), and everything ends. The
finished samples are in the output folder, so the same command continues an interrupted evaluation
and tries failed samples again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.config.load import load, load_run
from megatron_async_rl.controller.evaluation import records
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.launcher import run as launcher
from megatron_async_rl.observability.evaluation_table import evaluation_table
from megatron_async_rl.observability.status import STATUS_FILE, read_status
from megatron_async_rl.storage import snapshots

FIXED = (
    "run.mode=rollout_only",
    "run.steps=0",
    "evaluation.mode=pause",
    "evaluation.before=true",
    "data.filter={}",
    "trainer={}",
    "megatron={}",
)
EXIT_FAILED_SAMPLES = 1


def run(
    path: str, overrides: list[str], model: Path | None, out: Path | None, sets: Collection[str]
) -> int:
    """Evaluates `model`, or model.path. Returns 1 if samples failed, else the code of the run.

    `out`: the output folder; by default beside run.dir. `sets`: names of sets; empty for all.
    """
    config = load(path, [*overrides, *FIXED])
    folder = (model or Path(config.model.path)).resolve()
    out = out or config.run_dir.with_name(f"{config.run_dir.name}-eval-{folder.name}")
    places = [f"run.dir={json.dumps(str(out))}", f"model.path={json.dumps(str(folder))}"]
    chosen = _chosen_sets(config, sets)
    places.append(f"evaluation.sets={json.dumps(chosen)}")
    config = load(path, [*overrides, *FIXED, *places])
    _forget_failed(config.run_dir)
    code = launcher.run(config)
    if code:
        return code
    [(_, results)] = records.read_results(config.run_dir)
    result = records.result_path(out, 0)
    sys.stdout.write(f"{evaluation_table(results)}\nmodel: {folder}\nresult: {result}\n")
    failed = sum(int(result.metrics["failed"]) for result in results)
    if failed:
        sys.stdout.write(f"{failed} samples failed; run the same command again to retry them\n")
    return EXIT_FAILED_SAMPLES if failed else 0


def policy_folder(run_dir: Path, version: int | None) -> Path:
    """Returns the Hugging Face folder of a version of a run; None: of the newest.

    Raises DataError if that version was not kept.
    """
    status = read_status(run_dir)
    found = {s.version: s.path for s in reversed(snapshots.list_snapshots(run_dir))}
    found[0] = Path(load_run(run_dir).model.path)
    for path in run_dir.glob("policy-v*"):
        if path.name.removeprefix("policy-v").isdigit():
            found[int(path.name.removeprefix("policy-v"))] = path
    if status.state == "finished" and (run_dir / "policy").is_dir():
        found[status.version] = run_dir / "policy"
    version = max(found) if version is None else version
    if version not in found:
        known = ", ".join(map(str, sorted(found)))
        raise DataError(
            f"--version {version}: {run_dir} has the weights of versions {known} only",
            "choose one of these; run.export_every and weights.snapshot_every keep more",
        )
    return found[version]


def _chosen_sets(config: Config, names: Collection[str]) -> dict[str, object]:
    known = config.evaluation.sets
    if not known:
        raise ConfigError(
            "evaluation.sets is empty: there is nothing to evaluate",
            "name a set, such as evaluation.sets.aime.path=data/aime.jsonl",
        )
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--sets {name}: evaluation.sets has no such set; it has {', '.join(known)}",
                "choose one of these",
            )
    return {name: msgspec.to_builtins(known[name]) for name in names or known}


def _forget_failed(out: Path) -> None:
    """Lets an evaluation with failed samples continue: the scored samples stay in its file."""
    for _, results in records.read_results(out):
        if any(result.metrics.get("failed") for result in results):
            records.result_path(out, 0).unlink()
            (out / STATUS_FILE).unlink(missing_ok=True)
