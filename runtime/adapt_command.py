"""`invariclip adapt`: measures a place from unlabelled pictures of it."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

import invariclip
from invariclip.artifact import checked_path, read_manifest
from invariclip.commands import (
    ARTIFACT,
    BACKEND,
    BATCH,
    CLASS_OPTIONS,
    JSON,
    PIXEL_MODE,
    QUIET,
    THREADS,
    class_names,
    noting,
    open_model,
)
from invariclip.console import bar, emit_json, say, silent
from invariclip.errors import FewKindsWarning, InputError, SiteError
from invariclip.pixels import find_pictures
from invariclip.projection import read_projection
from invariclip.site import new_site, read_site, write_site

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from invariclip.manifest import Manifest
    from invariclip.pixels import PixelMode
    from invariclip.predictor import Model
    from invariclip.site import Site

_ROWS = 256
"""Embeddings that are added at a time."""


@click.command()
@ARTIFACT
@click.option("--images", "images", multiple=True, required=True, type=click.Path(path_type=Path),
              help="Unlabelled pictures and folders of the place; repeatable.")  # fmt: skip
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path),
              help="The site to write, NAME.safetensors; or the artifact adapted to it, NAME.icm.")  # fmt: skip
@click.option("--name", help="Of the place [default: that of the file].")
@click.option("--add-to", type=click.Path(path_type=Path), help="Count what this site has seen already as well.")
@CLASS_OPTIONS[0]
@CLASS_OPTIONS[1]
@BATCH
@PIXEL_MODE
@BACKEND
@THREADS
@JSON
@QUIET
def adapt(
    artifact: Path, images: tuple[Path, ...], out: Path, name: str | None, add_to: Path | None, classes: str | None,
    classes_file: Path | None, batch_size: int, pixel_mode: PixelMode, backend: str | None, threads: int | None,
    as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Measure a place from a few unlabelled pictures of it, so that answers there lose what it shifts.

    The pictures should show what the place sees, of several kinds: classes tell how many kinds there are.
    """
    if out.suffix not in (".safetensors", ".icm"):
        raise InputError(f"{out}: a site is a file NAME.safetensors, an adapted artifact a folder NAME.icm")
    names = class_names(classes, classes_file)
    known = None if add_to is None else read_site(add_to)
    manifest = read_manifest(artifact)
    if manifest.site is not None:
        raise InputError(f"{artifact}: is adapted to {manifest.site.name!r} already; take the one it was made from")
    mean = training_mean(artifact, manifest)
    model = open_model(artifact, None, backend, threads, pixel_mode)
    progress = silent if quiet or as_json else bar
    if names and names != model.classes:
        model = model.with_classes(names, progress=progress)
    if not model.classes:
        raise InputError(
            f"{artifact}: has no classes, and without any nobody knows how many kinds of things the pictures show; "
            "give --classes or --classes-file"
        )
    site = begun(model, name or (known.name if known else out.stem), mean, known)
    bad: list[dict[str, str]] = []
    paths = find_pictures(images)
    shown = progress(paths, total=len(paths), desc="pictures")
    stream = model.stream(shown, batch_size=batch_size, unreadable=noting(bad), classes=False)
    site = measured(site, model.class_bank(progress), (answer.embedding for answer in stream))
    if not site.pictures:
        raise InputError("no picture could be read; nothing was written")
    if out.suffix == ".icm":
        from invariclip.cli import other_room

        other_room("adapt -o NAME.icm")(artifact, out, site, pictures=paths, threads=threads, progress=progress)
    else:
        write_site(out, site)
    if site.limited:
        warnings.warn(
            f"{site.pictures} pictures show about {site.kinds:.1f} kinds of things, too few to tell the place from its "
            f"contents: {site.weight:.0%} of the shift is taken away; add pictures of other things",
            FewKindsWarning, stacklevel=2,
        )  # fmt: skip
    if as_json:
        emit_json({"out": str(out), **told(site), "unreadable": bad})
    else:
        say(
            f"{site.name}: {site.pictures} pictures of about {site.kinds:.0f} kinds of things; {site.weight:.0%} of a "
            f"shift of {np.linalg.norm(site.mean - site.training_mean):.3f} is taken away. {out}"
        )
    return 2 if bad else 0


def training_mean(artifact: Path, manifest: Manifest) -> NDArray[np.float64]:
    """m₀ of an artifact, float64 [d].

    Raises:
        InputError: It was exported without a projection, or with one that was fitted without pictures.
    """
    found = None
    if manifest.projection_file is not None:
        found = read_projection(checked_path(artifact, manifest.projection_file)).training_mean
    if found is None or not len(found):
        raise InputError(
            f"{artifact}: does not know the mean of the pictures that were calibrated on, which a place is measured "
            "against; calibrate with --pictures and export with --projection (also where no projection is better)"
        )
    return found


def begun(model: Model, name: str, mean: NDArray[np.float64], known: Site | None) -> Site:
    """A site without pictures, or one that was measured before.

    Raises:
        SiteError: That one is of another space, or counted kinds of things among other classes.
    """
    digest = hashlib.sha256("\n".join((*model.templates, "", *model.classes)).encode()).hexdigest()
    provenance = {
        "invariclip": invariclip.__version__, "numpy": np.__version__, "variant": model.variant,
        "backend": model.backend, "classes": len(model.classes), "classes_sha256": digest,
    }  # fmt: skip
    if known is None:
        return new_site(name, model.space_id, mean, len(model.classes), provenance)
    known.require_space(model.space_id, "the artifact")
    if known.provenance.get("classes_sha256") != digest:
        raise SiteError(f"the site {known.name!r} was measured with other classes or prompts; name the same ones")
    return known


def measured(site: Site, bank: NDArray[np.float32], embeddings: Iterable[NDArray[np.float32]]) -> Site:
    """A site with more pictures, whatever their number, in bounded memory.

    Args:
        site: What is known already.
        bank: [K, d], unit-length embeddings of its classes.
        embeddings: Of the pictures, [d] each.
    """
    rows: list[NDArray[np.float32]] = []
    for embedding in embeddings:
        rows.append(embedding)
        if len(rows) == _ROWS:
            site, rows = site.adding(np.stack(rows), bank), []
    return site.adding(np.stack(rows), bank) if rows else site


def told(site: Site) -> dict[str, Any]:
    """What a site says of itself, JSON-ready."""
    return {
        "name": site.name, "pictures": site.pictures, "kinds": round(site.kinds, 3), "weight": round(site.weight, 6),
        "shift": round(float(np.linalg.norm(site.shift)), 6),
        "distance": round(float(np.linalg.norm(site.mean - site.training_mean)), 6),
        "space_id": site.space_id, "sha256": site.digest,
    }  # fmt: skip
