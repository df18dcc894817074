"""Injects faults into a running job of real processes, then audits its journal.

    python tools/chaos/chaos.py CONFIG RUN_DIR [--faults F1,F4,...] [--rounds 2] [key=value ...]
    python tools/chaos/chaos.py --report RUN_DIR

One job runs through all faults, each injected --rounds times at random moments. A fault counts as
survived when the job trains two more versions after it. Started again on the same RUN_DIR, the tool
resumes the job and adds to its results, so a long list of faults can be split over several starts.
At the end, and with --report, it prints the audit of the whole run and one line per fault, counted
from the journal and the sample log between the fault and the recovery:

    fault=F1 injected=2 survived=2 lost=0 duplicated=0 dropped_with_reason=0 max_staleness=3/3
    recover_p50=.. p95=.. what=..                                  (one line in the output)

docs/reliability.md describes every fault. With F8 the job has two hosts, and the rollout worker is
on the second. Needs Linux namespaces, `ip` and a C compiler (chaos_parts/namespaces.py). The exit
code is 1 if a fault was not survived or the audit found a breach.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import msgspec
from chaos_parts import namespaces
from chaos_parts.faults import FAULTS, Fault
from chaos_parts.job import START_S, Job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_async_rl.cli import audit
from megatron_async_rl.config.load import load
from megatron_async_rl.observability.sample_log import read_samples

STATUS_S = 1.5  # until status.json shows the steps before the fault
# engine against trainer in fp32; under a neighbouring version they differ by more than 0.01
MAX_LOGPROB_DIFF = 1e-3
SETTLE_S = 2.0  # undisturbed training between faults; a random time is added


class Injection(msgspec.Struct):
    fault: str
    what: str
    first_seq: int  # events in the journal before the fault; last_seq: after the recovery
    last_seq: int
    first_version: int
    last_version: int
    recovered_s: float | None  # None: not survived
    error: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML of the job (RUN_DIR with --report)")
    parser.add_argument("run_dir", type=Path, nargs="?", help="run.dir of the job")
    parser.add_argument(
        "--report", action="store_true", help="only report the results of earlier starts on RUN_DIR"
    )
    parser.add_argument(
        "--faults",
        default=",".join(f for f in FAULTS if f not in ("F8", "F10")),
        help="default: all except F8, which needs two hosts, and F10, which needs --disk-mb",
    )
    parser.add_argument("--rounds", type=int, default=1, help="injections of each fault")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random times")
    parser.add_argument(
        "--recover-limit-s",
        type=float,
        default=150.0,
        help="seconds within which a fault must be survived",
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        default=float("inf"),
        help="inject no further fault after this many seconds",
    )
    parser.add_argument(
        "--disk-mb",
        type=int,
        help="put run.dir on a separate file system of this size (F10 needs it)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the job")
    arguments = parser.parse_intermixed_args()
    run_dir = (arguments.config if arguments.report else arguments.run_dir).resolve()
    chosen = arguments.faults.split(",")
    if unknown := set(chosen) - set(FAULTS):
        parser.error(f"unknown faults {sorted(unknown)}; known: {', '.join(FAULTS)}")
    if "F10" in chosen and not arguments.disk_mb:
        parser.error("F10 fills the disk: put run.dir on a separate one with --disk-mb")
    namespaces.enter()
    job_namespaces = namespaces.Namespaces(run_dir.with_suffix(".chaos"))
    results = job_namespaces.folder / "results.jsonl"
    if arguments.disk_mb:
        disk = run_dir.with_suffix(".disk")
        job_namespaces.mount_disk(disk, arguments.disk_mb)
        run_dir = disk / run_dir.name
    if not arguments.report:
        if "F8" in chosen:
            job_namespaces.make_hosts()
        job = Job(
            arguments.config.resolve(),
            run_dir,
            arguments.overrides,
            job_namespaces,
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
                print(f"# --limit-s reached before {inject.__name__}", flush=True)
                break
            injection = _inject(job, name, inject, arguments.recover_limit_s)
            with results.open("ab") as file:
                file.write(msgspec.json.encode(injection) + b"\n")
            print(
                f"# {injection.what} at version {injection.first_version}: "
                f"{injection.recovered_s} s {injection.error}"
            )
            sys.stdout.flush()
            if injection.recovered_s is None:
                break
        job.terminate()
        job.check_no_process_left()
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
        time.sleep(STATUS_S)
        before = max(version, job.version) if before is None else before
        # one version may have been in progress: the second was started after the fault
        waited = job.wait_for_version(before + 2, limit_s)
        injection.recovered_s = None if waited is None else round(time.monotonic() - started, 1)
    except (RuntimeError, TimeoutError, OSError) as e:
        injection.error = f"{type(e).__name__}: {e}"
    injection.last_seq, injection.last_version = job.seq, max(version, job.version)
    return injection


def _report(run_dir: Path, results: Path) -> int:
    """Prints the lines; returns 1 if a fault was not survived or the audit found a breach."""
    max_staleness = load(run_dir / "config.yaml").staleness.max_staleness
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
            before, after = (
                audit.audit(run_dir, max_staleness, seq) for seq in (i.first_seq, i.last_seq)
            )
            lost += after.lost - before.lost
            duplicated += after.duplicated - before.duplicated
            dropped += after.dropped.total() - before.dropped.total()
            inside = [lag for version, lag in lags if i.first_version <= version <= i.last_version]
            staleness = max([staleness, *inside])
        p50 = f"{statistics.median(times):.1f}s" if times else "-"
        p95 = f"{times[min(len(times) - 1, round(0.95 * (len(times) - 1)))]:.1f}s" if times else "-"
        print(
            f"fault={name} injected={len(mine)} survived={len(times)} lost={lost} "
            f"duplicated={duplicated} dropped_with_reason={dropped} "
            f"max_staleness={staleness}/{max_staleness} recover_p50={p50} p95={p95} "
            f"what={','.join(sorted({i.what for i in mine}))}"
        )
    stale_kv = _report_f20(run_dir)
    broken = audit.run(run_dir, max_staleness)
    return int(broken or stale_kv or any(injection.recovered_s is None for injection in done))


def _report_f20(run_dir: Path) -> bool:
    """Returns whether a token was sampled on a KV cache of older weights.

    Looks at samples that resumed after an update and are trained on that version: the trainer's
    logprobs of their last tokens come from one pass under the weights of their labels.
    """
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    diffs = {event.step: event.value for event in events.Scalars("train/logprob_diff_max")}
    resumed = [
        s for s in read_samples(run_dir) if len(s.versions) > 1 and s.versions[-1][0] == s.version
    ]
    resumed = [s for s in resumed if s.version + 1 in diffs]  # without those of an open step
    good = [s for s in resumed if diffs[s.version + 1] < MAX_LOGPROB_DIFF]
    worst = max((diffs[s.version + 1] for s in resumed), default=0.0)
    print(
        f"fault=F20 injected={len(resumed)} survived={len(good)} max_logprob_diff={worst:.2g} "
        "what=samples_resumed_under_the_weights_they_are_trained_on"
    )
    return len(good) < len(resumed)


if __name__ == "__main__":
    sys.exit(main())
