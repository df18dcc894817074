"""After an update, a real SGLang of one and of two ranks matches transformers.

Compared is the whole distribution at every position, after an update over the network and after
one from the disk. Damaged snapshots are never served. Trainer ranks (weights_main.py, TP = 2),
publisher, rollout worker and engine are the real ones; the test takes the controller's place.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from engine_worker import engine_worker, load_snapshot
from model_shapes import make_model_folder
from needs import needs_engine
from tiny_model import CPU_ENGINE, make_model
from weight_ranks import WeightController, drive_updates, weight_processes

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.weight_sync.session import UpdateSession
from megatron_async_rl.controller.weight_sync.snapshot import SnapshotStore, TrainerPublisher
from megatron_async_rl.errors import DataError
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.engine_process import SGLangServer
from megatron_async_rl.rollout.worker import RolloutWorker
from megatron_async_rl.storage import snapshots

pytestmark = needs_engine
VOCABULARY = 37  # of tiny_model.py
IDS = [5, 9, 21, 33, 7, 7, 30, 12, 3, 36, 17, 25, 4, 11]
NAME = "rollout-0"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The model that the engine starts with, and two others."""
    base = tmp_path_factory.mktemp("models")
    return [make_model(base / f"model{seed}", seed) for seed in range(3)]


def models_of(family: str, models: list[Path], folder: Path) -> list[Path]:
    """Returns three models of another family, with the tokenizer of `models`."""
    folders = []
    for number, scale in enumerate((0.3, 0.4, 0.5)):
        folders.append(make_model_folder(folder / f"other{number}", family, scale))
        for file in models[0].glob("*token*"):
            shutil.copy(file, folders[-1])
    return folders


def config_tree(run_dir: Path, model: Path, tp: int, transport: str) -> dict[str, Any]:
    return {
        "run": {"dir": str(run_dir), "steps": 1},
        "model": {"path": str(model), "context_tokens": 64},
        "data": {"train": "unused"},
        "rollout": {"max_new_tokens": 32},
        "algorithm": {"prompts_per_step": 4, "samples_per_prompt": 2},
        "trainer": {"precision": "fp32", "data_parallel_size": 2, "collective_timeout_s": 100},
        "weights": {"bucket_bytes": 40000, "transport": transport},
        "megatron": {"tensor_model_parallel_size": 2},
        "sglang": CPU_ENGINE | {"max_total_tokens": 1024, "tp_size": tp},
    }


def publish_by(control: WeightController, config: Config) -> None:
    session = UpdateSession(control.send, config.weights.update_timeout_s)
    control.publisher = TrainerPublisher(session, config, SnapshotStore(config))


def transformers_logprobs(model: Path) -> np.ndarray:
    """[num_tokens - 1, vocabulary]: log softmax after each token but the last, by transformers."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    with torch.no_grad():
        return torch.log_softmax(policy(input_ids=torch.tensor([IDS])).logits[0, :-1], -1).numpy()


async def engine_logprobs(worker: RolloutWorker, version: int) -> np.ndarray:
    """The same by the engine: one prefill, with the top logprobs of the whole vocabulary."""
    request = {
        "input_ids": IDS,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": VOCABULARY,
    }
    client = worker._client
    reply = await client._call("POST", "/generate", request, client._api)
    assert reply["meta_info"]["weight_version"] == str(version)
    rows = reply["meta_info"]["input_top_logprobs"][1:]
    out = np.full((len(IDS) - 1, VOCABULARY), np.nan, np.float32)
    for row, entries in zip(out, rows, strict=True):
        for logprob, token, *_ in entries:
            row[token] = logprob
    assert not np.isnan(out).any()
    return out


@contextmanager
def changed_copy(
    snapshot: snapshots.Snapshot, version: int
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Copies the folder as another version; the block may change the copy and its manifest."""
    path = snapshot.path.with_name(f"v{version:06d}.0")
    shutil.copytree(snapshot.path, path)
    manifest = msgspec.to_builtins(snapshot.manifest)
    manifest["version"] = version
    yield path, manifest
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "family, tp, attention",
    [
        ("", 1, "self_attn.qkv_proj"),
        ("qwen3_next of blocks", 2, "qkv_proj"),
        ("deepseek_v3 of blocks", 2, "self_attn.kv_b_proj"),
    ],
)
def test_engine_matches_transformers_after_every_update(
    family: str, tp: int, attention: str, models: list[Path], tmp_path: Path
) -> None:
    """Qwen3; Qwen3-Next: linear and gated attention, experts and a shared one; DeepSeek-V3: latent
    attention, of whose weights the engine computes others after each update."""
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    start, second, third = models_of(family, models, tmp_path) if family else models
    config = configuration.from_tree(config_tree(run_dir, start, tp, "disk"))
    over_network = configuration.from_tree(config_tree(run_dir, start, tp, "network"))
    work = [
        {"config": config_tree(run_dir, second, tp, "network"), "versions": [0, 0]},
        {"config": config_tree(run_dir, third, tp, "disk"), "versions": [1, 1]},
    ]
    tensor = f"{tp - 1}:model.layers.1.{attention}.weight"

    async def body(control: WeightController) -> None:
        publish_by(control, over_network)
        async with engine_worker(config, run_dir, NAME) as (server, worker):
            await control.wait_for(lambda: NAME in control.peers)
            outcome, _ = await control.publish(0, [NAME])
            assert outcome.serving == [NAME]
            np.testing.assert_allclose(
                await engine_logprobs(worker, 0), transformers_logprobs(second), atol=2e-4
            )
            assert np.abs(transformers_logprobs(second) - transformers_logprobs(start)).max() > 0.1

            for ids in ([5, VOCABULARY], [-1], []):  # these would crash the engine
                with pytest.raises(DataError, match=f"from 0 to {VOCABULARY - 1}"):
                    await worker.generator.generate(ids, Sampling(1, 1.0, []))
            completion = await worker.generator.generate([VOCABULARY - 1], Sampling(1, 1.0, []))
            assert len(completion.ids) == 1

            publish_by(control, config)
            outcome, _ = await control.publish(1, [NAME])
            assert (
                outcome.serving == [NAME]
                and {"check_files", "load", "digest", "write"} <= outcome.seconds.keys()
            )
            np.testing.assert_allclose(
                await engine_logprobs(worker, 1), transformers_logprobs(third), atol=2e-4
            )
            [snapshot] = snapshots.list_snapshots(run_dir)
            np.testing.assert_allclose(
                transformers_logprobs(snapshot.path), transformers_logprobs(third), atol=1e-5
            )

            # a wrong digest in the manifest: the engine's weights do not match it
            with changed_copy(snapshot, 2) as (path, manifest):
                manifest["digests"][tensor] = "0" * 16
            answer = await load_snapshot(control, NAME, path, 2)
            assert tensor in answer.error and not worker.gate.is_open
            # only a complete catch-up opens the gate again
            answer = await load_snapshot(control, NAME, snapshot.path, 1)
            assert not answer.error and worker.gate.is_open

            # a flipped bit in a file: nothing reaches the engine
            with changed_copy(snapshot, 3) as (path, _):
                file = next(path.glob("*.safetensors"))
                raw = bytearray(file.read_bytes())
                raw[-5] ^= 1
                file.write_bytes(raw)
            answer = await load_snapshot(control, NAME, path, 3)
            assert f"{file} does not match its digest" in answer.error and worker.gate.is_open
            np.testing.assert_allclose(
                await engine_logprobs(worker, 1), transformers_logprobs(third), atol=2e-4
            )

            # a new server starts from the newest snapshot, once the damaged ones are removed
            cold = SGLangServer(config, run_dir, "cold")
            for broken in snapshots.list_snapshots(run_dir)[:-1]:
                snapshots.remove(broken.path)
            assert "--weight-version" not in server._command("h", 1)
            if tp == 1:
                await cold.start()
                try:
                    assert (
                        cold.started_from == snapshot.path
                        and await cold.client.served_version() == "1"
                    )
                    held = await cold.client.checksums()
                    assert held == snapshot.manifest.digests
                finally:
                    await cold.stop()

    with weight_processes(tmp_path / "run", work, {}):
        asyncio.run(drive_updates(run_dir, body))
