"""Monitors of the run: progress, scores, lengths, mismatch and stalls."""
