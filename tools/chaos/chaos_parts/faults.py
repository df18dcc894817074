"""What is done to a running job. A fault returns the version from which on the job counts as recovered, or None: its own.

F20 is not here: the tool looks at every sample that an update interrupted (chaos.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable

import psutil

from chaos_parts.job import Job
from chaos_parts.world import HOST_A, HOST_B
from megatron_async_rl import processes
from megatron_async_rl.controller.core.events import ControllerStarted, SampleReturned, SampleScored
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, read_events
from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.observability.status import read_status
from megatron_async_rl.protocol import transport
from megatron_async_rl.protocol.messages import (
    Generated,
    GenerateFailed,
    Hello,
    Message,
    ScoreResult,
    StepDone,
)
from megatron_async_rl.protocol.transport import Link
from megatron_async_rl.protocol.types import SampleKey
from megatron_async_rl.storage import checkpoints

Fault = Callable[[Job], int | None]
ROLLOUT, TRAINER = "megatron_async_rl.rollout", "-m megatron_async_rl.trainer"
CONTROLLER, REWARD, SERVER = (
    "megatron_async_rl.controller",
    "-m megatron_async_rl.reward",
    "--model-path",
)
CUT_S = 12.0  # longer than faults.heartbeat_timeout_s
FLAG_S = 180.0  # to meet a process that takes it: a server may have to start first
HOUR_S = 3600


def f1_worker_dies(job: Job) -> None:
    job.one(ROLLOUT).kill()


def f1_server_dies(job: Job) -> None:
    job.one(SERVER).kill()


def f2_worker_hangs(job: Job) -> None:
    job.one(ROLLOUT).suspend()


def f2_worker_answers_late(job: Job) -> None:
    """Silent until it has lost its leases, then it goes on as if nothing had been."""
    process = job.one(ROLLOUT)
    process.suspend()
    time.sleep(10)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.resume()


def f3_server_is_slow(job: Job) -> None:
    """A fifth of the time is its own."""
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


def _cut(job: Job, *towards: str) -> None:
    for host in towards:
        job.world.cut(host)
    time.sleep(CUT_S)
    for host in towards:
        job.world.heal(host)


def f8_host_is_cut_off(job: Job) -> None:
    _cut(job, HOST_A, HOST_B)


def f8_host_hears_nothing(job: Job) -> None:
    """Half of it: what B sends arrives, what A sends does not."""
    _cut(job, HOST_B)


def f8_host_is_not_heard(job: Job) -> None:
    _cut(job, HOST_A)


def f9_server_dies_in_update(job: Job) -> None:
    job.wait_for_update()
    job.one(SERVER).kill()


def f10_disk_is_full(job: Job) -> None:
    """No room for six seconds on the file system of run.dir."""
    filler = job.run_dir / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    time.sleep(6)
    filler.unlink()


def f11_checkpoint_is_damaged(job: Job) -> None:
    """One byte of the newest checkpoint flips; then the trainer needs it."""
    manifest = checkpoints.manifests(job.run_dir)[0]
    name = next(name for name in sorted(manifest.files) if name.endswith(".distcp"))
    with (job.run_dir / checkpoints.FOLDER / manifest.folder / name).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    f4_rank_dies(job)


def f12_preempted(job: Job) -> int:
    """SIGTERM to the whole job; nobody is left; it is begun again."""
    before = job.version
    job.requeue()
    return before


def _jump(job: Job, pid: int, offset_s: int) -> None:
    """Off by so much for five seconds, and back: two jumps, one of them backwards."""
    job.world.move_clock(pid, offset_s)
    time.sleep(5)
    if pid in (0, job.one(CONTROLLER).pid):
        seen_s = read_status(job.run_dir).updated_unix - time.time()
        if abs(seen_s - offset_s) > 60:
            raise RuntimeError(
                f"the controller's clock is off by {seen_s:.0f} s instead of {offset_s}"
            )
    job.world.move_clock(0, 0)


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
    """From here on a prompt holds a token that the model lacks (workflow.py)."""
    (job.world.folder / "poisoned").unlink(missing_ok=True)
    job.world.raise_flag("poison")
    job.world.wait_for_flag("poison", FLAG_S)


MALFORMED = {  # setting -> what the error must name
    "staleness.etta=1": "staleness.max_staleness",
    "rollout.max_new_tokens=many": "rollout.max_new_tokens",
    "algorithm.loss.clip_eps=-1": "algorithm.loss.clip_eps",
    "data.train=/nowhere.jsonl": "data.train",
}


def f15_malformed_settings(job: Job) -> int:
    """Ended, begun again with settings that cannot be: refused by name before anything starts, and nothing is touched."""
    before = job.version
    job.end()
    seq = job.seq
    for setting, name in MALFORMED.items():
        code, said = job.try_start(setting)
        if (
            code != processes.EXIT_ERROR
            or name not in said
            or "Traceback" in said
            or job.seq != seq
        ):
            raise RuntimeError(f"{setting}: exit code {code}, {said!r}")
    job.start()
    return before


def f16_replayed_messages(job: Job) -> None:
    """A peer with all keys says again, thrice and in disorder, what others have said of the newest groups, and lies."""
    facts = list(read_events(job.run_dir / JOURNAL_FILE))
    epoch = next(fact.epoch for fact in reversed(facts) if isinstance(fact, ControllerStarted))
    messages: list[Message] = []
    for fact in facts[-400:]:
        if isinstance(fact, SampleReturned):
            for attempt, of in ((1, epoch), (2, epoch), (1, epoch - 1)):
                key = SampleKey(of, fact.group_id, attempt, fact.index)
                messages += [Generated(key, fact.sample), GenerateFailed(key, "a lie")]
        elif isinstance(fact, SampleScored):
            messages += [
                ScoreResult(SampleKey(epoch, fact.group_id, attempt, fact.index), 1.0 - fact.reward)
                for attempt in (1, 2)
            ]
    messages += [StepDone(version, {}) for version in range(max(0, job.version - 3), job.version)]
    messages *= 3
    job.random.shuffle(messages)

    async def say() -> None:
        link = Link(job.run_dir)
        try:
            await link.join(Hello("reward", "reward-99", os.getpid(), capacity=0), 20)
            for message in messages:
                await link.send(message)
        finally:
            link.close()

    asyncio.run(say())


def f17_peers_of_other_versions(job: Job) -> None:
    """Workers with all keys whose package, messages or tokenizer are others: each is refused, with both sides' values."""

    async def join(hello: Hello) -> str:
        link = Link(job.run_dir)
        try:
            await link.join(hello, 20)
        except ProtocolError as e:
            return str(e)
        finally:
            link.close()
        return "welcome"

    ours = transport.__version__, transport.SCHEMA
    for versions, tokenizer, what in (
        (("0.0.1", ours[1]), "", f"package version 0.0.1 there, {ours[0]} here"),
        ((ours[0], "0000"), "", f"message schema 0000 there, {ours[1]} here"),
        (ours, "0000", "tokenizer 0000 there"),
    ):
        transport.__version__, transport.SCHEMA = versions  # what this process says of itself
        said = asyncio.run(
            join(Hello("rollout", "rollout-0", os.getpid(), capacity=64, tokenizer=tokenizer))
        )
        transport.__version__, transport.SCHEMA = ours
        if what not in said:
            raise RuntimeError(f"a peer with {what} was told {said!r}")


def f18_loss_is_nan(job: Job) -> None:
    """The next loss on one rank is NaN (hooks/sitecustomize.py): the step is refused, nothing of it is served."""
    job.world.raise_flag("nan")
    job.world.wait_for_flag("nan", FLAG_S)


def f19_the_run_ends(job: Job) -> int:
    """Its last steps, groups in flight: every process ends by itself, in time. Then more steps are asked of it."""
    last = job.version + 6
    job.end()
    job.start(f"run.steps={last}")
    code = job.launcher.wait(180)
    if code != 0:
        raise RuntimeError(f"exit code {code} of a run that was to end at version {last}")
    job.check_nobody_left()
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
    "F8": (f8_host_is_cut_off, f8_host_hears_nothing, f8_host_is_not_heard),
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
    "F19": (f19_the_run_ends,),
}
