"""`status.json`: the state of a run, written by the controller (run_log.py).

The terminal display, `status`, the launchers and the trainer nodes read it.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from pathlib import Path
from typing import Literal

import msgspec

from megatron_async_rl.errors import DataError

STATUS_FILE = "status.json"
FINAL_STATES = ("finished", "failed", "stopped")
MAX_REWARDS = 256  # in the status, of the whole course
MAX_EVALS = 8  # in the status, of each set besides the first

RunState = Literal[
    "starting", "evaluating", "training", "finishing", "finished", "failed", "stopped"
]


class ServerStatus(msgspec.Struct):
    """A rollout worker and its SGLang server."""

    name: str
    state: str
    version: int
    running: int  # samples
    # of the server itself, at the last heartbeat; None: not known
    queued: int | None = None  # requests
    kv_use: float | None = None  # fraction of the KV cache
    cache_hits: float | None = None  # fraction of the last prefill's input tokens
    tokens_per_s: float | None = None  # decoded


class EvaluationResult(msgspec.Struct):
    """One evaluation set at one version (docs/evaluation.md defines the metrics)."""

    version: int
    set: str
    metrics: dict[str, float]


class RunStatus(msgspec.Struct):
    """The content of status.json. None: not known yet."""

    state: RunState = "starting"
    message: str = ""  # the current activity, or the reason of the failure
    pid: int = 0  # of the controller; 0 is filled in when written
    host: str = ""  # of the controller; filled in when written
    updated_unix: float = 0.0  # filled in when written; for display only
    elapsed_s: float = 0.0  # since the controller started; 0 is filled in when written
    version: int = 0  # training steps done
    steps: int = 0  # training steps to do
    eta_s: float | None = None  # estimated time to the end
    reward_mean: float | None = None  # of the trained groups
    reward_all_mean: float | None = None  # of all groups scored since the step before
    reward_history: list[float] = []
    # of the last step: tokens of the samples that returned, and trained, over its wall time
    generate_tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None
    staleness_mean: float | None = None
    staleness_max: int | None = None  # of the last step
    staleness_worst: int | None = None  # of the whole run
    staleness_limit: int = 0
    update_s: float | None = None  # the last weight update
    update_fraction: float | None = None  # share of the wall time spent in weight updates
    step_s: float | None = None
    mfu: float | None = None  # of the last step; None on a CPU, or with a GPU of unknown rate
    trainer_memory_gib: float | None = None  # peak of the last step, the largest of all ranks
    train_wait_fraction: float | None = None  # share of the step that the trainer waited for data
    ledger: dict[str, int] = {}  # admitted, trained, pending, dropped.<reason>: in groups
    fleet: list[ServerStatus] = []
    evals: list[EvaluationResult] = []
    evaluating: str = ""  # the evaluation that runs
    interrupted_samples: int = 0  # finished under newer weights than they began with
    lost: list[str] = []  # workers without heartbeat
    notes: list[str] = []  # warnings of this start, the newest last


def bounded(status: RunStatus) -> RunStatus:
    """Returns the status as it is written: its size does not grow with the length of the run.

    Every k-th reward is left, with the first and the newest, and of each evaluation set the first
    and the newest results; run.dir/evaluations has all. JSON has no number that is not finite.
    """
    rewards = [reward for reward in status.reward_history if math.isfinite(reward)]
    if len(rewards) > MAX_REWARDS:
        rewards = [*rewards[: -1 : -(-len(rewards) // MAX_REWARDS)], rewards[-1]]
    first: dict[str, EvaluationResult] = {}
    newest: defaultdict[str, deque[EvaluationResult]] = defaultdict(lambda: deque(maxlen=MAX_EVALS))
    for result in status.evals:
        metrics = {tag: value for tag, value in result.metrics.items() if math.isfinite(value)}
        known = EvaluationResult(result.version, result.set, metrics)
        if first.setdefault(result.set, known) is not known:
            newest[result.set].append(known)
    evals = [*first.values(), *(result for results in newest.values() for result in results)]
    evals.sort(key=lambda result: result.version)
    return msgspec.structs.replace(status, reward_history=rewards, evals=evals)


def read_status(run_dir: Path) -> RunStatus:
    """Raises DataError if there is no status.json, or it is not one of this version."""
    path = Path(run_dir) / STATUS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunStatus)
    except OSError as e:
        problem = f"no run at {run_dir}: {path} cannot be read ({e.strerror})"
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise DataError(
            f"{path} is damaged or of another version: {e}; lost: the state of the run",
            "`run` with its configuration continues the run and writes the file again; `audit` "
            "checks the other files; `eval --model` evaluates a folder of weights",
        ) from None
    raise DataError(problem, "give the run.dir of a run")


def find_status(run_dir: Path) -> RunStatus | None:
    """Returns None where `read_status` raises DataError."""
    try:
        return read_status(run_dir)
    except DataError:
        return None
