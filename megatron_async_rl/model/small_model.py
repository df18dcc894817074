"""The small model that `selftest` trains to compare parallel layouts."""

from __future__ import annotations

from typing import Any

from megatron_async_rl.config.config import Config
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.layout import Layout

VOCAB_SIZE = 251
MAX_SAMPLE_TOKENS = 60
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "full_attention_interval": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}


def small_chunks(config: Config) -> tuple[int, ...]:
    """Returns the layers of each pipeline chunk of the small model: 1, and 2 for larger chunks.

    A chunk without layers stays so. Raises ConfigError if the layers of model.path are not split.
    """
    num_layers = HfConfig(config.model.path).shape().num_layers
    chunks = Layout.from_config(config).chunk_layers(num_layers)
    if len(chunks) == 1:
        return (2,)
    least = min(filter(None, chunks))
    return tuple(min(size, 1 + (size > least)) for size in chunks)


def small_model(config: Config) -> dict[str, Any]:
    """Returns the config.json of a narrow and shallow model.

    Family and numbers of heads and experts are those of model.path, so every layout that fits that
    model fits this one. Raises DataError if model.path has no config.json, ConfigError as
    small_chunks.
    """
    given = dict(HfConfig(config.model.path).raw)
    given.pop("layer_types", None)  # of the given number of layers
    heads = given["num_attention_heads"]
    sizes = {
        name: size
        for name, size in _SIZES.items()
        if given.get(name) is not None or name == "head_dim"
    }
    return given | sizes | {
        "hidden_size": 16 * heads,
        "intermediate_size": 24 * heads,
        "num_hidden_layers": sum(small_chunks(config)),
        "max_position_embeddings": 4 * MAX_SAMPLE_TOKENS,
    }  # fmt: skip
