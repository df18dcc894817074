"""The faults that are injected into a running job.

A fault returns the version from which two more must be trained, or None for the version at its end.
F20 is not here: chaos.py checks every sample that an update interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable

import psutil

from chaos_parts.job import Job
from chaos_parts.namespaces import HOST_A, HOST_B
from chaos_parts.signals import (
    CONTROLLER,
    REWARD,
    ROLLOUT,
    SERVER,
    TRAINER,
    f21_several_die_at_once,
    f22_controller_is_told_to_end,
    f22_process_is_told_to_end,
)
from megatron_async_rl import processes
from megatron_async_rl.controller.journal.events import (
    ControllerStarted,
    SampleReturned,
    SampleScored,
)
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, read_events
from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.observability.status import read_status
from megatron_async_rl.protocol import link as link_module
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.protocol.messages import (
    Generated,
    GenerateFailed,
    Hello,
    Message,
    ScoreResult,
    StepDone,
)
from megatron_async_rl.protocol.types import SampleKey
from megatron_async_rl.storage import checkpoints

Fault = Callable[[Job], int | None]
PARTITION_S = 12.0  # longer than faults.heartbeat_timeout_s
FLAG_S = 180.0  # until a process removes the flag: a server may have to start first
HOUR_S = 3600


def f1_worker_dies(job: Job) -> None:
    job.one(ROLLOUT).kill()


def f1_server_dies(job: Job) -> None:
    job.one(SERVER).kill()


def f2_worker_hangs(job: Job) -> None:
    job.one(ROLLOUT).suspend()


def f2_worker_answers_late(job: Job) -> None:
    """The worker is stopped until it has lost its leases, then continues."""
    process = job.one(ROLLOUT)
    process.suspend()
    time.sleep(10)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.resume()


def f3_server_is_slow(job: Job) -> None:
    """The server runs a fifth of the time."""
    process = job.one(SERVER)
    for _ in range(20):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
            time.sleep(0.4)
            process.resume()
        time.sleep(0.1)


def f4_rank_dies(job: Job) -> None:
    job.one(TRAINER).kill()


def f5_server_hangs_in_update(job: Job) -> None:
    job.wait_for_update()
    for process in job.find("sglang") or job.find(SERVER):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()


def f6_controller_dies(job: Job) -> None:
    job.one(CONTROLLER).kill()


def f7_reward_worker_dies(job: Job) -> None:
    job.one(REWARD).kill()


def _partition(job: Job, *hosts: str) -> None:
    for host in hosts:
        job.namespaces.partition(host)
    time.sleep(PARTITION_S)
    for host in hosts:
        job.namespaces.heal(host)


def f8_host_is_cut_off(job: Job) -> None:
    _partition(job, HOST_A, HOST_B)


def f8_host_receives_nothing(job: Job) -> None:
    """One direction: packets from B arrive, packets from A do not."""
    _partition(job, HOST_B)


def f8_host_sends_nothing(job: Job) -> None:
    _partition(job, HOST_A)


def f9_server_dies_in_update(job: Job) -> None:
    job.wait_for_update()
    job.one(SERVER).kill()


def f10_disk_is_full(job: Job) -> None:
    """The file system of run.dir is full for six seconds."""
    filler = job.run_dir / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    time.sleep(6)
    filler.unlink()


def f11_checkpoint_is_damaged(job: Job) -> None:
    """A bit of the newest checkpoint is flipped; then a trainer rank is killed and loads it."""
    manifest = checkpoints.list_manifests(job.run_dir)[0]
    name = next(name for name in sorted(manifest.files) if name.endswith(".distcp"))
    with (job.run_dir / checkpoints.FOLDER / manifest.folder / name).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    f4_rank_dies(job)


def f12_preempted(job: Job) -> int:
    """SIGTERM to the whole job, which leaves no process and is resumed."""
    before = job.version
    job.requeue()
    return before


def _jump(job: Job, pid: int, offset_s: int) -> None:
    """Shifts the clock for five seconds and back: two jumps, one of them backwards."""
    job.namespaces.move_clock(pid, offset_s)
    time.sleep(5)
    if pid in (0, job.one(CONTROLLER).pid):
        seen_s = read_status(job.run_dir).updated_unix - time.time()
        if abs(seen_s - offset_s) > 60:
            raise RuntimeError(
                f"the controller's clock is off by {seen_s:.0f} s instead of {offset_s}"
            )
    job.namespaces.move_clock(0, 0)


def f13_all_clocks_jump(job: Job) -> None:
    _jump(job, 0, job.random.choice((HOUR_S, -HOUR_S)))


def f13_controllers_clock_jumps(job: Job) -> None:
    _jump(job, job.one(CONTROLLER).pid, job.random.choice((HOUR_S, -HOUR_S)))


def f13_workers_clock_jumps(job: Job) -> None:
    _jump(
        job,
        job.one(job.random.choice((ROLLOUT, TRAINER, REWARD))).pid,
        job.random.choice((HOUR_S, -HOUR_S)),
    )


def f14_poison_prompt(job: Job) -> None:
    """From now on one prompt holds a token id beyond the vocabulary (workflow.py)."""
    (job.namespaces.folder / "poisoned").unlink(missing_ok=True)
    job.namespaces.raise_flag("poison")
    job.namespaces.wait_for_flag("poison", FLAG_S)


MALFORMED = {  # setting -> name that the error must contain
    "staleness.etta=1": "staleness.max_staleness",
    "rollout.max_new_tokens=many": "rollout.max_new_tokens",
    "algorithm.loss.clip_eps=-1": "algorithm.loss.clip_eps",
    "data.train=/nowhere.jsonl": "data.train",
}


def f15_malformed_settings(job: Job) -> int:
    """Restarted with invalid settings: refused by name, before anything starts or is written."""
    before = job.version
    job.terminate()
    seq = job.seq
    for setting, name in MALFORMED.items():
        code, output = job.try_start(setting)
        if (
            code != processes.EXIT_ERROR
            or name not in output
            or "Traceback" in output
            or job.seq != seq
        ):
            raise RuntimeError(f"{setting}: exit code {code}, {output!r}")
    job.start()
    return before


def f16_replayed_messages(job: Job) -> None:
    """A peer with valid keys repeats, three times and in random order, replies and false ones."""
    events = list(read_events(job.run_dir / JOURNAL_FILE))
    epoch = next(event.epoch for event in reversed(events) if isinstance(event, ControllerStarted))
    messages: list[Message] = []
    for event in events[-400:]:
        if isinstance(event, SampleReturned):
            for attempt, of in ((1, epoch), (2, epoch), (1, epoch - 1)):
                key = SampleKey(of, event.group_id, attempt, event.index)
                messages += [Generated(key, event.sample), GenerateFailed(key, "false report")]
        elif isinstance(event, SampleScored):
            messages += [
                ScoreResult(
                    SampleKey(epoch, event.group_id, attempt, event.index), 1.0 - event.reward
                )
                for attempt in (1, 2)
            ]
    messages += [StepDone(version, {}) for version in range(max(0, job.version - 3), job.version)]
    messages *= 3
    job.random.shuffle(messages)

    async def send() -> None:
        link = Link(job.run_dir)
        try:
            await link.join(Hello("reward", "reward-99", os.getpid(), capacity=0), 20)
            for message in messages:
                await link.send(message)
        finally:
            link.close()

    asyncio.run(send())


def f17_peers_of_other_versions(job: Job) -> None:
    """Workers with another package, message schema or tokenizer: refused with both values."""

    async def join(hello: Hello) -> str:
        link = Link(job.run_dir)
        try:
            await link.join(hello, 20)
        except ProtocolError as e:
            return str(e)
        finally:
            link.close()
        return "welcome"

    own = link_module.__version__, link_module.SCHEMA
    for versions, tokenizer, what in (
        (("0.0.1", own[1]), "", f"package version 0.0.1 there, {own[0]} here"),
        ((own[0], "0000"), "", f"message schema 0000 there, {own[1]} here"),
        (own, "0000", "tokenizer 0000 there"),
    ):
        # this process sends them in its hello
        link_module.__version__, link_module.SCHEMA = versions
        output = asyncio.run(
            join(Hello("rollout", "rollout-0", os.getpid(), capacity=64, tokenizer=tokenizer))
        )
        link_module.__version__, link_module.SCHEMA = own
        if what not in output:
            raise RuntimeError(f"a peer with {what} was told {output!r}")


def f18_loss_is_nan(job: Job) -> None:
    """The next loss of one rank is NaN (hooks/sitecustomize.py): the step must be refused."""
    job.namespaces.raise_flag("nan")
    job.namespaces.wait_for_flag("nan", FLAG_S)


def f19_run_ends(job: Job) -> int:
    """The run reaches its last step: all processes end in time. Then it is resumed with more."""
    last = job.version + 6
    job.terminate()
    job.start(f"run.steps={last}")
    code = job.launcher.wait(180)
    if code != 0:
        raise RuntimeError(f"exit code {code} of a run that was to end at version {last}")
    job.check_no_process_left()
    job.start()
    return last


FAULTS: dict[str, tuple[Fault, ...]] = {
    "F1": (f1_worker_dies, f1_server_dies),
    "F2": (f2_worker_hangs, f2_worker_answers_late),
    "F3": (f3_server_is_slow,),
    "F4": (f4_rank_dies,),
    "F5": (f5_server_hangs_in_update,),
    "F6": (f6_controller_dies,),
    "F7": (f7_reward_worker_dies,),
    "F8": (f8_host_is_cut_off, f8_host_receives_nothing, f8_host_sends_nothing),
    "F9": (f9_server_dies_in_update,),
    "F10": (f10_disk_is_full,),
    "F11": (f11_checkpoint_is_damaged,),
    "F12": (f12_preempted,),
    "F13": (f13_all_clocks_jump, f13_controllers_clock_jumps, f13_workers_clock_jumps),
    "F14": (f14_poison_prompt,),
    "F15": (f15_malformed_settings,),
    "F16": (f16_replayed_messages,),
    "F17": (f17_peers_of_other_versions,),
    "F18": (f18_loss_is_nan,),
    "F19": (f19_run_ends,),
    "F21": (f21_several_die_at_once,),
    "F22": (f22_process_is_told_to_end, f22_controller_is_told_to_end),
}
