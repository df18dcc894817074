"""Datasets and tokenizers, read the same way by preflight checks and by the controller."""
