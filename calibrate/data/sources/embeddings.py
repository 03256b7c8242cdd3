"""Embeddings computed elsewhere, in npy, safetensors or parquet files.

Opening a file reads its header only; rows are read in ranges, a small part at a time.
"""

from __future__ import annotations

import glob
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from invariclip.calibrate.data.stream.blocks import BLOCK_ROWS, RowBlock, Shard, require_file, unchanged
from invariclip.errors import InputError, MissingExtraError
from invariclip.records import safetensors_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.calibrate.data.problems import ProblemCounts

MAX_WIDTH = 1 << 16
"""Of an embedding: a damaged header must not make us allocate."""
SHARD_ROWS = 16 * BLOCK_ROWS
"""Rows of a shard: 65,536 pairs of 512 float32 are 268 MB."""
COLUMNS = ("points", "first", "second", "weights")
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
"""What safetensors calls the numbers that are taken."""


class ColumnFile(Protocol):
    """Columns of rows.

    Attributes:
        columns: Their names.
        rows: N.
        width: D of the columns that hold embeddings.
    """

    columns: tuple[str, ...]
    rows: int
    width: int

    def cuts(self, rows: int) -> list[int]:
        """Where shards of about so many rows end; the last is N."""

    def read(self, start: int, stop: int, block: int) -> Iterator[dict[str, NDArray[Any]]]:
        """Column → its rows from start to stop, at most `block` at a time. Both ends are cuts."""


def open_tables(files: Mapping[str, Path]) -> ColumnFile:
    """One file that holds all columns (called ""), or an npy file for every column.

    Raises:
        InputError: A file is missing, damaged or of another kind, or the columns do not go together.
        MissingExtraError: A parquet file needs pyarrow.
    """
    if "" not in files:
        where = ", ".join(str(file) for file in files.values())
        return _Arrays(where, {column: _npy(file) for column, file in files.items()})
    file = files[""]
    if file.suffix == ".safetensors":
        return _Arrays(str(file), _safetensors(file))
    if file.suffix == ".parquet":
        return _Parquet(file)
    raise InputError(f"{file}: not a .safetensors or .parquet file; .npy files are named by first and second")


class _Column(NamedTuple):
    """Where a file holds an array. It is read and never mapped: a map of a file that is cut kills the process."""

    file: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    by_columns: bool = False

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Some of its rows.

        Raises:
            InputError: The file cannot be read, or ends before.
        """
        rest, count = self.shape[1:], stop - start
        runs = [(start * math.prod(rest), count * math.prod(rest))]
        if self.by_columns:
            runs = [(column * self.shape[0] + start, count) for column in range(math.prod(rest))]
        content = bytearray()
        try:
            with self.file.open("rb") as stream:
                for first, length in runs:
                    stream.seek(self.offset + first * self.dtype.itemsize)
                    content += stream.read(length * self.dtype.itemsize)
        except OSError as error:
            raise InputError(f"{self.file}: cannot be read ({error.strerror or error})") from error
        if len(content) != count * math.prod(rest) * self.dtype.itemsize:
            raise InputError(f"{self.file}: ends before row {stop - 1}")
        flat = np.frombuffer(content, dtype=self.dtype)
        return flat.reshape(count, *rest) if not self.by_columns else flat.reshape(*rest[::-1], count).T


class _Arrays:
    """Columns that can be read from any row on."""

    def __init__(self, where: str, columns: Mapping[str, _Column]) -> None:
        self._columns, self.columns = columns, tuple(columns)
        shapes = {name: column.shape for name, column in columns.items()}
        listing = ", ".join(f"{column} {list(shape)}" for column, shape in shapes.items())
        lengths = {shape[0] if shape else 0 for shape in shapes.values()}
        if len(lengths) > 1:
            raise InputError(f"{where}: columns of different lengths: {listing}")
        wide = {shape[1:] for column, shape in shapes.items() if column != "weights"}
        if len(wide) != 1 or len(width := wide.pop()) != 1 or not 1 <= width[0] <= MAX_WIDTH:
            raise InputError(f"{where}: embeddings must be of shape [N, D], all of one width: {listing}")
        self.rows, self.width = lengths.pop(), int(width[0])

    def cuts(self, rows: int) -> list[int]:
        return [*range(rows, self.rows, rows), self.rows]

    def read(self, start: int, stop: int, block: int) -> Iterator[dict[str, NDArray[Any]]]:
        for first in range(start, stop, block):
            yield {name: column.rows(first, min(first + block, stop)) for name, column in self._columns.items()}


def _npy(file: Path) -> _Column:
    try:
        # Never unpickles; a header that promises more than the file holds is refused by the map.
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file}: not an npy file of numbers ({error})") from error
    if not isinstance(mapped, np.memmap) or mapped.dtype.kind != "f":
        raise InputError(f"{file}: not an npy file of floating numbers")
    return _Column(file, mapped.offset, mapped.dtype, mapped.shape, not mapped.flags.c_contiguous)


def _safetensors(file: Path) -> dict[str, _Column]:
    try:
        with safe_open(file, framework="numpy"):  # checks the header
            pass
        with file.open("rb") as stream:
            begin, header = safetensors_header(stream, str(file))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a safetensors file ({error})") from error
    header.pop("__metadata__", None)
    strange = next((tensor["dtype"] for tensor in header.values() if tensor["dtype"] not in _DTYPES), None)
    if strange:
        raise InputError(f"{file}: holds {strange}; store float32")
    return {
        name: _Column(file, begin + tensor["data_offsets"][0], np.dtype(_DTYPES[tensor["dtype"]]),
                      tuple(tensor["shape"]))
        for name, tensor in header.items()
    }  # fmt: skip


class _Parquet:
    """Rows are stored in groups, which have to be read from their start: shards end where groups do."""

    def __init__(self, file: Path) -> None:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise MissingExtraError(f'{file}: parquet needs pyarrow: pip install "invariclip[parquet]"') from error
        self._file, self._error = file, ArrowException
        try:
            self._opened = parquet.ParquetFile(file)
            self.columns = tuple(self._opened.schema_arrow.names)
            meta = self._opened.metadata
            self._ends = np.cumsum([meta.row_group(k).num_rows for k in range(meta.num_row_groups)], dtype=int).tolist()
            self.rows = int(meta.num_rows)
            head = next(self._opened.iter_batches(batch_size=1), None)
        except (ArrowException, OSError) as error:
            raise InputError(f"{file}: not a parquet file ({error})") from error
        shapes = {} if head is None else {name: self._array(head, name).shape for name in self.columns}
        self.width = next((shape[1] for shape in shapes.values() if len(shape) == 2), 0)
        if self.rows and not 1 <= self.width <= MAX_WIDTH:
            raise InputError(f"{file}: no column holds a list of numbers in every cell")

    def cuts(self, rows: int) -> list[int]:
        del rows
        return [int(end) for end in self._ends]

    def read(self, start: int, stop: int, block: int) -> Iterator[dict[str, NDArray[Any]]]:
        groups = [k for k, end in enumerate(self._ends) if start < end <= stop]
        try:
            for batch in self._opened.iter_batches(batch_size=block, row_groups=groups):
                yield {name: self._array(batch, name) for name in self.columns}
        except (self._error, OSError) as error:
            raise InputError(f"{self._file}: cannot be read ({error})") from error

    def _array(self, batch: Any, name: str) -> NDArray[Any]:
        """A column of numbers as [n], one of lists as [n, D]."""
        column = batch.column(name)
        if not hasattr(column, "flatten") or not hasattr(column.type, "value_type"):
            return np.asarray(column.to_numpy(zero_copy_only=False))
        from pyarrow import compute

        flat = np.asarray(column.flatten().to_numpy(zero_copy_only=False))
        lengths = compute.list_value_length(column)
        if column.null_count or len(compute.unique(lengths)) > 1:
            raise InputError(f"{self._file}: the lists of column {name!r} are not of one length")
        return flat.reshape(len(column), -1)


@dataclass(frozen=True)
class EmbeddingSource:
    """Rows of files. Pairs are rows of one number in `first` and `second`; points are what Σ is made of.

    Attributes:
        name: The source's name.
        weight: What its pairs count, beside other sources.
        path: Files (a glob) that hold the columns `first` and `second`, or `points`, and perhaps `weights`:
            safetensors, or parquet with a list of numbers in every cell.
        first: npy files (a glob) with the first members, [N, D]; as many as `second` has, in the order of their names.
        second: npy files with the second ones.
        points: Which members are points too: the first, both, or none. Both suits natural pairs; the first, pairs of a
            image and its changed version.
    """

    name: str
    weight: float = 1.0
    path: str | None = None
    first: str | None = None
    second: str | None = None
    points: Literal["first", "both", "none"] = "both"
    needs_encoder = False

    def shards(self) -> list[Shard]:
        """Ranges of rows of all files; only their headers are read."""
        shards: list[Shard] = []
        for files in self._files():
            table = self._open(files)
            facts = [[str(file), *require_file(file)] for file in files.values()]
            for start, stop in pairwise([0, *table.cuts(SHARD_ROWS)]):
                spec = {"columns": list(files), "files": facts, "points": self.points, "width": table.width}
                name = f"{next(iter(files.values())).name}[{start}:{stop}]"
                shards.append(Shard(self.name, name, {**spec, "start": start, "stop": stop}))
        return shards

    def read(self, shard: Shard, encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
        """Blocks of rows, as they are in the files."""
        del encoder, tally
        spec = shard.spec
        files = {column: Path(fact[0]) for column, fact in zip(spec["columns"], spec["files"], strict=True)}
        with unchanged((Path(file), file_stamp) for file, *file_stamp in spec["files"]):
            yield from self._blocks(shard, files)

    def _blocks(self, shard: Shard, files: dict[str, Path]) -> Iterator[RowBlock]:
        spec = shard.spec
        done = spec["start"]
        for rows in self._open(files).read(done, spec["stop"], BLOCK_ROWS):
            names = Numbered(shard.name.rpartition("[")[0], done, len(next(iter(rows.values()))))
            done += len(names)
            if "points" in rows:
                yield RowBlock(points=rows["points"], point_names=names)
                continue
            first, second, weights = rows["first"], rows["second"], rows.get("weights")
            yield RowBlock(
                points=None if self.points == "none" else first,
                first=first,
                second=second,
                weights=None if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1),
                point_names=names,
                pair_names=names,
            )
            if self.points == "both":
                yield RowBlock(points=second, point_names=names)

    def _open(self, files: dict[str, Path]) -> ColumnFile:
        table = open_tables(files)
        if not table.rows:
            raise InputError(f"{', '.join(map(str, files.values()))}: holds no rows")
        if "points" not in table.columns and not {"first", "second"} <= set(table.columns):
            where = ", ".join(str(file) for file in files.values())
            raise InputError(f"{where}: no columns first and second, nor points; it has {', '.join(table.columns)}")
        strange = sorted(set(table.columns) - set(COLUMNS))
        if strange:
            raise InputError(f"{self.name}: no use for column {strange[0]!r}; available: {', '.join(COLUMNS)}")
        return table

    def _files(self) -> Iterator[dict[str, Path]]:
        """Files that belong together: one for each column, or one (called "") that holds them all."""
        if (self.path is None) == (self.first is None) or (self.first is None) != (self.second is None):
            raise InputError(f"{self.name}: name either path, or first and second")
        if self.path is not None:
            yield from ({"": file} for file in _matching(self.name, self.path))
            return
        first, second = _matching(self.name, self.first or ""), _matching(self.name, self.second or "")
        if len(first) != len(second):
            raise InputError(f"{self.name}: first names {len(first)} files and second {len(second)}")
        yield from ({"first": a, "second": b} for a, b in zip(first, second, strict=True))


class Numbered:
    """Names of rows, made on demand: a million rows need no million names."""

    def __init__(self, file: str, start: int, count: int) -> None:
        """Rows `start` to `start + count` of a file."""
        self._file, self._start, self._count = file, start, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> str:
        return f"{self._file}, row {self._start + int(place)}"


def _matching(name: str, pattern: str) -> list[Path]:
    files = sorted(Path(file) for file in glob.glob(pattern, recursive=True))
    if not files:
        raise InputError(f"{name}: no file matches {pattern}")
    return files
