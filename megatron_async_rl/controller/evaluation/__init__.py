"""Evaluations: when each is due, its samples on disk, and its metrics."""
