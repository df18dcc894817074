"""Commands of `megatron-async-rl`, one module each."""
