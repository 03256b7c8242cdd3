"""How docs/parity.md and tests/export/golden are made: each family's graphs against PyTorch, and as text."""
