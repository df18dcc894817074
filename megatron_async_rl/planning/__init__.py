"""Predicts step time, throughput and staleness of a run without GPUs: the command `plan`."""
