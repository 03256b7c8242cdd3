"""Explicit pairs: images or texts that a file lists two by two, and classes in several templates.

Pairs of texts add to Σ_Δ only (docs/method.md, section 1).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from invariclip.calibrate.data.encode import EmbeddedVersions, Request, encode_images, encode_texts
from invariclip.calibrate.data.images import inside_folder
from invariclip.calibrate.data.problems import SAME, UNREADABLE
from invariclip.calibrate.data.records import IMAGE_COLUMNS, TEXT_COLUMNS, ListedPair, Span, read_pairs, spans
from invariclip.calibrate.data.stream.blocks import (
    BLOCK_ROWS,
    NATURAL,
    TEXTS,
    BlockBuilder,
    Shard,
    require_encoder,
    require_file,
    stamp,
    ties_of,
    unchanged,
)
from invariclip.errors import InputError
from invariclip.preprocessing.prompts import check_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.calibrate.data.problems import ProblemCounts
    from invariclip.calibrate.data.stream.blocks import RowBlock

TEXTS_PER_SHARD = 4096
"""Pairs of texts in a shard."""
Points = Literal["both", "first", "none"]
"""Which members of pairs are taken as points."""
PAIRS_PER_SHARD = 1024
"""Pairs of images in a shard: their embeddings are held together, and what they share is known within it."""
HALF = "pairs of which an image cannot be read"


@dataclass(frozen=True)
class TextPairs:
    """A JSONL, CSV or TSV file of text pairs: columns `first`, `second` and, if there is one, `weight`.

    Attributes:
        name: See `PairSource`.
        path: The file.
        weight: See `PairSource`.
    """

    name: str
    path: str
    weight: float = 1.0
    needs_encoder = True

    def shards(self) -> list[Shard]:
        """Ranges of `TEXTS_PER_SHARD` pairs; the file is read once.

        Raises:
            InputError: The file is missing or empty, or a record cannot be used.
        """
        return _shards(self, TEXTS_PER_SHARD, TEXT_COLUMNS, lambda _: {"kind": "text pairs"})

    def read(self, shard: Shard, encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
        """The pairs of a range (see `PairSource`).

        Raises:
            InputError: There is no encoder of texts, or the file has changed since it was listed.
        """
        return _blocks(self.name, _pairs_of(self.path, shard, TEXT_COLUMNS), encoder, tally)


@dataclass(frozen=True)
class TemplatePairs:
    """Every class in every two templates.

    A class weighs M - 1 in M templates, shared evenly by its pairs, as a concept in M environments does.

    Attributes:
        name: See `PairSource`.
        classes: Names.
        templates: Texts with one `{}` each, such as `a photo of a {}`.
        weight: See `PairSource`.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    weight: float = 1.0
    needs_encoder = True

    def __post_init__(self) -> None:
        """Refuses what gives no pair.

        Raises:
            InputError: See `prompts.check_prompts`; or there is one template alone.
        """
        check_prompts(self.classes, self.templates)
        if len(self.templates) < 2:
            raise InputError(f"{self.name}: one template gives no pair; name two or more")

    def shards(self) -> list[Shard]:
        """Ranges of classes, of about `BLOCK_ROWS` texts."""
        step = max(1, BLOCK_ROWS // len(self.templates))
        return [
            Shard(
                self.name,
                f"classes {start} to {min(start + step, len(self.classes)) - 1} in {len(self.templates)} templates",
                {
                    "kind": "templates",
                    "classes": list(self.classes[start : start + step]),
                    "templates": list(self.templates),
                },
            )
            for start in range(0, len(self.classes), step)
        ]

    def read(self, shard: Shard, encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
        """The pairs of a range of classes (see `PairSource`).

        Raises:
            InputError: There is no encoder of texts.
        """
        share = 2 / len(self.templates)
        pairs = [
            ListedPair(0, first.replace("{}", name), second.replace("{}", name), share)
            for name in shard.spec["classes"]
            for first, second in combinations(self.templates, 2)
        ]
        return _blocks(self.name, pairs, encoder, tally)


def _blocks(
    source: str, pairs: Sequence[ListedPair], encoder: Encoder | None, tally: ProblemCounts
) -> Iterator[RowBlock]:
    """Pairs as rows; those whose members the encoder cannot tell apart (case, beyond its context) are left out."""
    encoder = require_encoder(source, encoder, "texts")
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))
    place = {text: index for index, text in enumerate(texts)}
    ids, rows = encode_texts(encoder, texts)
    blocks = BlockBuilder()
    for pair, tie in zip(pairs, ties_of([(pair.first, pair.second) for pair in pairs]), strict=True):
        first, second = place[pair.first], place[pair.second]
        name = f"{pair.first} | {pair.second}"
        if np.array_equal(ids[first], ids[second]):
            tally.add(SAME, [name])
        else:
            blocks.pair(TEXTS, rows[first], rows[second], pair.weight, name, tie)
        yield from blocks.full()
    yield from blocks.rest()


@dataclass(frozen=True)
class PairsFile:
    """A JSONL, CSV or TSV file of pairs: columns `first`, `second` and, if there is one, `weight`.

    Attributes:
        name: See `PairSource`.
        path: The file; the paths in it are relative to its folder.
        weight: See `PairSource`.
        points: Which members are points; an image that stands in several pairs then counts in each.
        allow_outside: Accept paths that leave the file's folder.
    """

    name: str
    path: str
    weight: float = 1.0
    points: Points = "both"
    allow_outside: bool = False
    needs_encoder = True

    def shards(self) -> list[Shard]:
        """Ranges of `PAIRS_PER_SHARD` pairs; the file is read once, the images are not opened.

        Raises:
            InputError: The file is missing or empty, or a record cannot be used.
        """
        return _shards(
            self,
            PAIRS_PER_SHARD,
            IMAGE_COLUMNS,
            lambda pairs: {"kind": "pairs", "images": self._stamps(pairs), "points": self.points},
        )

    def read(self, shard: Shard, encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
        """The pairs of a range; every image of it is embedded once (see `PairSource`).

        A pair whose members are one file, or two of the same content, is left out with its points.

        Raises:
            InputError: There is no encoder, or a file has changed since it was listed.
        """
        encoder = require_encoder(self.name, encoder)
        pairs = _pairs_of(self.path, shard, IMAGE_COLUMNS)
        self._require_unchanged(pairs, shard, "since the shards were listed")
        embedded = self._embedded(pairs, encoder, tally)
        self._require_unchanged(pairs, shard, "while it was read")
        blocks = BlockBuilder()
        for pair, tie in zip(pairs, ties_of([(pair.first, pair.second) for pair in pairs]), strict=True):
            first, second = embedded.get(pair.first), embedded.get(pair.second)
            name = f"{pair.first} | {pair.second}"
            if pair.first == pair.second or (first and second and first.digest == second.digest):
                tally.add(SAME, [name])
            elif first is None or second is None:
                tally.add(HALF, [name])
            else:
                blocks.pair(NATURAL, first.row, second.row, pair.weight, name, tie)
                for member in (first, second)[: {"both": 2, "first": 1, "none": 0}[self.points]]:
                    blocks.point(member.row, member.name)
            yield from blocks.full()
        yield from blocks.rest()

    def _embedded(
        self, pairs: Sequence[ListedPair], encoder: Encoder, tally: ProblemCounts
    ) -> dict[str, EmbeddedVersions]:
        """Every image that can be read, by the path that the file gives."""
        names = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
        readable = [name for name in names if stamp(Path(self.path).parent / name)]
        tally.add(UNREADABLE, [name for name in names if name not in set(readable)])
        requests = (Request(Path(self.path).parent / name, name) for name in readable)
        return {image.name: image for image in encode_images(encoder, requests, tally)}

    def _require_unchanged(self, pairs: Sequence[ListedPair], shard: Shard, when: str) -> None:
        if self._stamps(pairs) != shard.spec["images"]:
            raise InputError(f"{shard.name}: an image has changed {when}; start again, what is done is kept")

    def _stamps(self, pairs: Sequence[ListedPair]) -> str:
        """A digest of what the images of some pairs are, which stay inside the file's folder."""
        lines = hashlib.sha256()
        for pair in pairs:
            for name in (pair.first, pair.second):
                image = inside_folder(Path(self.path), pair.line, name, self.allow_outside)
                lines.update(f"{name}\t{stamp(image)}\n".encode(errors="surrogatepass"))
        return lines.hexdigest()


def _shards(
    source: TextPairs | PairsFile,
    records: int,
    columns: Mapping[str, tuple[str, ...]],
    spec_of: Callable[[Sequence[ListedPair]], dict[str, Any]],
) -> list[Shard]:
    """Ranges of `records` pairs of a file. Every record is read, so that an unusable one is reported before the run."""
    path = Path(source.path)
    file_stamp = require_file(path)
    with unchanged([(path, file_stamp)]):
        shards = [
            Shard(
                source.name,
                f"{source.path}: {span.records} pairs from line {span.line}",
                {
                    "path": source.path,
                    "stamp": file_stamp,
                    "span": [span.start, span.end, span.line, span.records],
                    **spec_of(list(read_pairs(path, span, columns))),
                },
            )
            for span in spans(path, records)
        ]
    if not shards:
        raise InputError(f"{path}: lists no pair")
    return shards


def _pairs_of(file: str, shard: Shard, columns: Mapping[str, tuple[str, ...]]) -> list[ListedPair]:
    """The pairs of a shard, if the file is still what was listed."""
    with unchanged([(Path(file), shard.spec["stamp"])]):
        return list(read_pairs(Path(file), Span(*shard.spec["span"]), columns))
