"""From interventional pairs to the invariant projection."""
