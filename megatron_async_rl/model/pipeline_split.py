"""The number of decoder layers on each pipeline stage, by Megatron-Core's settings for it.

A stage has one chunk of layers, in an interleaved pipeline several: chunk c of stage s is number
c * stages + s in the order of the layers. Trainer, weight plan and memory estimate take the sizes
of the chunks from here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError

_FIRST, _LAST = (f"num_layers_in_{name}_pipeline_stage" for name in ("first", "last"))
_EMBEDDING, _LOSS = (f"account_for_{name}_in_pipeline_split" for name in ("embedding", "loss"))
_LAYOUT = "pipeline_model_parallel_layout"
KEYS = (_FIRST, _LAST, _EMBEDDING, _LOSS, _LAYOUT)
"""Keys under `megatron:`. Without any of them the chunks are as equal as possible."""
_LETTERS = {"E": "embedding", "t": "decoder", "L": "loss"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSplit:
    """The settings, checked as far as that needs no model."""

    first: int | None = None
    """Layers of the first stage; None: as many as stages between first and last have."""
    last: int | None = None
    counts_embedding: bool = False
    """The embedding counts as a layer of the first chunk."""
    counts_loss: bool = False
    """The output layer counts as a layer of the last chunk."""
    chunks: tuple[int, ...] = ()
    """Layers of each chunk, as pipeline_model_parallel_layout gives them."""

    @classmethod
    def from_config(cls, config: Config) -> PipelineSplit:
        """Raises ConfigError for a value of the wrong kind, and for settings that exclude others.

        These are Megatron-Core's rules; each setting needs several stages.
        """
        given = {key: config.megatron.get(key) for key in KEYS}
        chosen = {key: v for key, v in given.items() if v is not None and v is not False}
        names = list(chosen)
        if chosen and config.parallel_size("pipeline_model") == 1:
            raise ConfigError(
                f"megatron.{names[0]} = {chosen[names[0]]!r} needs pipeline_model_parallel_size "
                ">= 2",
                "raise that, or remove the key",
            )
        for key in {_FIRST, _LAST} & chosen.keys():
            if type(chosen[key]) is not int or chosen[key] < 1:
                raise ConfigError(f"megatron.{key} = {chosen[key]!r}: expected an integer >= 1")
        for key in {_EMBEDDING, _LOSS} & chosen.keys():
            if chosen[key] is not True:
                raise ConfigError(f"megatron.{key} = {chosen[key]!r}: expected true or false")
        for kind in ({_FIRST, _LAST}, {_EMBEDDING, _LOSS}, {_LAYOUT}):
            if kind & chosen.keys() and chosen.keys() - kind:
                raise ConfigError(
                    f"megatron.{' and megatron.'.join(names)} exclude each other",
                    "keep one way to split the layers over pipeline stages",
                )
        return cls(
            first=chosen.get(_FIRST),
            last=chosen.get(_LAST),
            counts_embedding=_EMBEDDING in chosen,
            counts_loss=_LOSS in chosen,
            chunks=_layout_chunks(chosen[_LAYOUT], config) if _LAYOUT in chosen else (),
        )

    @property
    def is_automatic(self) -> bool:
        """True if no setting says how the layers are split."""
        return self == PipelineSplit()

    def chunk_layers(self, stages: int, chunks: int, num_layers: int) -> tuple[int, ...]:
        """Returns the layers of each chunk in the order of the layers; `chunks`: per stage.

        Raises ConfigError if a model of so many layers cannot be split so.
        """
        if self.chunks:
            sizes = list(self.chunks)
        elif self.first or self.last:
            sizes = self._with_ends(stages, chunks, num_layers)
        else:
            sizes = self._equal(stages, chunks, num_layers)
        if sum(sizes) != num_layers:
            raise _refused(f"{_LAYOUT} has {sum(sizes)} decoder layers", num_layers)
        if empty := [stage for stage in range(1, stages - 1) if not any(sizes[stage::stages])]:
            raise _refused(f"{_LAYOUT} leaves stage {empty[0]} without a decoder layer", num_layers)
        return tuple(sizes)

    def _with_ends(self, stages: int, chunks: int, num_layers: int) -> list[int]:
        """Returns the sizes with `first` or `last`; the other stages share the rest equally."""
        ends = {_FIRST: self.first, _LAST: self.last}
        given = {key: size for key, size in ends.items() if size is not None}
        chosen = " and megatron.".join(f"{key} = {size}" for key, size in given.items())
        for key, size in given.items():
            if size % chunks:
                rule = f"is no multiple of virtual_pipeline_model_parallel_size = {chunks}"
                raise _refused(f"{key} = {size} {rule}", num_layers)
        rest, between = num_layers - sum(given.values()), stages - len(given)
        if rest != 0 if not between else rest < 1 or rest % (between * chunks):
            parts = f"{between} stages" + f" of {chunks} chunks" * (chunks > 1)
            raise _refused(f"{chosen} leaves {rest} layers for {parts} of equal size", num_layers)
        sizes = [rest // max(between, 1)] * stages
        sizes[0], sizes[-1] = self.first or sizes[0], self.last or sizes[-1]
        return [size // chunks for _ in range(chunks) for size in sizes]

    def _equal(self, stages: int, chunks: int, num_layers: int) -> list[int]:
        """Returns sizes that differ by one at most.

        The larger chunks are the last ones but one: the last has the output layer, and the first
        stages keep the activations of the most micro-batches.
        """
        total = stages * chunks
        size, extra = divmod(num_layers + self.counts_embedding + self.counts_loss, total)
        if not size:
            factor = f" times virtual_pipeline_model_parallel_size = {chunks}" * (chunks > 1)
            raise ConfigError(
                f"megatron.pipeline_model_parallel_size = {stages}{factor} is more than the "
                f"model's num_hidden_layers = {num_layers}",
                "lower it",
            )
        if extra and not self.is_automatic:
            key = _EMBEDDING if self.counts_embedding else _LOSS
            rule = f"leaves {extra} layers beyond {total} equal parts"
            raise _refused(f"{key} = true {rule}", num_layers)
        sizes = [size + (total - 1 - extra <= number < total - 1) for number in range(total)]
        sizes[0] -= self.counts_embedding
        sizes[-1] -= self.counts_loss
        return sizes


def _refused(problem: str, num_layers: int) -> ConfigError:
    return ConfigError(
        f"megatron.{problem}; the model has num_hidden_layers = {num_layers}",
        "correct it, or remove the key for stages that are as equal as possible",
    )


def megatron_layout(chunks: tuple[int, ...]) -> list[list[str]]:
    """Returns chunks of these numbers of layers as pipeline_model_parallel_layout has them."""
    parts = [["decoder"] * size for size in chunks]
    return [["embedding", *parts[0]], *parts[1:-1], [*parts[-1], "loss"]]


def _layout_chunks(value: Any, config: Config) -> tuple[int, ...]:
    """Returns the decoder layers of each part of a pipeline_model_parallel_layout."""
    parts = _parsed(value) if isinstance(value, str) else value
    problem = ""
    if not (isinstance(parts, list) and all(isinstance(part, list) for part in parts)):
        problem = "is neither text nor a list of lists"
    else:
        kinds = [kind for part in parts for kind in part]
        layers = kinds.count("decoder")
        if kinds != ["embedding", *["decoder"] * layers, "loss"]:
            problem = "has other parts than one embedding, decoder layers and one loss"
        sizes = [config.parallel_size(f"{name}pipeline_model") for name in ("", "virtual_")]
        if not problem and len(parts) != sizes[0] * sizes[1]:
            problem = (
                f"has {len(parts)} parts, but pipeline_model_parallel_size = {sizes[0]} times "
                f"virtual_pipeline_model_parallel_size = {sizes[1]} is {sizes[0] * sizes[1]}"
            )
        elif not problem and not (parts[0][:1] and parts[-1][-1:]):
            problem = "has the embedding or the loss in other parts than the first and the last"
    if problem:
        raise ConfigError(
            f"megatron.{_LAYOUT} = {value!r} {problem}",
            "write it as Megatron does, such as Et*3|(t*4|)*14t*2L for 16 stages of 61 layers",
        )
    return tuple(part.count("decoder") for part in parts)


def _parsed(text: str) -> list[list[str]]:
    """Returns the parts of a layout in text; as PipelineParallelLayerLayout.parse_str_to_list."""
    text = text.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(repeated, lambda found: found[1] * int(found[2]), text)
    return [[_LETTERS.get(letter, letter) for letter in part] for part in text.split("|")]
