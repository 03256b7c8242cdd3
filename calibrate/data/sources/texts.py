"""Pairs of texts: listed in a file, or one class in two templates. They add to Σ_Δ only (docs/method.md, section 1)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.data.sources import columns
from invariclip.calibrate.data.sources.columns import Listed, read_pairs
from invariclip.calibrate.data.encode import encode_texts
from invariclip.calibrate.data.sources.gather import TEXTS, Gather
from invariclip.calibrate.data.records import Span, spans
from invariclip.calibrate.data.sources.stamps import require_file, require_unchanged
from invariclip.calibrate.data.sources.ties import ties_of
from invariclip.calibrate.data.stream.blocks import BLOCK_ROWS, Shard
from invariclip.calibrate.data.stream.tally import SAME
from invariclip.errors import InputError
from invariclip.preprocessing.prompts import check_prompts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.stream.blocks import RowBlock
    from invariclip.calibrate.data.stream.tally import ProblemCounts

RECORDS = 4096
"""Pairs of a shard of a file."""


@dataclass(frozen=True)
class TextPairs:
    """A JSONL, CSV or TSV file of text pairs: columns `first`, `second` and, if there is one, `weight`.

    Attributes:
        name: See `Source`.
        path: The file.
        weight: See `Source`.
    """

    name: str
    path: str
    weight: float = 1.0

    @property
    def needs_encoder(self) -> bool:
        """True."""
        return True

    def shards(self) -> list[Shard]:
        """Ranges of `RECORDS` pairs; the file is read once.

        Raises:
            InputError: The file is missing or empty, or a record cannot be used.
        """
        path = Path(self.path)
        listed = require_file(path)
        found = []
        for span in spans(path, RECORDS):
            for _ in read_pairs(path, span, columns.TEXTS):
                pass  # what cannot be used is said now, not after hours
            found.append(
                Shard(
                    self.name,
                    f"{self.path}: {span.records} pairs from line {span.line}",
                    {
                        "kind": "text pairs",
                        "path": self.path,
                        "stamp": listed,
                        "span": [span.start, span.end, span.line, span.records],
                    },
                )
            )
        if not found:
            raise InputError(f"{path}: lists no pair")
        return found

    def read(self, shard: Shard, encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
        """The pairs of a range (see `Source`).

        Raises:
            InputError: There is no encoder of texts, or the file has changed since it was listed.
        """
        path = Path(self.path)
        require_unchanged(path, shard.spec["stamp"])
        pairs = list(read_pairs(path, Span(*shard.spec["span"]), columns.TEXTS))
        return _blocks(self.name, pairs, encoder, tally)


@dataclass(frozen=True)
class TemplatePairs:
    """Every class in every two templates.

    A class weighs M - 1 in M templates, shared evenly by its pairs, as a concept in M environments does.

    Attributes:
        name: See `Source`.
        classes: Names.
        templates: Texts with one `{}` each, such as `a photo of a {}`.
        weight: See `Source`.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what gives no pair.

        Raises:
            InputError: See `prompts.check_prompts`; or there is one template alone.
        """
        check_prompts(self.classes, self.templates)
        if len(self.templates) < 2:
            raise InputError(f"{self.name}: one template gives no pair; name two or more")

    @property
    def needs_encoder(self) -> bool:
        """True."""
        return True

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
        """The pairs of a range of classes (see `Source`).

        Raises:
            InputError: There is no encoder of texts.
        """
        share = 2 / len(self.templates)
        pairs = [
            Listed(0, first.replace("{}", name), second.replace("{}", name), share)
            for name in shard.spec["classes"]
            for first, second in combinations(self.templates, 2)
        ]
        return _blocks(self.name, pairs, encoder, tally)


def _blocks(source: str, pairs: Sequence[Listed], encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
    """Pairs as rows; those whose members the encoder cannot tell apart (case, beyond its context) are left out."""
    if encoder is None:
        raise InputError(f"{source}: texts need an encoder; name a checkpoint")
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))
    place = {text: index for index, text in enumerate(texts)}
    ids, rows = encode_texts(encoder, texts)
    gather = Gather()
    for pair, tie in zip(pairs, ties_of([(pair.first, pair.second) for pair in pairs]), strict=True):
        first, second = place[pair.first], place[pair.second]
        name = f"{pair.first} | {pair.second}"
        if np.array_equal(ids[first], ids[second]):
            tally.add(SAME, [name])
        else:
            gather.pair(TEXTS, rows[first], rows[second], pair.weight, name, tie)
        yield from gather.full()
    yield from gather.rest()
