"""One command that proves and times a checkpoint on a GPU machine, offline."""
