"""The arguments of all commands. A command's own module is imported only when it is called."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_async_rl import __version__
from megatron_async_rl.program import program


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser; it sets `command` to the name of the command, None without one."""
    parser = argparse.ArgumentParser(
        prog=program(),
        description="Asynchronous reinforcement learning for language models: Megatron-Core "
        "trains, SGLang generates.",
    )
    parser.add_argument("--version", action="version", version=f"megatron_async_rl {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")

    run = commands.add_parser("run", help="start or resume a run and show its progress")
    _add_config(run)
    run.add_argument(
        "--from-scratch",
        action="store_true",
        help="start a new run; an existing run in run.dir is renamed, not deleted",
    )
    run.add_argument(
        "--new-if-complete",
        action="store_true",
        help="the same, but only if the run in run.dir is complete; otherwise it is resumed",
    )
    run.add_argument(
        "--elsewhere",
        metavar="NAME,...",
        default="",
        help="processes that `join` starts on other hosts, such as rollout-1",
    )

    evaluate = commands.add_parser("eval", help="evaluate a model on CONFIG's sets, no training")
    _add_config(evaluate)
    source = evaluate.add_mutually_exclusive_group()
    source.add_argument(
        "--model", metavar="FOLDER", type=Path, help="Hugging Face folder; default: model.path"
    )
    source.add_argument("--run", metavar="RUN_DIR", type=Path, help="a run's policy")
    evaluate.add_argument(
        "--version", metavar="N", type=int, help="with --run: its version; default: the newest"
    )
    evaluate.add_argument("--sets", metavar="NAME,...", default="", help="default: all sets")
    evaluate.add_argument(
        "--out", metavar="FOLDER", type=Path, help="finished samples and result; continued if begun"
    )

    join = commands.add_parser("join", help="start processes of an existing run on this host")
    _add_run_dir(join, "its run.dir, on a file system that all hosts share")
    join.add_argument(
        "names",
        metavar="NAME",
        nargs="+",
        help="rollout-N, reward-N, trainer, or trainer-N with trainer.hosts > 1; a name in use is "
        "taken over",
    )

    slurm = commands.add_parser(
        "slurm", help="start this node's part of a Slurm job (see launchers/slurm.sbatch)"
    )
    _add_config(slurm)
    slurm.add_argument(
        "--plan", action="store_true", help="only print the placement; needs no Slurm"
    )
    slurm.add_argument("--nodes", metavar="N", type=int, help="with --plan: number of nodes")
    slurm.add_argument("--gpus-per-node", metavar="G", type=int, help="with --plan: GPUs per node")

    doctor = commands.add_parser(
        "doctor", help="check this host's installation and, with CONFIG, a run's settings"
    )
    _add_config(doctor, "YAML file", optional=True)

    status = commands.add_parser("status", help="show the state of a run, or how it ended")
    _add_run_dir(status)
    status.add_argument("--watch", action="store_true", help="follow the run until it ends")

    tensorboard = commands.add_parser("tensorboard", help="serve the metrics of a run by HTTP")
    _add_run_dir(tensorboard)
    tensorboard.add_argument(
        "options",
        metavar="OPTION",
        nargs=argparse.REMAINDER,
        help="options of TensorBoard, such as --port 6006 or --bind_all",
    )

    audit = commands.add_parser(
        "audit", help="recompute sample accounting and staleness of a run from its journal"
    )
    _add_run_dir(audit)

    plan = commands.add_parser(
        "plan", help="predict step time and throughput on N GPUs, and the best split; needs no GPU"
    )
    _add_config(plan, "YAML file; of model.path only config.json is needed")
    plan.add_argument(
        "--gpus", metavar="N", type=int, help="to split; default: predict the split of CONFIG"
    )
    plan.add_argument("--gpu", metavar="NAME", default="h100", help="h100 (default), h200 or h800")
    plan.add_argument(
        "--mean-tokens", metavar="M", type=int, help="mean response; default: a third of the limit"
    )
    plan.add_argument("--prompt-tokens", metavar="P", type=int, help="mean prompt")
    plan.add_argument(
        "--calibrate", metavar="RUN_DIR", type=Path, help="take costs and lengths from this run"
    )

    routes = commands.add_parser(
        "plan-weights", help="print how each parameter maps from trainer shards to engine shards"
    )
    _add_config(routes, "YAML file; of model.path only config.json is needed")
    routes.add_argument("--json", metavar="FILE", type=Path, help="write every route to this file")
    routes.add_argument(
        "--link-gb-s",
        metavar="RATE",
        type=float,
        default=50.0,
        help="bandwidth of a source's link in 10^9 bytes/s (default 50)",
    )

    prepare = commands.add_parser("prepare", help="turn a published dataset into rows to train on")
    prepare.add_argument("kind", metavar="KIND", help="its format, see docs/data.md, such as gsm8k")
    prepare.add_argument("source", metavar="IN", help="file or folder: JSONL, JSON, Parquet, Arrow")
    prepare.add_argument("out", metavar="OUT", type=Path, help="JSONL file to write")
    prepare.add_argument("--split", metavar="NAME", help="the split, if IN has several")
    prepare.add_argument(
        "--decontaminate",
        metavar="EVAL",
        nargs="+",
        default=[],
        help="evaluation sets whose problems OUT must not contain",
    )
    prepare.add_argument(
        "--ngram", metavar="N", type=int, default=13, help="words that count as the same problem"
    )
    prepare.add_argument(
        "--val", metavar="N", type=int, default=0, help="rows to write to OUT.val.jsonl instead"
    )
    prepare.add_argument("--max-tests", metavar="N", type=int, help="tests to keep of each row")
    prepare.add_argument("--model", metavar="FOLDER", help="count the prompts' tokens as it does")

    replay = commands.add_parser("replay", help="train one saved batch without rollout workers")
    replay.add_argument(
        "batches",
        metavar="BATCH",
        nargs="+",
        help="batch files of one step, then settings to override (key=value)",
    )
    replay.add_argument(
        "--config",
        type=Path,
        help="YAML file; default: the config.yaml in the nearest folder above the batch",
    )
    replay.add_argument(
        "--set", metavar="key=value", action="append", default=[], help="the same as key=value"
    )
    replay.set_defaults(overrides=[])

    selftest = commands.add_parser(
        "selftest", help="check CONFIG's advantages and objective, and its layout against one rank"
    )
    _add_config(selftest)

    compare = commands.add_parser(
        "compare-logprobs",
        help="find the first operation of the model in which engine and trainer differ",
    )
    _add_config(compare)
    compare.add_argument("--prompts", metavar="N", type=int, default=4, help="default: 4")
    compare.add_argument(
        "--tokens", metavar="N", type=int, default=16, help="sampled for each prompt; default: 16"
    )
    return parser


def _add_config(
    parser: argparse.ArgumentParser, text: str = "YAML file, see configs/", optional: bool = False
) -> None:
    parser.add_argument("config", metavar="CONFIG", help=text, nargs="?" if optional else None)
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="settings to override, such as staleness.max_staleness=0",
    )


def _add_run_dir(parser: argparse.ArgumentParser, text: str = "run.dir of the run") -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help=text)
