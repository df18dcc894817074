"""What arrives at a receiver is the Hugging Face folder, bit for bit, from every parallel layout; and what breaks on the
way breaks no one else. Trainer ranks (weights_main.py), update groups, Publisher and transport are the real ones; the
receivers (weights_receiver.py) are processes of the tests, for an engine shows its tensors only as digests."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT, SUPPORT
from safetensors.torch import load_file, save_file

from megatron_async_rl.config import load as configuration
from megatron_async_rl.controller.weight_sync.broadcast import BroadcastPublisher
from megatron_async_rl.controller.weight_sync.session import Outcome, UpdateSession
from megatron_async_rl.controller.weight_sync.snapshot import SnapshotStore, TrainerPublisher
from megatron_async_rl.errors import PublishError
from megatron_async_rl.protocol.messages import (
    BucketsSent,
    GroupJoined,
    GroupOpened,
    Hello,
    Message,
    PublishOffer,
    Shutdown,
    SnapshotWritten,
    Updated,
    UpdateReady,
    Welcome,
)
from megatron_async_rl.protocol.transport import Hub, Peer
from megatron_async_rl.weights.folder import ModelFolder
from megatron_async_rl.weights.mapping import place

WORLD = 4
SIZES: dict[str, Any] = {
    "vocab_size": 51,  # odd: padded under TP
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "qwen3 two groups": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}
# experts of whole tiles, for an engine on a GPU: their digests are added up over the ranks that own them
FAMILIES["qwen3_moe of tiles"] = FAMILIES["qwen3_moe"] | {
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
}
LAYOUTS: list[
    tuple[str, dict[str, int], dict[str, Any]]
] = [  # family, megatron's sizes, weights' settings
    ("llama", {}, {}),
    ("qwen2", {"tensor_model": 2}, {}),
    ("qwen2", {"tensor_model": 2, "pipeline_model": 2}, {}),
    ("qwen3", {"tensor_model": 4}, {"broadcast_unit": "tensor"}),
    ("qwen3 two groups", {"tensor_model": 2, "context": 2}, {"dtype": "bfloat16"}),
    ("qwen3", {"pipeline_model": 2, "virtual_pipeline_model": 2}, {"dtype": "float16"}),
    ("llama", {"tensor_model": 2, "pipeline_model": 2, "virtual_pipeline_model": 2}, {}),
    ("qwen3_moe", {}, {}),
    ("qwen3_moe", {"expert_model": 2}, {}),
    ("qwen3_moe", {"expert_model": 4}, {"bucket_bytes": 1 << 20}),
    ("qwen3_moe", {"tensor_model": 2, "expert_model": 2}, {}),
    ("qwen3_moe", {"tensor_model": 2, "pipeline_model": 2}, {}),
    ("qwen3_moe", {"pipeline_model": 2, "expert_model": 2, "virtual_pipeline_model": 2}, {}),
    ("qwen3_moe", {"tensor_model": 2, "expert_model": 2, "expert_tensor": 1}, {}),
    ("qwen3_moe of tiles", {"tensor_model": 2, "expert_model": 2}, {"bucket_bytes": 200_000}),
]
FAULTS = ["absent", "die:0", "die:1", "die:2", "die:3", "flip", "drop"]
TIMEOUT_S = 4.0


def make_folder(folder: Path, family: str, scale: float = 1.0) -> Path:
    """Every tensor of the family's table, random, in an HF folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIZES | FAMILIES[family]))
    shape = ModelFolder(folder).shape()
    generator = torch.Generator().manual_seed(0)
    names = [
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]
    for layer in range(shape.num_layers):
        for rule in shape.family.layer:
            experts = range(shape.num_experts) if "{e}" in rule.megatron else [0]
            names += [
                f"decoder.layers.{layer}.{rule.megatron}".replace("{e}", str(e)) for e in experts
            ]
    pieces = dict(piece for name in names for piece in place(name, shape).pieces)
    tensors = {hf: scale * torch.randn(size, generator=generator) for hf, size in pieces.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_config(model: Path, sizes: dict[str, int], weights: dict[str, Any]) -> dict[str, Any]:
    ranks = 1
    for name in ("tensor_model", "pipeline_model", "context"):
        ranks *= sizes.get(name, 1)
    return {
        "run": {"dir": "unused", "steps": 1},
        "model": {"path": str(model), "context_tokens": 64},
        "data": {"train": "unused"},
        "rollout": {"max_new_tokens": 32},
        "algorithm": {"prompts_per_step": 4, "samples_per_prompt": 2},
        "trainer": {
            "precision": "fp32",
            "data_parallel_size": WORLD // ranks,
            "collective_timeout_s": 100,
        },
        "weights": {"bucket_bytes": 20000, "update_timeout_s": TIMEOUT_S} | weights,
        "megatron": {f"{name}_parallel_size": size for name, size in sizes.items()},
        "sglang": {} if model.name.endswith("tiles") else {"device": "cpu"},
    }


@dataclass
class Control:
    """The controller's end: everyone connects here, updates are driven one by one."""

    hub: Hub
    peers: dict[str, Peer] = field(default_factory=dict)
    offers: dict[str, PublishOffer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.publisher: BroadcastPublisher | TrainerPublisher = BroadcastPublisher(
            UpdateSession(self.send, TIMEOUT_S), 1, verify_every=1
        )
        self.changed = asyncio.Condition()
        self.num_buckets = 0

    async def send(self, name: str, message: Message) -> None:
        await self.hub.send(self.peers[name], message)

    async def receive(self) -> None:
        while True:
            peer, message = await self.hub.receive()
            name = next((n for n, p in self.peers.items() if p == peer), "")
            if isinstance(message, Hello):
                self.peers[message.name] = peer
                self.publisher.forget_groups()
                await self.hub.send(peer, Welcome(0))
            elif isinstance(message, PublishOffer):
                self.offers[name] = message
            elif isinstance(
                message,
                UpdateReady | GroupOpened | GroupJoined | BucketsSent | SnapshotWritten | Updated,
            ):
                self.publisher.exchange.inbox.put_nowait((name, message))
            async with self.changed:
                self.changed.notify_all()

    async def wait_for(self, what: Any) -> None:
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(what), 100)

    async def publish(self, version: int, servers: list[str]) -> tuple[Outcome, float]:
        await self.wait_for(lambda: self._all_offer(version))
        offers, self.offers = self.offers, {}
        self.num_buckets = sum(len(offer.buckets) for offer in offers.values())
        by_source = sorted(offers.values(), key=lambda offer: offer.source)
        self.senders = [
            [spec.name for bucket in offer.buckets for spec in bucket.tensors]
            for offer in by_source
        ]
        started = time.monotonic()
        outcome = await self.publisher.publish(version, offers, servers, lambda name: None)
        return outcome, time.monotonic() - started

    def _all_offer(self, version: int) -> bool:
        mine = [offer for offer in self.offers.values() if offer.version == version]
        return bool(mine) and len(mine) == mine[0].num_sources


@contextmanager
def processes(
    folder: Path, work: list[dict[str, Any]], lives: dict[str, list[str]]
) -> Iterator[None]:
    (folder / "keys").mkdir(mode=0o700)
    (folder / "work.json").write_text(json.dumps(work))
    environment = os.environ | {
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),
    }
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(WORLD),
    ]
    commands = [[*torchrun, str(SUPPORT / "weights_main.py"), str(folder)]]
    commands += [
        [sys.executable, str(SUPPORT / "weights_receiver.py"), str(folder), name, *lives_of]
        for name, lives_of in lives.items()
    ]
    children = []
    try:
        for number, command in enumerate(commands):
            log = (folder / f"process-{number}.log").open("w")
            children.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
        yield
        assert children[0].wait(60) == 0, (folder / "process-0.log").read_text()[-6000:]
    except BaseException:
        print((folder / "process-0.log").read_text()[-6000:])
        raise
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, 15)
        for child in children:
            child.wait(20)


async def drive(folder: Path, body: Any) -> Any:
    hub = Hub(folder)
    control = Control(hub)
    loop = asyncio.create_task(control.receive())
    try:
        return await body(control)
    finally:
        for peer in control.peers.values():
            await hub.send(peer, Shutdown("over"))
        loop.cancel()
        hub.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {family: make_folder(base / family.replace(" ", "-"), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def arrived(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each layout publishes twice: version 2n over the network, 2n + 1 by way of the disk; n is its number in LAYOUTS."""
    folder = tmp_path_factory.mktemp("arrived")
    work = [
        {
            "config": make_config(folders[family], sizes, weights),
            "versions": [2 * number, 2 * number + 1],
        }
        for number, (family, sizes, weights) in enumerate(LAYOUTS)
    ]

    async def body(control: Control) -> None:
        await control.wait_for(lambda: "rollout-0" in control.peers)
        for number, item in enumerate(work):
            outcome, _ = await control.publish(2 * number, ["rollout-0"])
            assert outcome.serving == ["rollout-0"]
            (folder / f"senders-{number}.json").write_text(json.dumps(control.senders))
            over_network, disk = (
                control.publisher,
                {"run": {"dir": str(folder), "steps": 1}, "weights": {"transport": "disk"}},
            )
            chosen = configuration.from_tree(item["config"] | disk)
            control.publisher = TrainerPublisher(
                over_network.exchange, chosen, SnapshotStore(chosen)
            )
            outcome, _ = await control.publish(2 * number + 1, ["rollout-0"])
            assert outcome.serving == ["rollout-0"]
            control.publisher = over_network

    with processes(folder, work, {"rollout-0": ["ok"]}):
        asyncio.run(drive(folder, body))
    return folder


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[f"{f} {s} {w}" for f, s, w in LAYOUTS])
def test_what_arrives_is_the_folder_bit_for_bit(
    arrived: Path, folders: dict[str, Path], number: int
) -> None:
    family, _, weights = LAYOUTS[number]
    dtype = getattr(torch, weights.get("dtype", "float32"))
    want = {
        name: tensor.to(dtype)
        for name, tensor in load_file(folders[family] / "model.safetensors").items()
    }
    for version in (2 * number, 2 * number + 1):  # over the network, and by way of the disk
        got = load_file(arrived / f"rollout-0-v{version}.safetensors")
        assert set(got) == set(want)
        for name, tensor in want.items():
            assert got[name].dtype == dtype and torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    "number", [n for n, layout in enumerate(LAYOUTS) if "expert_model" in layout[1]]
)
def test_experts_leave_from_the_ranks_that_own_them(arrived: Path, number: int) -> None:
    sizes = LAYOUTS[number][1]
    owners, stages = sizes["expert_model"], sizes.get("pipeline_model", 1)
    senders: list[list[str]] = json.loads((arrived / f"senders-{number}.json").read_text())
    assert len(senders) == owners * stages
    for source, names in enumerate(senders):
        owner = source % owners
        experts = {int(name.split(".")[5]) for name in names if ".experts." in name}
        assert experts == set(range(owner * 4 // owners, (owner + 1) * 4 // owners))
        assert any(".experts." not in name for name in names) == (owner == 0)


def test_a_faulty_receiver_is_fenced_in_time_and_the_other_and_the_next_update_go_on(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Two receivers and a pipeline of two stages; after each fault the faulty one comes back healthy."""
    lives = [life for fault in FAULTS for life in (fault, "ok")]
    config = make_config(
        folders["qwen3"], {"tensor_model": 2, "pipeline_model": 2}, {"bucket_bytes": 70000}
    )
    outcomes: list[tuple[str, Outcome, float]] = []

    async def body(control: Control) -> None:
        await control.wait_for(lambda: {"rollout-0", "rollout-1"} <= control.peers.keys())
        for number, life in enumerate(lives):
            known = control.peers["rollout-1"]
            outcome, seconds = await control.publish(number, ["rollout-0", "rollout-1"])
            outcomes.append((life, outcome, seconds))
            if number + 1 == len(lives):
                assert control.num_buckets == sum(
                    fault.startswith("die:") for fault in FAULTS
                )  # after each of them once
                return
            if life in ("ok", "absent"):
                await control.send("rollout-1", Shutdown("the next life takes over"))
            await control.wait_for(lambda known=known: control.peers["rollout-1"] != known)

    with processes(
        tmp_path,
        [{"config": config, "versions": [0, len(lives) - 1]}],
        {"rollout-0": ["ok"], "rollout-1": lives},
    ):
        asyncio.run(drive(tmp_path, body))
    reference = load_file(folders["qwen3"] / "model.safetensors")
    for number, (life, outcome, seconds) in enumerate(outcomes):
        assert "rollout-0" in outcome.serving, (life, outcome)
        assert ("rollout-1" in outcome.serving) == (life == "ok"), (life, outcome)
        assert seconds < 2.5 * TIMEOUT_S, (life, seconds)
        got = load_file(tmp_path / f"rollout-0-v{number}.safetensors")
        assert all(torch.equal(got[name], tensor) for name, tensor in reference.items())
        if life in ("flip", "drop"):
            assert "model.norm.weight" in outcome.fenced["rollout-1"]


def test_an_update_with_no_receiver_left_fails_by_name_and_the_trainer_lives(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(folders["llama"], {"tensor_model": 2}, {})

    async def body(control: Control) -> None:
        await control.wait_for(lambda: "rollout-0" in control.peers)
        known = control.peers["rollout-0"]
        with pytest.raises(PublishError, match="rollout-0"):
            await control.publish(0, ["rollout-0"])
        await control.wait_for(lambda: control.peers["rollout-0"] != known)
        outcome, _ = await control.publish(1, ["rollout-0"])
        assert outcome.serving == ["rollout-0"]

    with processes(
        tmp_path, [{"config": config, "versions": [0, 1]}], {"rollout-0": ["die:1", "ok"]}
    ):
        asyncio.run(drive(tmp_path, body))
