"""Models of the benchmarks: sizes of Qwen3, and model folders without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": 0,
}
_EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1001,
}
_SIZES: dict[str, dict[str, Any]] = {  # vocabulary and embeddings as published
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "30b-a3b": _EXPERTS
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "tiny": _TINY,
    "tiny-moe": _EXPERTS
    | _TINY
    | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
SHAPES = {name: _COMMON | sizes for name, sizes in _SIZES.items()}
"""config.json by the name of the model."""


def shape_of(name: str, layers: int | str | None = None) -> dict[str, Any]:
    """Returns config.json of a model, cut to so many layers."""
    shape = dict(SHAPES[name])
    shape["num_hidden_layers"] = int(layers or shape["num_hidden_layers"])
    return shape


def make_model(folder: Path, shape: dict[str, Any], num_words: int = 0) -> Path:
    """Writes all that random weights need: config.json and a tokenizer of w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    vocabulary = {"<end>": 0, "<pad>": 1, "<unk>": 2}
    vocabulary |= {f"w{number}": number + 3 for number in range(num_words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
