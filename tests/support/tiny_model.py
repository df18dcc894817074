"""A tiny random Qwen3 with a tokenizer, and a dataset, for tests that start real processes."""

from __future__ import annotations

import json
from pathlib import Path

# One token each; with the three special tokens the size of the vocabulary is odd.
ALPHABET = "0123456789+-*/=()<>,;:abcdefghijkl"
# `sglang:` of every engine that tests start
CPU_ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.1,
    "max_total_tokens": 8192,
    "disable_overlap_schedule": True,
}


def make_model(
    folder: Path, seed: int = 0, scale: float = 0.25, layers: int = 2, **sizes: int
) -> Path:
    """Writes a model of two key-value heads; its random weights sample every token at times.

    `sizes` are keys of config.json that have other values than here.
    """
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = ["<|end|>", "<|pad|>", "<|unk|>", *ALPHABET]
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<|unk|>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unk|>"
    )
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2} | sizes
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **shape,
            vocab_size=len(words),
            num_hidden_layers=layers,
            num_attention_heads=4,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
            dtype="float32",
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * scale + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_dataset(path: Path, count: int, first: int = 10) -> Path:
    rows = [
        {"id": f"{path.stem}-{n}", "prompt": f"{n}+{n + 1}=", "answer": str(2 * n + 1)}
        for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
