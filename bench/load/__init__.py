"""`invariclip serve` under load."""
