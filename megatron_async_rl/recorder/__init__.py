"""PROCESS. Stands where the trainer stands when there is none: writes batches to disk."""
