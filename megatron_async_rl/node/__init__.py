"""One host's part of a trainer that is on several: PROCESS."""
