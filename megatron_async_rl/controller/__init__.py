"""PROCESS. Decides what is generated and what is trained; owns no GPU."""
