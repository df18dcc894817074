"""The parts of tools/chaos/chaos.py: the job, the world it runs in, the faults."""
