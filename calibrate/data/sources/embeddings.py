"""Embeddings computed elsewhere, in npy, safetensors or parquet files.

Opening a file reads its header only; rows are read in ranges, a small part at a time.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from invariclip.calibrate.data.stream.blocks import BLOCK_ROWS, RowBlock, Shard, require_file, require_unchanged
from invariclip.errors import InputError, MissingExtraError

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
        return _Npy(files)
    file = files[""]
    if file.suffix == ".safetensors":
        return _Safetensors(file)
    if file.suffix == ".parquet":
        return _Parquet(file)
    raise InputError(f"{file}: not a .safetensors or .parquet file; .npy files are named by first and second")


class _Ranged:
    """What can be read from any row on."""

    def __init__(self, where: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.columns = tuple(shapes)
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


class _Npy(_Ranged):
    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        where = ", ".join(str(file) for file in files.values())
        super().__init__(where, {column: self._map(column).shape for column in files})

    def _map(self, column: str) -> NDArray[Any]:
        try:
            # Never unpickles; a header that promises more than the file holds is refused by the map.
            rows = np.load(self._files[column], mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{self._files[column]}: not an npy file of numbers ({error})") from error
        if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f":
            raise InputError(f"{self._files[column]}: not an npy file of floating numbers")
        return rows

    def read(self, start: int, stop: int, block: int) -> Iterator[dict[str, NDArray[Any]]]:
        for first in range(start, stop, block):
            # Mapped anew for every block, for what was mapped counts as memory until the map is closed.
            yield {column: self._map(column)[first : min(first + block, stop)] for column in self.columns}


class _Safetensors(_Ranged):
    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            with safe_open(file, framework="numpy") as tensors:
                names = list(tensors.keys())
                shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a safetensors file ({error})") from error
        super().__init__(str(file), shapes)

    def read(self, start: int, stop: int, block: int) -> Iterator[dict[str, NDArray[Any]]]:
        for first in range(start, stop, block):
            try:
                with safe_open(self._file, framework="numpy") as tensors:
                    part = slice(first, min(first + block, stop))
                    rows = {column: tensors.get_slice(column)[part] for column in self.columns}
            except (SafetensorError, OSError, TypeError) as error:
                raise InputError(f"{self._file}: cannot be read ({error}); store float32") from error
            yield rows


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
        for file, *file_stamp in spec["files"]:
            require_unchanged(Path(file), file_stamp)
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
