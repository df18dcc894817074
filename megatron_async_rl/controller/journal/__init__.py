"""The event journal on disk."""
