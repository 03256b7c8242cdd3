"""Any number of images embedded into one parquet file, in parts that a kill does not lose.

Parts of `PART_IMAGES` images are written into a folder beside the file, `NAME.parquet.unfinished`, each named by a
digest of all that its rows depend on. The same command goes on from them, and the finished file is the same bytes as
without a stop. Memory holds one part, or `GROUP_ROWS` rows while the parts are joined.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from invariclip.artifact.embeddings import Embeddings
from invariclip.artifact.embeddings_table import (
    EMBEDDING_DTYPES,
    EmbeddedKind,
    EmbeddingDtype,
    EmbeddingRows,
    TableFacts,
    TableWriter,
    read_table,
    require_pyarrow,
    table_bytes,
)
from invariclip.artifact.quantized import (
    QuantizedDtype,
    Quantizer,
    RecallMeter,
    quantize,
    quantizer_for,
    recall_places,
    search_recall,
)
from invariclip.console import LARGEST_LIST, Progress, UnreadableImages, note, silent
from invariclip.errors import InputError
from invariclip.files import locks, write_atomically
from invariclip.model import Model
from invariclip.preprocessing.find import walk_images
from invariclip.preprocessing.pixels import ImageInput
from invariclip.preprocessing.streams import DEFAULT_BATCH
from invariclip.rooms import other_room

PART_IMAGES = 512
"""Images of a part, which a kill loses at most; as many as a batch where that is more."""
GROUP_ROWS = 1 << 14
"""Rows of a row group of the finished file: 34 MB of 512 float32."""
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_JOINED = "joined.parquet"

_Named: TypeAlias = tuple[str, ImageInput]
_Part: TypeAlias = tuple[Any, Iterable[_Named]]
"""What its rows depend on, and its images by name."""


def is_shard(path: Path) -> bool:
    """Whether a file is taken for a webdataset shard, by its name."""
    return path.name.lower().endswith(SHARD_SUFFIXES)


def embed_files(
    model: Model,
    images: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    dtype: EmbeddingDtype = "float32",
    batch_size: int = DEFAULT_BATCH,
    unreadable: UnreadableImages | None = None,
    progress: Progress = silent,
) -> TableFacts:
    """Embeds images of files, folders and webdataset shards into a parquet file; resumes where a kill stopped it.

    Args:
        model: What embeds.
        images: Files, folders (see `find.walk_images`) and tar files, in the order of the rows.
        out: The file to write, `NAME.parquet`.
        dtype: `float32`, or codes of fewer bytes: `int8` or `binary` (see `quantized`).
        batch_size: Images to a run.
        unreadable: Is told of images that cannot be read, which have no row; None names each on standard error.
        progress: `console.bar` or `console.silent`, over images.

    Returns:
        What the file says of itself.

    Raises:
        InputError: There is no such dtype, no image could be read, a file or folder does not exist, a shard is damaged,
            the output cannot be written, or another process is writing it.
        MissingExtraError: pyarrow is not installed.
    """
    _require_dtype(dtype)
    require_pyarrow(str(out))
    target, told = Path(out), UnreadableImages() if unreadable is None else unreadable
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file, NAME.parquet")
    with _parts_folder(target) as folder:
        work = _Work(model, folder, batch_size, told)
        paths, site = [Path(path) for path in images], model.site_sha256
        work.embed(_parts(paths, max(PART_IMAGES, batch_size), work.left_out), progress, _count(paths))
        if model.site_sha256 != site:
            _clear(folder)
            raise InputError(
                "the model measures a live site, which changed meanwhile; give it one site: with_site(...)"
            )
        if not work.count:
            _clear(folder)
            raise InputError("no image could be read; nothing was written")
        facts = work.join(target, dtype)
        _clear(folder)
    return facts


def embed_texts_to_file(
    model: Model, texts: Sequence[str], out: str | os.PathLike[str], *, dtype: EmbeddingDtype = "float32"
) -> TableFacts:
    """Embeds texts into a parquet file, whose second column is `text`.

    Raises:
        InputError: There is no such dtype, something is not a string, or the output cannot be written.
        MissingExtraError: pyarrow is not installed.
    """
    _require_dtype(dtype)
    require_pyarrow(str(out))
    rows: NDArray[Any] = model.embed_texts(texts)
    facts = embeddings_facts(model, "texts", len(texts))
    if dtype != "float32":
        embeddings = Embeddings(rows, tuple(texts), facts.space_id)
        codes = quantize(embeddings, dtype)
        facts = replace(facts, dtype=dtype, scale=codes.quantizer.scale, recall=search_recall(embeddings, dtype))
        rows = codes.codes
    write_atomically(Path(out), table_bytes(EmbeddingRows(facts, np.arange(len(texts)), tuple(texts), rows)))
    return facts


def _require_dtype(dtype: str) -> None:
    if dtype not in EMBEDDING_DTYPES:
        raise InputError(f"no dtype is called {dtype!r:.40}; available: {', '.join(EMBEDDING_DTYPES)}")


@dataclass
class _Work:
    """What a run has done: its parts in order, and what they hold."""

    model: Model
    folder: Path
    batch_size: int
    told: UnreadableImages
    parts: list[Path] = field(default_factory=list)
    count: int = 0
    kept: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def embed(self, parts: Iterable[_Part], progress: Progress, total: int | None) -> None:
        """Makes the parts that are not there."""
        shown = iter(progress(self._rows_of(parts), total=total, desc="images"))
        deque(shown, maxlen=0)
        if self.kept:
            note(f"invariclip: {self.kept:,} images were embedded before ({self.folder})")

    def _rows_of(self, parts: Iterable[_Part]) -> Iterator[int]:
        """Numbers images as they are done, for the progress display."""
        engine = {name: value for name, value in self.model.describe().items() if name != "text_cache"}
        of_model = [self.model.space_id, self.model.site_sha256, engine, self.batch_size]
        for number, (key, images) in enumerate(parts):
            text = json.dumps([of_model, key], sort_keys=True, default=str)
            path = (
                self.folder
                / f"part-{number:07}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:32]}.parquet"
            )
            rows = _kept_part(path)
            if rows is not None:
                deque(images, maxlen=0)
                self.kept += rows.facts.count + rows.facts.unreadable_count
                for one in rows.facts.unreadable:
                    self.told(0, one["image"], InputError(one["error"]))
            else:
                rows = self._embedded(images)
                write_atomically(path, table_bytes(rows))
            self.parts.append(path)
            self.count += rows.facts.count
            yield from range(rows.facts.count + rows.facts.unreadable_count)

    def _embedded(self, images: Iterable[_Named]) -> EmbeddingRows:
        names: list[str] = []
        bad: list[dict[str, str]] = []

        def given() -> Iterator[ImageInput]:
            for name, image in images:
                names.append(name)
                yield image

        def unreadable(place: int, _image: ImageInput, error: InputError) -> None:
            text = str(error) if names[place] in str(error) else f"{names[place]}: {error}"
            bad.append({"image": names[place], "error": text})
            self.told(place, names[place], InputError(text))

        places, rows = [], []
        for answer in self.model.stream(given(), batch_size=self.batch_size, unreadable=unreadable, classes=False):
            places.append(answer.place)
            rows.append(answer.embedding)
        vectors = np.stack(rows) if rows else np.empty((0, self.model.width), dtype=np.float32)
        facts = embeddings_facts(self.model, "images", len(rows))
        facts = replace(facts, unreadable_count=len(bad), unreadable=tuple(bad))
        ids = np.array(places, dtype=np.int64)
        return EmbeddingRows(facts, ids, tuple(names[place] for place in places), vectors)

    def join(self, out: Path, dtype: EmbeddingDtype) -> TableFacts:
        """Writes the parts as one file in the place of `out`."""
        joined = self.folder / _JOINED
        try:
            with joined.open("w+b") as stream:
                facts = self._write_joined(stream, dtype)
                stream.flush()
                os.fsync(stream.fileno())
            joined.replace(out)
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
        return facts

    def _write_joined(self, stream: BinaryIO, dtype: EmbeddingDtype) -> TableFacts:
        how, meter = (None, None) if dtype == "float32" else self._quantizer(dtype)
        listed: list[dict[str, str]] = []
        seen = done = 0
        with TableWriter(stream, "images", dtype, self.model.width) as writer:
            for group in self._groups():
                ids = []
                for rows in group:
                    ids.append(rows.ids + seen)
                    seen += rows.facts.count + rows.facts.unreadable_count
                    listed += rows.facts.unreadable[: LARGEST_LIST - len(listed)]
                vectors = np.concatenate([rows.vectors for rows in group])
                codes = vectors if how is None else how.encode(vectors)
                if meter is not None:
                    meter.add(vectors, codes, done)
                if len(vectors):
                    writer.write(np.concatenate(ids), list(chain(*(rows.items for rows in group))), codes)
                done += len(vectors)
            facts = replace(
                embeddings_facts(self.model, "images", self.count), dtype=dtype,
                unreadable_count=seen - self.count, unreadable=tuple(listed), left_out=self.left_out,
                scale=None if how is None else how.scale, recall=None if meter is None else meter.result(),
            )  # fmt: skip
            writer.close(facts)
        return facts

    def _quantizer(self, dtype: QuantizedDtype) -> tuple[Quantizer, RecallMeter | None]:
        """How all parts become codes, and what measures what a search with them finds."""
        largest, start, asked = 0.0, 0, recall_places(self.count)
        queries = [np.empty((0, self.model.width), dtype=np.float32)]
        for path in self.parts:
            vectors = read_table(path).vectors
            largest = max(largest, float(np.abs(vectors).max(initial=0)))
            queries.append(vectors[asked[(asked >= start) & (asked < start + len(vectors))] - start])
            start += len(vectors)
        how = quantizer_for(dtype, self.model.width, largest)
        return how, RecallMeter(how, np.concatenate(queries), asked) if len(asked) else None

    def _groups(self) -> Iterator[list[EmbeddingRows]]:
        """The parts, as many at a time as a row group takes."""
        group: list[EmbeddingRows] = []
        for path in self.parts:
            group.append(read_table(path))
            if sum(len(rows.ids) for rows in group) >= GROUP_ROWS:
                yield group
                group = []
        if group:
            yield group


def embeddings_facts(model: Model, kind: EmbeddedKind, count: int) -> TableFacts:
    """What a file of float32 embeddings says of itself, where every image could be read."""
    manifest, site = model.manifest, "" if kind == "texts" else model.site_sha256
    return TableFacts(
        kind, "float32", model.width, count, model.space_id, site, manifest.model.name, model.variant, model.backend
    )


def _parts(inputs: Sequence[Path], size: int, left_out: dict[str, int]) -> Iterator[_Part]:
    """The images of files, folders and shards, in parts."""
    for of_shards, group in groupby(inputs, key=lambda path: is_shard(path) and not path.is_dir()):
        if of_shards:
            for shard in group:
                yield from _shard_parts(shard, size, left_out)
            continue
        found = walk_images(list(group))
        while some := list(islice(found, size)):
            yield [[str(path), *_stamp(path)] for path in some], [(str(path), path) for path in some]


def _shard_parts(path: Path, size: int, left_out: dict[str, int]) -> Iterator[_Part]:
    """A shard's images; one that is embedded already is still read to its end, so that damage is seen."""
    stamp = _stamp(path)
    images = other_room("embed SHARD.tar")(path, left_out)
    for number, first in enumerate(images):
        part = islice(chain([first], images), size)
        yield [str(path), *stamp, number], ((f"{path.parent / name}", content) for name, content in part)
    if _stamp(path) != stamp:
        raise InputError(f"{path}: was changed while it was read; run the same command again")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        facts = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return facts.st_size, facts.st_mtime_ns


def _count(inputs: Sequence[Path]) -> int | None:
    """How many images there are; None with shards, which are read once."""
    if any(is_shard(path) and not path.is_dir() for path in inputs):
        return None
    return sum(1 for _ in walk_images(inputs))


def _kept_part(path: Path) -> EmbeddingRows | None:
    """A part of an earlier run; None where there is none, or it is damaged and must be made again."""
    if not path.is_file():
        return None
    try:
        return read_table(path)
    except InputError as error:
        note(f"invariclip: {error}; embedding its images again")
        return None


@contextmanager
def _parts_folder(out: Path) -> Iterator[Path]:
    """The folder of parts beside a file, for one process at a time."""
    folder = out.with_name(f"{out.name}.unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    try:
        if locks is not None:
            try:
                locks.flock(handle, locks.LOCK_EX | locks.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{out}: another process is writing it; wait for it, or name another file") from error
            except OSError:  # a file system without locks
                pass
        yield folder
    finally:
        os.close(handle)
        with suppress(OSError):  # parts are in it
            folder.rmdir()


def _clear(folder: Path) -> None:
    """Removes the parts, also those of earlier runs with other images or settings."""
    for path in [*folder.glob("part-*.parquet"), folder / _JOINED]:
        path.unlink(missing_ok=True)
