"""A tower as a graph: folded, traced, finished, written, looked at."""
