"""Timing candidates that must not slow each other: a process each, turns, and what the turns say."""
