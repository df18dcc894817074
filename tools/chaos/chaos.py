"""Faults against a running job of real processes, then the books counted anew from its journal.

    python tools/chaos/chaos.py CONFIG RUN_DIR [--faults F1,F4,...] [--rounds 2] [--seed 1] [--disk-mb 300] [key=value ...]
    python tools/chaos/chaos.py --report RUN_DIR

One job goes on through all faults, `rounds` times each at random instants; a fault is survived when the job trains two
further versions after it. Started again on the same RUN_DIR it goes on with the same job and adds to its results, so a
long list of faults can be done in pieces. At the end, and with --report, a line per fault:

    fault=F1 injected=2 survived=2 lost=0 duplicated=0 dropped_with_reason=0 max_staleness=3/3 recover_p50=.. p95=.. what=..

counted from the journal and the sample log between the fault and the recovery from it, and the audit of the whole run.
With F8 the job has two hosts, the rollout worker on the second. Needs Linux namespaces, `ip`, and a C compiler (chaos_parts/
world.py). Exit code 1 when a fault was not survived or a promise was broken.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import msgspec
from chaos_parts import world
from chaos_parts.faults import FAULTS, Fault
from chaos_parts.job import START_S, Job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_async_rl.cli import audit
from megatron_async_rl.config.load import load
from megatron_async_rl.observability.sample_log import read_samples

NEWS_S = 1.5
MAX_LOGPROB_DIFF = (
    1e-3  # fp32, engine against trainer; one version beside it they differ by more than 0.01
)
SETTLE_S = 2.0  # of undisturbed training between faults, and a random time on top


class Injection(msgspec.Struct):
    fault: str
    what: str
    first_seq: int  # facts in the journal before and after
    last_seq: int
    first_version: int
    last_version: int
    recovered_s: float | None  # none: not survived
    error: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("run_dir", type=Path, nargs="?")
    parser.add_argument(
        "--report", action="store_true", help="only count what earlier starts on RUN_DIR did"
    )
    parser.add_argument("--faults", default=",".join(f for f in FAULTS if f not in ("F8", "F10")))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--recover-limit-s", type=float, default=150.0)
    parser.add_argument(
        "--limit-s", type=float, default=float("inf"), help="no further fault begins after so long"
    )
    parser.add_argument(
        "--disk-mb",
        type=int,
        help="run.dir lies on a file system of its own of this size (F10 needs it)",
    )
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    run_dir = (arguments.config if arguments.report else arguments.run_dir).resolve()
    chosen = arguments.faults.split(",")
    if unknown := set(chosen) - set(FAULTS):
        parser.error(f"unknown faults {sorted(unknown)}; known: {', '.join(FAULTS)}")
    if "F10" in chosen and not arguments.disk_mb:
        parser.error("F10 fills the disk: give run.dir one of its own with --disk-mb")
    world.enter()
    around = world.World(run_dir.with_suffix(".chaos"))
    results = around.folder / "results.jsonl"
    if arguments.disk_mb:
        disk = run_dir.with_suffix(".disk")
        around.mount_disk(disk, arguments.disk_mb)
        run_dir = disk / run_dir.name
    if not arguments.report:
        if "F8" in chosen:
            around.make_hosts()
        job = Job(
            arguments.config.resolve(),
            run_dir,
            arguments.overrides,
            around,
            "F8" in chosen,
            arguments.seed,
        )
        plan = [
            (name, inject)
            for name in chosen
            for inject in FAULTS[name]
            for _ in range(arguments.rounds)
        ]
        _inject_all(job, plan, results, arguments)
    return _report(run_dir, results)


def _inject_all(
    job: Job, plan: list[tuple[str, Fault]], results: Path, arguments: argparse.Namespace
) -> None:
    deadline = time.monotonic() + arguments.limit_s
    job.start()
    try:
        if job.wait_for_version(2, START_S) is None:
            raise SystemExit(f"the job did not start; see {job.run_dir.with_suffix('.out')}")
        for name, inject in plan:
            if time.monotonic() > deadline:
                print(f"# out of time before {inject.__name__}", flush=True)
                break
            injection = _inject(job, name, inject, arguments.recover_limit_s)
            with results.open("ab") as file:
                file.write(msgspec.json.encode(injection) + b"\n")
            print(
                f"# {injection.what} at version {injection.first_version}: {injection.recovered_s} s {injection.error}"
            )
            sys.stdout.flush()
            if injection.recovered_s is None:
                break
        job.end()
        job.check_nobody_left()
    finally:
        job.kill()


def _inject(job: Job, name: str, inject: Fault, limit_s: float) -> Injection:
    time.sleep(SETTLE_S + job.random.random() * 2)
    what = inject.__name__.partition("_")[2]
    seq, version = job.seq, job.version
    injection = Injection(name, what, seq, seq, version, version, None)
    started = time.monotonic()
    try:
        before = inject(job)
        started = time.monotonic()
        time.sleep(NEWS_S)  # until status.json tells what was trained before the fault
        before = max(version, job.version) if before is None else before
        # one version may have been under way already: the second was begun after the fault
        waited = job.wait_for_version(before + 2, limit_s)
        injection.recovered_s = None if waited is None else round(time.monotonic() - started, 1)
    except (RuntimeError, TimeoutError, OSError) as e:
        injection.error = f"{type(e).__name__}: {e}"
    injection.last_seq, injection.last_version = job.seq, max(version, job.version)
    return injection


def _report(run_dir: Path, results: Path) -> int:
    """Prints the lines; 1 when there is something to be ashamed of."""
    eta = load(run_dir / "config.yaml").staleness.max_staleness
    done = [msgspec.json.decode(line, type=Injection) for line in results.read_bytes().splitlines()]
    lags = [
        (line.version, max(line.version - v for v, _ in line.versions))
        for line in read_samples(run_dir)
    ]
    for name in sorted({injection.fault for injection in done}, key=lambda f: int(f[1:])):
        mine = [injection for injection in done if injection.fault == name]
        times = sorted(i.recovered_s for i in mine if i.recovered_s is not None)
        lost = duplicated = dropped = staleness = 0
        for i in mine:
            before, after = (audit.audit(run_dir, eta, seq) for seq in (i.first_seq, i.last_seq))
            lost += after.lost - before.lost
            duplicated += after.duplicated - before.duplicated
            dropped += after.dropped.total() - before.dropped.total()
            inside = [lag for version, lag in lags if i.first_version <= version <= i.last_version]
            staleness = max([staleness, *inside])
        p50 = f"{statistics.median(times):.1f}s" if times else "-"
        p95 = f"{times[min(len(times) - 1, round(0.95 * (len(times) - 1)))]:.1f}s" if times else "-"
        print(
            f"fault={name} injected={len(mine)} survived={len(times)} lost={lost} duplicated={duplicated} "
            f"dropped_with_reason={dropped} max_staleness={staleness}/{eta} recover_p50={p50} p95={p95} "
            f"what={','.join(sorted({i.what for i in mine}))}"
        )
    stale_kv = _report_f20(run_dir)
    broken = audit.run(run_dir, eta)
    return int(broken or stale_kv or any(injection.recovered_s is None for injection in done))


def _report_f20(run_dir: Path) -> bool:
    """Whether any token was sampled on a KV cache of older weights.

    A sample that goes on after an update and is trained on that very version: the trainer's logprob of its last tokens
    comes from one pass over the whole sample under the weights they are labelled with.
    """
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    diffs = {event.step: event.value for event in events.Scalars("train/logprob_diff_max")}
    resumed = [
        s for s in read_samples(run_dir) if len(s.versions) > 1 and s.versions[-1][0] == s.version
    ]
    resumed = [
        s for s in resumed if s.version + 1 in diffs
    ]  # not those of a step that is still under way
    good = [s for s in resumed if diffs[s.version + 1] < MAX_LOGPROB_DIFF]
    worst = max((diffs[s.version + 1] for s in resumed), default=0.0)
    print(
        f"fault=F20 injected={len(resumed)} survived={len(good)} max_logprob_diff={worst:.2g} "
        "what=samples_that_went_on_under_the_weights_they_are_trained_on"
    )
    return len(good) < len(resumed)


if __name__ == "__main__":
    sys.exit(main())
