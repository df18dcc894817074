"""Every layout, one after the other, in four processes under torchrun; run by test_layouts.py.

Start-up takes longer than all the checks, so one set of processes runs all layouts and writes the
figures to a JSON file, which the tests check. `folders` holds a tiny Hugging Face model per family.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from config_builders import algorithm_tree
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_async_rl.config import load as configuration
from megatron_async_rl.errors import NonFiniteStep
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.storage import checkpoints
from megatron_async_rl.trainer import parallel, passes, pipeline, step
from megatron_async_rl.trainer.algorithms import critic as critics
from megatron_async_rl.trainer.algorithms.value_head import ValueHead
from megatron_async_rl.trainer.checkpoint.checkpoint import Checkpointer
from megatron_async_rl.trainer.checkpoint.export import export_hf
from megatron_async_rl.trainer.data.microbatch import Packing, make_minibatches, pack
from megatron_async_rl.trainer.model.build import TrainerModel, build
from megatron_async_rl.trainer.probe import Probe
from megatron_async_rl.weights.reshard import hf_tensors

WORLD, VERSION, TEMPERATURE, VOCAB = 4, 5, 0.7, 51
PROBED = [3, 6]  # samples of the batch that are part of the mismatch probe
M2PO = {"m2_threshold": 0.5, "behavior_weight_cap": None}
GSPO = {"loss": "gspo", "behavior_weight_level": "sequence", "behavior_weight_action": "truncate"}
KL_REWARD = {"kl_coef": 0.5, "kl_in": "reward"}
SEQUENCE_MASK = {
    "behavior_weight_level": "sequence",
    "behavior_weight_cap": 1.2,
    "behavior_weight_floor": 0.5,
}


def global_batch() -> list[TrainSample]:
    rng = np.random.default_rng(0)
    samples = []
    for number in range(8):
        length, prompt = int(rng.integers(6, 40)), int(rng.integers(1, 5))
        versions = rng.integers(VERSION - 2, VERSION + 1, length)
        versions[:prompt] = -1
        samples.append(
            TrainSample(
                ids=rng.integers(0, VOCAB, length).astype(np.int32),
                logprobs=(-4 + rng.normal(size=length)).astype(np.float32),
                versions=versions.astype(np.int32),
                advantages=np.full(length, rng.normal(), np.float32),
                experts=random_experts(length, number),
                probe_index=PROBED.index(number) if number in PROBED else -1,
                probe_start=prompt + (number == PROBED[1]),
            )
        )
    return samples


def random_experts(length: int, seed: int) -> np.ndarray:
    """Returns two of four experts for each token and each of four layers, as the engine's choice;
    models without rollout.routing_replay do not use them."""
    order = np.random.default_rng(seed).random((length, 4, 4)).argsort(-1)
    return order[:, :, :2].astype(np.uint8).reshape(-1)


def make_config(
    folder: Path,
    tp: int = 1,
    pp: int = 1,
    budget: int = 64,
    minibatches: int = 1,
    algorithm: dict[str, Any] | None = None,
    packing: str = "ffd",
    precision: str = "fp32",
    replay: bool = False,
    **megatron: Any,
) -> Any:
    return configuration.from_tree(
        {
            "run": {"dir": str(folder.parent.parent / "run"), "steps": 10},
            "model": {"path": str(folder), "context_tokens": 40},
            "data": {"train": "unused"},
            "rollout": {
                "max_new_tokens": 32,
                "temperature": TEMPERATURE,
                "routing_replay": replay,
            },
            "algorithm": algorithm_tree(
                prompts_per_step=4,
                samples_per_prompt=2,
                minibatches=minibatches,
                **{"entropy_coef": 0.01, "behavior_weight_cap": 2.0} | (algorithm or {}),
            ),
            "trainer": {
                "precision": precision,
                "data_parallel_size": WORLD // tp // pp // megatron.get("context_parallel_size", 1),
                "max_tokens_per_microbatch": budget,
                "packing": packing,
                "collective_timeout_s": 240,
            },
            "megatron": {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "lr": "1e-2",
                # large, because Adam turns rounding differences of near-zero gradients into steps
                "adam_eps": "1e-3",
            }
            | megatron,
        }
    )


def start(config: Any) -> TrainerModel:
    """Builds the model, with new process groups only if the sizes changed.

    Process groups keep their threads until the process ends.
    """
    sizes = [
        config.parallel_size(name)
        for name in (
            *("tensor_model", "pipeline_model", "context", "virtual_pipeline_model"),
            "expert_model",
        )
    ]
    sizes.append(config.megatron.get("expert_tensor_parallel_size", sizes[0]))
    if not dist.is_initialized() or sizes != [
        mpu.get_tensor_model_parallel_world_size(),
        mpu.get_pipeline_model_parallel_world_size(),
        mpu.get_context_parallel_world_size(),
        mpu.get_virtual_pipeline_model_parallel_world_size() or 1,
        mpu.get_expert_model_parallel_world_size(),
        mpu.get_expert_tensor_parallel_world_size(),
    ]:
        if mpu.model_parallel_is_initialized():
            parallel.leave_parallel()
        parallel.init_parallel(config)
    return build(config)


def share() -> list[TrainSample]:
    return global_batch()[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]


def critic_share() -> list[TrainSample]:
    """Returns the share with rewards for a critic: each at the last token of its sample."""
    samples = share()
    for sample in samples:
        sample.advantages[:-1] = 0.0
    return samples


def uneven_share() -> list[TrainSample]:
    """Returns 6 samples on the first rank, 2 on the second and none on the others."""
    ends = [0, 6, 8, 8, 8]
    rank = mpu.get_data_parallel_rank()
    return global_batch()[ends[rank] : ends[rank + 1]]


def save_merged(model: TrainerModel, out: Path, get: Any = lambda p: p.data) -> None:
    """Saves the Hugging Face tensors of all stages as one file, on rank 0."""
    mine = {
        name: tensor.clone() for name, tensor in hf_tensors(model.modules, model.shape, get=get)
    }
    if model.shape.tied and isinstance(getattr(model.modules[-1], "output_layer", None), ValueHead):
        mine["value head"] = get(model.modules[-1].output_layer.weight).clone()
    parts = [None] * WORLD
    dist.all_gather_object(parts, mine)
    if dist.get_rank() == 0:
        torch.save({k: v for part in parts for k, v in part.items()}, out)


def gradient_of(model: TrainerModel, config: Any, samples: list[TrainSample]) -> dict[str, float]:
    """Accumulates the gradients of policy and critic; returns the totals of the step."""
    minibatches = make_minibatches(samples, VERSION, Packing.of(model, config), config)
    minibatches = passes.add_reference_logprobs(model, minibatches, config)
    critic_totals = {}
    if model.critic:
        minibatches = critics.add_advantages(model.critic, minibatches, config)
        critic_totals = critics.accumulate_gradients(model.critic, minibatches[0], config)
    [minibatch] = passes.add_m2_mask(
        passes.add_proximal_logprobs(model, minibatches, config), config
    )
    return step.accumulate_gradients(model, minibatch, config) | {
        f"critic {k}": v for k, v in critic_totals.items()
    }


def with_values(model: TrainerModel) -> None:
    """Gives the critic a nonzero value head: values of 0 would hide errors."""
    head = getattr(model.critic.modules[-1], "output_layer", None)
    if isinstance(head, ValueHead):
        head.weight.data.copy_(torch.linspace(-1, 1, head.weight.numel()).view_as(head.weight))


def logits_of(model: TrainerModel, config: Any) -> torch.Tensor | None:
    microbatch = pack(global_batch(), VERSION, Packing.of(model, config))

    def forward(data: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        def collect(logits: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            return gather_from_tensor_model_parallel_region(logits)[0, :, :VOCAB]

        return pipeline.forward(model, chunk, next(data)), collect

    with torch.no_grad():
        got = pipeline.run(model, [microbatch], forward, forward_only=True, collect=True)
    box = [got[0] if got else None]
    dist.broadcast_object_list(box, src=WORLD - 1)
    return box[0]


def run(folders: Path, out: Path) -> dict[str, Any]:
    qwen3 = folders / "qwen3"
    moe, ep2 = folders / "qwen3_moe", {"expert_model_parallel_size": 2}
    results: dict[str, Any] = {"totals": {}, "metrics": {}, "probe": {}}
    layouts = {  # equal sizes together
        "tp1": make_config(qwen3, 1, 1),
        "tp1 small microbatches": make_config(qwen3, 1, 1, budget=40),
        "tp1 one microbatch": make_config(qwen3, 1, 1, budget=1000),
        "tp1 uneven shares": make_config(qwen3, 1, 1),
        "tp1 equal flops": make_config(qwen3, 1, 1, packing="karmarkar_karp"),
        "tied": make_config(folders / "qwen2", 1, 1),
        "tp2": make_config(qwen3, 2, 1),
        "tp2 sp": make_config(qwen3, 2, 1, sequence_parallel=True),
        "pp2": make_config(qwen3, 1, 2),
        "pp2 recompute": make_config(
            qwen3,
            1,
            2,
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
        ),
        "cp2": make_config(qwen3, 1, 1, context_parallel_size=2),
        "gspo cp2": make_config(qwen3, 1, 1, algorithm=GSPO, context_parallel_size=2),
        "sequence mask cp2": make_config(
            qwen3, 1, 1, algorithm=SEQUENCE_MASK, context_parallel_size=2
        ),
        "kl in reward cp2": make_config(
            qwen3, 1, 1, budget=40, algorithm=KL_REWARD, context_parallel_size=2
        ),
        "m2po cp2": make_config(qwen3, 1, 1, algorithm=M2PO, context_parallel_size=2),
        "tp2 cp2 sp": make_config(qwen3, 2, 1, context_parallel_size=2, sequence_parallel=True),
        "gspo tp2 cp2 sp": make_config(
            qwen3, 2, 1, budget=40, algorithm=GSPO, context_parallel_size=2, sequence_parallel=True
        ),
        "kl in reward tp2 cp2 sp": make_config(
            qwen3, 2, 1, algorithm=KL_REWARD, context_parallel_size=2, sequence_parallel=True
        ),
        "gspo pp2 cp2": make_config(qwen3, 1, 2, algorithm=GSPO, context_parallel_size=2),
        "tied tp2 pp2": make_config(folders / "qwen2", 2, 2),
        "tp2 pp2 sp small microbatches": make_config(
            qwen3, 2, 2, budget=40, sequence_parallel=True
        ),
        "tp2 pp2": make_config(qwen3, 2, 2),
        "gspo tp2 pp2 sp": make_config(
            qwen3, 2, 2, budget=40, sequence_parallel=True, algorithm=GSPO
        ),
        "gspo": make_config(qwen3, 1, 1, algorithm=GSPO),
        "m2po": make_config(qwen3, 1, 1, algorithm=M2PO),
        "sequence mask": make_config(qwen3, 1, 1, algorithm=SEQUENCE_MASK),
        "kl in reward": make_config(qwen3, 1, 1, algorithm=KL_REWARD),
        "m2po tp2 pp2 sp": make_config(
            qwen3, 2, 2, budget=40, sequence_parallel=True, algorithm=M2PO
        ),
        "pp2 vpp2": make_config(qwen3, 1, 2, virtual_pipeline_model_parallel_size=2),
        "tied tp2 pp2 vpp2 sp": make_config(
            folders / "qwen2", 2, 2, virtual_pipeline_model_parallel_size=2, sequence_parallel=True
        ),
        "pp2 vpp2 small microbatches": make_config(
            qwen3, 2, 2, budget=40, virtual_pipeline_model_parallel_size=2
        ),
        "glm": make_config(folders / "glm4_moe", 1, 1),
        "glm tp2 pp2": make_config(folders / "glm4_moe", 2, 2),
        "latent": make_config(folders / "deepseek_v3", 1, 1),
        "latent tp2 cp2 ep2": make_config(
            folders / "deepseek_v3", 2, 1, context_parallel_size=2, **ep2
        ),
        "latent full queries tp2 pp2": make_config(folders / "deepseek_v3 full queries", 2, 2),
        # gradients of up to 0.3 in float32: their rounding is 1e-6
        "linear tp2 pp2": make_config(folders / "qwen3_next", 2, 2, adam_eps="1e-2"),
        "linear tp2 cp2 ep2": make_config(
            folders / "qwen3_next", 2, 1, budget=40, context_parallel_size=2, adam_eps="1e-2", **ep2
        ),
        "moe": make_config(moe, 1, 1),
        "moe cp2 ep2": make_config(moe, 1, 1, context_parallel_size=2, **ep2),
        "moe pp2 ep2 recompute": make_config(
            moe,
            1,
            2,
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
            **ep2,
        ),
        "moe tp2 ep2 etp2": make_config(moe, 2, 1, budget=40, **ep2),
        "moe tp2 ep4 etp1": make_config(
            moe, 2, 1, expert_model_parallel_size=4, expert_tensor_parallel_size=1
        ),
        "moe tp2 etp1": make_config(moe, 2, 1, expert_tensor_parallel_size=1),
        "replay": make_config(moe, 1, 1, replay=True),
        "replay tp2 cp2 ep2": make_config(
            moe, 2, 1, budget=40, replay=True, context_parallel_size=2, **ep2
        ),
        "replay pp2 vpp2 recompute": make_config(
            moe,
            1,
            2,
            budget=40,
            replay=True,
            virtual_pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout="Ett||t|tL",
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
        ),
        "moe sequential tp2 pp2 ep2": make_config(
            moe,
            2,
            2,
            num_layers_in_first_pipeline_stage=1,
            expert_tensor_parallel_size=1,
            moe_grouped_gemm=False,
            **ep2,
        ),
    }
    for name, config in layouts.items():
        # With the distributed optimizer each rank holds part of the gradient; without it, all.
        plain = configuration.from_tree(to_tree(config))
        plain.megatron["use_distributed_optimizer"] = False
        model = start(plain)
        results["totals"][name] = gradient_of(
            model, plain, share() if name != "tp1 uneven shares" else uneven_share()
        )
        save_merged(model, out / f"gradient {name}.pt", get=lambda p: p.main_grad)
        model = start(config)
        probe = Probe(len(PROBED), model.device)
        results["metrics"][name] = step.train_step(model, share(), VERSION, config, probe)
        results["probe"][name] = probe.logprobs().tolist()
        save_merged(model, out / f"weights {name}.pt")

    results["moe checkpoint"] = moe_checkpoint(folders / "qwen3_next")

    # Two minibatches need the proximal pass; with one minibatch it must change nothing.
    config = make_config(qwen3, 2, 2, minibatches=2)
    model = start(config)
    probe = Probe(len(PROBED), model.device)
    results["two minibatches"] = [
        step.train_step(model, share(), VERSION, config, probe),
        step.train_step(model, share(), VERSION + 1, config),
    ]
    results["probe"]["two minibatches"] = probe.logprobs().tolist()
    config = make_config(qwen3, 2, 2)
    model = start(config)
    minibatches = make_minibatches(share(), VERSION, Packing.of(model, config), config)
    [with_proximal] = passes.add_proximal_logprobs(model, minibatches, config)
    results["explicit proximal"] = step.accumulate_gradients(model, with_proximal, config)
    results["implicit proximal"] = step.accumulate_gradients(model, minibatches[0], config)

    # Settings that avoid the proximal pass or shorten it.
    compute, results["proximal passes"] = passes.current_logprobs, {}
    for proximal in ("recompute", "reuse_first_minibatch", "loglinear"):
        config = make_config(qwen3, 2, 2, minibatches=2, algorithm={"proximal": proximal})
        passed = results["proximal passes"][proximal] = []  # minibatches of each pass

        def counting(model: Any, minibatches: Any, config: Any, passed: Any = passed) -> Any:
            passed.append(len(minibatches))
            return compute(model, minibatches, config)

        passes.current_logprobs = counting
        results[f"proximal {proximal}"] = step.train_step(start(config), share(), VERSION, config)
    passes.current_logprobs = compute

    # KL to the starting policy is 0 at the first step and positive at the second; also in rewards.
    config = make_config(qwen3, 2, 2, algorithm={"kl_coef": 0.5})
    model = start(config)
    results["kl"] = [step.train_step(model, share(), VERSION + n, config) for n in range(3)]
    config = make_config(qwen3, 2, 2, algorithm=KL_REWARD)
    model = start(config)
    [plain_minibatch] = make_minibatches(share(), VERSION, Packing.of(model, config), config)
    [[taken, *_]] = passes.add_reference_logprobs(model, [plain_minibatch], config)
    changed = taken.reference_T is not None and not torch.equal(
        taken.advantages_T, plain_minibatch[0].advantages_T
    )
    gathered = [None] * WORLD
    dist.all_gather_object(gathered, (changed, mpu.is_pipeline_last_stage()))
    results["kl in reward changes advantages, last stage"] = gathered

    # A minibatch far from the policy that sampled it makes no step.
    config = make_config(qwen3, 2, 2, algorithm={"loss": "ppo", "stop_ratio": 1.001})
    model = start(config)
    before = [p.clone() for p in model.parameters()]
    results["stopped"] = step.train_step(model, share(), VERSION, config)
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    results["stopped, weights same"] = same

    # A non-finite advantage is rejected on all ranks and leaves the weights unchanged.
    config = make_config(qwen3, 2, 2)
    model = start(config)
    before = [p.clone() for p in model.parameters()]
    poisoned = [sample if n else poison(sample) for n, sample in enumerate(share())]
    try:
        step.train_step(model, poisoned, VERSION, config)
        refused = ""
    except NonFiniteStep as e:
        refused = str(e)
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    results["refused"] = refused
    gathered = [None] * WORLD
    dist.all_gather_object(gathered, (bool(refused), same))
    results["refused everywhere, weights same"] = gathered

    for family in ("qwen3", "qwen2", "llama"):
        config = make_config(folders / family, 2, 2)
        model = start(config)
        logits = logits_of(model, config)
        if dist.get_rank() == 0:
            torch.save(logits, out / f"logits {family}.pt")
        for _ in range(2):  # the second one replaces the first
            export_hf(model.modules, model.shape, folders / family, out / f"export {family}")
        if family == "qwen3":
            step.train_step(model, share(), VERSION, config)
            export_hf(model.modules, model.shape, folders / family, out / "export trained")
            save_merged(model, out / "weights trained.pt")

    # bf16: the wrapped model, fp32 main weights.
    config = make_config(qwen3, 2, 2, precision="bf16")
    model = start(config)
    results["bf16"] = step.train_step(model, share(), VERSION, config)
    results["bf16 dtypes"] = sorted({str(p.dtype) for p in model.parameters()})
    results["fp16"] = {str(shard): fp16(qwen3, out, shard) for shard in (True, False)}

    # Values are 0 at first: the second step is the first that depends on them.
    cp2 = {"context_parallel_size": 2, "algorithm": GAE}
    for name, config in {
        "gae tp2 pp2 sp": make_config(
            qwen3, 2, 2, budget=40, algorithm=GAE, sequence_parallel=True
        ),
        "gae": make_config(qwen3, 1, 1, algorithm=GAE),
        "gae pp2 vpp2": make_config(
            qwen3, 1, 2, algorithm=GAE, virtual_pipeline_model_parallel_size=2
        ),
        "gae cp2": make_config(qwen3, 1, 1, budget=40, **cp2),
        "gae tp2 cp2 sp": make_config(qwen3, 2, 1, sequence_parallel=True, **cp2),
    }.items():
        plain = configuration.from_tree(to_tree(config))
        plain.megatron["use_distributed_optimizer"] = False
        model = start(plain)
        with_values(model)
        results["totals"][name] = gradient_of(model, plain, critic_share())
        save_merged(model, out / f"gradient {name}.pt", get=lambda p: p.main_grad)
        save_merged(model.critic, out / f"critic gradient {name}.pt", get=lambda p: p.main_grad)
        model = start(config)
        results[name] = [
            step.train_step(model, critic_share(), VERSION + n, config) for n in range(2)
        ]
        save_merged(model, out / f"weights {name}.pt")
        save_merged(model.critic, out / f"critic {name}.pt")
    config = make_config(qwen3, 2, 2, algorithm=GAE, minibatches=2)
    results["gae two minibatches"] = step.train_step(start(config), critic_share(), VERSION, config)
    return results


GAE = {
    "advantage": "gae",
    "gamma": 0.99,
    "gae_lambda": 0.9,
    "batch_normalize": True,
    "entropy_coef": 0.0,
}
GAE |= {"kl_coef": 0.05, "kl_in": "reward"}


def moe_checkpoint(folder: Path) -> dict[str, dict[str, Any]]:
    """Saves after a step in one layout of experts; returns the next step there and in another."""
    layouts = {
        "saved": make_config(folder, 2, 1, expert_model_parallel_size=2),
        "loaded": make_config(
            folder,
            1,
            2,
            expert_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout="Ett|t||tL",
        ),
    }
    steps = {}
    saved: list[tuple[int, str]] = []
    for name, config in layouts.items():
        config = configuration.from_tree(
            to_tree(config) | {"checkpoint": {"every": 1, "asynchronous": False}}
        )
        model, run_dir = start(config), folder.parent.parent / "moe run"
        saver = Checkpointer(model, config, run_dir, lambda *told: saved.append(told))
        if name == "saved":
            step.train_step(model, share(), VERSION, config)
            saver.save(1)
            if dist.get_rank() == 0:
                checkpoints.commit(run_dir, *saved[0], 0, 0)
            dist.barrier()
        else:
            assert saver.load() == 1
        steps[name] = step.train_step(model, share(), VERSION + 1, config)
        saver.close()
    return steps


def fp16(folder: Path, out: Path, shard: bool) -> dict[str, Any]:
    """Trains normal steps and steps with overflow, a NaN loss, overflow at the lowest scale."""
    options = {"precision": "fp16", "use_distributed_optimizer": shard}
    config = make_config(folder, 2, 2, **options, initial_loss_scale=1024.0, loss_scale_window=1)
    model = start(config)
    figures: dict[str, Any] = {"dtypes": sorted({str(p.dtype) for p in model.parameters()})}
    figures["step"] = step.train_step(model, share(), VERSION, config)
    saved: list[tuple[int, str]] = []
    run_dir = out / f"fp16 {shard}"
    saver = Checkpointer(
        model, config, run_dir, lambda version, folder: saved.append((version, folder))
    )
    saver.save(1)
    saver.close()
    if dist.get_rank() == 0:
        checkpoints.commit(run_dir, *saved[0], 0, 0)
    dist.barrier()
    model = start(config)
    saver = Checkpointer(model, config, run_dir, lambda version, folder: None)
    figures["loaded"] = saver.load()
    saver.close()
    figures["loaded scale"] = model.optimizer.get_loss_scale().item()
    figures["step after loading"] = step.train_step(model, share(), VERSION + 1, config)
    figures["published as"] = sorted(
        {str(tensor.dtype) for _, tensor in hf_tensors(model.modules, model.shape)}
    )

    config = make_config(folder, 2, 2, **options, initial_loss_scale=2.0**60, hysteresis=2)
    model = start(config)
    before = [p.clone() for p in model.parameters()]
    figures["overflows"] = [step.train_step(model, share(), VERSION + n, config) for n in range(3)]
    figures["weights same"] = all(
        torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    )
    for case, scale, samples in (
        ("nan", 1.0, [poison(s) for s in share()]),
        ("smallest", 2.0**60, share()),
    ):
        config = make_config(
            folder, 2, 2, **options, initial_loss_scale=scale, min_loss_scale=scale
        )
        model = start(config)
        before = [p.clone() for p in model.parameters()]
        try:
            step.train_step(model, samples, VERSION + 1, config)
        except NonFiniteStep as e:
            figures[case] = str(e)
        figures[f"{case}, weights same"] = all(
            torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
        )
    return figures


def poison(sample: TrainSample) -> TrainSample:
    return TrainSample(
        **{f: getattr(sample, f) for f in sample.__struct_fields__}
        | {"advantages": sample.advantages * np.nan}
    )


def to_tree(config: Any) -> dict[str, Any]:
    return msgspec.to_builtins(config)


def main(folders: Path, out: Path) -> None:
    figures = run(folders, out)
    if dist.get_rank() == 0:
        (out / "results.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()
