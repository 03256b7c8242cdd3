"""What a calibration is fitted on: images, pairs, sources of any size, and their embeddings."""
