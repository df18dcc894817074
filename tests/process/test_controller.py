"""The controller's shell over its real socket: who is welcome, who must say hello, and what its next life remembers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import pytest
from test_config import tree
from test_journal import some_facts, write_checkpoint
from tiny import make_dataset, make_model

from megatron_async_rl import __version__
from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, Journal
from megatron_async_rl.data.tokenizer import fingerprint
from megatron_async_rl.errors import DataError, Error
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.protocol.messages import (
    Bucket,
    Heartbeat,
    Hello,
    Message,
    Published,
    PublishOffer,
    Refused,
    RejoinRequest,
    TensorSpec,
    UpdateWeights,
    Welcome,
)
from megatron_async_rl.protocol.transport import Hub, Link, with_versions
from megatron_async_rl.protocol.wire import SCHEMA

TIMEOUT_S = 20.0
Closes = TypeVar("Closes", Journal, RunLog, Hub, Link)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_model(folder / "model"), make_dataset(folder / "train.jsonl", 20)


def settings(inputs: tuple[Path, Path], run_dir: Path) -> Config:
    model, train = inputs
    return load.from_tree(
        tree(
            run={"dir": str(run_dir), "steps": 5},
            model={"path": str(model), "context_tokens": 96},
            data={"train": str(train)},
            algorithm={"prompts_per_step": 2, "samples_per_prompt": 2},
        )
    )


def with_controller(
    inputs: tuple[Path, Path], run_dir: Path, test: Callable[[Controller, Link], Awaitable[None]]
) -> None:
    """A controller that runs, and a worker's socket."""

    async def body() -> None:
        chosen = settings(inputs, run_dir)
        with contextlib.ExitStack() as opened:

            def closing(part: Closes) -> Closes:
                opened.callback(part.close)
                return part

            journal, log = (
                closing(Journal(run_dir / JOURNAL_FILE)),
                closing(RunLog(run_dir, chosen)),
            )
            hub = closing(Hub(run_dir))
            link = closing(Link(run_dir))
            controller = Controller(chosen, hub, log, journal)
            running = asyncio.create_task(controller.run())
            try:
                await asyncio.wait_for(test(controller, link), TIMEOUT_S)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    asyncio.run(body())


async def answer(link: Link, message: Message) -> Message:
    await link.send(message)
    return await link._receive()


def hello_of(
    inputs: tuple[Path, Path], role: Literal["rollout", "reward", "trainer"], name: str, **more: int
) -> Hello:
    """As a worker of this version that sees this model folder says it."""
    return with_versions(Hello(role, name, 1, capacity=4, tokenizer=fingerprint(inputs[0]), **more))


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
def test_a_worker_that_differs_is_refused_with_both_sides_and_the_remedy(
    inputs: tuple[Path, Path], tmp_path: Path, field: str, theirs: str, what: str, remedy: str
) -> None:
    async def test(controller: Controller, link: Link) -> None:
        other = msgspec.structs.replace(hello_of(inputs, "rollout", "rollout-0"), **{field: theirs})
        refused = await answer(link, other)
        assert isinstance(refused, Refused)
        assert (
            refused.reason.startswith(f"rollout-0 and the controller differ: {what}")
            and remedy in refused.reason
        )
        assert len(controller.workers) == 0
        assert isinstance(
            await answer(link, hello_of(inputs, "rollout", "rollout-0")), Welcome
        )  # the run goes on

    with_controller(inputs, tmp_path, test)


def test_a_worker_whose_hello_cannot_be_read_is_refused_by_name(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    async def test(controller: Controller, link: Link) -> None:
        old = {"type": "Hello", "role": "trainer", "name": "trainer-0", "pid": 1, "protocol": 1}
        await link._socket.send_multipart([msgspec.msgpack.encode(old)])
        refused = await link._receive()
        assert isinstance(refused, Refused) and refused.reason.startswith(
            "trainer-0 and the controller differ: package"
        )
        assert len(controller.workers) == 0

    with_controller(inputs, tmp_path, test)


def test_a_model_folder_saved_anew_is_the_same_tokenizer_and_any_other_is_not(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    tokenizer = json.loads((inputs[0] / "tokenizer.json").read_text())
    settings = json.loads((inputs[0] / "tokenizer_config.json").read_text())

    def saved(tokenizer: dict, settings: dict) -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3, sort_keys=True))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return fingerprint(tmp_path)

    assert saved(tokenizer, settings) == fingerprint(inputs[0])
    assert saved(tokenizer, settings | {"chat_template": "{{ messages }}"}) != fingerprint(
        inputs[0]
    )
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = vocabulary
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    assert saved(tokenizer, settings) != fingerprint(inputs[0])


def test_who_is_not_known_must_say_hello_and_who_was_lost_too(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    async def test(controller: Controller, link: Link) -> None:
        assert await answer(link, Heartbeat()) == RejoinRequest()
        assert isinstance(
            await answer(link, hello_of(inputs, "rollout", "rollout-0", serving=0)), Welcome
        )
        assert controller.core.fleet.rollout[
            "rollout-0"
        ].is_serving  # it served before this life began
        controller.core.worker_lost("rollout-0", 0.0)
        assert await answer(link, Heartbeat()) == RejoinRequest()
        assert isinstance(
            await answer(link, hello_of(inputs, "rollout", "rollout-0", serving=0)), Welcome
        )
        assert not controller.core.fleet.rollout[
            "rollout-0"
        ].is_serving  # lost once in this life: not trusted again

    with_controller(inputs, tmp_path, test)


def test_each_life_has_an_epoch_of_its_own(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    epochs = []

    async def test(controller: Controller, link: Link) -> None:
        welcome = await answer(link, hello_of(inputs, "reward", "reward-0"))
        assert isinstance(welcome, Welcome)
        epochs.append(welcome.epoch)
        await controller.journal.durable()

    for _ in range(3):
        with_controller(inputs, tmp_path, test)
    assert epochs == [1, 2, 3]


def test_a_journal_that_is_shorter_than_the_checkpoint_says_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, 2, journal_seq=100)

    async def test(controller: Controller, link: Link) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(
        DataError, match=r"written after 100 facts, but the journal .* has 0.*--from-scratch"
    ):
        with_controller(inputs, tmp_path, test)


def test_a_journal_of_another_dataset_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    journal = Journal(tmp_path / JOURNAL_FILE)
    journal.append(some_facts())
    journal.close()

    async def test(controller: Controller, link: Link) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(Error, match=r"the dataset or run\.seed changed"):
        with_controller(inputs, tmp_path, test)


def test_the_end_of_the_run_is_not_taken_for_a_trainer_that_came_back(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Told to end in the middle of an update, the controller ends: it does not wait for the trainer's next offer."""

    async def test(controller: Controller, link: Link) -> None:
        trainer, judge = Link(tmp_path), Link(tmp_path)
        try:
            await answer(link, hello_of(inputs, "rollout", "rollout-0"))
            await answer(judge, hello_of(inputs, "reward", "reward-0"))
            await answer(trainer, hello_of(inputs, "trainer", "trainer-0", leader=0, stage=0))
            await trainer.send(
                PublishOffer(0, 0, 1, [Bucket([TensorSpec("w", "float32", [2])])], "gloo")
            )
            while not isinstance(await link._receive(), UpdateWeights):
                pass  # and it is never answered
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

    with_controller(inputs, tmp_path, test)


def test_an_update_ends_when_a_new_life_of_the_server_that_it_waits_for_says_hello(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Long before weights.update_timeout_s = 120; and the new life is in the next one."""

    async def test(controller: Controller, link: Link) -> None:
        trainer, judge, anew = Link(tmp_path), Link(tmp_path), Link(tmp_path)
        offer = PublishOffer(0, 0, 1, [Bucket([TensorSpec("w", "float32", [2])])], "gloo")
        try:
            await answer(link, hello_of(inputs, "rollout", "rollout-0"))
            await answer(judge, hello_of(inputs, "reward", "reward-0"))
            await answer(trainer, hello_of(inputs, "trainer", "trainer-0", leader=0, stage=0))
            await trainer.send(offer)
            while not isinstance(await link._receive(), UpdateWeights):
                pass  # and it is never answered
            assert isinstance(await answer(anew, hello_of(inputs, "rollout", "rollout-0")), Welcome)
            assert await trainer._receive() == Published(0, 0)
            await trainer.send(offer)
            while not isinstance(await anew._receive(), UpdateWeights):
                pass
        finally:
            for opened in (trainer, judge, anew):
                opened.close()

    with_controller(inputs, tmp_path, test)


def test_a_server_that_is_lost_before_its_update_begins_is_left_out(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """The journal is waited for between the choice of servers and the update."""

    async def test(controller: Controller, link: Link) -> None:
        await answer(link, hello_of(inputs, "rollout", "rollout-0"))
        offer = PublishOffer(0, 0, 1, [Bucket([TensorSpec("w", "float32", [2])])], "gloo")
        chosen = ["rollout-0", "rollout-1"]  # of these rollout-1 is there no more
        update = asyncio.create_task(controller.updates._publish(0, {"trainer-0": offer}, chosen))
        while not isinstance(await link._receive(), UpdateWeights):
            pass
        assert not update.done()
        update.cancel()

    with_controller(inputs, tmp_path, test)


def test_a_trainer_that_says_hello_twice_has_offered_nothing_until_it_offers_again(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """After a crash of the controller each message on the way is answered by SayHello, and each of those by a hello."""

    async def test(controller: Controller, link: Link) -> None:
        trainer, judge = Link(tmp_path), Link(tmp_path)
        hello = hello_of(inputs, "trainer", "trainer-0", leader=0, stage=0)
        offer = PublishOffer(0, 0, 1, [Bucket([TensorSpec("w", "float32", [2])])], "gloo")
        try:
            await answer(trainer, hello)
            await trainer.send(offer)
            await answer(trainer, hello)
            await answer(link, hello_of(inputs, "rollout", "rollout-0"))
            await answer(
                judge, hello_of(inputs, "reward", "reward-0")
            )  # all are there: the first update may begin
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

    with_controller(inputs, tmp_path, test)
