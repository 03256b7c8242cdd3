"""The release, for whatever records it."""

__version__ = "0.1.0"
