"""The trainer's part of `compare-logprobs`: its operations beside the engine's."""
