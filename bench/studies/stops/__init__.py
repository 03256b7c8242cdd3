"""Commands that are stopped while they work: the same results afterwards, and nothing left behind."""
