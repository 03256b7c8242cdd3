"""Embeddings that were computed before, in npy, safetensors or parquet files: read in ranges of rows, never whole."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from invariclip.calibrate.data.sources.tables import ColumnFile, open_tables
from invariclip.calibrate.data.stream.blocks import BLOCK_ROWS, RowBlock, Shard
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.stream.tally import ProblemCounts

SHARD_ROWS = 16 * BLOCK_ROWS
"""Rows of a shard: 65,536 pairs of 512 float32 are 268 MB."""
COLUMNS = ("points", "first", "second", "weights")


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

    @property
    def needs_encoder(self) -> bool:
        """It holds embeddings."""
        return False

    def shards(self) -> list[Shard]:
        """Ranges of rows of all files; only their headers are read."""
        found: list[Shard] = []
        for files in self._files():
            table = self._open(files)
            facts = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files.values()]
            for start, stop in pairwise([0, *table.cuts(SHARD_ROWS)]):
                spec = {"columns": list(files), "files": facts, "points": self.points, "width": table.width}
                name = f"{next(iter(files.values())).name}[{start}:{stop}]"
                found.append(Shard(self.name, name, {**spec, "start": start, "stop": stop}))
        return found

    def read(self, shard: Shard, encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
        """Blocks of rows, as they are in the files."""
        del encoder, tally
        spec = shard.spec
        files = {column: Path(fact[0]) for column, fact in zip(spec["columns"], spec["files"], strict=True)}
        for file, size, changed in spec["files"]:
            seen = Path(file).stat()
            if (seen.st_size, seen.st_mtime_ns) != (size, changed):
                raise InputError(f"{file}: changed since the run began; run it again")
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
    """Names of rows that are made when they are asked for: a million rows need no million names."""

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
