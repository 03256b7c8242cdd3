"""The parity contract: evidence, figures, bounds, verdicts and causes."""
