"""Weight updates of a real SGLang server while requests are running, for each interruption mode.

One server, two random models: the weights of the second model arrive while requests with shared
prompts are running. The logprob of every token is compared with transformers, under the weights
that the token is labelled with.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from needs import needs_engine
from safetensors.torch import load_file, save_file
from tiny_model import make_model
from transformers import AutoModelForCausalLM
from update_parts import NEW_TOKENS, Sent, make_config

from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.protocol.weight_messages import (
    Bucket,
    JoinGroup,
    ReceiveBuckets,
    StageBuckets,
    TensorSpec,
    Updated,
    UpdateWeights,
    WeightDigests,
)
from megatron_async_rl.rollout.engine_client import EngineClient, RequestOutput, Sampling
from megatron_async_rl.rollout.engine_process import SGLangServer
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.interruption import Pause
from megatron_async_rl.rollout.weight_update import WeightUpdates
from megatron_async_rl.weights.digest import EngineDigests
from megatron_async_rl.weights.update_group import UpdateGroup

pytestmark = needs_engine
group_numbers = itertools.count(1)


@functools.cache
def contents(folder: Path) -> tuple[dict[str, torch.Tensor], list[Bucket], dict[str, str]]:
    """Returns the tensors of a model, the buckets that they are sent in, and their digests."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    specs = [TensorSpec(name, "float32", list(tensors[name].shape)) for name in names]
    digests = EngineDigests(HfConfig(folder).shape(), 1)
    for name in names:
        digests.add(name, tensors[name])
    buckets = [Bucket(specs[start : start + 4]) for start in range(0, len(specs), 4)]
    return tensors, buckets, digests.result()


@dataclass
class Trainer:
    """Sends the tensors of a folder like a weight source, in buckets of four tensors."""

    updates: WeightUpdates
    sent: Sent
    group: UpdateGroup | None = None

    async def publish(self, version: int, folder: Path, corrupt: bool = False) -> Updated:
        tensors, buckets, expected = contents(folder)
        if corrupt:
            norm = tensors["model.norm.weight"].clone()
            norm.view(torch.int32)[3] ^= 1
            tensors = tensors | {"model.norm.weight": norm}
        await self.updates.handle(UpdateWeights(version))
        group = self.group or await self.join()
        receive = asyncio.create_task(
            self.updates.handle(
                ReceiveBuckets(version, [StageBuckets(group.name, buckets)], verify=True)
            )
        )
        await asyncio.to_thread(self.send, group, buckets, tensors)
        self.updates.deliver(WeightDigests(version, expected))
        await receive
        answer = self.sent.messages[-1]
        assert isinstance(answer, Updated)
        return answer

    async def join(self) -> UpdateGroup:
        name = f"weights-{next(group_numbers)}-stage0"
        self.group = group = UpdateGroup(name, 2, "gloo", "127.0.0.1", 60.0)
        order = JoinGroup(name, group.address, group.port, 1, 2, "gloo")
        await asyncio.gather(self.updates.handle(order), asyncio.to_thread(group.join))
        return group

    @staticmethod
    def send(group: UpdateGroup, buckets: list[Bucket], tensors: dict[str, torch.Tensor]) -> None:
        for bucket in buckets:
            parts = [
                tensors[spec.name].contiguous().view(torch.uint8).flatten()
                for spec in bucket.tensors
            ]
            group.broadcast(torch.cat(parts))
            group.wait()


@dataclass
class Rollout:
    """A gate, the engine behind it, and the trainer that sends it weights."""

    gate: Gate
    client: EngineClient
    updates: WeightUpdates
    trainer: Trainer

    async def generate(self, prompt: list[int], num_new: int = NEW_TOKENS) -> RequestOutput:
        async with self.gate.request():
            key = self.updates.interruption.cache_key()
            return await self.client.generate(prompt, Sampling(num_new, 1.0, []), key)

    async def start(self, prompts: list[list[int]]) -> list[asyncio.Task[RequestOutput]]:
        """Starts one request per prompt; returns when each has a dozen tokens."""
        requests = [asyncio.create_task(self.generate(prompt)) for prompt in prompts]
        await self.generate(prompts[0], 12)  # in the same batch
        return requests

    async def run_through_update(
        self, version: int, folder: Path, prompts: list[list[int]]
    ) -> list[RequestOutput]:
        """Publishes `folder` in the middle of one request per prompt.

        The prompts are in the prefix cache.
        """
        await asyncio.gather(*(self.generate(prompt, 2) for prompt in prompts))
        requests = await self.start(prompts)
        updated = await self.trainer.publish(version, folder)
        assert not updated.error and updated.num_interrupted >= len(prompts) // 2
        return list(await asyncio.gather(*requests))


@dataclass
class Models:
    folders: list[Path]  # two

    def __post_init__(self) -> None:
        self.models = [
            AutoModelForCausalLM.from_pretrained(f, dtype="float32").eval() for f in self.folders
        ]
        for folder in self.folders:  # not while requests are running
            contents(folder)

    def fresh(self, which: int, prompt: list[int], ids: list[int]) -> np.ndarray:
        """[num_ids]: logprobs of `ids` after `prompt`, by one prefill of the whole."""
        return self.mixed(which, which, 1, prompt, ids)

    def mixed(
        self, before: int, after: int, num_before: int, prompt: list[int], ids: list[int]
    ) -> np.ndarray:
        """[num_ids]: the same on one KV cache, under two models.

        Model `before` samples the first `num_before` tokens (at least 1), `after` the others.
        """
        tokens = torch.tensor([prompt + ids])
        cut = len(prompt) + num_before - 1  # the last token that `before` sampled is fed to `after`
        with torch.no_grad():
            first = self.models[before](input_ids=tokens[:, :cut], use_cache=True)
            second = self.models[after](
                input_ids=tokens[:, cut:], past_key_values=first.past_key_values
            )
        logits = torch.cat([first.logits[0], second.logits[0]])[len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folders = [make_model(tmp_path_factory.mktemp("models") / str(seed), seed) for seed in (0, 1)]
    for folder in folders:  # the end token is rarely sampled, so that requests are long
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"][0] = 0.0
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Models(folders)


@pytest.fixture(scope="module")
def server(
    models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[asyncio.Runner, SGLangServer]]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "logs").mkdir()
    (folder / "keys").mkdir(mode=0o700)
    server = SGLangServer(make_config(models.folders[0], folder), folder, "rollout-0")
    with asyncio.Runner() as runner:
        runner.run(server.start())
        yield runner, server
        runner.run(server.stop())


@contextmanager
def rollout(
    server: SGLangServer, models: Models, run_dir: Path, **weights: str
) -> Iterator[Rollout]:
    settings, sent, gate = make_config(models.folders[0], run_dir, **weights), Sent(), Gate()
    updates = WeightUpdates(settings, sent, server.client, gate)  # type: ignore[arg-type]
    trainer = Trainer(updates, sent)
    yield Rollout(gate, server.client, updates, trainer)
    if trainer.group:
        trainer.group.close()


def prompts(num: int) -> list[list[int]]:
    """Pairs of equal prompts, all with a common prefix."""
    rng = np.random.default_rng(5)
    common = rng.integers(3, 34, 24).tolist()
    return [common + rng.integers(3, 34, 16).tolist() for _ in range(num // 2) for _ in range(2)][
        :num
    ]


def segments(part: RequestOutput) -> list[tuple[int, list[int], np.ndarray]]:
    return [
        (segment.version, segment.ids, np.asarray(segment.logprobs)) for segment in part.segments
    ]


def test_retracted_and_new_requests_use_only_new_weights(
    server: tuple[asyncio.Runner, SGLangServer], models: Models, tmp_path: Path
) -> None:
    asked = prompts(10)

    async def scenario(rollout: Rollout) -> None:
        assert not (await rollout.trainer.publish(10, models.folders[0])).error
        parts = await rollout.run_through_update(11, models.folders[1], asked)
        later = list(await asyncio.gather(*map(rollout.generate, asked)))
        assert {version for part in later for version, _, _ in segments(part)} == {11}
        spanning = [part for part in parts if [s.version for s in part.segments] == [10, 11]]
        assert len(spanning) >= 4
        differs = 0.0
        for prompt, part in zip(asked + asked, parts + later, strict=True):
            ids = [token for segment in part.segments for token in segment.ids]
            done = 0
            for version, these, said in segments(part):
                expected = models.fresh(version - 10, prompt, ids)[done : done + len(these)]
                np.testing.assert_allclose(said, expected, atol=1e-3)
                if done and len(these) > 8:
                    # the logprobs that a KV cache of the old weights would have given
                    stale = models.mixed(0, 1, done, prompt, ids)[done:]
                    differs = max(differs, float(np.abs(said - stale).max()))
                done += len(these)
        assert differs > 0.1

    runner, engine = server
    with rollout(engine, models, tmp_path, interrupt="retract") as it:
        assert isinstance(it.updates.interruption, Pause)
        runner.run(scenario(it))


def test_kept_kv_cache_is_labelled_and_not_shared_with_new_requests(
    server: tuple[asyncio.Runner, SGLangServer], models: Models, tmp_path: Path
) -> None:
    asked = prompts(10)

    async def scenario(rollout: Rollout) -> None:
        assert not (await rollout.trainer.publish(20, models.folders[0])).error
        parts = await rollout.run_through_update(21, models.folders[1], asked)
        spanning = [
            (p, part) for p, part in zip(asked, parts, strict=True) if len(part.segments) == 2
        ]
        assert len(spanning) >= 4
        for prompt, part in spanning:  # the label changes exactly where the weights did
            assert [segment.version for segment in part.segments] == [20, 21]
            ids = [token for segment in part.segments for token in segment.ids]
            said = np.concatenate([logprobs for _, _, logprobs in segments(part)])
            expected = models.mixed(0, 1, len(part.segments[0].ids), prompt, ids)
            np.testing.assert_allclose(said, expected, atol=1e-3)
        first = await rollout.generate(asked[0], 8)
        again = await rollout.generate(asked[0], 8)
        # the old prefix is still in the cache, and is not found
        assert first.num_cached == 0 and again.num_cached > 30
        later = list(await asyncio.gather(*map(rollout.generate, asked)))
        for prompt, part in zip([asked[0]] * 2 + asked, [first, again, *later], strict=True):
            [(version, ids, said)] = segments(part)
            assert version == 21
            np.testing.assert_allclose(said, models.fresh(1, prompt, ids), atol=1e-3)

    runner, engine = server
    with rollout(engine, models, tmp_path, kv_cache="keep") as it:
        runner.run(scenario(it))


def test_requests_finish_under_their_weights_and_new_ones_wait_for_the_next(
    server: tuple[asyncio.Runner, SGLangServer], models: Models, tmp_path: Path
) -> None:
    asked = prompts(6)

    async def scenario(rollout: Rollout) -> None:
        assert not (await rollout.trainer.publish(40, models.folders[0])).error
        requests = await rollout.start(asked)
        assert rollout.gate.num_in_flight
        update = asyncio.create_task(rollout.trainer.publish(41, models.folders[1]))
        await asyncio.sleep(0)  # the gate closes
        turns = [asyncio.create_task(rollout.generate(prompt)) for prompt in asked]
        await asyncio.gather(*requests)
        assert not update.done() and not any(turn.done() for turn in turns)
        updated = await update
        assert not updated.error and updated.num_interrupted == 0
        for model, group in ((0, requests), (1, turns)):
            for prompt, part in zip(asked, await asyncio.gather(*group), strict=True):
                [(version, ids, said)] = segments(part)
                assert version == 40 + model and part.stop != "abort"
                np.testing.assert_allclose(said, models.fresh(model, prompt, ids), atol=1e-3)

    runner, engine = server
    with rollout(engine, models, tmp_path, interrupt="finish") as it:
        runner.run(scenario(it))


@pytest.mark.parametrize("weights", [{"interrupt": "retract"}, {"kv_cache": "keep"}], ids=str)
def test_requests_wait_behind_bad_weights_until_the_next_update(
    server: tuple[asyncio.Runner, SGLangServer],
    models: Models,
    tmp_path: Path,
    weights: dict[str, str],
) -> None:
    asked = prompts(4)

    async def scenario(rollout: Rollout) -> None:
        assert not (await rollout.trainer.publish(30, models.folders[0])).error
        requests = await rollout.start(asked)
        updated = await rollout.trainer.publish(31, models.folders[1], corrupt=True)
        assert "model.norm.weight" in updated.error and not rollout.gate.is_open
        under_way = [request for request in requests if not request.done()]
        assert under_way and not (await asyncio.wait(under_way, timeout=1.0))[0]
        assert not (await rollout.trainer.publish(32, models.folders[1])).error
        for part in await asyncio.gather(*under_way):
            assert 31 not in {segment.version for segment in part.segments}

    runner, engine = server
    with rollout(engine, models, tmp_path, **weights) as it:
        runner.run(scenario(it))
