"""The sizes of published Qwen3 models, as config.json files without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_async_rl.model.config_json import HfConfig

# from the config.json of each model on huggingface.co
SHAPES = {
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8),
    "Qwen3-8B": (4096, 12288, 36, 32, 8),
    "Qwen3-14B": (5120, 17408, 40, 40, 8),
    "Qwen3-32B": (5120, 25600, 64, 64, 8),
    "Qwen3-30B-A3B": (2048, 6144, 48, 32, 4),
}


def model_config(name: str, folder: Path, **changes: Any) -> HfConfig:
    """Writes config.json into the folder."""
    hidden, ffn, layers, heads, kv_heads = SHAPES[name]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": name == "Qwen3-1.7B",
    }
    if name == "Qwen3-30B-A3B":
        config |= {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}
        config |= {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return HfConfig(folder)
