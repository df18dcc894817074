"""Process: decides which samples are generated and trained; uses no GPU."""
