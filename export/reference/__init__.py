"""The bundled kit: a small open_clip model with its record, and some pictures in several styles."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def checkpoint_folder() -> Path:
    """The folder that open_clip loads by `local-dir:`: config and weights."""
    return _HERE


def config_path() -> Path:
    """The model's and the preprocessing's configuration, in open_clip's own layout."""
    return _HERE / "open_clip_config.json"


def checkpoint_path() -> Path:
    """The model's weights: safetensors, float16."""
    return _HERE / "open_clip_model.safetensors"


def record_path() -> Path:
    """How the model was trained, from what, and how accurate it is in every style."""
    return _HERE / "training.json"


def pictures_path() -> Path:
    """The folder of the bundled pictures: `<style>/<hexcode>.webp`."""
    return _HERE / "pictures"


def manifest_path() -> Path:
    """One JSON line a bundled picture; its `file` is relative to the manifest's folder."""
    return _HERE / "pictures.jsonl"
