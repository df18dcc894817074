"""Runs untrusted programs. sandbox.py is the trusted side, the rest runs elsewhere."""
