"""The controller over its real socket.

Which workers are accepted, which must rejoin, and the state that a restarted controller recovers.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from controller_shell import ask, hello_of, with_controller
from journal_builders import journal_events, write_checkpoint

from megatron_async_rl import __version__
from megatron_async_rl.controller import controller as controller_module
from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, Journal
from megatron_async_rl.data.tokenizer import fingerprint
from megatron_async_rl.errors import DataError, Error
from megatron_async_rl.protocol.link import Link
from megatron_async_rl.protocol.messages import (
    Heartbeat,
    Refused,
    RejoinRequest,
    Shutdown,
    Welcome,
)
from megatron_async_rl.protocol.weight_messages import (
    Bucket,
    Published,
    PublishOffer,
    TensorSpec,
    UpdateWeights,
)
from megatron_async_rl.protocol.wire import SCHEMA


@pytest.mark.parametrize(
    ("field", "theirs", "what", "remedy"),
    [
        (
            "package",
            "0.0.9",
            f"package version 0.0.9 there, {__version__} here",
            "install the same version",
        ),
        ("schema", "feed", f"message schema feed there, {SCHEMA} here", "install the same version"),
        ("schema", "", f"message schema unknown there, {SCHEMA} here", "install the same version"),
        ("tokenizer", "beef", "tokenizer beef there, ", "put the same files under model.path"),
    ],
)
def test_incompatible_worker_is_refused_with_a_remedy(
    model_and_dataset: tuple[Path, Path],
    tmp_path: Path,
    field: str,
    theirs: str,
    what: str,
    remedy: str,
) -> None:
    async def test(controller: Controller, link: Link) -> None:
        other = msgspec.structs.replace(
            hello_of(model_and_dataset, "rollout", "rollout-0"), **{field: theirs}
        )
        refused = await ask(link, other)
        assert isinstance(refused, Refused)
        assert (
            refused.reason.startswith(f"rollout-0 and the controller differ: {what}")
            and remedy in refused.reason
        )
        assert len(controller.workers) == 0
        assert isinstance(
            await ask(link, hello_of(model_and_dataset, "rollout", "rollout-0")), Welcome
        )  # the run goes on

    with_controller(model_and_dataset, tmp_path, test)


def test_worker_with_unreadable_hello_is_refused_by_name(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    async def test(controller: Controller, link: Link) -> None:
        old = {"type": "Hello", "role": "trainer", "name": "trainer-0", "pid": 1, "protocol": 1}
        await link._socket.send_multipart([msgspec.msgpack.encode(old)])
        refused = await link._receive()
        assert isinstance(refused, Refused) and refused.reason.startswith(
            "trainer-0 and the controller differ: package"
        )
        assert len(controller.workers) == 0

    with_controller(model_and_dataset, tmp_path, test)


def test_tokenizer_fingerprint_ignores_how_the_folder_was_saved(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    tokenizer = json.loads((model_and_dataset[0] / "tokenizer.json").read_text())
    settings = json.loads((model_and_dataset[0] / "tokenizer_config.json").read_text())

    def saved(tokenizer: dict, settings: dict) -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3, sort_keys=True))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return fingerprint(tmp_path)

    assert saved(tokenizer, settings) == fingerprint(model_and_dataset[0])
    assert saved(tokenizer, settings | {"chat_template": "{{ messages }}"}) != fingerprint(
        model_and_dataset[0]
    )
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = vocabulary
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    assert saved(tokenizer, settings) != fingerprint(model_and_dataset[0])


def test_unknown_and_lost_workers_must_rejoin(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    async def test(controller: Controller, link: Link) -> None:
        assert await ask(link, Heartbeat()) == RejoinRequest()
        assert isinstance(
            await ask(link, hello_of(model_and_dataset, "rollout", "rollout-0", serving=0)), Welcome
        )
        assert controller.core.fleet.rollout[
            "rollout-0"
        ].is_serving  # it served before this controller started
        await controller.queue.submit(inputs.WorkerLost("rollout-0"))
        assert await ask(link, Heartbeat()) == RejoinRequest()
        assert isinstance(
            await ask(link, hello_of(model_and_dataset, "rollout", "rollout-0", serving=0)), Welcome
        )
        assert not controller.core.fleet.rollout[
            "rollout-0"
        ].is_serving  # lost since this controller started: not trusted

    with_controller(model_and_dataset, tmp_path, test)


def test_each_controller_start_has_its_own_epoch(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    epochs = []

    async def test(controller: Controller, link: Link) -> None:
        welcome = await ask(link, hello_of(model_and_dataset, "reward", "reward-0"))
        assert isinstance(welcome, Welcome)
        epochs.append(welcome.epoch)
        await controller.journal.durable()

    for _ in range(3):
        with_controller(model_and_dataset, tmp_path, test)
    assert epochs == [1, 2, 3]


def test_journal_shorter_than_the_checkpoint_is_refused(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, 2, journal_seq=100)

    async def test(controller: Controller, link: Link) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(
        DataError, match=r"written after 100 events, but the journal .* has 0.*--from-scratch"
    ):
        with_controller(model_and_dataset, tmp_path, test)


def test_journal_of_another_dataset_is_refused(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    journal = Journal(tmp_path / JOURNAL_FILE)
    journal.append(journal_events())
    journal.close()

    async def test(controller: Controller, link: Link) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(Error, match=r"the dataset or run\.seed changed"):
        with_controller(model_and_dataset, tmp_path, test)


def test_shutdown_during_an_update_ends_the_controller(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    """A controller that is stopped during an update does not wait for the trainer's next offer."""

    async def test(controller: Controller, link: Link) -> None:
        trainer, judge = Link(tmp_path), Link(tmp_path)
        try:
            await ask(link, hello_of(model_and_dataset, "rollout", "rollout-0"))
            await ask(judge, hello_of(model_and_dataset, "reward", "reward-0"))
            await ask(
                trainer, hello_of(model_and_dataset, "trainer", "trainer-0", leader=0, stage=0)
            )
            await trainer.send(
                PublishOffer(0, 0, 1, [Bucket([TensorSpec("w", "float32", [2])])], "gloo")
            )
            while not isinstance(await link._receive(), UpdateWeights):
                pass  # never answered
            [conducting] = [
                t
                for t in asyncio.all_tasks()
                if getattr(t.get_coro(), "__name__", "") == "_conduct"
            ]
            conducting.cancel()
            await asyncio.wait({conducting}, timeout=5)
            assert conducting.cancelled()
        finally:
            trainer.close()
            judge.close()

    with_controller(model_and_dataset, tmp_path, test)


def test_update_ends_when_its_server_rejoins(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    """Long before weights.update_timeout_s = 120; the next update includes the new server."""

    async def test(controller: Controller, link: Link) -> None:
        trainer, judge, anew = Link(tmp_path), Link(tmp_path), Link(tmp_path)
        offer = PublishOffer(0, 0, 1, [Bucket([TensorSpec("w", "float32", [2])])], "gloo")
        try:
            await ask(link, hello_of(model_and_dataset, "rollout", "rollout-0"))
            await ask(judge, hello_of(model_and_dataset, "reward", "reward-0"))
            await ask(
                trainer, hello_of(model_and_dataset, "trainer", "trainer-0", leader=0, stage=0)
            )
            await trainer.send(offer)
            while not isinstance(await link._receive(), UpdateWeights):
                pass  # never answered
            assert isinstance(
                await ask(anew, hello_of(model_and_dataset, "rollout", "rollout-0")), Welcome
            )
            assert await trainer._receive() == Published(0, 0)
            await trainer.send(offer)
            while not isinstance(await anew._receive(), UpdateWeights):
                pass
        finally:
            for opened in (trainer, judge, anew):
                opened.close()

    with_controller(model_and_dataset, tmp_path, test)


def test_server_lost_before_an_update_is_left_out(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    """The controller waits for the journal between choosing the servers and the update."""

    async def test(controller: Controller, link: Link) -> None:
        await ask(link, hello_of(model_and_dataset, "rollout", "rollout-0"))
        offer = PublishOffer(0, 0, 1, [Bucket([TensorSpec("w", "float32", [2])])], "gloo")
        chosen = ["rollout-0", "rollout-1"]  # rollout-1 is already lost
        update = asyncio.create_task(controller.updates._update(0, {"trainer-0": offer}, chosen))
        while not isinstance(await link._receive(), UpdateWeights):
            pass
        assert not update.done()
        update.cancel()

    with_controller(model_and_dataset, tmp_path, test)


def test_second_hello_of_a_trainer_withdraws_its_offer(
    model_and_dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    """After a restart of the controller a trainer may send two hellos.

    Each of its messages is answered by RejoinRequest, and each RejoinRequest by a hello.
    """

    async def test(controller: Controller, link: Link) -> None:
        trainer, judge = Link(tmp_path), Link(tmp_path)
        hello = hello_of(model_and_dataset, "trainer", "trainer-0", leader=0, stage=0)
        offer = PublishOffer(0, 0, 1, [Bucket([TensorSpec("w", "float32", [2])])], "gloo")
        try:
            await ask(trainer, hello)
            await trainer.send(offer)
            await ask(trainer, hello)
            await ask(link, hello_of(model_and_dataset, "rollout", "rollout-0"))
            await ask(
                judge, hello_of(model_and_dataset, "reward", "reward-0")
            )  # all workers have joined: the first update may begin
            await asyncio.sleep(0.3)
            [conducting] = [
                t
                for t in asyncio.all_tasks()
                if getattr(t.get_coro(), "__name__", "") == "_conduct"
            ]
            assert not conducting.done()
            await trainer.send(offer)
            while not isinstance(await link._receive(), UpdateWeights):
                pass
        finally:
            trainer.close()
            judge.close()

    with_controller(model_and_dataset, tmp_path, test)


def test_controller_that_restarts_after_the_last_update_ends_the_run(
    model_and_dataset: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer has ended, so no offer of weights will come."""
    monkeypatch.setattr(controller_module, "REJOIN_TICKS", 1)
    monkeypatch.setattr(controller_module, "COMMIT_S", 0.1)  # nothing was saved here

    async def test(controller: Controller, link: Link) -> None:
        controller.core.admitting = True  # as after a restart; `run` has not begun
        controller.core.state.version = 5  # run.steps
        hello = hello_of(model_and_dataset, "rollout", "rollout-0", serving=5)
        assert isinstance(await ask(link, hello), Welcome)
        while not isinstance(message := await link._receive(), Shutdown):
            pass
        assert message.reason == "the run is complete"

    with_controller(model_and_dataset, tmp_path, test)


def test_crash_of_the_controller_ends_no_worker(
    model_and_dataset: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that is told to shut down would end in order and would not be started again."""

    async def test(controller: Controller, link: Link) -> None:
        trainer = hello_of(model_and_dataset, "trainer", "trainer-0", leader=0, stage=0)
        assert isinstance(await ask(link, trainer), Welcome)
        crashed = asyncio.Event()

        def crash(*arguments: object) -> None:
            crashed.set()
            raise KeyError("a bug")

        monkeypatch.setattr(controller.core, "handle", crash)
        await link.send(Heartbeat())
        await asyncio.wait_for(crashed.wait(), 10)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(link._receive(), 1.0)

    with_controller(model_and_dataset, tmp_path, test)
