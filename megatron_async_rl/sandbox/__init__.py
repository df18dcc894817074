"""Runs programs that a model wrote. box.py: our end; zygote.py and jail.py: the other, in an interpreter of its own."""
