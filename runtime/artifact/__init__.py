"""The artifact: what it says of itself, its files, and the files that calibration leaves beside it."""
