"""Files of a run besides its journal: checkpoints, snapshots, batches, digests of its inputs."""
