"""Webdataset shards: tar files whose members `key.….jpg` belong to a sample by what stands before the first dot.

The images of a sample are natural pairs of each other; an image may also be paired with changed versions of itself.
Members are read as they come, in one pass, and never written to disk.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from invariclip.calibrate.data.pairs import seeded
from invariclip.calibrate.data.sources.archive import TarSample, archives, samples
from invariclip.calibrate.data.changes import NO_CHANGES, Changes
from invariclip.calibrate.data.encode import EmbeddedVersions, Request, encode_images
from invariclip.calibrate.data.sources.gather import NATURAL, Gather
from invariclip.calibrate.data.sources.images import take
from invariclip.calibrate.data.sources.stamps import require_file, require_unchanged
from invariclip.calibrate.data.stream.blocks import Shard
from invariclip.calibrate.data.stream.tally import SAME
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.stream.blocks import RowBlock
    from invariclip.calibrate.data.stream.tally import ProblemCounts

ALONE = "samples with one usable image: no natural pair"

LENDERS = 16
"""Images of earlier samples that are held for interventions that need a second image."""

LENT_BYTES = 4 << 20
"""Bytes of such an image at most."""


@dataclass(frozen=True)
class WebDataset:
    """Tar files of samples.

    Attributes:
        name: See `Source`.
        paths: Files, with `*`, `?`, `[…]` and brace ranges such as `{000..099}`.
        weight: See `Source`.
        natural: Pair the images of a sample with each other.
        changes: Pair every image with changed versions of itself.
        points: Take the images as points.
    """

    name: str
    paths: tuple[str, ...]
    weight: float = 1.0
    natural: bool = True
    changes: Changes = NO_CHANGES
    points: bool = True

    @property
    def needs_encoder(self) -> bool:
        """True."""
        return True

    def shards(self) -> list[Shard]:
        """One for every tar file, in the order of the paths.

        Raises:
            InputError: A file is missing, a pattern matches none, or there is nothing to take.
        """
        if not (self.natural or self.changes.kinds or self.points):
            raise InputError(f"{self.name}: neither points nor natural pairs nor interventions are to be taken")
        return [
            Shard(
                self.name,
                str(path),
                {
                    "kind": "webdataset",
                    "path": str(path),
                    "stamp": require_file(path),
                    "natural": self.natural,
                    "points": self.points,
                    "changes": self.changes.to_json(),
                },
            )
            for path in archives(self.paths)
        ]

    def read(self, shard: Shard, encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
        """The images of a tar file, sample by sample (see `Source`).

        A sample of k usable images weighs k - 1, shared evenly by its k(k-1)/2 pairs, as a concept in k
        environments does (see `pairs.natural_pairs`).

        Raises:
            InputError: There is no encoder, or the file is damaged, or has changed since it was listed.
        """
        if encoder is None:
            raise InputError(f"{self.name}: images need an encoder; name a checkpoint")
        path = Path(shard.spec["path"])
        require_unchanged(path, shard.spec["stamp"])
        gather, good, done = Gather(), list[EmbeddedVersions](), 0
        requests = _requests(samples(path, tally), LENDERS if self.changes.needs_donor else 0)
        for image in encode_images(encoder, requests, tally, changes=self.changes, donor=self._donor):
            if good and image.place != good[0].place:
                self._pair_up(good, done, gather, tally)
                good, done = [], done + len(good)
            if take(image, gather, tally, points=self.points):
                good.append(image)
            yield from gather.full()
        self._pair_up(good, done, gather, tally)
        yield from gather.rest()

    def _donor(self, request: Request, digest: str, label: str) -> bytes | None:
        """One of the images at hand, never one of the same sample."""
        if not request.lenders:
            return None
        return request.lenders[seeded("donor", digest, label, self.changes.seed).integers(len(request.lenders))]

    def _pair_up(self, good: Sequence[EmbeddedVersions], before: int, gather: Gather, tally: ProblemCounts) -> None:
        """Natural pairs of a sample's images; there were so many images before them."""
        if not self.natural:
            return
        if len(good) == 1 and not self.changes.kinds:
            tally.add(ALONE, [good[0].name])
        for (one, first), (other, second) in combinations(enumerate(good, start=before), 2):
            name = f"{first.name} | {second.name}"
            if first.digest == second.digest:
                tally.add(SAME, [name])
            else:
                gather.pair(NATURAL, first.row, second.row, 2 / len(good), name, (one, other, first.place))


def _requests(found: Iterator[TarSample], lenders: int) -> Iterator[Request]:
    """The images of samples, each with some of the samples before it to borrow from."""
    before: deque[bytes] = deque(maxlen=lenders)
    for place, sample in enumerate(found):
        at_hand = tuple(before)
        for name, content in sample.images:
            yield Request(content, name, place, at_hand)
            if len(content) <= LENT_BYTES:
                before.append(content)
