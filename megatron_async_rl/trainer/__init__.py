"""The trainer process: Megatron-Core model, packed micro-batches, decoupled PPO. Call patches.prepare_megatron() first."""
