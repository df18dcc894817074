"""Runs untrusted programs. sandbox.py is the trusted side; zygote.py and jail.py run elsewhere."""
