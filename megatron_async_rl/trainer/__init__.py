"""The trainer process. Call patches.prepare_megatron() before importing its modules."""
