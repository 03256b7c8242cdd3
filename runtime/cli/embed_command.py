"""`invariclip embed`: embeddings of images or texts to files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from invariclip.artifact.embeddings import Embeddings, write_embeddings
from invariclip.artifact.embeddings_table import EMBEDDING_DTYPES, EmbeddingDtype
from invariclip.artifact.quantized import RECALL_FROM
from invariclip.cli.options import (
    BACKEND,
    BATCH,
    JSON,
    OTHER_PROJECTION,
    PIXEL_MODE,
    QUIET,
    SITE,
    THREADS,
    artifact_argument,
    open_model,
)
from invariclip.console import UnreadableImages, bar, emit_json, note, say, silent
from invariclip.embedding import embed_files, embed_texts_to_file, is_shard
from invariclip.errors import InputError
from invariclip.files import require_writable
from invariclip.preprocessing.find import find_images
from invariclip.rooms import other_room

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.console import Progress
    from invariclip.model import Model
    from invariclip.preprocessing.pixels import PixelMode


@click.command()
@artifact_argument
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, help="Embed this text instead of images; repeatable.")
@click.option(
    "--out",
    "-o",
    required=True,
    type=click.Path(path_type=Path),
    help="The file to write: NAME.parquet, or safetensors under any other name.",
)
@click.option("--dtype", type=click.Choice(EMBEDDING_DTYPES), default="float32", show_default=True,
              help="int8 or binary: codes for search, whose recall is measured on them (NAME.parquet).")  # fmt: skip
@OTHER_PROJECTION
@SITE
@BATCH
@PIXEL_MODE
@BACKEND
@THREADS
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
              help="ray writes a folder of parquet parts; what is there already is not embedded again.")  # fmt: skip
@click.option("--ray-address", help="An existing Ray cluster; a local one is started by default.")
@click.option("--workers", type=int, help="Ray workers at most; one for every CPU of the cluster by default.")
@JSON
@QUIET
def embed(
    artifact: Path, images: tuple[Path, ...], texts: tuple[str, ...], out: Path, dtype: EmbeddingDtype,
    projection: Path | None, site: Path | None, batch_size: int, pixel_mode: PixelMode, backend: str | None,
    threads: int | None, engine: str, ray_address: str | None, workers: int | None, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Write unit-length embeddings with their paths (or texts) and the id of their space.

    IMAGES are files and folders; for NAME.parquet also webdataset shards (.tar). A parquet file is written in parts:
    run the same command again to resume (progress is kept in NAME.parquet.unfinished).
    """
    if bool(images) == bool(texts):
        raise InputError("give images, or --text, and not both")
    if dtype != "float32" and (out.suffix != ".parquet" or engine == "ray"):
        raise InputError(f"--dtype {dtype} goes with -o NAME.parquet and --engine local")
    if engine == "ray":
        if texts or projection is not None or site is not None or pixel_mode != "exact":
            raise InputError("--engine ray embeds images exactly as the artifact does; it goes without --text, "
                             "--projection, --site and --pixel-mode")  # fmt: skip
        return _by_ray(artifact, images, out, as_json=as_json, backend=backend, threads=threads,
                       address=ray_address, workers=workers, batch_size=batch_size,
                       progress=silent if quiet or as_json else bar)  # fmt: skip
    require_writable(out)
    if site is not None and texts:
        raise InputError("a site changes images' embeddings alone; leave --site out for texts")
    if out.suffix != ".parquet" and any(is_shard(path) for path in images):
        raise InputError("shards are embedded into parquet: name the output NAME.parquet")
    model = open_model(artifact, projection, backend, threads, pixel_mode, site)
    if out.suffix == ".parquet":
        return _to_parquet(model, images, texts, out, dtype, as_json=as_json, batch_size=batch_size,
                           progress=silent if quiet or as_json else bar)  # fmt: skip
    return _to_safetensors(model, images, texts, out, as_json=as_json, batch_size=batch_size,
                           progress=silent if quiet or as_json else bar)  # fmt: skip


def _to_safetensors(
    model: Model, images: tuple[Path, ...], texts: tuple[str, ...], out: Path, *, as_json: bool, batch_size: int,
    progress: Progress,
) -> int:  # fmt: skip
    items: list[str] = list(texts)
    rows: list[NDArray[np.float32]] = list(model.embed_texts(items)) if texts else []
    bad = UnreadableImages()
    if images:
        paths = find_images(images)
        shown = progress(paths, total=len(paths), desc="images")
        for answer in model.stream(shown, batch_size=batch_size, unreadable=bad, classes=False):
            items.append(str(answer.image))
            rows.append(answer.embedding)
    if not rows:
        raise InputError("no image could be read; nothing was written")
    adapted = "" if texts else model.site_sha256
    write_embeddings(out, Embeddings(np.stack(rows), tuple(items), model.space_id, adapted))
    if as_json:
        emit_json(
            {"out": str(out), "count": len(items), "width": model.width, "space_id": model.space_id,
             "site_sha256": adapted or None, **bad.facts()}
        )  # fmt: skip
    else:
        say(f"{len(items)} embeddings of width {model.width} in {out} (space {model.space_id})")
    return 2 if bad.count else 0


def _to_parquet(
    model: Model, images: tuple[Path, ...], texts: tuple[str, ...], out: Path, dtype: EmbeddingDtype, *, as_json: bool,
    **how: Any,
) -> int:  # fmt: skip
    bad = UnreadableImages()
    if texts:
        facts = embed_texts_to_file(model, texts, out, dtype=dtype)
    else:
        facts = embed_files(model, images, out, dtype=dtype, unreadable=bad, **how)
    for reason, count in facts.left_out.items():
        note(f"invariclip: {count:,} left out of the shards: {reason}")
    if as_json:
        emit_json(
            {"out": str(out), "count": facts.count, "width": facts.dimensions, "dtype": facts.dtype,
             "scale": facts.scale, "recall": None if facts.recall is None else asdict(facts.recall),
             "space_id": facts.space_id, "site_sha256": facts.site_sha256 or None, **bad.facts(),
             "left_out": facts.left_out}
        )  # fmt: skip
        return 2 if bad.count else 0
    say(f"{facts.count} embeddings of width {facts.dimensions} in {out} (space {facts.space_id})")
    if facts.recall is not None:
        found = facts.recall
        say(
            f"recall@{found.neighbours} of {facts.dtype} search beside exact search: {found.recall:.3f}; among the "
            f"{found.wider} nearest by codes {found.recall_in_wider:.3f} ({found.queries} images or texts as queries)"
        )
    elif dtype != "float32":
        note(f"invariclip: the recall of {dtype} search is not known: it is measured from {RECALL_FROM} embeddings on")
    return 2 if bad.count else 0


def _by_ray(artifact: Path, images: tuple[Path, ...], out: Path, *, as_json: bool, **how: Any) -> int:
    told: dict[str, Any] = other_room("embed --engine ray")(artifact, find_images(images), out, **how)
    for path, reason in told["unreadable"]:
        note(f"invariclip: {reason}" if str(path) in reason else f"invariclip: {path}: {reason}")
    if as_json:
        emit_json({"out": str(out), **told})
    else:
        say(f"{told['count']} embeddings in {len(told['parts'])} parts in {out} (space {told['space_id']})")
    return 2 if told["unreadable"] else 0
