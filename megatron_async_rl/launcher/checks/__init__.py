"""Checks that preflight.py lists: each returns its finding, or raises an Error."""
