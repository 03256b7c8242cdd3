"""The reference models, put together from published parts, and the bundled pictures in several styles."""

from __future__ import annotations

from pathlib import Path

from invariclip.errors import InputError
from invariclip.export.reference.assemble import RECIPES, assembled, cache_folder

__all__ = ["RECIPES", "assembled", "cache_folder", "manifest_path", "pictures_path"]

_HERE = Path(__file__).resolve().parent


def pictures_path() -> Path:
    """The folder of the bundled pictures: `<style>/<file>`.

    Raises:
        InputError: They are not here: the repository has them, the wheel does not.
    """
    return _bundled(_HERE / "pictures")


def manifest_path() -> Path:
    """One JSON line a bundled picture; its `file` is relative to the manifest's folder.

    Raises:
        InputError: It is not here: the repository has it, the wheel does not.
    """
    return _bundled(_HERE / "pictures.jsonl")


def _bundled(path: Path) -> Path:
    if not path.exists():
        raise InputError(
            "the bundled pictures are in the repository, not in the wheel: give images of your own with --images, or "
            "install from a clone (`pip install -e .`)"
        )
    return path
