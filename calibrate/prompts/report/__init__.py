"""Learned templates as a page: figures first, without a plot among them; then plots and HTML."""
