"""Checkpoints: found, built, filled with weights, and what they need for images and texts."""
