"""Workflows that ship with the project; hooks.py has their names."""
