"""Checkpoints and exported Hugging Face folders."""
