"""Megatron's shards to and from Hugging Face names: the layout tables, loading, gathering, sending."""
