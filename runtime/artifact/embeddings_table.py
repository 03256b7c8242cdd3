"""Embeddings as a parquet file: written row group by row group, sealed in its footer, read in bounded memory.

Columns are `id` (int64), `path` or `text` (string) and `embedding` (a list of fixed size). The facts stand as JSON
under `invariclip.embeddings` in the file's metadata, the digest of the whole file as their first field.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from invariclip.console import printable
from invariclip.errors import InputError, MissingExtraError
from invariclip.records import Record, require_whole_footer, seal_footer
from invariclip.version import __version__

MAGIC = b"PAR1"
"""The first and the last bytes of a parquet file."""
EmbeddedKind: TypeAlias = Literal["images", "texts"]
EmbeddingDtype: TypeAlias = Literal["float32", "int8", "binary"]
EMBEDDING_DTYPES: tuple[EmbeddingDtype, ...] = get_args(EmbeddingDtype)
MAX_FOOTER = 1 << 28
"""Bytes of a footer at most: ten million rows have one of less than a megabyte."""
MAX_FACTOR = 256
"""A file holds at most so many times its own size: repeated codes are stored once."""
_ITEM = {"images": "path", "texts": "text"}


@dataclass(frozen=True)
class SearchRecall:
    """How many of the exact `neighbours` nearest vectors a search with codes finds, as shares from 0 to 1.

    Attributes:
        neighbours: Ten.
        queries: How many vectors were asked for, each among all others of the file.
        recall: Among as many nearest by codes.
        wider: A larger number of nearest by codes,
        recall_in_wider: and the share among those: what is left when they are scored again with exact vectors.
    """

    neighbours: int
    queries: int
    recall: float
    wider: int
    recall_in_wider: float


@dataclass(frozen=True)
class TableFacts:
    """What a file of embeddings says of itself.

    Attributes:
        kind: What was embedded.
        dtype: What the vectors are stored as.
        dimensions: d, the width of the vectors.
        count: N, how many there are.
        space_id: The embedding space.
        site_sha256: Of the site that they are adapted to; "" for none.
        model: The checkpoint's architecture, by the artifact's manifest.
        variant: The artifact's variant that embedded.
        backend: The engine that ran it.
        invariclip: The version that wrote the file.
        unreadable_count: Images that could not be read.
        unreadable: `image` and `error` of the first of them.
        left_out: What shards held that is no image of a sample, counted by kind.
        scale: What int8 codes are multiplied by; None for others.
        recall: What a search with the codes finds; None for float32, and for fewer vectors than are measured.
    """

    kind: EmbeddedKind
    dtype: EmbeddingDtype
    dimensions: int
    count: int
    space_id: str
    site_sha256: str
    model: str
    variant: str
    backend: str
    invariclip: str = __version__
    unreadable_count: int = 0
    unreadable: tuple[dict[str, str], ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    scale: float | None = None
    recall: SearchRecall | None = None

    def __post_init__(self) -> None:
        """Refuses a scale that does not go with the dtype.

        Raises:
            InputError: int8 has none above zero, or another dtype has one.
        """
        usable = self.scale is not None and math.isfinite(self.scale) and self.scale > 0
        if usable != (self.dtype == "int8") or (self.scale is not None and not usable):
            raise InputError(f"{self.dtype} does not go with a scale of {self.scale}")


EMBEDDINGS_TABLE = Record(
    "invariclip.embeddings", "an embeddings file", "`invariclip embed`", 1, 1 << 40, InputError, TableFacts
)


@dataclass(frozen=True)
class EmbeddingRows:
    """Rows of such a file.

    Attributes:
        facts: What it says of itself.
        ids: int64 [N], each item's place among all that were found; unreadable ones leave gaps.
        items: N paths or texts.
        vectors: float32 [N, d]; int8 [N, d]; or uint8 [N, ⌈d/8⌉] of binary codes.
    """

    facts: TableFacts
    ids: NDArray[np.int64]
    items: tuple[str, ...]
    vectors: NDArray[Any]


class TableWriter:
    """Writes such a file to a stream that can be read too; rows go out group by group.

    The same rows in the same groups give the same bytes. Close it with the facts, which seal the file, within a `with`
    block: where that ends early, the stream is given up.
    """

    def __init__(self, stream: BinaryIO, kind: EmbeddedKind, dtype: EmbeddingDtype, dimensions: int) -> None:
        """Begins a file.

        Raises:
            MissingExtraError: pyarrow is not installed.
        """
        pyarrow, parquet = require_pyarrow("-o NAME.parquet")
        number = pyarrow.float32() if dtype == "float32" else pyarrow.int8() if dtype == "int8" else pyarrow.uint8()
        self._item, self._stream, self._pyarrow = _ITEM[kind], stream, pyarrow
        self._width = stored_width(dtype, dimensions)
        self._schema = pyarrow.schema(
            [
                pyarrow.field("id", pyarrow.int64(), nullable=False),
                pyarrow.field(self._item, pyarrow.string(), nullable=False),
                pyarrow.field("embedding", pyarrow.list_(number, self._width), nullable=False),
            ]
        )
        # a dictionary lets bytes be stored as bytes: parquet knows no smaller number than int32
        small = [] if dtype == "float32" else ["embedding.list.element"]
        self._writer = parquet.ParquetWriter(
            stream, self._schema, compression="none", use_dictionary=small or False, write_statistics=["id"]
        )

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Gives up what was not closed, so that nothing is written to the stream later."""
        if self._writer.is_open:
            with suppress(Exception):  # a full disk, which is being reported
                self._writer.close()
            self._writer.is_open = False

    def write(self, ids: NDArray[np.int64], items: Sequence[str], vectors: NDArray[Any]) -> None:
        """One row group."""
        values = self._pyarrow.array(np.ascontiguousarray(vectors).reshape(-1))
        rows = self._pyarrow.FixedSizeListArray.from_arrays(values, self._width)
        names = self._pyarrow.array([printable(item) for item in items], type=self._pyarrow.string())
        table = self._pyarrow.table([self._pyarrow.array(ids), names, rows], schema=self._schema)
        self._writer.write_table(table, row_group_size=max(len(items), 1))

    def close(self, facts: TableFacts) -> None:
        """Ends the file and seals it."""
        self._writer.add_key_value_metadata({EMBEDDINGS_TABLE.key: EMBEDDINGS_TABLE.text(asdict(facts))})
        self._writer.close()
        seal_footer(self._stream, _footer_start(self._stream), EMBEDDINGS_TABLE.key)


def table_bytes(rows: EmbeddingRows) -> bytes:
    """A whole file of few rows."""
    stream = io.BytesIO()
    with TableWriter(stream, rows.facts.kind, rows.facts.dtype, rows.facts.dimensions) as writer:
        writer.write(rows.ids, rows.items, rows.vectors)
        writer.close(rows.facts)
    return stream.getvalue()


def is_table(path: Path) -> bool:
    """Whether a file begins as parquet files do; False where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_table(path: str | os.PathLike[str]) -> EmbeddingRows:
    """Reads what a `TableWriter` wrote; memory holds the vectors once.

    Raises:
        InputError: The file is missing, damaged, or not such a file.
        MissingExtraError: pyarrow is not installed.
    """
    where = Path(path)
    pyarrow, parquet = require_pyarrow(str(where))
    try:
        with where.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            require_whole_footer(stream, _footer_start(stream), EMBEDDINGS_TABLE, str(where))
            stream.seek(0)
            file = parquet.ParquetFile(stream)
            metadata = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
            facts = EMBEDDINGS_TABLE.read_facts(metadata, str(where))
            _require_plain(where, file.metadata, facts, size)
            return _rows(where, file, facts)
    except (pyarrow.ArrowException, OSError, ValueError) as reason:
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else reason
        raise InputError(f"{where}: not an embeddings file written by `invariclip embed` ({text})") from reason


def require_pyarrow(what: str) -> tuple[Any, Any]:
    """Pyarrow and its parquet module.

    Args:
        what: What needs them, for the message.

    Raises:
        MissingExtraError: They are not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError(f'{what}: parquet needs {error.name}: pip install "invariclip[parquet]"') from error
    return pyarrow, parquet


def stored_width(dtype: EmbeddingDtype, dimensions: int) -> int:
    """How many numbers a row is stored as."""
    return -(-dimensions // 8) if dtype == "binary" else dimensions


def stored_type(dtype: EmbeddingDtype) -> np.dtype[Any]:
    """What numbers a row is stored as."""
    return np.dtype({"float32": np.float32, "int8": np.int8, "binary": np.uint8}[dtype])


def _rows(where: Path, file: Any, facts: TableFacts) -> EmbeddingRows:
    width, done = stored_width(facts.dtype, facts.dimensions), 0
    vectors = np.empty((facts.count, width), dtype=stored_type(facts.dtype))
    ids = np.empty(facts.count, dtype=np.int64)
    items: list[str] = []
    for group in range(file.metadata.num_row_groups):
        table = file.read_row_group(group).combine_chunks()
        if table.column_names != ["id", _ITEM[facts.kind], "embedding"] or any(c.null_count for c in table.columns):
            EMBEDDINGS_TABLE.refuse(where, f"its columns are {', '.join(table.column_names)}, or hold nulls")
        stop = done + len(table)
        flat = np.concatenate([np.asarray(chunk.flatten()) for chunk in table["embedding"].chunks] or [vectors[:0, 0]])
        if flat.dtype != vectors.dtype or flat.size != len(table) * width or stop > facts.count:
            EMBEDDINGS_TABLE.refuse(where, f"its vectors are not {facts.count} of {width} {vectors.dtype}")
        vectors[done:stop] = flat.reshape(-1, width)
        ids[done:stop] = np.asarray(table["id"])
        items += table[_ITEM[facts.kind]].to_pylist()
        done = stop
    return EmbeddingRows(facts, ids, tuple(items), vectors)


def _require_plain(where: Path, metadata: Any, facts: TableFacts, size: int) -> None:
    """Refuses a file that promises more than it can hold, before memory is taken for it."""
    held = facts.count * stored_width(facts.dtype, facts.dimensions) * stored_type(facts.dtype).itemsize
    if min(facts.count, facts.dimensions) < 0 or metadata.num_rows != facts.count or held > MAX_FACTOR * size:
        EMBEDDINGS_TABLE.refuse(
            where, f"{metadata.num_rows} rows; its facts say {facts.count} of {facts.dimensions} dimensions"
        )
    for group in range(metadata.num_row_groups):
        of_group = metadata.row_group(group)
        for column in map(of_group.column, range(of_group.num_columns)):
            codes = facts.dtype != "float32" and column.path_in_schema.startswith("embedding")
            known = {"PLAIN", "RLE", "BIT_PACKED", *(["RLE_DICTIONARY", "PLAIN_DICTIONARY"] if codes else [])}
            if column.compression != "UNCOMPRESSED" or not known.issuperset(column.encodings):
                EMBEDDINGS_TABLE.refuse(where, f"its column {column.path_in_schema!s:.40} is compressed")


def _footer_start(stream: BinaryIO) -> int:
    """Where a parquet file's footer begins: its length stands before the last four bytes.

    Raises:
        ValueError: It is no parquet file, or the footer is too large.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - 8, 0))
    tail = stream.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or not 0 < length <= min(size - 12, MAX_FOOTER):
        raise ValueError("no footer of a parquet file")
    return size - 8 - length
