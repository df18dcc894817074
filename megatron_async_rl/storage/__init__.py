"""What a run keeps on disk besides its journal, and how files become complete atomically."""
