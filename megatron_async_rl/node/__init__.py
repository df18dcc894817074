"""One host's part of a trainer that spans several hosts."""
