"""Natural pairs that a file lists: two paths a record, read in ranges of records."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from invariclip.calibrate.data.images import inside_folder
from invariclip.calibrate.data.sources.columns import PATHS, Listed, read_pairs
from invariclip.calibrate.data.encode import EmbeddedVersions, Request, encode_images
from invariclip.calibrate.data.sources.gather import NATURAL, Gather
from invariclip.calibrate.data.records import Span, spans
from invariclip.calibrate.data.sources.stamps import require_file, require_unchanged, stamp
from invariclip.calibrate.data.sources.ties import ties_of
from invariclip.calibrate.data.stream.blocks import Shard
from invariclip.calibrate.data.stream.tally import SAME, UNREADABLE
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.stream.blocks import RowBlock
    from invariclip.calibrate.data.stream.tally import ProblemCounts

Points = Literal["both", "first", "none"]
"""Which members of pairs are taken as points."""
RECORDS = 1024
"""Pairs of a shard: the embeddings of their images are held together, and what they share is known within it."""

HALF = "pairs of which an image cannot be read"


@dataclass(frozen=True)
class PairsFile:
    """A JSONL, CSV or TSV file of pairs: columns `first`, `second` and, if there is one, `weight`.

    Attributes:
        name: See `Source`.
        path: The file; the paths in it are relative to its folder.
        weight: See `Source`.
        points: Which members are points; an image that stands in several pairs then counts in each.
        allow_outside: Accept paths that leave the file's folder.
    """

    name: str
    path: str
    weight: float = 1.0
    points: Points = "both"
    allow_outside: bool = False

    @property
    def needs_encoder(self) -> bool:
        """True."""
        return True

    def shards(self) -> list[Shard]:
        """Ranges of `RECORDS` pairs; the file is read once, the images are not opened.

        Raises:
            InputError: The file is missing or empty, or a record cannot be used.
        """
        path = Path(self.path)
        listed = require_file(path)
        found = [
            Shard(
                self.name,
                f"{self.path}: {span.records} pairs from line {span.line}",
                {
                    "kind": "pairs",
                    "path": self.path,
                    "stamp": listed,
                    "span": [span.start, span.end, span.line, span.records],
                    "images": self._stamps(list(read_pairs(path, span, PATHS))),
                    "points": self.points,
                },
            )
            for span in spans(path, RECORDS)
        ]
        if not found:
            raise InputError(f"{path}: lists no pair")
        return found

    def read(self, shard: Shard, encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
        """The pairs of a range; every image of it is embedded once (see `Source`).

        A pair whose members are one file, or two of the same content, is left out with its points.

        Raises:
            InputError: There is no encoder, or a file has changed since it was listed.
        """
        if encoder is None:
            raise InputError(f"{self.name}: images need an encoder; name a checkpoint")
        path = Path(self.path)
        require_unchanged(path, shard.spec["stamp"])
        pairs = list(read_pairs(path, Span(*shard.spec["span"]), PATHS))
        if self._stamps(pairs) != shard.spec["images"]:
            raise InputError(f"{shard.name}: an image has changed since the shards were listed; start again")
        seen = self._embedded(pairs, encoder, tally)
        gather = Gather()
        for pair, tie in zip(pairs, ties_of([(pair.first, pair.second) for pair in pairs]), strict=True):
            first, second = seen.get(pair.first), seen.get(pair.second)
            name = f"{pair.first} | {pair.second}"
            if pair.first == pair.second or (first and second and first.digest == second.digest):
                tally.add(SAME, [name])
            elif first is None or second is None:
                tally.add(HALF, [name])
            else:
                gather.pair(NATURAL, first.row, second.row, pair.weight, name, tie)
                for member in (first, second)[: {"both": 2, "first": 1, "none": 0}[self.points]]:
                    gather.point(member.row, member.name)
            yield from gather.full()
        yield from gather.rest()

    def _embedded(self, pairs: Sequence[Listed], encoder: Encoder, tally: ProblemCounts) -> dict[str, EmbeddedVersions]:
        """Every image that can be read, by the path that the file gives."""
        names = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
        there = [name for name in names if stamp(Path(self.path).parent / name)]
        tally.add(UNREADABLE, [name for name in names if name not in set(there)])
        requests = (Request(Path(self.path).parent / name, name) for name in there)
        return {seen.name: seen for seen in encode_images(encoder, requests, tally)}

    def _stamps(self, pairs: Sequence[Listed]) -> str:
        """A digest of what the images of some pairs are, which stay inside the file's folder."""
        lines = hashlib.sha256()
        for pair in pairs:
            for name in (pair.first, pair.second):
                image = inside_folder(Path(self.path), pair.line, name, self.allow_outside)
                lines.update(f"{name}\t{stamp(image)}\n".encode(errors="surrogatepass"))
        return lines.hexdigest()
