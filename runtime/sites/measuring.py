"""A site measured from any number of images: part by part, so that what was stopped goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invariclip.artifact.embeddings import read_embeddings
from invariclip.artifact.folder import checked_path
from invariclip.artifact.manifest import Manifest
from invariclip.artifact.projection import read_projection
from invariclip.console import Progress, UnreadableImages, note, silent
from invariclip.errors import InputError, SiteError
from invariclip.model import Model
from invariclip.preprocessing.find import walk_images
from invariclip.sites.live_site import LiveSite, SiteWindow
from invariclip.sites.site import Site, new_site, read_site, write_site
from invariclip.version import __version__

PART = 256
"""Images whose embeddings are added at a time; batches begin anew with each part."""
SAVE_SECONDS = 5.0
"""Between two writes of what is measured so far."""
_UNFINISHED = "unfinished"


def training_mean(artifact: Path, manifest: Manifest) -> NDArray[np.float64]:
    """m₀ of an artifact, float64 [d].

    Raises:
        InputError: It was exported without a projection, or with one that was fitted without images.
    """
    found = None
    if manifest.projection_file is not None:
        found = read_projection(checked_path(artifact, manifest.projection_file)).training_mean
    if found is None or not len(found):
        raise InputError(
            f"{artifact}: does not know the mean of the images that were calibrated on, which a site is measured "
            "against; calibrate with --images and export with --projection (also where no projection is better)"
        )
    return found


def model_mean(model: Model) -> NDArray[np.float64]:
    """m₀ of a model's space, float64 [d].

    Raises:
        InputError: See `training_mean`; or the model has another projection than it was exported with.
    """
    if model.space_id != model.manifest.space_id:
        raise InputError(
            f"{model.folder}: knows the mean of its calibrated images with its own projection alone; to measure a "
            "site with another one, export with that"
        )
    return training_mean(model.folder, model.manifest)


def begun(model: Model, name: str, mean: NDArray[np.float64], known: Site | None) -> Site:
    """A site without images, or one that was measured before.

    Args:
        model: With the site's classes.
        name: Of a site without images.
        mean: float64 [d], m₀.
        known: What was measured before.

    Raises:
        SiteError: That one is of another space, or counted kinds of things among other classes.
    """
    digest = hashlib.sha256("\n".join((*model.templates, "", *model.classes)).encode()).hexdigest()
    provenance = {
        "invariclip": __version__, "numpy": np.__version__, "variant": model.variant,
        "backend": model.backend, "classes": len(model.classes), "classes_sha256": digest,
    }  # fmt: skip
    if known is None:
        return new_site(name, model.space_id, mean, len(model.classes), provenance)
    known.require_space(model.space_id, "the artifact")
    if known.provenance.get("classes_sha256") != digest:
        raise SiteError(f"the site {known.name!r} was measured with other classes or prompts; name the same ones")
    return known


def open_live_site(model: Model, name: str, *, start: Site | None = None, window: SiteWindow | None = None) -> LiveSite:
    """A running site of a model's space, for `Model.adapting`.

    Args:
        model: With the site's classes.
        name: For people.
        start: What is known of the site; None for nothing.
        window: How much of the past counts.

    Raises:
        InputError: There are no classes, or the model does not know its training mean.
        SiteError: `start` is of another space, or was measured with other classes.
    """
    mean = model_mean(model)
    return LiveSite(begun(model, name, mean, start), model.class_bank(), window)


def measure(
    model: Model,
    site: Site,
    images: Sequence[str | os.PathLike[str]],
    *,
    batch_size: int,
    unreadable: UnreadableImages,
    unfinished: Path | None = None,
    progress: Progress = silent,
) -> Site:
    """A site with all images of some files and folders, in memory that does not grow with their number.

    Args:
        model: Embeds them; without a site.
        site: What is known already, see `begun`.
        images: Files and folders, see `find.walk_images`.
        batch_size: Images to a run.
        unreadable: Is told of images that cannot be read.
        unfinished: A file that keeps what is measured so far, every `SAVE_SECONDS`. If it stands there and was begun
            with the same model, images and settings, the work goes on from it; the sums are then the same bits as
            without a stop. Remove it when the site is written: until then it is all that a failure leaves.
        progress: `console.bar` or `console.silent`.

    Raises:
        InputError: A file or folder does not exist, or a folder holds no image.
        SiteError: `unfinished` is not a site.
    """
    bank = model.class_bank(progress)
    count, listing = _listed(images)
    key = _key(model, site, batch_size, listing)
    done, site = _resumed(unfinished, key, site, unreadable)
    shown = iter(progress(walk_images(images), total=count, desc="images"))
    met = sum(1 for _ in islice(shown, done * PART))
    saved, saved_at, bad = done, time.monotonic(), unreadable.count

    def save() -> None:
        if unfinished is not None and done > saved:
            state = {"key": key, "parts": done, "unreadable": bad, "listed": unreadable.listed[:bad]}
            write_site(unfinished, replace(site, provenance={**site.provenance, _UNFINISHED: state}))

    try:
        while part := list(islice(shown, PART)):
            answers = model.stream(part, batch_size=batch_size, unreadable=unreadable, classes=False)
            rows = [answer.embedding for answer in answers]
            site = site.adding(np.stack(rows), bank) if rows else site
            met += len(part)
            done, bad = done + 1, unreadable.count  # not of a part that is interrupted: it is read again
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
                saved, saved_at = done, time.monotonic()
    except KeyboardInterrupt:
        save()
        raise
    save()
    if met != count:
        note(f"invariclip: images came or went meanwhile: {count:,} were listed, and {met:,} were there")
    return site


def measure_embeddings(model: Model, site: Site, files: Sequence[Path]) -> Site:
    """A site with images that were embedded before, by `invariclip embed`.

    Args:
        model: Of their space.
        site: What is known already, see `begun`.
        files: Embeddings of images.

    Raises:
        InputError: A file is not embeddings, of another space, or adapted to a site.
        SiteError: They are not of unit length.
    """
    bank = model.class_bank()
    for path in files:
        found = read_embeddings(path)
        if found.space_id != model.space_id:
            raise InputError(f"{path}: embeddings of space {found.space_id}, and the artifact's is {model.space_id}")
        if found.site_sha256:
            raise InputError(f"{path}: is adapted to a site already; embed the images without --site")
        for start in range(0, len(found.vectors), PART):
            site = site.adding(found.vectors[start : start + PART], bank)
    return site


def _listed(images: Sequence[str | os.PathLike[str]]) -> tuple[int, str]:
    """How many images there are, and a digest of their paths, sizes and times."""
    count, digest = 0, hashlib.sha256()
    for path in walk_images(images):
        try:
            facts = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        digest.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        count += 1
    return count, digest.hexdigest()


def _key(model: Model, site: Site, batch_size: int, listing: str) -> str:
    """Of all that the sums depend on."""
    engine = {name: value for name, value in model.describe().items() if name != "text_cache"}
    known = hashlib.sha256(site.total.tobytes() + site.taken_for.tobytes()).hexdigest()
    parts = [engine, site.name, site.space_id, site.images, known, site.provenance, batch_size, PART, listing]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _resumed(unfinished: Path | None, key: str, site: Site, unreadable: UnreadableImages) -> tuple[int, Site]:
    """Parts that are done, and the site with them."""
    if unfinished is None or not unfinished.is_file():
        return 0, site
    try:
        kept = read_site(unfinished)
    except SiteError as error:
        raise SiteError(f"{error}; delete it, and measure from the start") from error
    state: Any = kept.provenance.get(_UNFINISHED)
    if not isinstance(state, dict) or state.get("key") != key:
        note(f"invariclip: {unfinished}: was begun with other images or settings; measuring from the start")
        return 0, site
    if not all(isinstance(state.get(name), int) for name in ("parts", "unreadable")):
        raise SiteError(f"{unfinished}: is damaged; delete it, and measure from the start")
    unreadable.count, unreadable.listed = state["unreadable"], list(state.get("listed", []))
    count = kept.images - site.images + state["unreadable"]
    note(f"invariclip: going on after {count:,} images that were measured before ({unfinished})")
    return state["parts"], replace(kept, provenance=site.provenance)
