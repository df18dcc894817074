"""The arguments of all commands. A command's own module is imported only when it is called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_async_rl import __version__
from megatron_async_rl.program import program


class _Parser(argparse.ArgumentParser):
    """A parser with the arguments that several commands have; commands are of this class too."""

    def option(
        self, name: str, metavar: str, text: str, kind: type = str, default: Any = None
    ) -> None:
        self.add_argument(name, metavar=metavar, help=text, type=kind, default=default)

    def flag(self, name: str, text: str) -> None:
        self.add_argument(name, action="store_true", help=text)

    def config(self, text: str = "YAML file, see configs/", optional: bool = False) -> None:
        self.add_argument("config", metavar="CONFIG", help=text, nargs="?" if optional else None)
        text = "settings to override, such as staleness.max_staleness=0"
        # a default, so that it is not named among the required ones
        self.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=text)

    def run_dir(self, text: str = "run.dir of the run") -> None:
        self.add_argument("run_dir", metavar="RUN_DIR", type=Path, help=text)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser; it sets `command` to the name of the command, None without one."""
    parser = _Parser(
        prog=program(),
        description="Asynchronous reinforcement learning for language models: Megatron-Core "
        "trains, SGLang generates.",
    )
    parser.add_argument("--version", action="version", version=f"megatron_async_rl {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")

    run = commands.add_parser("run", help="start or resume a run and show its progress")
    run.config()
    run.flag(
        "--from-scratch", "start a new run; an existing run in run.dir is renamed, not deleted"
    )
    run.flag(
        "--new-if-complete",
        "as --from-scratch, but only if the run in run.dir is complete; else it is resumed",
    )
    run.option(
        "--elsewhere",
        "NAME,...",
        "processes that `join` starts on other hosts, such as rollout-1",
        default="",
    )

    evaluate = commands.add_parser("eval", help="evaluate a model on CONFIG's sets, no training")
    evaluate.config()
    source = evaluate.add_mutually_exclusive_group()
    source.add_argument(
        "--model", metavar="FOLDER", type=Path, help="Hugging Face folder; default: model.path"
    )
    source.add_argument("--run", metavar="RUN_DIR", type=Path, help="evaluate the policy of a run")
    evaluate.option("--version", "N", "with --run: version to evaluate; default: the newest", int)
    evaluate.option("--sets", "NAME,...", "sets to evaluate; default: all", default="")
    evaluate.option(
        "--out", "FOLDER", "samples and result; continues an evaluation that is in it", Path
    )

    join = commands.add_parser("join", help="start processes of an existing run on this host")
    join.run_dir("run.dir of the run, on a file system that all hosts share")
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
    slurm.config()
    slurm.flag("--plan", "only print the placement; needs no Slurm")
    slurm.option("--nodes", "N", "with --plan: number of nodes", int)
    slurm.option("--gpus-per-node", "G", "with --plan: GPUs per node", int)

    doctor = commands.add_parser(
        "doctor", help="check this host's installation and, with CONFIG, a run's settings"
    )
    doctor.config("YAML file", optional=True)

    status = commands.add_parser("status", help="show the state of a run, or how it ended")
    status.run_dir()
    status.flag("--watch", "follow the run until it ends")

    tensorboard = commands.add_parser("tensorboard", help="serve the metrics of a run by HTTP")
    tensorboard.run_dir()
    tensorboard.add_argument(
        "options",
        metavar="OPTION",
        nargs=argparse.REMAINDER,
        help="options of TensorBoard, such as --port 6006 or --bind_all",
    )

    audit = commands.add_parser(
        "audit", help="recompute sample accounting and staleness of a run from its journal"
    )
    audit.run_dir()

    plan = commands.add_parser(
        "plan", help="predict step time and throughput on N GPUs, and the best split; needs no GPU"
    )
    plan.config("YAML file; of model.path only config.json is needed")
    plan.option("--gpus", "N", "GPUs to split; default: predict the split of CONFIG", int)
    plan.option("--gpu", "NAME", "h100 (default), h200 or h800", default="h100")
    plan.option(
        "--mean-tokens", "M", "mean length of a response; default: a third of the limit", int
    )
    plan.option("--prompt-tokens", "P", "mean length of a prompt; default: 256", int)
    plan.option("--calibrate", "RUN_DIR", "take costs and lengths from this run", Path)

    routes = commands.add_parser(
        "plan-weights", help="print how each parameter maps from trainer shards to engine shards"
    )
    routes.config("YAML file; of model.path only config.json is needed")
    routes.option("--json", "FILE", "write every route to this file", Path)
    routes.option(
        "--link-gb-s",
        "RATE",
        "bandwidth of a source's link in 10^9 bytes/s (default 50)",
        float,
        default=50.0,
    )

    prepare = commands.add_parser("prepare", help="turn a published dataset into rows to train on")
    prepare.add_argument("kind", metavar="KIND", help="format of IN, such as gsm8k (docs/data.md)")
    prepare.add_argument("source", metavar="IN", help="file or folder: JSONL, JSON, Parquet, Arrow")
    prepare.add_argument("out", metavar="OUT", type=Path, help="JSONL file to write")
    prepare.option("--split", "NAME", "the split, if IN has several")
    prepare.add_argument(
        "--decontaminate",
        metavar="EVAL",
        nargs="+",
        default=[],
        help="evaluation sets whose problems OUT must not contain",
    )
    prepare.option(
        "--ngram",
        "N",
        "consecutive words that problems may not share; default: 13",
        int,
        default=13,
    )
    prepare.option("--val", "N", "number of rows to write to OUT.val.jsonl instead", int, default=0)
    prepare.option("--max-tests", "N", "number of tests to keep of each row", int)
    prepare.option("--model", "FOLDER", "report prompt lengths in tokens of this model")

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
    selftest.config()

    compare = commands.add_parser(
        "compare-logprobs",
        help="find the first operation of the model in which engine and trainer differ",
    )
    compare.config()
    compare.option("--prompts", "N", "number of prompts; default: 4", int, default=4)
    compare.add_argument(
        "--tokens", metavar="N", type=int, default=16, help="tokens per prompt; default: 16"
    )
    return parser
