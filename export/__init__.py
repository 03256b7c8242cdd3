"""From an open_clip checkpoint to a verified artifact."""
