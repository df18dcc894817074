"""Files of a run besides its journal: checkpoints, snapshots, batches."""
