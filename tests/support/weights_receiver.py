"""A receiver of weight updates with the real messages and update groups; run by weight_ranks.py.

It saves the tensors that arrive. `weights_receiver.py RUN_DIR NAME BEHAVIOR...` starts one process
after the other, one for each behavior:

    ok          serves updates until Shutdown
    die:K       exits when bucket K (counted over stages) of its first update has arrived
    hang:K      does nothing more then, and leaves the file NAME.hangs; its connections stay open
    flip        flips one bit of the received tensors before it computes digests
    drop        loses one tensor
    absent      never joins a group
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed import distributed_c10d as c10d

from megatron_async_rl.errors import EngineError
from megatron_async_rl.protocol.messages import Hello, Shutdown
from megatron_async_rl.protocol.sync_link import SyncLink
from megatron_async_rl.protocol.weight_messages import (
    AbandonUpdate,
    GroupJoined,
    JoinGroup,
    LoadSnapshot,
    ReceiveBuckets,
    Updated,
    UpdateReady,
    UpdateWeights,
    WeightDigests,
)
from megatron_async_rl.rollout.weight_update import check_digests
from megatron_async_rl.storage import snapshots
from megatron_async_rl.weights import tile_hash

TIMEOUT = timedelta(seconds=60)


def digests(tensors: dict[str, torch.Tensor], expected: dict[str, str]) -> dict[str, str]:
    """Returns the digests of an engine of one rank, without the layout code of the package.

    They are sha256 as on a CPU or tile hashes as on a GPU, whichever matches more of `expected`.
    """
    held: dict[str, dict[int, torch.Tensor]] = {}
    experts: dict[str, dict[tuple[int, int], torch.Tensor]] = {}
    is_linear = any(".linear_attn." in name for name in tensors)
    is_latent = any(".kv_a_proj_with_mqa." in name for name in tensors)
    attention = [("qkv_proj", ["q_proj", "k_proj", "v_proj"])]
    if is_latent:  # whose queries may be made from hidden states directly
        has_both = any(".q_a_proj." in name for name in tensors)
        attention = [("fused_qkv_a_proj_with_mqa", ["q_a_proj", "kv_a_proj_with_mqa"])] * has_both
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "experts" in parts:
            layer, number, leaf = ".".join(parts[:5]), int(parts[5]), parts[6]
            into = "w2" if leaf == "down_proj" else "w13"
            name = f"{layer}.{into}_{parts[-1]}"
            experts.setdefault(name, {})[number, int(leaf == "up_proj")] = tensor
            continue
        if parts[0] == "lm_head" or parts[1] == "embed_tokens":
            rows = -(-len(tensor) // 64) * 64
            tensor = torch.cat(
                [tensor, torch.zeros(rows - len(tensor), tensor.shape[1], dtype=tensor.dtype)]
            )
        place = 0
        for fused, leaves in (*attention, ("gate_up_proj", ["gate_proj", "up_proj"])):
            if parts[-2] in leaves:
                name = ".".join([*parts[:-2], fused, parts[-1]])
                place = leaves.index(parts[-2])
        if is_linear:  # SGLang's module of Qwen3-Next has no such level
            name = name.replace(".self_attn.", ".")
        held.setdefault(name, {})[place] = tensor
    flat = {
        name: torch.cat(
            [parts[key].contiguous().view(torch.uint8).flatten() for key in sorted(parts)]
        )
        for name, parts in (held | experts).items()
    }
    said = [{f"0:{name}": digest(raw) for name, raw in flat.items()} for digest in (sha256, tiles)]
    return max(said, key=lambda digests: len(digests.items() & expected.items()))


def sha256(raw: torch.Tensor) -> str:
    return hashlib.sha256(raw.numpy()).hexdigest()[:16]


def tiles(raw: torch.Tensor) -> str:
    total = torch.zeros((), dtype=torch.int64)
    tile_hash.add_tile_sum(tile_hash.as_words(raw), total)
    return tile_hash.finish(int(total))


def join(order: JoinGroup) -> dist.ProcessGroup:
    store = dist.TCPStore(order.address, order.port, order.world_size, False, TIMEOUT)
    group, _ = c10d._new_process_group_helper(
        order.world_size, order.rank_offset, [], c10d.Backend("gloo"),
        c10d.PrefixStore(order.group, store), group_name=order.group, timeout=TIMEOUT,
    )  # fmt: skip
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(order.world_size)}
    return group


def receive(
    update: ReceiveBuckets, groups: dict[str, dist.ProcessGroup], behavior: str, hangs: Path
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    number = 0
    for stage in update.stages:
        for bucket in stage.buckets:
            sizes = [
                getattr(torch, s.dtype).itemsize * torch.Size(s.shape).numel()
                for s in bucket.tensors
            ]
            flat = torch.empty(sum(sizes), dtype=torch.uint8)
            pieces = flat.split(sizes)
            for piece in [flat] if update.flattened else pieces:
                dist.broadcast(piece, group=groups[stage.group], group_src=0)
            for spec, piece in zip(bucket.tensors, pieces, strict=True):
                assert spec.name not in tensors, f"{spec.name} came twice"
                tensors[spec.name] = piece.clone().view(getattr(torch, spec.dtype)).view(spec.shape)
            if behavior == f"die:{number}":
                os._exit(9)
            if behavior == f"hang:{number}":
                hangs.touch()
                signal.pause()
            number += 1
    if behavior == "flip":
        tensors["model.norm.weight"].view(torch.uint8)[3] ^= 4
    if behavior == "drop":
        del tensors["model.norm.weight"]
    return tensors


def serve_updates(run_dir: Path, name: str, behavior: str) -> None:
    link = SyncLink(run_dir)
    link.join(Hello("rollout", name, os.getpid(), capacity=1))
    groups: dict[str, dist.ProcessGroup] = {}
    tensors: dict[str, torch.Tensor] = {}
    verify = False
    while True:
        message = link.receive(120)
        if isinstance(message, Shutdown):
            os._exit(0)
        if isinstance(message, UpdateWeights):
            link.send(UpdateReady(message.version, {}))
        elif isinstance(message, JoinGroup) and behavior != "absent":
            try:
                groups[message.group] = join(message)
                link.send(GroupJoined(message.group))
            except RuntimeError as e:
                link.send(GroupJoined(message.group, error=str(e)))
        elif isinstance(message, ReceiveBuckets):
            tensors, verify = {}, message.verify
            try:
                tensors = receive(message, groups, behavior, run_dir / f"{name}.hangs")
            except RuntimeError as e:
                link.send(Updated(message.version, {}, error=str(e)))
        elif isinstance(message, LoadSnapshot):
            snapshot = snapshots.read(Path(message.folder))
            assert snapshot and not snapshots.find_damage(snapshot)
            tensors = {
                name: tensor
                for file in snapshot.path.glob("*.safetensors")
                for name, tensor in load_file(file).items()
            }
            check_digests(digests(tensors, snapshot.manifest.digests), snapshot.manifest.digests)
            save_file(tensors, run_dir / f"{name}-v{message.version}.safetensors")
            link.send(Updated(message.version, {}))
        elif isinstance(message, AbandonUpdate) and tensors:
            link.send(UpdateReady(message.version, {}))
        elif isinstance(message, WeightDigests):
            try:
                if verify:
                    check_digests(digests(tensors, message.digests), message.digests)
                save_file(tensors, run_dir / f"{name}-v{message.version}.safetensors")
                link.send(Updated(message.version, {}))
            except EngineError as e:
                link.send(Updated(message.version, {}, error=str(e)))
                if behavior != "ok":
                    link.close()  # the message is sent
                    os._exit(0)  # the next process starts


if __name__ == "__main__":
    for this_behavior in sys.argv[3:]:
        child = os.fork()
        if child == 0:
            try:
                serve_updates(Path(sys.argv[1]), sys.argv[2], this_behavior)
            finally:
                os._exit(1)
        os.waitpid(child, 0)
