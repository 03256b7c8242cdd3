"""Measurements: latency, accuracy, invariance; and the demo."""
