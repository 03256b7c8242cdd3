"""The families: what is damaged or made up, and what an accepted input is held against."""

from importlib import import_module

NAMES = (
    "artifact", "sealed", "json", "safetensors", "lists", "sources", "tars", "tokenizers", "texts", "images",
    "checkpoints", "configs",
)  # fmt: skip
"""In the order of the page; each is a module of its own with a class `Family`."""


def family(name):
    """The family of that name, not yet opened."""
    return import_module(f"fuzz.families.{name}_family").Family()
