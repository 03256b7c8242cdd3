"""Webdataset shards: tar files whose members `key.….jpg` belong to a sample by what stands before the first dot.

The images of a sample are natural pairs of each other; an image may also be paired with changed versions of itself.
Members are read in one pass, in bounded memory, and never written to disk; damaged files are refused.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import re
import tarfile
import zlib
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from invariclip.calibrate.data.encode import EmbeddedVersions, Request, encode_images
from invariclip.calibrate.data.pairs import seeded
from invariclip.calibrate.data.problems import SAME, ProblemCounts
from invariclip.calibrate.data.sources.images import require_something, take
from invariclip.calibrate.data.stream.blocks import (
    NATURAL,
    BlockBuilder,
    Shard,
    require_encoder,
    require_file,
    unchanged,
)
from invariclip.calibrate.data.versions import NO_CHANGES, Changes
from invariclip.errors import InputError
from invariclip.files import path_kind
from invariclip.preprocessing.decode import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.calibrate.data.stream.blocks import RowBlock

MAX_ARCHIVES = 100_000
MAX_MEMBER = 64 << 20
"""Bytes of an image at most."""
MAX_SAMPLE = 256 << 20
"""Bytes of a sample's images at most."""
MAX_IMAGES = 64
"""Images of a sample at most: they make 2,016 pairs."""
MAX_HEADER = 1 << 20
"""Bytes of an extended header, such as a long name, at most; and of all that stand before one member."""
MAX_MEMBERS = 10_000_000
"""Members of a tar at most: the keys of its samples are remembered."""
MAX_GLOBAL = 1000
"""Facts in a tar's global headers at most: every member takes a copy of them."""
MAX_EXPANSION = 1000
FREE_BYTES = 1 << 30
"""A compressed tar unpacks to `MAX_EXPANSION` times what was read of it at most, or to so many bytes."""
MAX_DICTIONARY = 256 << 20
"""Bytes that unpacking xz may hold at most: four times what `xz -9` needs."""

TOO_LARGE = f"images above {MAX_MEMBER >> 20} MB"
TOO_MUCH = f"samples of more than {MAX_IMAGES} images or {MAX_SAMPLE >> 20} MB"
NO_IMAGE = "samples without an image"
LINK = "links, devices and sparse files in a tar"
REPEATED = "samples whose key stood earlier in the tar"

_CHUNK = 1 << 16
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
            literal = not glob.has_magic(pattern) or path_kind(Path(pattern)) != ""
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


def shard_images(path: Path, left_out: dict[str, int]) -> Iterator[tuple[str, bytes]]:
    """The images of a tar's samples, name and content, in order; for `invariclip embed`.

    Args:
        path: The file.
        left_out: Counts what is no image of a sample, by kind, when the tar's end is reached.

    Raises:
        InputError: The file is damaged or no tar.
    """
    tally = ProblemCounts()
    for sample in samples(path, tally):
        yield from sample.images
    for reason, count in tally.counts.items():
        left_out[reason] = left_out.get(reason, 0) + count


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


class _Packed:
    """What bzip2 or xz packed, in one stream or several; rubbish behind them, which Python's readers skip, raises."""

    def __init__(self, raw: BinaryIO, new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._raw, self._new, self._decoder = raw, new, new()

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none only at the end."""
        content = b""
        while not content:
            packed = b""
            if self._decoder.eof:
                packed = self._decoder.unused_data.lstrip(b"\0") or self._raw.read(_CHUNK).lstrip(b"\0")
                if not packed:
                    return b""
                self._decoder = self._new()
            elif self._decoder.needs_input and not (packed := self._raw.read(_CHUNK)):
                raise EOFError("it ends early")
            content = self._decoder.decompress(packed, size)
        return content


def _unpacked(raw: BinaryIO) -> Any:
    """A tar's bytes, whatever packed them: something with `read`."""
    magic = raw.read(6)
    raw.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw)
    if magic.startswith(b"BZh"):
        return _Packed(raw, bz2.BZ2Decompressor)
    if magic.startswith((b"\xfd7zXZ", b"\x5d\x00\x00\x80")):
        return _Packed(raw, partial(lzma.LZMADecompressor, memlimit=MAX_DICTIONARY))
    return raw


class _Forward:
    """A tar's bytes as `tarfile` may read them: forward alone, and in bounds.

    Where they end early, `tarfile` would read on for ever, or take what is missing for the end of the tar.

    Attributes:
        allowed: How many bytes may be read before this is set again.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self.allowed = MAX_HEADER
        self._raw, self._stream, self._place = raw, _unpacked(raw), 0

    def tell(self) -> int:
        """How many bytes were read."""
        return self._place

    def seek(self, place: int) -> None:
        """Reads on up to a byte.

        Raises:
            ReadError: It was passed, or the bytes end before it.
        """
        if place < self._place:
            raise tarfile.ReadError(f"a header points back to byte {place:,}")
        while self._place < place:
            self._some(place - self._place)

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes.

        Raises:
            ReadError: The bytes end before, or are more than allowed.
        """
        self.allowed -= size
        if self.allowed < 0:
            raise tarfile.ReadError(f"more than {MAX_HEADER:,} bytes of headers for one member")
        content = bytearray()
        while len(content) < size:
            content += self._some(size - len(content))
        return bytes(content)

    def require_end(self) -> None:
        """Reads all that is left, which must be zeros.

        Raises:
            ReadError: It is not.
        """
        while rest := self._stream.read(_CHUNK):
            self._count(rest)
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is data after the end mark, as where tars were joined")

    def _some(self, size: int) -> bytes:
        part: bytes = self._stream.read(min(size, _CHUNK))
        if not part:
            raise tarfile.ReadError("it ends early")
        self._count(part)
        return part

    def _count(self, part: bytes) -> None:
        self._place += len(part)
        if self._place > FREE_BYTES and self._place > MAX_EXPANSION * self._raw.tell():
            raise tarfile.ReadError(f"it unpacks to more than {MAX_EXPANSION:,} times its size")


def _members(path: Path, tally: ProblemCounts) -> Iterator[tuple[str, bytes | None]]:
    """Names of members, with the content of those that are images."""
    place, last, count = 0, "", 0
    try:
        with path.open("rb") as raw:
            stream = _Forward(raw)
            tar = tarfile.open(fileobj=cast("BinaryIO", stream), mode="r:", tarinfo=_Checked)  # noqa: SIM115 - `raw` is closed
            while (member := _next(tar, stream)) is not None:
                place, last, count = member.offset, member.name, count + 1
                if count > MAX_MEMBERS:
                    raise tarfile.ReadError(f"more than {MAX_MEMBERS:,} members")
                yield member.name, _content(stream, member, tally)
                stream.seek(tar.offset)
                tar.members.clear()  # type: ignore[attr-defined] # a list of all that it has seen
            place = stream.tell()
            stream.require_end()
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, RecursionError) as error:
        after = f"after {last!r}" if last else "at its beginning"
        raise InputError(
            f"{path}: not a whole tar, damaged {after}, from byte {place:,} on ({error}); nothing of it is counted"
        ) from error


def _next(tar: tarfile.TarFile, stream: _Forward) -> tarfile.TarInfo | None:
    """The next member; None at the end mark."""
    stream.allowed = MAX_HEADER
    member = tar.next()
    if len(tar.pax_headers) > MAX_GLOBAL:
        raise tarfile.ReadError(f"more than {MAX_GLOBAL:,} facts in global headers")
    return member


def _content(stream: _Forward, member: tarfile.TarInfo, tally: ProblemCounts) -> bytes | None:
    if PurePosixPath(member.name).suffix.lower() not in IMAGE_SUFFIXES or member.isdir():
        return None
    if not member.isreg() or member.issparse():
        tally.add(LINK, [member.name])
        return None
    if member.size > MAX_MEMBER:
        tally.add(TOO_LARGE, [member.name])
        return None
    stream.seek(member.offset_data)
    stream.allowed = member.size
    return stream.read(member.size)


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
        with unchanged([(path, shard.spec["stamp"])]):
            yield from self._blocks(path, encoder, tally)

    def _blocks(self, path: Path, encoder: Encoder, tally: ProblemCounts) -> Iterator[RowBlock]:
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
