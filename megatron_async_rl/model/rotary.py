"""The settings of rotary embeddings in config.json, with the defaults of the engine."""

from __future__ import annotations

from typing import Any

from megatron_async_rl.errors import DataError
from megatron_async_rl.model.config_fields import ConfigFields
from megatron_async_rl.model.families import Family

# Megatron's rope_scaling has these values of Llama 3 built in; only the factor can be set.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {  # Megatron's defaults, which are the engine's
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
_YARN_KEYS = {"type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings"}


def is_scaled(fields: ConfigFields) -> bool:
    """Returns whether the angles are scaled. Raises DataError if config.json has no such object."""
    return _kind(_parameters(fields)) != "default"


def settings(fields: ConfigFields, family: Family) -> dict[str, Any]:
    """Returns the fields of Architecture for rotary embeddings.

    Only rope_theta and partial_rotary_factor may be at the top level instead. Raises DataError for
    values that Megatron or the engine would compute differently.
    """
    rope, latent = _parameters(fields), family.latent_attention
    if family.linear_layer:
        _check_engine(fields, rope)
    base = fields.number("rope_theta", 10000.0)
    percent = fields.number("partial_rotary_factor", family.rotary_percent)
    percent = fields.number("partial_rotary_factor", percent, rope)
    if family.rotary_percent == 1.0 and percent != 1.0:  # transformers and most engines ignore it
        raise fields.refused(
            f"partial_rotary_factor = {percent:g}, which {family.name} does not have"
        )
    return {
        "rotary_base": fields.number("rope_theta", base, rope),
        "rotary_percent": percent,
        "rope_scaling_factor": None if latent else _llama3_factor(fields, rope),
        "yarn": _yarn(fields, rope) if latent else None,
    }


def _parameters(fields: ConfigFields) -> dict[str, Any]:
    # transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling.
    rope = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise fields.refused(f"{rope!r} as rope_parameters or rope_scaling, expected an object")
    return rope


def _kind(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _check_engine(fields: ConfigFields, rope: dict[str, Any]) -> None:
    """Raises DataError if SGLang, which reads no rope_parameters, would rotate otherwise."""
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 0.25)):
        engine = fields.raw.get(key, default)
        if rope.get(key, engine) != engine:
            raise fields.refused(
                f"{key} = {rope[key]} in rope_parameters only, and SGLang would use {engine}",
                f"write {key} at the top level of config.json too",
            )


def _llama3_factor(fields: ConfigFields, rope: dict[str, Any]) -> float | None:
    kind = _kind(rope)
    if kind == "default":
        return None
    different = {k: rope[k] for k, v in _LLAMA3.items() if rope.get(k, v) != v}
    if kind != "llama3" or different:
        raise _unsupported(fields, kind, different, f"llama3 with {_LLAMA3}")
    return fields.number("factor", part=rope)


def _yarn(fields: ConfigFields, rope: dict[str, Any]) -> dict[str, float] | None:
    kind = _kind(rope)
    if kind == "default":
        return None
    unknown = sorted(rope.keys() - _YARN_KEYS - _YARN.keys())
    if kind != "yarn" or unknown:
        raise _unsupported(fields, kind, unknown, f"yarn with {', '.join(_YARN)}")
    length = "original_max_position_embeddings"
    return {name: fields.number(name, default, rope) for name, default in _YARN.items()} | {
        "factor": fields.number("factor", part=rope),
        length: fields.integer(length, part=rope),
    }


def _unsupported(fields: ConfigFields, kind: str, unknown: Any, supported: str) -> DataError:
    others = f" with {unknown}" if unknown else ""
    return fields.refused(
        f"rope_type {kind!r}{others}, which is not supported",
        f"use a model with rope_type default, or {supported}",
    )
