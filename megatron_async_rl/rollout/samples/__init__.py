"""State of unfinished samples in a rollout worker: partial samples, experts."""
