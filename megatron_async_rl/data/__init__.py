"""Datasets and tokenizers; preflight and the controller read them by the same code."""
