"""CDC on the multi-style picture set: base classes to new ones, seen styles to unseen ones."""
