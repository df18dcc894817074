"""The controller's part of weight updates."""
