"""A site's shift in the graphs of an artifact that exists: no checkpoint, no tracing, no second look at its weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import onnx_ir as ir

from invariclip.artifact.fidelity import require_level
from invariclip.artifact.folder import (
    checked_path,
    describe_file,
    new_artifact,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from invariclip.artifact.manifest import EMBEDDING, IMAGE_INPUT, METADATA_KEY, SiteFacts
from invariclip.backends import open_backend
from invariclip.console import silent
from invariclip.errors import ContractError, InputError
from invariclip.export.checkpoints import check_texts
from invariclip.export.graphs.head import attach_site
from invariclip.export.graphs.writing import facts_text, require_valid, save_graph
from invariclip.export.swap import copy_weights, require_copied, takes_images, with_facts, with_files
from invariclip.export.verification import evidence
from invariclip.export.verification.figures import EXACT, THRESHOLDS
from invariclip.preprocessing.find import walk_images
from invariclip.sites.site import write_site

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from invariclip.artifact.manifest import Compute, Manifest
    from invariclip.console import Progress
    from invariclip.export.verification.evidence import ImageBatches
    from invariclip.sites.site import Site

T = TypeVar("T")

SITE_FILE = "site.safetensors"
CHECKED = 24
"""Images that adapted graphs are checked on, evenly spread over those given: a site may be measured on millions."""
_BATCH = 16


def bake_site(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    site: Site,
    *,
    images: Sequence[str | Path],
    threads: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Writes an artifact whose image graphs take a site's shift away, or nothing.

    Every variant is held against the shift taken away in float64 from what it answered before.

    Args:
        artifact: The artifact to start from; it stays as it is.
        out: The artifact to write. One that stands there is replaced.
        site: Measured in its space.
        images: Files and folders to check on; `CHECKED` of them at most.
        threads: The engines'; None takes what this process may use.
        progress: `console.bar` or `console.silent`.

    Returns:
        The manifest that was written.

    Raises:
        ArtifactError: `artifact` is not one, or a file of it is missing or changed.
        InputError: It has a site already, or learned templates; no image can be read, or `out` cannot be written or
            is `artifact`.
        SiteError: The site was measured in another space.
        ContractError: An adapted graph does not answer what it should.
        MissingExtraError: An engine that the artifact was proved on is not installed here.
    """
    source, target = Path(artifact), Path(out)
    old = read_manifest(source)
    require_adaptable(source, old, site)
    require_replaceable(target, source)
    entries = {entry.path: entry for entry in old.files}
    paths = {name: checked_path(source, entry) for name, entry in entries.items()}
    looked_at = evidence.images_of(check_texts.spread(_thinned(walk_images(images), CHECKED), CHECKED), old.pixels)
    looked_at.require_readable()
    told = SiteFacts(site.name, site.digest, site.images, site.kinds, site.weight)
    with new_artifact(target) as folder:
        write_site(folder / SITE_FILE, site)
        manifest = replace(old, site=told, site_file=describe_file(folder, SITE_FILE))
        for name, path in paths.items():
            _write(path, folder / name, manifest, site)
        new_files = {name: describe_file(folder, name) for name in (*paths, SITE_FILE)}
        require_copied(entries, new_files)
        manifest = cast("Manifest", with_files(manifest, new_files))
        variants = dict(manifest.variants)
        runs = [(name, backend) for name, variant in variants.items() for backend in variant.parity]
        for name, backend in progress(runs, total=len(runs), desc="check adapted graphs"):
            variant = variants[name]
            graph = variant.image.path
            off = _difference(
                paths[graph], folder / graph, site, looked_at, backend=backend, threads=threads, compute=variant.compute
            )
            most = EXACT.max_abs_diff
            if variant.compute != "float32":
                most = THRESHOLDS[require_level(variant.parity[backend]["level"])].max_abs_diff
            if not off <= most:  # a NaN must fail
                raise ContractError(f"{graph} on {backend}: the adapted embedding is off by {off:.3g}, above {most:g}")
            record = {"sha256": site.digest, "images": len(looked_at.readable), "embedding_diff": off}
            parity = {**variant.parity, backend: {**variant.parity[backend], "site": record}}
            variants[name] = replace(variant, parity=parity)
        manifest = replace(manifest, variants=variants)
        write_manifest(folder, manifest)
    return manifest


def require_adaptable(artifact: Path, manifest: Manifest, site: Site) -> None:
    """Refuses what a site cannot go into.

    Raises:
        InputError: The artifact has a site already, or learned templates.
        SiteError: The site was measured in another space.
    """
    if manifest.site is not None:
        raise InputError(f"{artifact}: is adapted to {manifest.site.name!r} already; take the one it was made from")
    if manifest.cdc is not None:
        raise InputError(
            f"{artifact}: its learned templates and their uncertainty were fitted on images that were not adapted; "
            "adapt an artifact without --cdc"
        )
    site.require_space(manifest.space_id, str(artifact))


def _write(path: Path, target: Path, manifest: Manifest, site: Site) -> None:
    copy_weights(path, target)
    if path.suffix != ".onnx":
        shutil.copyfile(path, target)
        return
    if not takes_images(path):
        with_facts(path, target, manifest)
        return
    model = ir.load(path)
    attach_site(model, site.shift)
    model.metadata_props[METADATA_KEY] = facts_text(manifest.facts(path.name))
    save_graph(model, target)
    require_valid(target, "the adapted graph")


def _thinned(items: Iterable[T], count: int) -> list[T]:
    """Some items at even steps: all up to 2 · count − 1 of them, else at least `count`; no more are held."""
    kept: list[T] = []
    step = 1
    for place, item in enumerate(items):
        if place % step == 0:
            kept.append(item)
        if len(kept) == 2 * count:
            kept, step = kept[::2], 2 * step
    return kept


def _difference(
    before: Path, after: Path, site: Site, images: ImageBatches, *, backend: str, threads: int | None, compute: Compute
) -> float:
    """Largest difference of an adapted graph's embeddings from float64; NaN where one is."""
    engine = open_backend(backend, before, threads=threads, compute=compute)
    wanted = [
        site.exactly(engine.run({IMAGE_INPUT: batch}, (EMBEDDING,))[EMBEDDING]) for batch in images.batches(_BATCH)
    ]
    del engine  # one graph is open at a time
    engine = open_backend(backend, after, threads=threads, compute=compute)
    off = [
        np.abs(engine.run({IMAGE_INPUT: batch}, (EMBEDDING,))[EMBEDDING] - rows).max()
        for batch, rows in zip(images.batches(_BATCH), wanted, strict=True)
    ]
    return float(np.max(off))
