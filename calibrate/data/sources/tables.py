"""Files of rows: npy, safetensors, parquet. Opening looks at headers; a range is read in small parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from invariclip.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

MAX_WIDTH = 1 << 16
"""Of an embedding: a damaged header must not make us allocate."""


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
        lengths = {shape[0] if shape else 0 for shape in shapes.values()}
        if len(lengths) > 1:
            told = ", ".join(f"{column} {list(shape)}" for column, shape in shapes.items())
            raise InputError(f"{where}: columns of different lengths: {told}")
        wide = {shape[1:] for column, shape in shapes.items() if column != "weights"}
        if len(wide) != 1 or len(width := wide.pop()) != 1 or not 1 <= width[0] <= MAX_WIDTH:
            told = ", ".join(f"{column} {list(shape)}" for column, shape in shapes.items())
            raise InputError(f"{where}: embeddings must be of shape [N, D], all of one width: {told}")
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
