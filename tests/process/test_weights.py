"""A receiver gets the tensors of the Hugging Face folder bit for bit, from every parallel layout.

A faulty receiver fails alone. Trainer ranks (weights_main.py), update groups, publisher and
transport are the real ones; the receivers (weights_receiver.py) are test processes, because an
engine shows its tensors only as digests.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from model_shapes import (
    TINY_FAMILIES,
    make_model_folder,
    weights_config_tree,
)
from safetensors.torch import load_file
from weight_ranks import WeightController, drive_updates, weight_processes

from megatron_async_rl.config import load as configuration
from megatron_async_rl.controller.weight_sync.session import Outcome
from megatron_async_rl.controller.weight_sync.snapshot import SnapshotStore, TrainerPublisher
from megatron_async_rl.errors import PublishError
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.shape import map_parameter, parameter_names
from megatron_async_rl.protocol.messages import (
    Shutdown,
)

FIRST = "num_layers_in_first_pipeline_stage"
FP8 = {"quantization": "fp8_block", "bucket_bytes": 60_000}
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
    ("glm4_moe", {"tensor_model": 2, "pipeline_model": 2}, {"dtype": "bfloat16"}),
    ("deepseek_v3", {"tensor_model": 2, "expert_model": 2}, {"dtype": "bfloat16"}),
    # no experts on the first stage
    ("deepseek_v3 full queries", {"pipeline_model": 2, "expert_model": 2, FIRST: 1}, {}),
    ("qwen3_next", {"tensor_model": 2, "pipeline_model": 2}, {"dtype": "bfloat16"}),
    ("qwen3_moe of tiles", {"tensor_model": 2, "expert_model": 2}, {"bucket_bytes": 200_000}),
    ("qwen3 of blocks", {"tensor_model": 4}, FP8),
    ("qwen3_moe of blocks", {"pipeline_model": 2, "expert_model": 2}, FP8),
    ("qwen3_moe of blocks and tiles", {"tensor_model": 2, "expert_model": 2}, FP8),
]
FAULT_TIMEOUT_S = 6.0  # of updates with a faulty receiver
FAULTS = ["absent", "die:0", "die:1", "die:2", "die:3", "flip", "drop"]


def fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes block by block."""
    fp8, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), []
    for row in range(0, weight.shape[0], 128):
        for column in range(0, weight.shape[1], 128):
            block = weight[row : row + 128, column : column + 128]
            scales.append(block.abs().max() / 448)
            fp8[row : row + 128, column : column + 128] = (block / scales[-1]).to(fp8.dtype)
    return fp8, torch.stack(scales).view(weight.shape[0] // 128, -1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {
        family: make_model_folder(base / family.replace(" ", "-"), family)
        for family in TINY_FAMILIES
    }


@pytest.fixture(scope="module")
def arrived(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layout number n publishes twice: version 2n over the network, 2n + 1 through the disk."""
    folder = tmp_path_factory.mktemp("arrived")
    work = [
        {
            "config": weights_config_tree(folders[family], sizes, weights),
            "versions": [2 * number, 2 * number + 1],
        }
        for number, (family, sizes, weights) in enumerate(LAYOUTS)
    ]

    async def body(control: WeightController) -> None:
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
                over_network.session, chosen, SnapshotStore(chosen)
            )
            outcome, _ = await control.publish(2 * number + 1, ["rollout-0"])
            assert outcome.serving == ["rollout-0"]
            over_network.forget_groups()  # the next layout's ranks may have joined already
            control.publisher = over_network

    with weight_processes(folder, work, {"rollout-0": ["ok"]}):
        asyncio.run(drive_updates(folder, body))
    return folder


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[f"{f} {s} {w}" for f, s, w in LAYOUTS])
def test_received_weights_equal_the_folder_bit_for_bit(
    arrived: Path, folders: dict[str, Path], number: int
) -> None:
    family, _, weights = LAYOUTS[number]
    dtype = getattr(torch, weights.get("dtype", "float32"))
    shape = HfConfig(folders[family]).shape()
    fp32 = {  # sent in float32 in any case
        hf
        for name in parameter_names(shape)
        for hf, _ in map_parameter(name, shape).pieces
        if map_parameter(name, shape).rule.fp32
    }
    want = {
        name: tensor if name in fp32 else tensor.to(dtype)
        for name, tensor in load_file(folders[family] / "model.safetensors").items()
    }
    assert bool(fp32) == family.startswith(("glm4", "deepseek", "qwen3_next"))
    if weights is FP8:
        for name in [name for name in want if name.endswith("_proj.weight")]:
            want[name], want[f"{name}_scale_inv"] = fp8_blocks(want[name])
    for version in (2 * number, 2 * number + 1):  # over the network, through the disk
        got = load_file(arrived / f"rollout-0-v{version}.safetensors")
        assert set(got) == set(want)
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype, name
            assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    "number", [n for n, layout in enumerate(LAYOUTS) if "expert_model" in layout[1]]
)
def test_experts_are_sent_by_the_ranks_that_own_them(arrived: Path, number: int) -> None:
    sizes = LAYOUTS[number][1]
    owners, stages = sizes["expert_model"], sizes.get("pipeline_model", 1)
    senders: list[list[str]] = json.loads((arrived / f"senders-{number}.json").read_text())
    assert len(senders) == owners * stages
    for source, names in enumerate(senders):
        owner = source % owners
        experts = {int(name.split(".")[5]) for name in names if ".experts." in name}
        has_experts = FIRST not in sizes or source >= owners
        held = range(owner * 4 // owners, (owner + 1) * 4 // owners)
        assert experts == (set(held) if has_experts else set())
        assert any(".experts." not in name for name in names) == (owner == 0)


def test_faulty_receiver_is_fenced_and_the_update_continues(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Two receivers, two pipeline stages; after each fault the faulty receiver returns healthy."""
    lives = [life for fault in FAULTS for life in (fault, "ok")]
    config = weights_config_tree(
        folders["qwen3"],
        {"tensor_model": 2, "pipeline_model": 2},
        {"bucket_bytes": 70000, "update_timeout_s": FAULT_TIMEOUT_S},
    )
    outcomes: list[tuple[str, Outcome, float]] = []

    async def body(control: WeightController) -> None:
        control.publisher.session.timeout_s = FAULT_TIMEOUT_S
        await control.wait_for(lambda: {"rollout-0", "rollout-1"} <= control.peers.keys())
        for number, life in enumerate(lives):
            known = control.peers["rollout-1"]
            outcome, seconds = await control.publish(number, ["rollout-0", "rollout-1"])
            outcomes.append((life, outcome, seconds))
            if number + 1 == len(lives):
                assert control.num_buckets == sum(
                    fault.startswith("die:") for fault in FAULTS
                )  # once after each of them
                return
            if life in ("ok", "absent"):
                await control.send("rollout-1", Shutdown("the next life takes over"))
            await control.wait_for(lambda known=known: control.peers["rollout-1"] != known)

    with weight_processes(
        tmp_path,
        [{"config": config, "versions": [0, len(lives) - 1]}],
        {"rollout-0": ["ok"], "rollout-1": lives},
    ):
        asyncio.run(drive_updates(tmp_path, body))
    print([(life, round(seconds, 1)) for life, _, seconds in outcomes])
    reference = load_file(folders["qwen3"] / "model.safetensors")
    for number, (life, outcome, seconds) in enumerate(outcomes):
        assert "rollout-0" in outcome.serving, (life, outcome)
        assert ("rollout-1" in outcome.serving) == (life == "ok"), (life, outcome)
        assert seconds < 2.5 * FAULT_TIMEOUT_S, (life, seconds)
        got = load_file(tmp_path / f"rollout-0-v{number}.safetensors")
        assert all(torch.equal(got[name], tensor) for name, tensor in reference.items())
        if life in ("flip", "drop"):
            assert "model.norm.weight" in outcome.fenced["rollout-1"]


def test_update_without_receivers_fails_and_the_trainer_survives(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = weights_config_tree(
        folders["llama"], {"tensor_model": 2}, {"update_timeout_s": FAULT_TIMEOUT_S}
    )

    async def body(control: WeightController) -> None:
        control.publisher.session.timeout_s = FAULT_TIMEOUT_S
        await control.wait_for(lambda: "rollout-0" in control.peers)
        known = control.peers["rollout-0"]
        with pytest.raises(PublishError, match="rollout-0"):
            await control.publish(0, ["rollout-0"])
        await control.wait_for(lambda: control.peers["rollout-0"] != known)
        outcome, _ = await control.publish(1, ["rollout-0"])
        assert outcome.serving == ["rollout-0"]

    work, receivers = [{"config": config, "versions": [0, 1]}], {"rollout-0": ["die:1", "ok"]}
    with weight_processes(tmp_path, work, receivers):
        asyncio.run(drive_updates(tmp_path, body))


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_source_stops_at_once_when_a_server_is_lost(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The server hangs, so its connection shows nothing until the broadcast's own deadline."""
    patience_s = 90.0  # weights.update_timeout_s; the deadline is half of it
    config = weights_config_tree(folders["qwen3"], {}, {"update_timeout_s": patience_s})
    config["trainer"]["data_parallel_size"] = 2

    async def body(control: WeightController) -> tuple[Outcome, float]:
        session = control.publisher.session
        session.timeout_s = patience_s
        await control.wait_for(lambda: {"rollout-0", "rollout-1"} <= control.peers.keys())
        update = asyncio.create_task(control.publish(0, ["rollout-0", "rollout-1"]))
        await asyncio.to_thread(wait_for_file, tmp_path / "rollout-1.hangs")
        started = time.monotonic()
        session.lost("rollout-1")
        outcome, _ = await update
        return outcome, time.monotonic() - started

    receivers = {"rollout-0": ["ok"], "rollout-1": ["hang:0"]}
    work = [{"config": config, "versions": [0, 0]}]
    with weight_processes(tmp_path, work, receivers, num_ranks=2):
        outcome, seconds = asyncio.run(drive_updates(tmp_path, body))
    assert outcome.serving == ["rollout-0"]
    assert "lost during the update" in outcome.fenced["rollout-1"]
    assert seconds < patience_s / 4
    got = load_file(tmp_path / "rollout-0-v0.safetensors")
    reference = load_file(folders["qwen3"] / "model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in reference.items())
