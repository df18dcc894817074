"""The configuration of a run: its sections, how it is loaded, and the rules between settings."""
