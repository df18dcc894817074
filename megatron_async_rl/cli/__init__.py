"""Commands of `python -m megatron_async_rl`, one module each."""
