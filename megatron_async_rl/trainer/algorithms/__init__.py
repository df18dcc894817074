"""Losses, importance weights, GAE, critic and reference policy."""
