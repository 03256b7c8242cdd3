"""A collection of images embedded on Ray (`embed --engine ray`), as parquet parts that are each written atomically.

A part's name holds a digest of all that its content depends on: the artifact's space and variant, and its images with
their sizes and times. Existing parts are not embedded again, and parts of another run are never mistaken for them.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.folder import read_manifest
from invariclip.calibrate.data.stream.cluster import Cluster
from invariclip.console import Progress, silent
from invariclip.errors import InputError
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.model import Model

PART_IMAGES = 1024
"""Images of a part: what a worker that dies has to do again."""
INDEX = "collection.json"
_SPACE, _UNREADABLE = b"invariclip.space_id", b"invariclip.unreadable"


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
        images: Their paths.
    """

    file: str
    images: tuple[str, ...]


def embed_collection(
    opening: ArtifactOpening,
    images: Sequence[Path],
    out: Path,
    *,
    cluster: Cluster,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Embeds images into parts, parquet files with columns `item` and `embedding`, and lists them in `INDEX`.

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
        content = json.dumps([space_id, opening.variant, opening.backend, facts])
        digest = hashlib.sha256(content.encode()).hexdigest()
        parts.append(Part(f"part-{start // PART_IMAGES:06}-{digest[:16]}.parquet", tuple(str(path) for path in some)))
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
        unreadable: list[list[str]] = []
        answers = list(
            self._model.stream(
                list(part.images),
                batch_size=self._batch_size,
                unreadable=lambda _place, image, error: unreadable.append([str(image), str(error)]),
                classes=False,
            )
        )
        rows = [answer.embedding for answer in answers]
        vectors = np.stack(rows) if rows else np.empty((0, self._model.width), dtype=np.float32)
        content = _parquet([str(answer.image) for answer in answers], vectors, self._model.space_id, unreadable)
        write_atomically(self._out / part.file, content)
        return part.file


def _parquet(items: list[str], vectors: NDArray[np.float32], space: str, bad: list[list[str]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    flat = pyarrow.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
    columns = {"item": pyarrow.array(items, type=pyarrow.string())}
    columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    table = pyarrow.table(columns)
    table = table.replace_schema_metadata({_SPACE: space, _UNREADABLE: json.dumps(bad, ensure_ascii=False)})
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    return stream.getvalue()


def _read_part(out: Path, part: Part, space_id: str) -> dict[str, Any]:
    """A part's entry in `INDEX`, from its file."""
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(out / part.file)
        metadata = table.schema_arrow.metadata or {}
        space, bad = metadata[_SPACE].decode(), json.loads(metadata[_UNREADABLE])
    except (ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"{out / part.file}: damaged ({error}); remove it and run again") from error
    if space != space_id:
        raise InputError(f"{out / part.file}: is of space {space}, not {space_id}; remove it and run again")
    return {"file": part.file, "count": int(table.metadata.num_rows), "unreadable": bad}
