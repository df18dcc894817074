"""Element types of a server: of its weights, and of its state of linear attention."""

from __future__ import annotations

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model.config_json import HfConfig

_CHOICES = {"half": "float16", "float": "float32"} | {
    name: name for name in ("float16", "bfloat16", "float32")
}


def weight_dtype(config: Config) -> str:
    """Returns the element type of the engine's weights, "" if it is not known.

    `auto` is that of the model, but float16 for float32.
    """
    chosen = str(config.sglang.get("dtype", "auto"))
    if chosen != "auto":
        return _CHOICES.get(chosen, "")
    stored = HfConfig(config.model.path).dtype_name or ""
    return "float16" if stored == "float32" else stored


def convolution_dtype(config: Config) -> str:
    """Returns the type in which a server must keep the last inputs of convolutions.

    "" without linear attention. Raises ConfigError if config.json has another type than the engine,
    which keeps the norms of linear attention in that of config.json.
    """
    model = HfConfig(config.model.path)
    if not model.family.linear_layer:
        return ""
    engine = weight_dtype(config)
    if model.dtype_name != engine:
        raise ConfigError(
            f"sglang.dtype = {config.sglang.get('dtype', 'auto')}, but config.json of model.path = "
            f"{config.model.path} has dtype {model.dtype_name}, in which SGLang keeps the norms of "
            "linear attention",
            f"set sglang.dtype={model.dtype_name}, or convert the model"
            if model.dtype_name
            else "write the dtype of the weights into config.json",
        )
    return engine
