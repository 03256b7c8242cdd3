"""The reference models, put together from published parts, and the bundled images in several styles."""

from __future__ import annotations

from pathlib import Path

from invariclip.errors import InputError
from invariclip.export.reference.models import RECIPES, assembled, cache_folder

__all__ = ["RECIPES", "assembled", "cache_folder", "images_path", "manifest_path"]

_HERE = Path(__file__).resolve().parent


def images_path() -> Path:
    """The folder of the bundled images: `<style>/<file>`.

    Raises:
        InputError: They are not here: the repository has them, the wheel does not.
    """
    return _bundled(_HERE / "images")


def manifest_path() -> Path:
    """One JSON line a bundled image; its `file` is relative to the manifest's folder.

    Raises:
        InputError: It is not here: the repository has it, the wheel does not.
    """
    return _bundled(_HERE / "images.jsonl")


def _bundled(path: Path) -> Path:
    if not path.exists():
        raise InputError(
            "the bundled images are in the repository, not in the wheel: give images of your own with --images, those "
            "to calibrate variants on with --calibration, or "
            "install from a clone (`pip install -e .`)"
        )
    return path
