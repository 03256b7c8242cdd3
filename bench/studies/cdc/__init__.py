"""CDC on the multi-style image set: base classes to new ones, seen styles to unseen ones."""
