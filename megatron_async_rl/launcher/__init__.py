"""Starts and supervises the processes of a run, on one host, on several, or in a Slurm job."""
