"""What a rollout worker keeps of samples while they grow."""
