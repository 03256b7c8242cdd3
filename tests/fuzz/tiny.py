"""Tiny real files to start from, made once in a run's folder: a checkpoint, images, artifacts."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from invariclip.files import new_directory

CLASSES = ("cat", "dog", "tree")
WIDTH = 24


def once(folder, name, make):
    """A folder that `make` fills where it is not there yet."""
    made = Path(folder) / name
    if not made.is_dir():
        with new_directory(made) as filling:
            make(filling)
    return made


def images(folder):
    """A dozen small images of different sizes and contents."""

    def make(into):
        rng = np.random.default_rng(0)
        for index in range(12):
            height, width = rng.integers(20, 90, 2)
            y, x = np.mgrid[0:height, 0:width]
            wave = np.stack([np.sin(x / (3 + index) + k) + np.cos(y / (2 + k)) for k in range(3)], axis=-1)
            array = ((wave + rng.normal(0, 0.2, wave.shape) + 2.5) / 5 * 255).clip(0, 255).astype(np.uint8)
            Image.fromarray(array).save(into / f"{index:02d}.png")

    return once(folder, "images", make)


def checkpoint(folder):
    """A tiny ViT in open_clip's layout, with seeded random weights."""
    from conftest import write_tiny_checkpoint

    return once(folder, "checkpoint", write_tiny_checkpoint)


@cache
def loaded(folder):
    """The checkpoint, loaded."""
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    return load_checkpoint(str(checkpoint(folder)), threads=1)


def projection():
    """A projection of rank 8."""
    from invariclip.artifact.projection import Projection

    rng = np.random.default_rng(1)
    return Projection(
        rng.normal(size=(WIDTH, 8)), "icm", 3.0, eigenvalues=rng.random(WIDTH), provenance={"seed": 1, "what": ["é"]},
        training_mean=rng.normal(size=8) / 10,
    )  # fmt: skip


def learned_prompts(checkpoint_sha256="0" * 64):
    """Two learned templates."""
    from invariclip.artifact.learned_prompts import LearnedPrompts

    rng = np.random.default_rng(5)
    return LearnedPrompts(
        (0.02 * rng.normal(size=(2, 3, 16))).astype(np.float32), np.array([0.2, 0.1, 0.3]), np.array([-1.0, 0.5, -3.0]),
        np.array([0.1, -0.2, 0.3]), ("a photo of a {}.", "a drawing of a {}"), checkpoint_sha256, projection().digest,
        abstain_above=0.3, provenance={"seed": 5},
    )  # fmt: skip


def site(space_id="0" * 32):
    """A site of 40 images in a space of width 8, among three classes."""
    from invariclip.sites.site import new_site

    rng = np.random.default_rng(7)
    rows = rng.normal(size=(40, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return new_site("yard", space_id, projection().training_mean, 3, {"made": "here"}).adding(rows, np.eye(8)[:3])


def _export(into, folder, **options):
    from invariclip.export.build import export_artifact
    from invariclip.export.config import ExportConfig
    from invariclip.preprocessing.find import find_images

    config = ExportConfig(classes=CLASSES, images=find_images([images(folder)]), threads=1)
    export_artifact(loaded(folder), into, config, projection=projection(), **options)


def _with_profile(artifact):
    """A machine profile of this machine, as `tune` writes it."""
    from invariclip.profile import MachineProfile, Measurement, ProfileChoice, profile_path, write_profile
    from invariclip.selection import basis_of

    basis = basis_of(artifact, "latency", "exact", (1,), (1,))
    choice = ProfileChoice("float32", "onnxruntime", 1, 1)
    measured = Measurement(choice, "exact", 3, 11, 1.5, 1.4, 1.6, 666.7, 2.0, 1.9, 2.1)
    profile = MachineProfile(
        basis, choice, "2 × the safe default", (measured,), ({"candidate": "x on y", "why": "z"},), 3.2, 0.1,
        "2026-01-01T00:00:00+00:00", {"invariclip": "0"},
    )  # fmt: skip
    write_profile(profile_path(artifact, replace(basis)), profile)


def plain_artifact(folder):
    """An artifact with three classes and a projection, and a machine profile."""

    def make(into):
        _export(into / "plain.icm", folder)
        _with_profile(into / "plain.icm")

    return once(folder, "plain", make) / "plain.icm"


def cdc_artifact(folder):
    """The same with learned templates."""

    def make(into):
        _export(into / "cdc.icm", folder, learned_prompts=learned_prompts(loaded(folder).sha256))
        _with_profile(into / "cdc.icm")

    return once(folder, "cdc", make) / "cdc.icm"


def site_artifact(folder):
    """The plain one with a site in its graphs."""

    def make(into):
        from invariclip.artifact.folder import read_manifest
        from invariclip.export.site import bake_site

        plain = plain_artifact(folder)
        bake_site(plain, into / "site.icm", site(read_manifest(plain).space_id), images=[images(folder)], threads=1)
        _with_profile(into / "site.icm")

    return once(folder, "site", make) / "site.icm"


def linked(artifact, into):
    """A copy of an artifact whose files are further names of the same files; one that is written anew is only here."""
    shutil.rmtree(into, ignore_errors=True)
    return shutil.copytree(artifact, into, copy_function=lambda old, new: Path(new).hardlink_to(old))
