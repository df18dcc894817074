"""The command line, `megatron-async-rl COMMAND`: parses it and calls the command.

run, join and slurm (launcher/) start a run's processes, eval (cli/) those of an evaluation; the
other commands in cli/ check, show or debug. A command's module is imported only when the command is
called, so that a wrong argument is reported at once.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from pathlib import Path

from megatron_async_rl.cli.arguments import make_parser
from megatron_async_rl.errors import ConfigError, Error


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 2 for a wrong argument or an Error."""
    parser = make_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and (any(text.startswith("-") for text in rest) or not hasattr(args, "overrides")):
        settings = "; settings are written as run.steps=3" if hasattr(args, "overrides") else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{settings}")
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    if rest:
        args.overrides += rest  # key=value after an option
    try:
        return _call(args)
    except Error as e:
        sys.stderr.write(f"error: {e}\n")
        return 2
    except ModuleNotFoundError as e:
        if not e.name or e.name.startswith("megatron_async_rl"):
            raise
        remedy = "set MEGATRON_ASYNC_RL_PYTHON to the trainer's Python, or unset it and run bash "
        sys.stderr.write(
            f"error: {sys.executable} has no package {e.name}; {remedy}tools/setup_env.sh\n"
        )
        return 2
    except OSError as e:
        if e.filename is None:
            raise
        remedy = "make it a file or folder that this user can read and write, or restore it"
        sys.stderr.write(f"error: {e.filename2 or e.filename}: {e.strerror}; {remedy}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _call(args: Namespace) -> int:
    from megatron_async_rl.config.load import load

    match args.command:
        case "run":
            return _run(args)
        case "eval":
            return _eval(args)
        case "join":
            from megatron_async_rl.launcher import join

            return join.join(args.run_dir, args.names)
        case "slurm":
            from megatron_async_rl.launcher import slurm

            if args.plan:
                return slurm.show(args.config, args.overrides, args.nodes, args.gpus_per_node)
            return slurm.run(args.config, args.overrides)
        case "doctor":
            from megatron_async_rl.cli import doctor

            return doctor.run(args.config, args.overrides)
        case "status":
            from megatron_async_rl.cli import status

            return status.run(args.run_dir, args.watch)
        case "tensorboard":
            from megatron_async_rl.cli import tensorboard

            tensorboard.run(args.run_dir, args.options)
        case "audit":
            from megatron_async_rl.cli import audit

            return audit.run(args.run_dir)
        case "plan":
            return _plan(args)
        case "plan-weights":
            from megatron_async_rl.cli import plan_weights

            config = load(args.config, args.overrides)
            return plan_weights.run(config, args.link_gb_s, args.json)
        case "prepare":
            return _prepare(args)
        case "replay":
            return _replay(args)
        case "selftest":
            from megatron_async_rl.cli import offline

            return offline.selftest(load(args.config, args.overrides))
        case "compare-logprobs":
            from megatron_async_rl.cli import compare_logprobs

            config = load(args.config, args.overrides)
            return compare_logprobs.run(config, args.prompts, args.tokens)
    raise AssertionError(args.command)


def _run(args: Namespace) -> int:
    from megatron_async_rl.config.load import load

    config = load(args.config, args.overrides)
    # slower to import: errors of the YAML come first
    from megatron_async_rl.launcher import run, slurm

    slurm.check_started_once()
    if warning := slurm.idle_nodes_warning():
        sys.stderr.write(f"warning: {warning}\n")
    existing: run.ExistingRun = "resume"
    if args.from_scratch:
        existing = "rename"
    elif args.new_if_complete:
        existing = "rename if complete"
    return run.run(config, existing, [name for name in args.elsewhere.split(",") if name])


def _eval(args: Namespace) -> int:
    from megatron_async_rl.cli import evaluate

    model, out = args.model, args.out
    if args.version is not None and args.run is None:
        raise ConfigError("--version needs --run RUN_DIR", "name the run, or use --model FOLDER")
    if args.run is not None:
        model = evaluate.policy_folder(args.run, args.version)
        out = out or args.run / "evaluations" / f"eval-{model.name}"
    sets = [name for name in args.sets.split(",") if name]
    return evaluate.run(args.config, args.overrides, model, out, sets)


def _plan(args: Namespace) -> int:
    from megatron_async_rl.cli import plan
    from megatron_async_rl.config.load import load

    options = plan.Options(
        num_gpus=args.gpus,
        gpu=args.gpu,
        mean_tokens=args.mean_tokens,
        prompt_tokens=args.prompt_tokens,
        calibrate=args.calibrate,
    )
    return plan.run(load(args.config, args.overrides), options)


def _prepare(args: Namespace) -> int:
    from megatron_async_rl.cli import prepare
    from megatron_async_rl.data.prepare.pipeline import Options

    options = Options(
        split=args.split,
        evaluation_sets=tuple(args.decontaminate),
        ngram=args.ngram,
        num_validation=args.val,
        max_tests=args.max_tests,
        model=args.model,
    )
    return prepare.run(args.kind, args.source, args.out, options)


def _replay(args: Namespace) -> int:
    from megatron_async_rl.cli import offline

    is_override = re.compile(r"[a-z_]+(\.[\w\[\]]+)+=").match
    paths = [Path(text) for text in args.batches if not is_override(text)]
    overrides = [text for text in args.batches if is_override(text)]
    if not paths:
        raise ConfigError("replay needs the path of a batch", "name it before the settings")
    return offline.replay(paths, args.config, [*args.set, *overrides, *args.overrides])


if __name__ == "__main__":
    sys.exit(main())
