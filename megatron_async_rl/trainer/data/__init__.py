"""Batches to packed micro-batches."""
