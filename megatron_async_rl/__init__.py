"""Asynchronous reinforcement learning for language models, as an extension of Megatron-Core."""

__version__ = "0.1.0"
