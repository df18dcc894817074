"""PROCESS. Replaces the trainer with run.mode = rollout_only: writes batches to disk."""
