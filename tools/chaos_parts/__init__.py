"""The parts of tools/chaos.py: the job, the world it runs in, the faults."""
