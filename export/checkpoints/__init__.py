"""Checkpoints: found, built, filled with weights, and what they need for pictures and texts."""
