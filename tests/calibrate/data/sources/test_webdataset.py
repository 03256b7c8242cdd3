"""Tar files of samples: what is in them, and what is wrong with them."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.calibrate.data import problems as reasons
from invariclip.calibrate.data.encode import DECLINED
from invariclip.calibrate.data.pairs import EmbeddingTable, fitted_moments
from invariclip.calibrate.data.sources import webdataset as archive
from invariclip.calibrate.data.sources.webdataset import (
    ALONE,
    LINK,
    NO_IMAGE,
    REPEATED,
    TOO_LARGE,
    TOO_MUCH,
    WebDataset,
    archives,
    samples,
)
from invariclip.calibrate.data.stream.collect import collect
from invariclip.calibrate.data.versions import Changes
from invariclip.errors import InputError


def image(seed):
    stream = io.BytesIO()
    array = np.random.default_rng(seed).integers(0, 256, (18, 18, 3), dtype=np.uint8)
    Image.fromarray(array).save(stream, "png")
    return stream.getvalue()


def write(path, members, mode="w"):
    """Members as (name, content); a content of None makes a link."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return path


def groups(count=4, each=2):
    return [(f"{key:03d}.{index}.png", image([key, index])) for key in range(count) for index in range(each)]


def of(path, **given):
    return WebDataset("w", (str(path),), **given)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_the_images_of_a_sample_are_natural_pairs(reading, tmp_path, mode):
    members = [*groups(3, each=3), ("003.txt", b"no image"), ("readme", b"without a dot")]
    encoder = reading.Rowwise()
    read = reading.read_all(of(write(tmp_path / "a.tar", members, mode)), encoder)
    raw = np.stack([reading.pixels_of(content) for _, content in members[:9]])
    vectors = encoder.encode_images(raw).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    codes, names = np.repeat(np.arange(3), 3), ("0", "1", "2")
    table = EmbeddingTable(
        vectors, codes, codes, np.tile(np.arange(3), 3), np.full(9, -1), np.arange(9), names, names, names
    )
    reading.assert_same(read.moments, fitted_moments(table))
    state = collect([of(tmp_path / "a.tar")], encoder)
    assert state.combined().effective_pairs == pytest.approx(3 * 2) == fitted_moments(table).effective_pairs
    assert read.tally.to_json() == {NO_IMAGE: {"count": 1, "examples": ["003"]}}


def test_one_image_gets_interventions(reading, tmp_path):
    path = write(tmp_path / "a.tar", groups(5, each=1))
    read = reading.read_all(of(path, changes=Changes(("invert", "posterize"), draws=2)), reading.Rowwise())
    assert (read.points.points, read.parts["interventions"].pairs) == (5, 10)
    assert read.parts["interventions"].pair_weight == pytest.approx(5)
    assert not read.tally.counts
    alone = reading.read_all(of(path), reading.Rowwise())
    assert alone.tally.counts == {ALONE: 5}
    assert not alone.parts


def test_donors_come_from_earlier_samples(reading, tmp_path):
    path = write(tmp_path / "a.tar", groups(5, each=1))
    source = of(path, changes=Changes(("style-exchange",), draws=1))
    read = reading.read_all(source, reading.Rowwise())
    assert read.parts["interventions"].pairs == 4
    assert read.tally.counts == {DECLINED: 1}  # the first has nothing to borrow from
    reading.assert_same(reading.read_all(source, reading.Rowwise()).moments, read.moments)


def test_names_and_folders(tmp_path):
    names = ["x/a.first.jpg", "x/a.second.JPG", "y.z/a.jpg", "./b.jpg", "b.jpg"]
    members = [(name, name.encode()) for name in names]
    found = list(samples(write(tmp_path / "a.tar", members), reasons.ProblemCounts()))
    assert [(sample.key, len(sample.images)) for sample in found] == [("x/a", 2), ("y.z/a", 1), ("./b", 1), ("b", 1)]
    assert found[0].images[0] == ("a.tar/x/a.first.jpg", b"x/a.first.jpg")


def test_patterns(tmp_path):
    for number in (8, 9, 10):
        write(tmp_path / f"s-{number:03d}.tar", groups(1))
    given = [f"{tmp_path}/s-{{008..010}}.tar", f"{tmp_path}/*.tar", f"{tmp_path}/s-{{008,010}}.tar"]
    expected = [tmp_path / f"s-{number}.tar" for number in ("008", "009", "010")]
    assert archives(given[:1]) == archives(given[1:2]) == archives(given) == expected
    assert [shard.name for shard in WebDataset("w", tuple(given)).shards()] == list(map(str, expected))
    for wrong, said in [
        (f"{tmp_path}/*.zip", "matches no file"),
        ("http://host/a.tar", "only files are read"),
        ("pipe:cat a.tar", "only files are read"),
        ("s-{9..1}.tar", "must go up"),
        ("s-{0..999999999}.tar", "must go up, by less than"),
        ("{0..9999}{0..9999}.tar", "names more than"),
    ]:
        with pytest.raises(InputError, match=said):
            archives([wrong])
    with pytest.raises(InputError, match="no such file"):
        of(tmp_path / "s-{011..012}.tar").shards()


def test_what_cannot_be_used_is_named(reading, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBER", 5000)
    monkeypatch.setattr(archive, "MAX_IMAGES", 3)
    same = image(1)
    members = [
        ("big.0.png", b"x" * 5001),
        ("big.1.png", image(2)),
        ("many.0.png", same), ("many.1.png", same), ("many.2.png", same), ("many.3.png", same),
        ("twin.0.png", same), ("twin.1.png", same),
        ("bad.0.png", b"no image"), ("bad.1.png", image(3)),
        ("link.0.png", None), ("link.1.png", image(4)),
        *groups(1),
        ("twin.2.png", image(5)),
    ]  # fmt: skip
    read = reading.read_all(of(write(tmp_path / "a.tar", members)), reading.Rowwise())
    found = {reason: told["examples"] for reason, told in read.tally.to_json().items()}
    assert found == {
        TOO_LARGE: ["big.0.png"],
        TOO_MUCH: ["many"],
        reasons.SAME: ["a.tar/twin.0.png | a.tar/twin.1.png"],
        reasons.UNREADABLE: ["a.tar/bad.0.png"],
        LINK: ["link.0.png"],
        REPEATED: ["twin"],
        ALONE: ["a.tar/big.1.png", "a.tar/bad.1.png", "a.tar/link.1.png"],
    }
    assert read.parts["natural"].pairs == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tar") / "whole.tar", groups(4))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_tar_that_is_cut_anywhere_is_refused(whole, data):
    content = whole.read_bytes()
    end = len(content.rstrip(b"\0"))
    cut = whole.with_name("cut.tar")
    cut.write_bytes(content[: data.draw(st.integers(0, end))])
    with pytest.raises(InputError, match=r"cut\.tar: not a whole tar"):
        list(samples(cut, reasons.ProblemCounts()))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_refused(whole, data):
    content = bytearray(whole.read_bytes())
    with tarfile.open(whole) as tar:
        member = data.draw(st.sampled_from(tar.getmembers()))
    content[member.offset + data.draw(st.integers(0, 147))] ^= data.draw(st.integers(1, 255))
    broken = whole.with_name("broken.tar")
    broken.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.tar: not a whole tar"):
        list(samples(broken, reasons.ProblemCounts()))


def test_other_damage(tmp_path, whole):
    content = whole.read_bytes()
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    for name, damaged, said in [
        ("joined", content + content, "data after the end mark"),
        ("text", b"no tar at all" * 100, "damaged at its beginning"),
        ("header", header.tobuf(tarfile.USTAR_FORMAT) + content, "a header announces 1073741824 bytes"),
        ("gz", gzip.compress(content)[:-500], "not a whole tar"),
        ("empty", b"", "not a whole tar"),
    ]:
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=said):
            list(samples(tmp_path / name, reasons.ProblemCounts()))


def test_a_damaged_shard_raises_when_it_is_read(reading, tmp_path, whole):
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[:4000])
    source = of(path)
    (shard,) = source.shards()
    with pytest.raises(InputError, match="nothing of it is counted"):
        list(source.read(shard, reading.Rowwise(), reasons.ProblemCounts()))
    path.write_bytes(whole.read_bytes())
    assert source.shards()[0].digest != shard.digest
    with pytest.raises(InputError, match="has changed since"):
        list(source.read(shard, reading.Rowwise(), reasons.ProblemCounts()))


def pax(name, content=b"x" * 100, **headers):
    """A tar of one member, with what its extended header says."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size, info.pax_headers = len(content), headers
        tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def header(kind, content):
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def fact(name, value="1"):
    """One record of an extended header."""
    length = next(n for n in range(1000) if n == len(f"{n} {name}={value}\n"))
    return f"{length} {name}={value}\n".encode()


@pytest.mark.parametrize("packed", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(pax("a.0.png", size="99999999999999"), "it ends early", id="size"),
        pytest.param(pax("a.0.txt", size="99999999999999"), "it ends early", id="size of no image"),
        pytest.param(pax("a.0.txt", size="-99999"), "points back|negative|announces", id="negative size"),
        pytest.param(header(tarfile.XHDTYPE, fact("a")) * 1500 + pax("a.0.png"), "bytes of headers|recursion",
                     id="chain"),
        pytest.param(header(tarfile.XGLTYPE, b"".join(fact(f"k{n}") for n in range(2000))) + pax("a.0.png"),
                     "facts in global headers", id="global"),
        pytest.param(pax("a.0.png", b"99999\n0\n" * 64, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
                     "", id="sparse map without an end"),
    ],
)  # fmt: skip
def test_headers_that_cannot_be_end_soon(tmp_path, packed, content, said):
    path = tmp_path / "a.tar"
    path.write_bytes(packed(content))
    start = time.monotonic()
    with pytest.raises(InputError, match=rf"(?s)a\.tar: not a whole tar, .*({said})"):
        list(samples(path, reasons.ProblemCounts()))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("packed", [gzip.compress, bz2.compress, lzma.compress])
def test_what_follows_a_packed_tar_is_refused(tmp_path, whole, packed):
    path, content = tmp_path / "a.tar", whole.read_bytes()
    half = len(content) // 2
    for good in (
        packed(content),
        packed(content[:half]) + packed(content[half:]),  # one tar in two streams, as parallel packers write
        packed(content) + b"\0" * 512,
    ):
        path.write_bytes(good)
        assert len(list(samples(path, reasons.ProblemCounts()))) == 4
    for damaged in (packed(content) * 2, packed(content) + b"rubbish" * 99, packed(content)[:-20]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.tar: not a whole tar"):
            list(samples(path, reasons.ProblemCounts()))


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "FREE_BYTES", 1 << 20)
    content = pax("a.0.txt", bytes(64 << 20))
    for packed in (bz2.compress, lzma.compress):
        (tmp_path / "a.tar").write_bytes(packed(content))
        with pytest.raises(InputError, match="unpacks to more than"):
            list(samples(tmp_path / "a.tar", reasons.ProblemCounts()))
    monkeypatch.setattr(archive, "MAX_DICTIONARY", 1 << 20)
    with pytest.raises(InputError, match="not a whole tar"):
        list(samples(tmp_path / "a.tar", reasons.ProblemCounts()))


def test_members_are_bounded(whole, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 5)
    with pytest.raises(InputError, match="more than 5 members"):
        list(samples(whole, reasons.ProblemCounts()))


def test_sparse_members_are_counted_and_passed_over(tmp_path):
    sparse = pax("a.0.png", **{"GNU.sparse.map": "0,100", "GNU.sparse.size": "100000", "GNU.sparse.numblocks": "1"})
    (tmp_path / "a.tar").write_bytes(
        sparse[: -len(sparse) % 512 or None].rstrip(b"\0").ljust(2048, b"\0") + pax("b.0.png")
    )
    tally = reasons.ProblemCounts()
    assert [sample.key for sample in samples(tmp_path / "a.tar", tally)] == ["b"]
    assert tally.to_json()[LINK] == {"count": 1, "examples": ["a.0.png"]}


@pytest.mark.parametrize("how", ["written over", "replaced", "cut"])
def test_a_tar_that_is_changed_while_it_is_read_is_refused(reading, tmp_path, how):
    path = write(tmp_path / "a.tar", groups(60))
    source, content = of(path), path.read_bytes()
    (shard,) = source.shards()

    class Changing(reading.Rowwise):
        def encode_images(self, batch):
            facts = path.stat()
            if how == "written over":
                with path.open("r+b") as stream:
                    stream.seek(-4096, 2)
                    stream.write(b"\0")
            elif how == "cut":
                os.truncate(path, len(content) - 512)
            else:
                (tmp_path / "b.tar").write_bytes(content)
                os.utime(tmp_path / "b.tar", ns=(facts.st_atime_ns, facts.st_mtime_ns))
                (tmp_path / "b.tar").replace(path)
            return super().encode_images(batch)

    with pytest.raises(InputError, match=r"a\.tar: (has changed while|was replaced while|not a whole tar)"):
        list(source.read(shard, Changing(), reasons.ProblemCounts()))
