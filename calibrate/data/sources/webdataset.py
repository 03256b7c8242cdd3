"""Webdataset shards: tar files whose members `key.….jpg` belong to a sample by what stands before the first dot.

The images of a sample are natural pairs of each other; an image may also be paired with changed versions of itself.
Members are read in one pass, in bounded memory, and never written to disk; damaged files are refused.
"""

from __future__ import annotations

import glob
import lzma
import re
import tarfile
import zlib
from collections import deque
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from invariclip.calibrate.data.encode import EmbeddedVersions, Request, encode_images
from invariclip.calibrate.data.pairs import seeded
from invariclip.calibrate.data.problems import SAME
from invariclip.calibrate.data.sources.images import require_something, take
from invariclip.calibrate.data.stream.blocks import (
    NATURAL,
    BlockBuilder,
    Shard,
    require_encoder,
    require_file,
    require_unchanged,
)
from invariclip.calibrate.data.versions import NO_CHANGES, Changes
from invariclip.errors import InputError
from invariclip.preprocessing.decode import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.calibrate.data.problems import ProblemCounts
    from invariclip.calibrate.data.stream.blocks import RowBlock

MAX_ARCHIVES = 100_000
MAX_MEMBER = 64 << 20
"""Bytes of an image at most."""
MAX_SAMPLE = 256 << 20
"""Bytes of a sample's images at most."""
MAX_IMAGES = 64
"""Images of a sample at most: they make 2,016 pairs."""
MAX_HEADER = 1 << 20
"""Bytes of an extended header, such as a long name, at most."""

TOO_LARGE = f"images above {MAX_MEMBER >> 20} MB"
TOO_MUCH = f"samples of more than {MAX_IMAGES} images or {MAX_SAMPLE >> 20} MB"
NO_IMAGE = "samples without an image"
LINK = "links and devices in a tar"
REPEATED = "samples whose key stood earlier in the tar"

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_KEYED = re.compile(r"((?:.*/)?[^./][^./]*)\.[^/]*", re.DOTALL)
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
ALONE = "samples with one usable image: no natural pair"
LENDERS = 16
"""Images of earlier samples that are held for interventions that need a second image."""
LENT_BYTES = 4 << 20
"""Bytes of such an image at most."""


@dataclass
class TarSample:
    """What belongs together in a tar.

    Attributes:
        key: The members' names up to the first dot.
        images: Their names and contents.
    """

    key: str
    images: list[tuple[str, bytes]] = field(default_factory=list)


def archives(patterns: Sequence[str]) -> list[Path]:
    """The files that patterns name: `*`, `?`, `[…]`, `**`, `{000..099}` and `{a,b}`; each once.

    Raises:
        InputError: A pattern matches nothing, names an address, or is too many files.
    """
    files: dict[Path, None] = {}
    for name in patterns:
        if "://" in name or name.startswith("pipe:"):
            raise InputError(f"{name}: only files are read; fetch it first, or mount it")
        for pattern in _expanded(name):
            literal = Path(pattern).exists() or not glob.has_magic(pattern)
            matches = [pattern] if literal else sorted(glob.glob(pattern, recursive=True))
            if not matches:
                raise InputError(f"{pattern}: matches no file")
            files.update(dict.fromkeys(map(Path, matches)))
    return list(files)


def samples(path: Path, tally: ProblemCounts) -> Iterator[TarSample]:
    """The samples of a tar, compressed or not, with their images; other members are passed over.

    Members of one sample follow each other, as in every webdataset shard.

    Args:
        path: The file.
        tally: Counts images and samples that are too large, and samples without images.

    Raises:
        InputError: The file is damaged or no tar; what was given before does not count then.
    """
    sample: TarSample | None = None
    done: set[str] = set()
    held = count = 0
    for member, content in _members(path, tally):
        match = _KEYED.fullmatch(member)
        if match is None:
            continue
        if sample is None or match[1] != sample.key:
            if sample is not None and _accepted(sample, done, count, held, tally):
                yield sample
            sample, held, count = TarSample(match[1]), 0, 0
        if content is not None:
            held, count = held + len(content), count + 1
            if count <= MAX_IMAGES and held <= MAX_SAMPLE:
                sample.images.append((f"{path.name}/{member}", content))
            else:
                sample.images.clear()
    if sample is not None and _accepted(sample, done, count, held, tally):
        yield sample


class _Checked(tarfile.TarInfo):
    """Headers, of which `tarfile` takes a damaged one for the end of the file, and reads any length."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Checked:
        """See `tarfile.TarInfo.frombuf`.

        Raises:
            ReadError: The header is damaged or missing, or announces more than `MAX_HEADER` of further headers.
        """
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the blocks of zeros that end every whole tar
                raise
            raise tarfile.ReadError(str(error)) from error
        if info.size < 0 or (info.type in _EXTENDED and info.size > MAX_HEADER):
            raise tarfile.ReadError(f"a header announces {info.size} bytes")
        return info


def _members(path: Path, tally: ProblemCounts) -> Iterator[tuple[str, bytes | None]]:
    """Names of members, with the content of those that are images."""
    place, last = 0, ""
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Checked) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined] # a list of all that it has seen
                place, last = member.offset, member.name
                yield member.name, _content(tar, member, tally)
            place = tar.offset
            while rest := tar.fileobj.read(1 << 16) if tar.fileobj else b"":
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("there is data after the end mark, as where tars were joined")
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        after = f"after {last!r}" if last else "at its beginning"
        raise InputError(
            f"{path}: not a whole tar, damaged {after}, from byte {place:,} on ({error}); nothing of it is counted"
        ) from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, tally: ProblemCounts) -> bytes | None:
    if PurePosixPath(member.name).suffix.lower() not in IMAGE_SUFFIXES or member.isdir():
        return None
    stream = tar.extractfile(member) if member.isreg() else None
    if stream is None:
        tally.add(LINK, [member.name])
        return None
    if member.size > MAX_MEMBER:
        tally.add(TOO_LARGE, [member.name])
        return None
    content = stream.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut off")
    return content


def _accepted(sample: TarSample, done: set[str], count: int, held: int, tally: ProblemCounts) -> bool:
    """Whether a sample counts; where it does not, that is counted."""
    reason = ""
    if sample.key in done:
        reason = REPEATED
    elif not count:
        reason = NO_IMAGE
    elif count > MAX_IMAGES or held > MAX_SAMPLE:
        reason = TOO_MUCH
    done.add(sample.key)
    if reason:
        tally.add(reason, [sample.key])
    return not reason


def _expanded(pattern: str) -> list[str]:
    """A pattern with its braces replaced; numbers keep the width they are written in."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    if match[3] is not None:
        parts = match[3].split(",")
    else:
        low, high, width = int(match[1]), int(match[2]), max(len(match[1]), len(match[2]))
        if not 0 <= high - low < MAX_ARCHIVES:
            raise InputError(f"{pattern}: {match[0]} must go up, by less than {MAX_ARCHIVES:,}")
        parts = [f"{number:0{width}d}" if match[1][0] == "0" else str(number) for number in range(low, high + 1)]
    names: list[str] = []
    for part in parts:
        names += _expanded(f"{before}{part}{after}")
        if len(names) > MAX_ARCHIVES:
            raise InputError(f"{pattern}: names more than {MAX_ARCHIVES:,} files")
    return names


@dataclass(frozen=True)
class WebDataset:
    """Tar files of samples.

    Attributes:
        name: See `PairSource`.
        paths: Files, with `*`, `?`, `[…]` and brace ranges such as `{000..099}`.
        weight: See `PairSource`.
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
    needs_encoder = True

    def shards(self) -> list[Shard]:
        """One for every tar file, in the order of the paths.

        Raises:
            InputError: A file is missing, a pattern matches none, or there is nothing to take.
        """
        require_something(self.name, self.natural, self.changes, self.points)
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
        """The images of a tar file, sample by sample (see `PairSource`).

        A sample of k usable images weighs k - 1, shared evenly by its k(k-1)/2 pairs, as a concept in k
        environments does (see `pairs.natural_pairs`).

        Raises:
            InputError: There is no encoder, or the file is damaged, or has changed since it was listed.
        """
        encoder = require_encoder(self.name, encoder)
        path = Path(shard.spec["path"])
        require_unchanged(path, shard.spec["stamp"])
        blocks, good, done = BlockBuilder(), list[EmbeddedVersions](), 0
        requests = _requests(samples(path, tally), LENDERS if self.changes.needs_donor else 0)
        for image in encode_images(encoder, requests, tally, changes=self.changes, donor=self._donor):
            if good and image.place != good[0].place:
                self._pair_up(good, done, blocks, tally)
                good, done = [], done + len(good)
            if take(image, blocks, tally, points=self.points):
                good.append(image)
            yield from blocks.full()
        self._pair_up(good, done, blocks, tally)
        yield from blocks.rest()

    def _donor(self, request: Request, digest: str, label: str) -> bytes | None:
        """One of the images at hand, never one of the same sample."""
        if not request.lenders:
            return None
        return request.lenders[seeded("donor", digest, label, self.changes.seed).integers(len(request.lenders))]

    def _pair_up(
        self, good: Sequence[EmbeddedVersions], before: int, blocks: BlockBuilder, tally: ProblemCounts
    ) -> None:
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
                blocks.pair(NATURAL, first.row, second.row, 2 / len(good), name, (one, other, first.place))


def _requests(tar_samples: Iterator[TarSample], lenders: int) -> Iterator[Request]:
    """The images of samples, each with some of the samples before it to borrow from."""
    before: deque[bytes] = deque(maxlen=lenders)
    for place, sample in enumerate(tar_samples):
        at_hand = tuple(before)
        for name, content in sample.images:
            yield Request(content, name, place, at_hand)
            if len(content) <= LENT_BYTES:
                before.append(content)
