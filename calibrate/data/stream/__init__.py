"""Calibration from any amount of data: shards → embeddings → moments, resumable, with memory that does not grow."""
