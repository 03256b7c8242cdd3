"""Fits the invariant projection, and learned prompts beside it, from images or other pairs."""
