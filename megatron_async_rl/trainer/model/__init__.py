"""The Megatron-Core model of a trainer rank."""
