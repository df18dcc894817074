"""Studies the effect of staleness: runs over max_staleness x policy objective x seed.

    python tools/study_staleness.py OUT [CONFIG] [--cases 0:decoupled_ppo 8:decoupled_ppo 8:ppo]
        [--seeds 1 2 3] [--set key=value ...] [--parallel 4] [--gpus 0 1] [--deadline-s 500]

Each run is `python -m megatron_async_rl run CONFIG run.dir=OUT/...` with its settings; its output
is in OUT/NAME.log. Running again continues the runs that are not finished. At the deadline they are
stopped as by a preemption: they save a checkpoint.

With --gpus, the run in slot n of --parallel has its trainer on the n-th of these GPUs (modulo their
number) and its server on the next one, so that several runs share a GPU: limit the server's memory
by sglang.max_total_tokens. On a single GPU weights go through run.dir, because NCCL refuses two
ranks on one device.

OUT/study.md holds the table, over the same number of steps of all runs, study.svg the reward by
step, accuracy.svg the accuracy by version, curves.csv all values; written every two minutes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import study_report
from study_report import Case, Run

from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.status import read_status

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CASES = [(eta, name) for eta in (0, 1, 4, 8) for name in ("decoupled_ppo", "ppo")]
PORTS_PER_RUN = 10
SHARED_DEVICE = ("weights.transport=disk", "weights.interrupt=abort")
POLL_S, REPORT_S, STOP_GRACE_S = 0.5, 120.0, 45.0


def is_finished(run: Run) -> bool:
    try:
        return read_status(run.run_dir).state == "finished"
    except DataError:
        return False


@dataclass(frozen=True)
class Child:
    run: Run
    slot: int
    process: subprocess.Popen[bytes]
    started: float


@dataclass
class Study:
    """Starts the runs in order, at most one per slot."""

    config: str
    overrides: list[str]
    gpus: list[str]
    first_port: int
    free_slots: list[int]
    children: list[Child]

    def start(self, run: Run, number: int) -> None:
        slot = self.free_slots.pop(0)
        max_staleness, objective = run.case
        port = self.first_port + PORTS_PER_RUN * number
        settings = [
            f"run.dir={run.run_dir}",
            f"run.seed={run.seed}",
            f"staleness.max_staleness={max_staleness}",
            f"algorithm.loss.objective={objective}",
            *(f"sglang.port={port}", f"sglang.nccl_port={port + 1}"),
            *(SHARED_DEVICE if len(self.gpus) == 1 else ()),
            *self.overrides,
        ]
        command = [sys.executable, "-m", "megatron_async_rl", "run", self.config, *settings]
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"PYTHONPATH": path}
        env.setdefault("OMP_NUM_THREADS", "1")  # else each process uses all cores
        if self.gpus:
            pair = (self.gpus[(slot + n) % len(self.gpus)] for n in (0, 1))
            env["CUDA_VISIBLE_DEVICES"] = ",".join(pair)  # of the trainer, of the server
        with run.run_dir.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        self.children.append(Child(run, slot, process, time.monotonic()))

    def poll(self) -> None:
        """Frees the slots of runs that have ended."""
        for child in list(self.children):
            if (code := child.process.poll()) is not None:
                self.children.remove(child)
                self.free_slots.append(child.slot)
                took_s = time.monotonic() - child.started
                say(f"{child.run.run_dir.name}: exit code {code} after {took_s:.0f} s")

    def stop(self) -> None:
        """Makes all runs save their state; kills those that do not end in time."""
        for child in self.children:
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE_S
        while self.children and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self.poll()
        for child in self.children:
            child.process.kill()  # its processes end with it
            child.process.wait()
        self.poll()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def report(out: Path, cases: list[Case], runs: Iterable[Run]) -> str:
    results = [study_report.read(run) for run in runs]
    return study_report.write(out, cases, [result for result in results if result])


def case(text: str) -> Case:
    max_staleness, _, objective = text.partition(":")
    return int(max_staleness), objective or "decoupled_ppo"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "config", nargs="?", default=str(REPOSITORY / "configs" / "quickstart.yaml")
    )
    parser.add_argument(
        "--cases",
        type=case,
        nargs="+",
        default=DEFAULT_CASES,
        metavar="ETA:OBJECTIVE",
        help="default: max_staleness 0, 1, 4, 8, each with decoupled_ppo and ppo",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--set", metavar="key=value", action="append", default=[], help="a setting for every run"
    )
    parser.add_argument("--parallel", type=int, default=1, help="runs at the same time")
    parser.add_argument("--gpus", nargs="+", default=[], help="indices of GPUs that the runs share")
    parser.add_argument(
        "--first-port",
        type=int,
        default=21000,  # below those that the kernel assigns
        help=f"of the servers; each run takes {PORTS_PER_RUN}",
    )
    parser.add_argument("--deadline-s", type=float, help="stop all runs after this many seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # seed by seed, so that an interrupted study has all cases
    runs = [
        Run(chosen, seed, args.out.resolve() / f"staleness{chosen[0]}-{chosen[1]}-seed{seed}")
        for seed in args.seeds
        for chosen in args.cases
    ]
    waiting = [(run, number) for number, run in enumerate(runs) if not is_finished(run)]
    study = Study(args.config, args.set, args.gpus, args.first_port, list(range(args.parallel)), [])
    deadline = time.monotonic() + (float("inf") if args.deadline_s is None else args.deadline_s)
    reported = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the runs, too
    try:
        while (waiting or study.children) and time.monotonic() < deadline:
            while waiting and study.free_slots:
                study.start(*waiting.pop(0))
            time.sleep(POLL_S)
            study.poll()
            if time.monotonic() > reported + REPORT_S:
                report(args.out, args.cases, runs)
                reported = time.monotonic()
    finally:
        study.stop()
    say(report(args.out, args.cases, runs))
    return 0 if all(map(is_finished, runs)) else 1


if __name__ == "__main__":
    sys.exit(main())
