"""The release, for whatever records it."""

__version__ = "0.2.0"
