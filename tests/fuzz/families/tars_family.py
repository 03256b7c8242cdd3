"""Shards of images: tars of every format, packed or not."""

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from fuzz.base import Family as Base
from fuzz.base import WrongError
from fuzz.mutate import damaged
from invariclip.calibrate.data.problems import ProblemCounts
from invariclip.calibrate.data.sources.webdataset import samples
from invariclip.preprocessing.decode import IMAGE_SUFFIXES

BLOCK = 512
PACKERS = {"tar": bytes, "gz": lambda raw: gzip.compress(raw, mtime=0), "bz2": bz2.compress, "xz": lzma.compress}
NUMBERS = (b"0" * 11 + b"\0", b"7" * 11 + b"\0", b"\x80" + b"\0" * 10 + b"\x10", b"\x80" + b"\xff" * 11, b"\xff" * 12,
           b"-0000000001\0", b"9" * 12, b" " * 12, b"0" * 12, b"00000000001 ", b"\xff" * 11 + b"\xfe")  # fmt: skip
PAX = ("size", "path", "linkpath", "mtime", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major", "uid",
"hdrcharset",
       "GNU.sparse.name", "GNU.sparse.realsize", "x" * 300)  # fmt: skip


class Family(Base):
    """See the module."""

    count = 6_000
    what = (
        "tars (ustar, GNU, pax) as they are and packed by gzip, bzip2 and xz: sizes, types, names and links in "
        "headers whose checksum is right, pax records with sizes that cannot be, sparse files, long names, "
        "members twice, "
        "tars joined or followed by anything, damaged bytes inside and outside the packing"
    )
    reference = "Python's tarfile with the whole file at hand: the same images in the same samples, byte for byte"
    memory = 1 << 30

    def open(self, folder):
        self.path = Path(folder) / "shard"
        rng = np.random.default_rng(0)
        self.image = _png(rng.integers(0, 255, (6, 5, 3), dtype=np.uint8))
        self.other = _png(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            for pack in PACKERS.values():
                self._read(pack(self._tar(self._members(), form)), whole=True)

    def _members(self):
        return [
            (name, content, {})
            for number in range(4)
            for name, content in (
                (f"{number:03d}.0.png", self.image), (f"{number:03d}.1.png", self.other), (f"{number:03d}.json", b"{}"),
            )
        ]  # fmt: skip

    def _tar(self, members, form):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
            for name, content, facts in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                for key, value in facts.items():
                    setattr(info, key, value)
                tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
        return stream.getvalue()

    def draw(self, rng):
        form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        packing = rng.choice(("tar", "tar", "tar", "gz", "bz2", "xz"))
        kind = rng.choice(("a header", "a header", "a header", "members", "pax", "bytes", "packed bytes", "joined"))
        members = self._members()
        if kind == "members":
            kind = _other_members(rng, members)
            if form == tarfile.USTAR_FORMAT:  # it has no long names
                form = tarfile.GNU_FORMAT
        elif kind == "pax":
            form = tarfile.PAX_FORMAT
            value = rng.choice(
                ("0", "-1", str(2**63), "9" * 30, "1e9", "", "x", "../a", "5", str(len(self.image)), "é")
            )
            place = rng.randrange(len(members))
            members[place] = (*members[place][:2], {"pax_headers": {rng.choice(PAX): value}})
        content = self._tar(members, form)
        if kind == "a header":
            kind, content = _other_header(rng, content)
        elif kind == "bytes":
            kind, content = damaged(rng, content)
        elif kind == "joined":
            content = rng.choice((content + content, content + b"x", content[: -10 * BLOCK], content + bytes(BLOCK * 3),
                                  content[:BLOCK] + content))  # fmt: skip
        packed = PACKERS[packing](content)
        if kind == "packed bytes":
            kind, packed = damaged(rng, packed)
            kind = f"packed: {kind}"
        return f"{packing}: {kind}", lambda: self._read(packed)

    def _read(self, content, whole=False):
        self.path.write_bytes(content)
        tally = ProblemCounts()
        read = [(name.partition("/")[2], held) for sample in samples(self.path, tally) for name, held in sample.images]
        wanted = _images(content)
        if whole and (read != wanted or tally.counts or not read):
            raise WrongError("an undamaged tar is not read whole")
        if not tally.counts and read != wanted:
            raise WrongError(f"{[name for name, _ in read]} in place of {[name for name, _ in wanted]}")
        left = iter(wanted)
        if not all(any(one == other for other in left) for one in read):
            raise WrongError("images that the tar does not hold, or in another order")


def _images(content):
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as tar:
        return [
            (member.name, tar.extractfile(member).read() if member.size < 1 << 31 else None)
            for member in tar
            if member.isreg() and not member.issparse()
            and PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES
        ]  # fmt: skip


def _other_members(rng, members):
    kind = rng.choice(("a link", "a name", "a name", "twice", "a type"))
    place = rng.randrange(len(members))
    name, content, _ = members[place]
    if kind == "a link":
        target = rng.choice((members[0][0], "/etc/hostname", "../x", "", "x" * 200))
        members[place] = (name, b"", {"type": rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)), "linkname": target})
    elif kind == "a name":
        new = rng.choice(("", ".", "..", "../000.0.png", "/abs.png", "a" * 300 + ".png", "é.png", "a/b/000.x.png",
        ".png",
                          "000.0.PNG", "000", "a\nb.png", "\udce9.png", "x/" * 90 + "000.0.png"))  # fmt: skip
        members[place] = (new, content, {})
    elif kind == "twice":
        members.append(members[place])
    else:
        types = (tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"Z", tarfile.CONTTYPE, b"\0", b"V", b"M")
        members[place] = (name, b"", {"type": rng.choice(types)})
    return kind


def _other_header(rng, content):
    """One field of one header is another, and its checksum is right again."""
    heads = [place for place in range(0, len(content), BLOCK) if content[place + 257 : place + 262] == b"ustar"]
    place = rng.choice(heads)
    head = bytearray(content[place : place + BLOCK])
    kind, start, size = rng.choice((("size", 124, 12), ("size", 124, 12), ("type", 156, 1), ("name", 0, 100),
                                    ("mtime", 136, 12), ("mode", 100, 8), ("magic", 257, 8), ("prefix", 345, 155),
                                    ("link", 157, 100), ("checksum", 148, 8)))  # fmt: skip
    if kind == "type":
        new = rng.choice((b"0", b"1", b"2", b"5", b"L", b"K", b"x", b"g", b"S", b"D", b"M", b"\0", b"7", b"X", b"Z"))
    elif size == 12:
        new = rng.choice((*NUMBERS, f"{rng.randrange(1 << 20):011o}\0".encode()))
    else:
        new = rng.choice((b"\0" * size, b"\xff" * size, b"a.png", rng.randbytes(size), b"../../x.png", b"000.0.png"))
    head[start : start + size] = new.ljust(size, b"\0")[:size]
    if kind != "checksum":
        head[148:156] = b" " * 8
        head[148:156] = f"{sum(head):06o}\0 ".encode()
    return f"a header's {kind}", content[:place] + bytes(head) + content[place + BLOCK :]


def _png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()
