"""Layout invariance, equality with transformers, and export.

Tiny models run once over four CPU ranks (layouts_main.py); all tests here read the results.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts_main import PROBED, TEMPERATURE, VOCAB, global_batch
from model_shapes import make_model_folder
from paths import ROOT, SUPPORT
from safetensors.torch import load_file

from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.storage import batches, exported

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,  # odd: padded under TP
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "dtype": "float32",
}
LAYOUTS = {  # layout -> the layout with the same results
    "tp1 small microbatches": "tp1",
    "tp1 one microbatch": "tp1",
    "tp1 uneven shares": "tp1",
    "tp1 equal flops": "tp1",
    "tp2": "tp1",
    "tp2 sp": "tp1",
    "pp2": "tp1",
    "tp2 pp2": "tp1",
    "tp2 pp2 sp small microbatches": "tp1",
    "cp2": "tp1",
    "tp2 cp2 sp": "tp1",
    "gspo cp2": "gspo",
    "gspo tp2 cp2 sp": "gspo",
    "gspo pp2 cp2": "gspo",
    "sequence mask cp2": "sequence mask",
    "kl in reward cp2": "kl in reward",
    "kl in reward tp2 cp2 sp": "kl in reward",
    "m2po cp2": "m2po",
    "pp2 recompute": "tp1",
    "tied tp2 pp2": "tied",
    "gspo tp2 pp2 sp": "gspo",
    "m2po tp2 pp2 sp": "m2po",
    "pp2 vpp2": "tp1",
    "pp2 vpp2 small microbatches": "tp1",
    "tied tp2 pp2 vpp2 sp": "tied",
    "glm tp2 pp2": "glm",
    "latent tp2 cp2 ep2": "latent",
    "linear tp2 cp2 ep2": "linear tp2 pp2",
    "moe cp2 ep2": "moe",
    "moe pp2 ep2 recompute": "moe",
    "moe tp2 ep2 etp2": "moe",
    "moe tp2 ep4 etp1": "moe",
    "moe tp2 etp1": "moe",
    "moe sequential tp2 pp2 ep2": "moe",
    "replay tp2 cp2 ep2": "replay",
    "replay pp2 vpp2 recompute": "replay",
}
GAE_LAYOUTS = ["gae tp2 pp2 sp", "gae pp2 vpp2", "gae cp2", "gae tp2 cp2 sp"]


def make_models(folder: Path) -> None:
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    models = {
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
        "llama": LlamaForCausalLM(
            LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=llama3)
        ),
    }
    g = torch.Generator().manual_seed(0)
    for name, model in models.items():
        # norms and biases too: initialised to ones and zeros they would hide a wrong mapping
        with torch.no_grad():
            for key, p in model.named_parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.08 + (1.0 if "norm" in key else 0.0))
        model.save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text("{}")
    latent = dict.fromkeys(("deepseek_v3", "deepseek_v3 full queries"), 0.3)
    # all experts get tokens
    scales = {"qwen3_moe": 0.3, "glm4_moe": 0.5, "qwen3_next": 0.3} | latent
    for family, scale in scales.items():
        make_model_folder(folder / family, family, scale)


@pytest.fixture(scope="module")
def layout_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs layouts_main.py once; returns the folder it wrote to, with the models in models/."""
    out = tmp_path_factory.mktemp("layouts")
    make_models(out / "models")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        # not as a script: the processes that save checkpoints would import it, for 4 CPU seconds
        "--no-python",
        sys.executable,
        "-c",
        "import sys, pathlib, layouts_main; layouts_main.main(*map(pathlib.Path, sys.argv[1:]))",
    ]
    paths = [str(ROOT), str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ranks = subprocess.Popen(
        [*command, str(out / "models"), str(out)],
        env=os.environ
        | {
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        log, _ = ranks.communicate(timeout=900)
    finally:
        ranks.terminate()  # torchrun ends its ranks on SIGTERM; they would survive a SIGKILL
        ranks.wait(30)
    assert ranks.returncode == 0, log[-12000:]
    return out


@pytest.fixture(scope="module")
def results(layout_folder: Path) -> dict[str, Any]:
    return json.loads((layout_folder / "results.json").read_text())


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def largest_difference(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], scale: dict[str, torch.Tensor]
) -> tuple[float, str]:
    assert set(got) == set(want)
    return max(
        ((got[n] - want[n]).abs().max().item() / scale[n].abs().max().item(), n) for n in want
    )


def hf_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_stacked_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Joins the tensors of single experts as transformers holds them."""
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        head, _, number = name.partition(".experts.")
        if not number:
            out[name] = tensor
            continue
        expert, leaf, _ = number.split(".")
        fused = "down_proj" if leaf == "down_proj" else "gate_up_proj"
        out.setdefault(f"{head}.experts.{fused}", {})[int(expert), leaf] = tensor
    for name, parts in out.items():
        if isinstance(parts, dict):  # gate_proj sorts before up_proj
            experts = 1 + max(expert for expert, _ in parts)
            out[name] = torch.stack(
                [
                    torch.cat([parts[part] for part in sorted(parts) if part[0] == expert])
                    for expert in range(experts)
                ]
            )
    return out


# Model of the layouts that are compared with this one; of all others qwen3.
FAMILIES = {
    "tied": "qwen2",
    "moe": "qwen3_moe",
    "replay": "qwen3_moe",
    "glm": "glm4_moe",
    "latent": "deepseek_v3",
    "latent full queries tp2 pp2": "deepseek_v3 full queries",
    "linear tp2 pp2": "qwen3_next",
}


def replay_experts(model: Any, sample: TrainSample) -> None:
    """Has the routers of transformers choose the sample's experts; at its last token their own."""
    experts = torch.from_numpy(sample.experts).long().view(len(sample.ids), 4, 2)

    def chosen(layer: int, gate: Any, hidden: tuple[torch.Tensor], out: Any) -> Any:
        logits = out[0]
        index = torch.cat([experts[1:, layer], logits[-1:].topk(2).indices])
        return logits, logits.gather(1, index).softmax(-1), index

    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate._forward_hooks.clear()
        layer.mlp.gate.register_forward_hook(partial(chosen, number))


@pytest.mark.parametrize(
    "family, layout",
    [
        ("qwen3", "tp1"),
        ("qwen3_moe", "moe"),
        ("glm4_moe", "glm"),
        ("qwen3_moe", "replay"),
        ("deepseek_v3", "latent"),
        ("deepseek_v3 full queries", "latent full queries tp2 pp2"),
        ("qwen3_next", "linear tp2 pp2"),
    ],
)
def test_loss_and_gradient_match_transformers_and_the_formula(
    layout_folder: Path, results: dict[str, Any], family: str, layout: str
) -> None:
    """Against an independent computation.

    One sample at a time, log_softmax over the full vocabulary, the formula of the paper as it is.
    """
    model = hf_model(layout_folder / "models" / family)
    algorithm = AlgorithmConfig(prompts_per_step=1, samples_per_prompt=2)
    total, count = torch.zeros(()), 0
    for sample in global_batch():
        ids = torch.from_numpy(sample.ids).long()
        if layout == "replay":
            replay_experts(model, sample)
        full = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1] / TEMPERATURE, -1)
        logp = full.gather(1, ids[1:, None])[:, 0]
        m = torch.from_numpy(sample.versions[1:] != -1)
        w = (logp.detach() - torch.from_numpy(sample.logprobs[1:])).exp()
        w = torch.where(w > 2.0, 0.0, w)
        u = (logp - logp.detach()).exp()
        a = torch.from_numpy(sample.advantages[1:])
        loss = w * torch.maximum(
            -a * u, -a * u.clamp(1 - algorithm.loss.clip_eps, 1 + algorithm.loss.clip_eps)
        )
        total = total + (loss - 0.01 * -(full.exp() * full).sum(-1))[m].sum()
        count += int(m.sum())
    (total / count).backward()
    totals = results["totals"][layout]
    assert totals["tokens"] == count
    assert totals["loss"] == pytest.approx(total.item(), rel=1e-5)
    want = {n: p.grad for n, p in model.named_parameters()}
    got = with_stacked_experts(load(layout_folder / f"gradient {layout}.pt"))
    difference, name = largest_difference(got, want, want)
    assert difference < 1e-4, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_do_not_depend_on_the_layout(
    layout_folder: Path, results: dict[str, Any], layout: str
) -> None:
    want = results["totals"][LAYOUTS[layout]]
    for name, value in results["totals"][layout].items():
        if name not in ("budget", "least_budget", "microbatches", "cost_max"):
            assert value == pytest.approx(want[name], rel=1e-4, abs=1e-4), name
    gradient = load(layout_folder / f"gradient {LAYOUTS[layout]}.pt")
    difference, name = largest_difference(
        load(layout_folder / f"gradient {layout}.pt"), gradient, gradient
    )
    assert difference < 1e-4, name


@pytest.mark.parametrize("layout", GAE_LAYOUTS)
def test_policy_and_critic_gradients_do_not_depend_on_the_layout(
    layout_folder: Path, results: dict[str, Any], layout: str
) -> None:
    """With a value head that is not all zeros."""
    for name, want in results["totals"]["gae"].items():
        if name not in ("budget", "least_budget", "microbatches", "cost_max"):
            assert results["totals"][layout][name] == pytest.approx(want, rel=1e-4, abs=1e-4), name
    assert results["totals"]["gae"]["critic value"] != 0
    for who in ("gradient", "critic gradient"):
        want = load(layout_folder / f"{who} gae.pt")
        difference, name = largest_difference(
            load(layout_folder / f"{who} {layout}.pt"), want, want
        )
        assert difference < 1e-4, (who, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_after_a_step_do_not_depend_on_the_layout(
    layout_folder: Path, results: dict[str, Any], layout: str
) -> None:
    want = load(layout_folder / f"weights {LAYOUTS[layout]}.pt")
    family = FAMILIES.get(LAYOUTS[layout], "qwen3")
    before = load_file(layout_folder / "models" / family / "model.safetensors")
    got = load(layout_folder / f"weights {layout}.pt")
    for name in [name for name in want if name.endswith("e_score_correction_bias")]:
        assert torch.equal(want.pop(name), before[name]) and torch.equal(
            got.pop(name), before[name]
        )
    moved = {n: want[n] - before[n] for n in want}
    assert min(m.abs().max().item() for m in moved.values()) > 0
    difference, name = largest_difference(got, want, moved)
    assert difference < 1e-4, name
    for key in (
        "train/loss",
        "train/grad_norm",
        "train/entropy",
        "train/tokens",
        "train/logprob_diff_mean",
        "train/lr",
    ):
        assert results["metrics"][layout][key] == pytest.approx(
            results["metrics"][LAYOUTS[layout]][key], rel=1e-4
        ), key


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_logits_match_transformers(layout_folder: Path, family: str) -> None:
    model, got, start = (
        hf_model(layout_folder / "models" / family),
        load(layout_folder / f"logits {family}.pt"),
        0,
    )
    for sample in global_batch():
        with torch.no_grad():
            want = model(input_ids=torch.from_numpy(sample.ids).long()[None]).logits[0]
        torch.testing.assert_close(got[start : start + len(want)], want, rtol=1e-4, atol=1e-4)
        start += len(want)


def test_probe_has_the_logprobs_of_the_starting_weights(
    layout_folder: Path, results: dict[str, Any]
) -> None:
    batch = global_batch()
    for name, values in results["probe"].items():
        reference = LAYOUTS.get(name, name)
        model = hf_model(layout_folder / "models" / FAMILIES.get(reference, "qwen3"))
        want = np.full(len(values), np.nan)
        for sample in (batch[number] for number in PROBED):
            ids, slots = torch.from_numpy(sample.ids).long(), sample.probe_slots()
            if reference == "replay":
                replay_experts(model, sample)
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0] / TEMPERATURE
            logprobs = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].numpy()
            want[slots[1:][slots[1:] > 0] - 1] = logprobs[slots[1:] > 0]
        assert np.isfinite(want).sum() > 20
        np.testing.assert_allclose(values, want, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_export_returns_the_loaded_weights_bit_for_bit(layout_folder: Path, family: str) -> None:
    source, export = (
        hf_model(layout_folder / "models" / family),
        hf_model(layout_folder / f"export {family}"),
    )
    for name, tensor in source.state_dict().items():
        assert torch.equal(export.state_dict()[name], tensor), name
    files = {f.name for f in (layout_folder / f"export {family}").iterdir()}
    assert not list(exported.find_damage(layout_folder / f"export {family}"))
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    } <= files
    assert not [f for f in layout_folder.iterdir() if f.name.startswith(".export")]


def test_transformers_loads_the_trained_policy(layout_folder: Path) -> None:
    trained, weights = (
        hf_model(layout_folder / "export trained").state_dict(),
        load(layout_folder / "weights trained.pt"),
    )
    assert all(torch.equal(trained[name], tensor) for name, tensor in weights.items())


def test_proximal_pass_changes_nothing_with_one_minibatch(results: dict[str, Any]) -> None:
    implicit = results["implicit proximal"]
    assert results["explicit proximal"] == pytest.approx(implicit, rel=1e-6, abs=1e-6)


def test_second_minibatch_differs_from_the_proximal_policy(results: dict[str, Any]) -> None:
    first, second = results["two minibatches"]
    for metrics in (first, second):
        assert metrics["train/importance_weight_max"] > 1.0
        assert metrics["train/approx_kl"] != 0
        assert metrics["train/tokens"] == results["metrics"]["tp1"]["train/tokens"]
    assert first["perf/time/proximal_s"] > 0


def test_first_minibatch_needs_no_proximal_pass(results: dict[str, Any]) -> None:
    """Its own forward pass uses the same weights: the steps are equal."""
    whole, without_first = results["proximal recompute"], results["proximal reuse_first_minibatch"]
    for name, value in whole.items():
        if not name.startswith("perf/"):
            assert without_first[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_loglinear_proximal_makes_no_pass_and_other_weights(results: dict[str, Any]) -> None:
    loglinear, whole = results["proximal loglinear"], results["proximal recompute"]
    assert results["proximal passes"] == {
        "recompute": [2],
        "reuse_first_minibatch": [1],
        "loglinear": [],
    }
    assert loglinear["train/behavior_weight_mean"] != pytest.approx(
        whole["train/behavior_weight_mean"], rel=1e-3
    )


def test_kl_to_the_reference_is_zero_at_first_and_then_positive(results: dict[str, Any]) -> None:
    first, second, third = (metrics["train/reference_kl"] for metrics in results["kl"])
    assert abs(first) < 1e-6 and second > 1e-4 and third > 1e-4


def test_kl_in_the_reward_uses_the_tokens_of_the_loss(results: dict[str, Any]) -> None:
    assert all(
        changed == last for changed, last in results["kl in reward changes advantages, last stage"]
    )


def test_m2po_masks_tokens_by_the_whole_batch(results: dict[str, Any]) -> None:
    layouts = ("m2po", "m2po tp2 pp2 sp", "m2po cp2")
    fractions = [results["metrics"][name]["train/masked_by_cap_fraction"] for name in layouts]
    assert 0 < fractions[0] < 0.5 and len(set(fractions)) == 1


def test_checkpoint_of_grouped_experts_resumes_in_another_layout(results: dict[str, Any]) -> None:
    """With Adam's moments and linear attention: EP 2, with TP 2, then PP 2 and an empty chunk."""
    saved, loaded = results["moe checkpoint"]["saved"], results["moe checkpoint"]["loaded"]
    for key in ("train/loss", "train/grad_norm", "train/entropy"):
        assert loaded[key] == pytest.approx(saved[key], rel=1e-4), key


def test_whole_samples_are_masked_under_context_parallelism(
    results: dict[str, Any],
) -> None:
    layouts = ("sequence mask", "sequence mask cp2")
    fractions = [results["metrics"][name]["train/masked_by_cap_fraction"] for name in layouts]
    assert 0 < fractions[0] < 1 and fractions[0] == fractions[1]


def test_minibatch_with_too_large_a_ratio_makes_no_step(results: dict[str, Any]) -> None:
    assert results["stopped"]["train/stopped_minibatches"] == 1
    assert results["stopped, weights same"]


def test_all_ranks_refuse_a_non_finite_step_before_writing(
    results: dict[str, Any],
) -> None:
    assert "training step 5" in results["refused"] and "nan" in results["refused"]
    assert results["refused everywhere, weights same"] == [[True, True]] * 4


def test_refused_batch_is_saved(layout_folder: Path) -> None:
    version, samples = batches.load(layout_folder / "run" / "refused" / "v5-replica0.npz")
    assert version == 5 and len(samples) == len(global_batch())
    assert np.isnan(samples[0].advantages).all() and np.array_equal(
        samples[1].ids, global_batch()[1].ids
    )


def test_bf16_trains(results: dict[str, Any]) -> None:
    assert results["bf16 dtypes"] == ["torch.bfloat16"]
    assert math.isfinite(results["bf16"]["train/loss"])
    assert results["bf16"]["train/loss"] == pytest.approx(
        results["metrics"]["tp1"]["train/loss"], abs=0.05
    )


@pytest.mark.parametrize("layout", GAE_LAYOUTS)
def test_policy_and_critic_do_not_depend_on_the_layout(
    layout_folder: Path, results: dict[str, Any], layout: str
) -> None:
    """After two steps, the second with advantages from the critic's values."""
    last, want = results[layout][-1], results["gae"][-1]
    for name, value in want.items():
        if name.startswith(("critic/", "train/")) and "packing" not in name:
            assert last[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    for who in ("weights", "critic"):
        weights = load(layout_folder / f"{who} gae.pt")
        before = hf_model(layout_folder / "models" / "qwen3").state_dict() | {
            "value head": torch.zeros(1, 32)
        }
        moved = {n: weights[n] - before[n] for n in weights}
        difference, name = largest_difference(
            load(layout_folder / f"{who} {layout}.pt"), weights, moved
        )
        assert difference < 2e-4, (who, name)


def test_critic_is_a_separate_model_that_learns(
    layout_folder: Path, results: dict[str, Any]
) -> None:
    first, last = results["gae"]
    assert first["critic/value_mean"] == 0 and last["critic/value_mean"] != 0
    assert (
        results["gae two minibatches"]["critic/value_mean"] != 0
    )  # of the second step, after the first
    assert last["critic/grad_norm"] > 0 and last["critic/loss"] < first["critic/loss"]
    policy, critic = load(layout_folder / "weights gae.pt"), load(layout_folder / "critic gae.pt")
    assert set(critic) - set(policy) == {"value head"} and set(policy) - set(critic) == {
        "lm_head.weight"
    }
    assert critic["value head"].abs().max() > 0
    assert not torch.equal(
        critic["model.layers.0.mlp.up_proj.weight"], policy["model.layers.0.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("shard", ["True", "False"])
class TestFp16:
    """With and without the distributed optimizer."""

    def test_step_matches_fp32(self, results: dict[str, Any], shard: str) -> None:
        told, want = results["fp16"][shard], results["metrics"]["tp2 pp2"]
        assert told["dtypes"] == told["published as"] == ["torch.float16"]
        assert told["step"]["train/loss"] == pytest.approx(want["train/loss"], abs=5e-3)
        assert told["step"]["train/grad_norm"] == pytest.approx(
            want["train/grad_norm"], rel=2e-2
        )  # unscaled
        assert told["step"]["train/overflowed_minibatches"] == 0

    def test_loss_scale_is_saved_with_the_optimizer(
        self, results: dict[str, Any], shard: str
    ) -> None:
        told = results["fp16"][shard]
        assert told["loaded"] == 1
        assert (
            told["loaded scale"] == told["step"]["train/loss_scale"] == 2048
        )  # it grew after the one step
        assert told["step after loading"]["train/loss_scale"] == 4096

    def test_overflow_skips_the_step_and_lowers_the_scale(
        self, results: dict[str, Any], shard: str
    ) -> None:
        told = results["fp16"][shard]
        assert told["weights same"]
        assert [s["train/overflowed_minibatches"] for s in told["overflows"]] == [1, 1, 1]
        assert [s["train/loss_scale"] for s in told["overflows"]] == [
            2.0**60,
            2.0**59,
            2.0**58,
        ]  # from the second step
        assert all(math.isfinite(s["train/loss"]) for s in told["overflows"])

    def test_non_finite_loss_is_refused_and_not_an_overflow(
        self, results: dict[str, Any], shard: str
    ) -> None:
        told = results["fp16"][shard]
        assert "loss nan" in told["nan"] and told["nan, weights same"]

    def test_overflow_at_the_smallest_scale_is_refused(
        self, results: dict[str, Any], shard: str
    ) -> None:
        told = results["fp16"][shard]
        assert "smallest loss scale" in told["smallest"] and told["smallest, weights same"]
