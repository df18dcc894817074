"""A real SGLang computes with the fp8 weights that the trainer quantized (weights.quantization).

Its logprobs are those of transformers with the same quantization of weights and inputs, its digests
those of the trainer, and one changed byte is found. Trainer ranks (weights_main.py, tensor and
expert parallel), publisher, rollout worker and engine are the real ones; the first test takes the
controller's place, the second is a whole run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from engine_worker import engine_worker, load_snapshot
from model_shapes import make_model_folder, weights_config_tree
from needs import needs_engine
from safetensors.torch import load_file, save_file
from tiny_model import CPU_ENGINE, make_dataset, make_model
from torch import Tensor
from weight_ranks import WeightController, drive_updates, weight_processes
from whole_runs import FinishedRun, RunInputs, start_run

from megatron_async_rl.config import load as configuration
from megatron_async_rl.controller.weight_sync.session import UpdateSession
from megatron_async_rl.controller.weight_sync.snapshot import SnapshotStore, TrainerPublisher
from megatron_async_rl.storage import snapshots
from megatron_async_rl.storage.files import digest

pytestmark = needs_engine
NAME = "rollout-0"
IDS = [5, 9, 21, 33, 7, 7, 30, 12, 3, 36, 17, 25, 4, 11]


def rounded(tensor: Tensor, *block: int) -> Tensor:
    """Rounds each block of a matrix to fp8 under the scale of its largest magnitude."""
    rows, columns = block
    blocks = tensor.unflatten(-1, (-1, columns)).unflatten(0, (-1, rows))
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    quantized = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return quantized.flatten(0, 1).flatten(-2)


def transformers_logprobs(model: Path, linear: Callable[..., Tensor]) -> np.ndarray:
    """[num_tokens - 1]: logprob of each token of IDS but the first, with this F.linear."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(
        model, dtype="float32", experts_implementation="eager"
    ).eval()
    ids, original = torch.tensor([IDS]), F.linear
    F.linear = linear
    try:
        with torch.no_grad():
            logits = policy(input_ids=ids).logits[0, :-1]
    finally:
        F.linear = original
    return torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0].numpy()


def fp8_linear(input: Tensor, weight: Tensor, bias: Any = None, linear: Any = F.linear) -> Tensor:
    """Rounds the operands of the decoder's linear layers; router and lm_head have odd sizes."""
    if all(size % 128 == 0 for size in weight.shape):
        flat = rounded(input.flatten(0, -2), 1, 128)
        input, weight = flat.view(input.shape), rounded(weight, 128, 128)
    return linear(input, weight, bias)


def with_a_changed_byte(snapshot: snapshots.Snapshot, suffix: str) -> Path:
    """Changes the lowest bit of a tensor, in a copy that is otherwise consistent; returns it."""
    path = snapshot.path.with_name(f"v000002.{len(suffix)}")
    path.mkdir()
    manifest = msgspec.to_builtins(snapshot.manifest) | {"version": 2}
    changed = False
    for file in snapshot.path.iterdir():
        target = path / file.name
        target.write_bytes(file.read_bytes())
        if file.suffix == ".safetensors" and not changed:
            tensors = load_file(file)
            if chosen := [name for name in tensors if name.endswith(f"layers.1.{suffix}")]:
                changed = True
                tensors[chosen[0]].view(torch.uint8)[0, 0] ^= 1
                save_file(tensors, target, metadata={"format": "pt"})
                manifest["files"][file.name] = digest(target)
    assert changed
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_engine_holds_and_computes_with_the_quantized_weights(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    model = make_model_folder(tmp_path / "model", "qwen3_moe of blocks", scale=0.2)
    words = {"<|end|>": 0, "<|pad|>": 1, "<|unk|>": 2}
    WordLevel = tokenizers.models.WordLevel
    tokenizers.Tokenizer(WordLevel(words, unk_token="<|unk|>")).save(str(model / "tokenizer.json"))
    (model / "generation_config.json").write_text('{"eos_token_id": 0}')
    sizes = {"tensor_model": 2, "expert_model": 2}
    fp8 = {"quantization": "fp8_block", "update_timeout_s": 60.0}
    tree = weights_config_tree(model, sizes, fp8) | {"sglang": CPU_ENGINE}
    tree["run"] = {"dir": str(run_dir), "steps": 1}
    config = configuration.from_tree(tree)
    by_disk = configuration.from_tree(tree | {"weights": tree["weights"] | {"transport": "disk"}})

    async def body(control: WeightController) -> None:
        session = UpdateSession(control.send, 60.0)
        control.publisher = TrainerPublisher(session, config, SnapshotStore(config))
        async with engine_worker(config, run_dir, NAME) as (server, worker):
            await control.wait_for(lambda: NAME in control.peers)
            outcome, _ = await control.publish(0, [NAME])
            assert outcome.serving == [NAME], outcome
            version, logprobs = await server.client.input_logprobs(IDS, 1)
            reference = transformers_logprobs(model, fp8_linear)
            assert version == 0
            np.testing.assert_allclose(logprobs, reference, atol=0.01)
            exact = transformers_logprobs(model, F.linear)
            assert np.abs(exact - reference).max() > 0.02

            control.publisher = TrainerPublisher(session, by_disk, SnapshotStore(by_disk))
            outcome, _ = await control.publish(1, [NAME])
            assert outcome.serving == [NAME], outcome
            [snapshot] = snapshots.list_snapshots(run_dir)
            held = await server.client.checksums()
            assert held == snapshot.manifest.digests
            for suffix, tensor in (
                ("self_attn.o_proj.weight_scale_inv", "1.self_attn.o_proj.weight_scale_inv"),
                ("mlp.experts.1.up_proj.weight", "1.mlp.experts.w13_weight"),
            ):
                answer = await load_snapshot(
                    control, NAME, with_a_changed_byte(snapshot, suffix), 2
                )
                assert f"{tensor} is" in answer.error and not worker.gate.is_open
            assert (
                not (await load_snapshot(control, NAME, snapshot.path, 1)).error
                and worker.gate.is_open
            )
            again = await server.client.input_logprobs(IDS, 1)
            assert again == (1, logprobs)

    with weight_processes(run_dir, [{"config": tree, "versions": [0, 1]}], {}):
        asyncio.run(drive_updates(run_dir, body))


def test_whole_run_trains_with_fp8_servers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
    model, data = make_model(tmp_path / "model", **sizes), make_dataset(tmp_path / "data.jsonl", 20)
    path = RunInputs(model, data, data).config(
        tmp_path / "run",
        run={"steps": 2, "export_every": 0},
        weights={"quantization": "fp8_block"},
        evaluation={"sets": {}},
        rollout={"max_new_tokens": 24, "max_concurrent_samples": 16},
    )
    child = start_run(path)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    run = FinishedRun(tmp_path / "run", output)
    served = [
        line for line in run.log("controller").splitlines() if " is served by rollout-0" in line
    ]
    assert all("trainer_digest " in line for line in served) and len(served) == 3
    assert run.status.version == 2
