"""`invariclip adapt`: measures a site from unlabelled images of it."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from invariclip.artifact.folder import read_manifest, require_replaceable
from invariclip.cli.options import (
    BACKEND,
    BATCH,
    CLASS_OPTIONS,
    JSON,
    PIXEL_MODE,
    QUIET,
    THREADS,
    artifact_argument,
    class_names,
    open_model,
)
from invariclip.console import UnreadableImages, bar, emit_json, say, silent
from invariclip.errors import FewKindsWarning, InputError
from invariclip.files import require_writable
from invariclip.rooms import other_room
from invariclip.sites.measuring import begun, measure, measure_embeddings, training_mean
from invariclip.sites.site import read_site, write_site
from invariclip.sites.site_log import replay

if TYPE_CHECKING:
    from invariclip.preprocessing.pixels import PixelMode
    from invariclip.sites.site import Site


@click.command()
@artifact_argument
@click.option("--images", "images", multiple=True, type=click.Path(path_type=Path),
              help="Unlabelled images and folders of the site; repeatable.")  # fmt: skip
@click.option("--embeddings", "embedded", multiple=True, type=click.Path(path_type=Path),
              help="Embeddings of images of the site, written by `embed`; repeatable.")  # fmt: skip
@click.option("--replay", "log", type=click.Path(path_type=Path),
              help="Instead of both: the log of one site that `serve --adapt-log` wrote.")  # fmt: skip
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path),
              help="The site to write, NAME.safetensors; or the artifact adapted to it, NAME.icm.")  # fmt: skip
@click.option("--name", help="Name of the site [default: the file's name].")
@click.option("--add-to", type=click.Path(path_type=Path), help="Add to what this site has already measured.")
@CLASS_OPTIONS[0]
@CLASS_OPTIONS[1]
@BATCH
@PIXEL_MODE
@BACKEND
@THREADS
@JSON
@QUIET
def adapt(
    artifact: Path, images: tuple[Path, ...], embedded: tuple[Path, ...], log: Path | None, out: Path,
    name: str | None, add_to: Path | None, classes: str | None, classes_file: Path | None, batch_size: int,
    pixel_mode: PixelMode, backend: str | None, threads: int | None, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Measure the shift of a site (one camera, shop or style) from a few unlabelled images of it.

    The images should show several kinds of things; the classes are used to count the kinds. If it is interrupted, run
    the same command again to resume (progress is kept in OUT.unfinished).
    """
    _require_sense(artifact, images, embedded, log, add_to, out)
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
            f"{artifact}: has no classes, which are needed to count the kinds of things that the images show; "
            "give --classes or --classes-file"
        )
    unreadable, unfinished = UnreadableImages(), out.with_name(f"{out.name}.unfinished")
    if log is not None:
        known = replay(log, model.class_bank(progress)).site
    site = begun(model, name or out.stem, mean, known)
    site = replace(site, name=name) if name else site
    site = measure_embeddings(model, site, embedded)
    if images:
        site = measure(model, site, images, batch_size=batch_size, unreadable=unreadable, unfinished=unfinished,
                       progress=progress)  # fmt: skip
    if not site.images:
        _remove(unfinished if images else None)
        none = "no image could be read" if log is None else f"{log}: too few images counted for a site"
        raise InputError(f"{none}; nothing was written")
    if out.suffix == ".icm":
        other_room("adapt -o NAME.icm")(artifact, out, site, images=images, threads=threads, progress=progress)
    else:
        write_site(out, site)
    _remove(unfinished if images else None)
    if site.limited:
        warnings.warn(
            f"{site.images} images show about {site.kinds:.1f} kinds of things, too few to tell the site from its "
            f"contents: {site.weight:.0%} of the shift is taken away; add images of other things",
            FewKindsWarning, stacklevel=2,
        )  # fmt: skip
    if as_json:
        emit_json({"out": str(out), **site.facts(), **unreadable.facts()})
    else:
        say(f"{in_words(site)}\n{out}: written. Whether answers are better only labelled images can tell.")
    return 2 if unreadable.count else 0


def _require_sense(
    artifact: Path, images: tuple[Path, ...], embedded: tuple[Path, ...], log: Path | None, add_to: Path | None,
    out: Path,
) -> None:  # fmt: skip
    if log is not None and (images or embedded or add_to):
        raise InputError("--replay goes alone: a log says itself what was shown and what was known before")
    if not (images or embedded or log):
        raise InputError(
            "name images of the site with --images, embeddings of them with --embeddings, or a log with --replay"
        )
    if out.suffix not in (".safetensors", ".icm"):
        raise InputError(f"{out}: a site is a file NAME.safetensors, an adapted artifact a folder NAME.icm")
    if out.suffix == ".icm" and not images:
        raise InputError("an adapted artifact is checked on images of the site; name some with --images")
    if out.suffix == ".icm":
        require_replaceable(out, artifact)
    require_writable(out)


def _remove(unfinished: Path | None) -> None:
    """What is written needs it no more; where it cannot be removed, it does no harm."""
    if unfinished is not None:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def in_words(site: Site) -> str:
    """What a site says of itself, in a sentence or two."""
    moved = float(np.linalg.norm(site.mean - site.training_mean))
    known = f" ± {site.standard_error:.3f}" if site.images > 1 else ""
    said = (
        f"{site.name}: {site.images} images of about {site.kinds:.0f} kinds of things; {site.weight:.0%} of a "
        f"shift of {moved:.3f}{known} is taken away."
    )
    if site.wanted is None:
        return f"{said} So few images do not tell the shift from chance; add some."
    return f"{said} {site.wanted} images would measure it to a third." if site.wanted > site.images else said
