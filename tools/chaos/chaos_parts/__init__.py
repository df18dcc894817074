"""Parts of tools/chaos/chaos.py: the job, the namespaces it runs in, the faults."""
