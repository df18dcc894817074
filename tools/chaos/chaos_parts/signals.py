"""Faults that signal processes of any kind: several at once, or SIGTERM to one of them alone."""

from __future__ import annotations

import time

from chaos_parts.job import Job
from megatron_async_rl import processes

# on the command lines of the processes of a run
CONTROLLER, TRAINER = "megatron_async_rl.controller", "-m megatron_async_rl.trainer"
ROLLOUT, REWARD, SERVER = "megatron_async_rl.rollout", "-m megatron_async_rl.reward", "--model-path"
KINDS = {
    "controller": (CONTROLLER,),
    "rollout worker": (ROLLOUT,),
    "server": (SERVER,),
    "scheduler": ("sglang::scheduler",),
    "reward worker": (REWARD,),
    "torchrun": ("megatron_async_rl.trainer.torchrun",),
    "rank": (TRAINER + " ",),
}


def f21_several_die_at_once(job: Job) -> None:
    """Three processes, of any kind, die within a second."""
    for kind in job.random.sample(sorted(KINDS), 3):
        for process in job.find(*KINDS[kind])[-1:]:
            process.kill()
        time.sleep(job.random.random() / 3)


def f22_process_is_told_to_end(job: Job) -> None:
    """SIGTERM reaches one process, but not the controller or the launcher."""
    kind = job.random.choice(sorted(KINDS.keys() - {"controller"}))
    job.one(*KINDS[kind]).terminate()


def f22_controller_is_told_to_end(job: Job) -> int:
    """SIGTERM reaches the controller alone: it ends the run as preempted, which is resumed."""
    before = job.version
    job.one(CONTROLLER).terminate()
    code = job.launcher.wait(120)
    if code != processes.EXIT_REQUEUE:
        raise RuntimeError(f"exit code {code} instead of {processes.EXIT_REQUEUE}")
    job.check_no_process_left()
    job.start()
    return before
