"""A collection of images embedded on Ray (`embed --engine ray`), as parquet parts that are each written atomically.

A part's name holds a digest of all that its content depends on: the artifact's space and variant, and its images with
their sizes and times. Existing parts are not embedded again, and parts of another run are never mistaken for them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.embeddings_table import EmbeddingRows, read_table, table_bytes
from invariclip.artifact.folder import read_manifest
from invariclip.calibrate.data.stream.cluster import Cluster
from invariclip.console import Progress, silent
from invariclip.embedding import embeddings_facts
from invariclip.errors import InputError
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.model import Model

PART_IMAGES = 1024
"""Images of a part: what a worker that dies has to do again."""
INDEX = "collection.json"


@dataclass(frozen=True)
class ArtifactOpening:
    """How every worker opens the artifact; the arguments of `load`."""

    artifact: str
    variant: str | None = None
    backend: str | None = None
    threads: int | None = 1
    batch_size: int = 16


@dataclass(frozen=True)
class Part:
    """Some images of the collection.

    Attributes:
        file: Name of its parquet file.
        start: Where its images stand in the collection.
        images: Their paths.
    """

    file: str
    start: int
    images: tuple[str, ...]


def embed_collection(
    opening: ArtifactOpening,
    images: Sequence[Path],
    out: Path,
    *,
    cluster: Cluster,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Embeds images into parts, parquet files as `invariclip embed -o NAME.parquet` writes, listed in `INDEX`.

    Args:
        opening: The artifact; its folder must be readable by every worker, under the same path, as must the images.
        images: What to embed.
        out: The folder to write, which every worker can write.
        cluster: Where the workers are.
        progress: Progress display, over parts.

    Returns:
        What `collection.json` holds: `space_id`, `count`, `parts` (file and count), `unreadable` (path and reason).

    Raises:
        InputError: No image could be read, the cluster cannot be reached, or a part did not come back.
        ArtifactError: The artifact cannot be opened.
    """
    manifest = read_manifest(opening.artifact)
    parts = parts_of(opening, manifest.space_id, images)
    out.mkdir(parents=True, exist_ok=True)
    todo = [part for part in parts if not (out / part.file).is_file()]
    answers = cluster.over(todo, _Embedder, (opening, str(out)))
    for _ in progress(answers, total=len(todo), desc="parts"):
        pass
    contents = [_read_part(out, part, manifest.space_id) for part in parts]
    facts = {
        "space_id": manifest.space_id,
        "artifact": asdict(opening),
        "count": sum(part["count"] for part in contents),
        "parts": [{"file": part["file"], "count": part["count"]} for part in contents],
        "unreadable": [line for part in contents for line in part["unreadable"]],
    }
    if not facts["count"]:
        raise InputError("no image could be read; nothing is in the collection")
    write_atomically(out / INDEX, json.dumps(facts, indent=1, ensure_ascii=False))
    return facts


def embed_images(
    artifact: Path,
    images: Sequence[Path],
    out: Path,
    *,
    backend: str | None,
    threads: int | None,
    batch_size: int,
    address: str | None,
    workers: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """`embed_collection` as the command line asks for it; a worker has one thread unless told otherwise."""
    opening = ArtifactOpening(str(artifact.resolve()), None, backend, threads or 1, batch_size)
    paths = [path.resolve() for path in images]
    return embed_collection(opening, paths, out.resolve(), cluster=Cluster(address, workers), progress=progress)


def parts_of(opening: ArtifactOpening, space_id: str, images: Sequence[Path]) -> list[Part]:
    """The parts of a collection, in the order of its images.

    Raises:
        InputError: There is no image, or one is not there.
    """
    if not images:
        raise InputError("there are no images to embed")
    parts = []
    for start in range(0, len(images), PART_IMAGES):
        some = images[start : start + PART_IMAGES]
        try:
            facts = [[str(path), (status := path.stat()).st_size, status.st_mtime_ns] for path in some]
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}") from error
        content = json.dumps(["parts-2", space_id, opening.variant, opening.backend, start, facts])
        digest = hashlib.sha256(content.encode()).hexdigest()
        name = f"part-{start // PART_IMAGES:06}-{digest[:16]}.parquet"
        parts.append(Part(name, start, tuple(str(path) for path in some)))
    return parts


class _Embedder:
    """One worker: opens the artifact once, then writes parts."""

    def __init__(self, opening: ArtifactOpening, out: str) -> None:
        from invariclip.loading import load

        self._model: Model = load(
            opening.artifact, variant=opening.variant, backend=opening.backend, threads=opening.threads
        )
        self._batch_size = opening.batch_size
        self._out = Path(out)

    def __call__(self, part: Part) -> str:
        """Writes one part, and returns its file's name."""
        unreadable: list[dict[str, str]] = []
        answers = list(
            self._model.stream(
                list(part.images),
                batch_size=self._batch_size,
                unreadable=lambda _place, image, error: unreadable.append({"image": str(image), "error": str(error)}),
                classes=False,
            )
        )
        rows = [answer.embedding for answer in answers]
        vectors = np.stack(rows) if rows else np.empty((0, self._model.width), dtype=np.float32)
        facts = replace(
            embeddings_facts(self._model, "images", len(rows)),
            unreadable_count=len(unreadable), unreadable=tuple(unreadable),
        )  # fmt: skip
        ids = np.array([part.start + answer.place for answer in answers], dtype=np.int64)
        content = table_bytes(EmbeddingRows(facts, ids, tuple(str(answer.image) for answer in answers), vectors))
        write_atomically(self._out / part.file, content)
        return part.file


def _read_part(out: Path, part: Part, space_id: str) -> dict[str, Any]:
    """A part's entry in `INDEX`, from its file."""
    try:
        facts = read_table(out / part.file).facts
    except InputError as error:
        raise InputError(f"{error}; remove it and run again") from error
    if facts.space_id != space_id:
        raise InputError(f"{out / part.file}: is of space {facts.space_id}, not {space_id}; remove it and run again")
    bad = [[one["image"], one["error"]] for one in facts.unreadable]
    return {"file": part.file, "count": facts.count, "unreadable": bad}
