"""The command line: `python -m megatron_async_rl run | doctor | status`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_async_rl import __version__
from megatron_async_rl.errors import Error


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and (any(text.startswith("-") for text in rest) or not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest  # settings after an option
    try:
        return args.command(args)
    except Error as e:
        sys.stderr.write(f"error: {e}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_async_rl",
        description="Asynchronous reinforcement learning for language models: Megatron-Core trains, SGLang generates.",
    )
    parser.add_argument("--version", action="version", version=f"megatron_async_rl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train, and show how it goes")
    run.add_argument("config", metavar="CONFIG", help="YAML file, such as those in configs/")
    run.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="settings to change, such as staleness.max_staleness=0",
    )
    run.add_argument(
        "--from-scratch",
        action="store_true",
        help="begin anew; a run that is in run.dir is kept under another name",
    )
    run.add_argument(
        "--elsewhere",
        metavar="NAME,...",
        default="",
        help="processes that `join` starts on other hosts, such as rollout-1",
    )
    run.set_defaults(command=_run)

    join = commands.add_parser(
        "join", help="start some processes of a run from this host, also in place of lost ones"
    )
    join.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        type=Path,
        help="its run.dir, on a file system that all hosts share",
    )
    join.add_argument(
        "names",
        metavar="NAME",
        nargs="+",
        help="rollout-N, reward-N, trainer, or trainer-N with trainer.hosts > 1",
    )
    join.set_defaults(command=_join)

    slurm = commands.add_parser(
        "slurm",
        help="one node's part of a run over a Slurm job, as launchers/slurm.sbatch starts it",
    )
    slurm.add_argument("config", metavar="CONFIG", help="YAML file")
    slurm.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    slurm.add_argument(
        "--plan", action="store_true", help="print what would run where, and exit; needs no Slurm"
    )
    slurm.add_argument("--nodes", metavar="N", type=int, help="with --plan: nodes of the job")
    slurm.add_argument("--gpus-per-node", metavar="G", type=int, help="with --plan: GPUs of each")
    slurm.set_defaults(command=_slurm)

    doctor = commands.add_parser(
        "doctor", help="say what is missing on this host, or for this CONFIG"
    )
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    doctor.set_defaults(command=_doctor)

    selftest = commands.add_parser(
        "selftest", help="compare CONFIG's parallel layout with none: loss, gradients"
    )
    selftest.add_argument("config", metavar="CONFIG", help="YAML file")
    selftest.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    selftest.set_defaults(command=_selftest)

    replay = commands.add_parser("replay", help="train one saved batch, with no fleet")
    replay.add_argument(
        "batches",
        metavar="BATCH",
        nargs="+",
        type=Path,
        help="files of one step, as a refused one left",
    )
    replay.add_argument(
        "--config", type=Path, help="YAML file; otherwise the run's, from a folder above"
    )
    replay.add_argument(
        "--set", metavar="key=value", action="append", default=[], help="a setting to change"
    )
    replay.set_defaults(command=_replay)

    plan = commands.add_parser(
        "plan-weights", help="show and prove the way of every weight from trainer to engine"
    )
    plan.add_argument(
        "config", metavar="CONFIG", help="YAML file; model.path needs config.json alone"
    )
    plan.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    plan.add_argument("--json", metavar="FILE", type=Path, help="write every route there")
    plan.add_argument(
        "--link-gb-s",
        metavar="RATE",
        type=float,
        default=50.0,
        help="10^9 bytes/s of a source's link (50)",
    )
    plan.set_defaults(command=_plan_weights)

    audit = commands.add_parser(
        "audit", help="check a run's books and staleness from its journal, by counting anew"
    )
    audit.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="its run.dir")
    audit.set_defaults(command=_audit)

    status = commands.add_parser("status", help="show how a run stands")
    status.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="its run.dir")
    status.set_defaults(command=_status)
    return parser


def _run(args: argparse.Namespace) -> int:
    from megatron_async_rl.config.load import load

    config = load(args.config, args.overrides)
    from megatron_async_rl.launcher import run  # after the YAML was understood: it brings in more

    return run.run(config, args.from_scratch, [name for name in args.elsewhere.split(",") if name])


def _join(args: argparse.Namespace) -> int:
    from megatron_async_rl.launcher import join

    return join.join(args.run_dir, args.names)


def _slurm(args: argparse.Namespace) -> int:
    from megatron_async_rl.launcher import slurm

    if args.plan:
        return slurm.show(args.config, args.overrides, args.nodes, args.gpus_per_node)
    return slurm.run(args.config, args.overrides)


def _doctor(args: argparse.Namespace) -> int:
    from megatron_async_rl.cli import doctor

    return doctor.run(args.config)


def _selftest(args: argparse.Namespace) -> int:
    from megatron_async_rl.cli import offline
    from megatron_async_rl.config.load import load

    return offline.selftest(load(args.config, args.overrides))


def _replay(args: argparse.Namespace) -> int:
    from megatron_async_rl.cli import offline

    return offline.replay(args.batches, args.config, args.set)


def _plan_weights(args: argparse.Namespace) -> int:
    import msgspec

    from megatron_async_rl.config.load import load
    from megatron_async_rl.weights import plan as plans

    plan = plans.make(load(args.config, args.overrides), args.link_gb_s)
    print(plans.summary(plan))
    if args.json:
        args.json.write_bytes(msgspec.json.encode(plan))
        print(f"every route: {args.json}")
    return 0


def _audit(args: argparse.Namespace) -> int:
    from megatron_async_rl.cli import audit
    from megatron_async_rl.config.load import load

    return audit.run(args.run_dir, load(args.run_dir / "config.yaml").staleness.max_staleness)


def _status(args: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_async_rl.errors import DataError
    from megatron_async_rl.observability import terminal
    from megatron_async_rl.observability.run_log import read_status

    try:
        status = read_status(args.run_dir)
    except DataError as e:
        sys.stderr.write(f"error: {e}\n")
        return 1
    console = Console()
    console.print(terminal.render(status))
    console.print(terminal.ledger(status))
    return 0


if __name__ == "__main__":
    sys.exit(main())
