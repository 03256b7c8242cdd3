"""Images embedded into a parquet file: the rows that the model gives, resumed to the same bytes, read by others."""

import io
import json
import sys
import tarfile
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import invariclip
from invariclip import embedding
from invariclip.artifact import embeddings_table
from invariclip.artifact.embeddings import read_embeddings, write_embeddings
from invariclip.artifact.embeddings_table import (
    EMBEDDINGS_TABLE,
    EmbeddingRows,
    TableFacts,
    read_table,
    table_bytes,
)
from invariclip.console import UnreadableImages
from invariclip.embedding import embed_files
from invariclip.errors import InputError, MissingExtraError
from invariclip.preprocessing.find import find_images
from invariclip.records import seal_footer
from invariclip.sites.live_site import SiteWindow
from invariclip.sites.measuring import open_live_site
from invariclip.version import __version__

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install invariclip[parquet]")


@pytest.fixture(scope="module")
def model(tiny_artifact):
    return invariclip.load(tiny_artifact)


@pytest.fixture
def images(tiny_images, tmp_path):
    """Twelve images, and two files that are none: in the middle of a part, and a whole part's worth later on."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in find_images([tiny_images]):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "01b.png").write_bytes(b"no image")
    (folder / "08b.jpg").write_bytes(b"nor this")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(embedding, "PART_IMAGES", 4)
    monkeypatch.setattr(embedding, "GROUP_ROWS", 6)


class _StoppedError(BaseException):
    """In place of a kill: nothing cleans up after it."""


def written(model, images, out, **how):
    return embed_files(model, images, out, batch_size=2, unreadable=how.pop("unreadable", UnreadableImages()), **how)


def test_pyarrow_reads_the_rows_that_the_model_gives(run, tiny_artifact, model, images, tmp_path):
    out = tmp_path / "vectors.parquet"
    code, said, err = run("embed", tiny_artifact, images, "-o", out, "--quiet", "--batch-size", "2")
    assert code == 2  # two could not be read
    assert ("01b.png" in err, "08b.jpg" in err) == (True, True)
    assert f"12 embeddings of width 8 in {out} (space {model.space_id})" in said
    table = parquet.read_table(out)
    assert table.column_names == ["id", "path", "embedding"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[8]"
    everything = find_images([images])
    readable = [path for path in everything if "b." not in path.name]
    assert table["path"].to_pylist() == [str(path) for path in readable]
    assert table["id"].to_pylist() == [everything.index(path) for path in readable]
    vectors = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    np.testing.assert_allclose(vectors, model.embed_images(readable), rtol=0, atol=1e-6)
    facts = json.loads(parquet.ParquetFile(out).metadata.metadata[b"invariclip.embeddings"])
    known = {
        "space_id": model.space_id, "site_sha256": "", "dimensions": 8, "dtype": "float32", "kind": "images",
        "model": model.manifest.model.name, "invariclip": __version__, "count": 12, "unreadable_count": 2,
    }  # fmt: skip
    assert known.items() <= facts.items()
    assert [one["image"] for one in facts["unreadable"]] == [str(images / "01b.png"), str(images / "08b.jpg")]
    assert not list(tmp_path.glob("*.unfinished"))
    assert parquet.ParquetFile(out).metadata.num_row_groups == 2


def test_the_library_reads_it_as_it_reads_safetensors(run, tiny_artifact, model, tiny_images, tmp_path):
    for name in ("i.parquet", "i.safetensors"):
        assert run("embed", tiny_artifact, tiny_images, "-o", tmp_path / name, "--quiet", "--batch-size", 4)[0] == 0
    one, other = read_embeddings(tmp_path / "i.parquet"), read_embeddings(tmp_path / "i.safetensors")
    np.testing.assert_array_equal(one.vectors, other.vectors)
    assert replace(one, vectors=None) == replace(other, vectors=None)
    texts = ["a cat", "süß \U0001f408"]
    run("embed", tiny_artifact, "--text", texts[0], "--text", texts[1], "-o", tmp_path / "t.parquet")
    read = read_embeddings(tmp_path / "t.parquet")
    assert read.items == tuple(texts)
    np.testing.assert_allclose(read.vectors, model.embed_texts(texts), rtol=0, atol=1e-6)
    assert one.similarity(read).shape == (12, 2)
    with pytest.raises(InputError, match="cannot be compared"):
        one.similarity(replace(read, space_id="another"))
    with pytest.raises(InputError, match="this writes safetensors"):
        write_embeddings(tmp_path / "x.parquet", one)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_stopped_run_is_resumed_to_the_same_bytes(model, images, tmp_path, monkeypatch, after):
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    facts = written(model, [images], whole)
    made, real = [], embedding.write_atomically

    def write(path, content):
        if len(made) == after and out.exists() is False and stopping:
            raise _StoppedError
        made.append(path)
        real(path, content)

    monkeypatch.setattr(embedding, "write_atomically", write)
    stopping = True
    with pytest.raises(_StoppedError):
        written(model, [images], out)
    assert not out.exists()
    stopping = False
    told = UnreadableImages()
    assert written(model, [images], out, unreadable=told) == facts
    assert len(made) == 4  # of the parts that were there none was made again
    assert out.read_bytes() == whole.read_bytes()
    assert told.count == 2  # those of the first run too
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_stop_while_the_parts_are_joined_loses_nothing(model, images, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    written(model, [images], whole)
    out.write_bytes(b"what stood there")
    real = embedding.TableWriter.close

    def close(writer, facts):
        if facts.count == 12:
            raise _StoppedError
        real(writer, facts)

    with monkeypatch.context() as stopped:
        stopped.setattr(embedding.TableWriter, "close", close)
        with pytest.raises(_StoppedError):
            written(model, [images], out)
    assert out.read_bytes() == b"what stood there"
    monkeypatch.setattr(model.__class__, "stream", None)  # nothing is embedded again
    written(model, [images], out)
    assert out.read_bytes() == whole.read_bytes()


def test_parts_that_are_damaged_or_of_other_images_are_made_again(model, images, tmp_path, monkeypatch, capsys):
    out, stops = tmp_path / "out.parquet", pytest.MonkeyPatch()
    stops.setattr(embedding._Work, "join", lambda *_: (_ for _ in ()).throw(_StoppedError))
    with pytest.raises(_StoppedError):
        written(model, [images], out)
    stops.undo()
    parts = sorted((tmp_path / "out.parquet.unfinished").glob("part-*.parquet"))
    content = bytearray(parts[0].read_bytes())
    content[40] ^= 1
    parts[0].write_bytes(content)
    (images / "11.png").write_bytes((images / "02.png").read_bytes())
    made, real = [], embedding.write_atomically
    monkeypatch.setattr(embedding, "write_atomically", lambda path, content: (made.append(path), real(path, content)))
    capsys.readouterr()
    written(model, [images], out)
    assert "is damaged" in capsys.readouterr().err
    assert [path.name[:12] for path in made] == ["part-0000000", "part-0000003"]
    read = read_embeddings(out)
    np.testing.assert_allclose(read.vectors[11], read.vectors[2], rtol=0, atol=1e-5)
    written(model, [images], tmp_path / "afresh.parquet")
    assert (tmp_path / "afresh.parquet").read_bytes() == out.read_bytes()


def test_two_runs_do_not_write_one_file(model, images, tmp_path):
    out = tmp_path / "out.parquet"
    with embedding._parts_folder(out), pytest.raises(InputError, match="another process is writing it"):
        written(model, [images], out)
    written(model, [images], out)


def shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_shards_among_files(run, tiny_artifact, model, images, tmp_path):
    paths = [path for path in find_images([images]) if "b." not in path.name]
    contents = {f"{number:03}.png": path.read_bytes() for number, path in enumerate(paths)}
    contents |= {"012.jpg": b"no image", "013.txt": b"a sample without an image"}
    tar, out = shard(tmp_path / "s.tar", contents), tmp_path / "out.parquet"
    code, _, err = run("embed", tiny_artifact, paths[3], tar, paths[4], paths[5], "-o", out, "--quiet")
    assert code == 2
    assert f"{tmp_path}/s.tar/012.jpg: " in err
    assert "1 left out of the shards: samples without an image" in err
    read = read_table(out)
    assert read.items == (
        str(paths[3]), *(f"{tmp_path}/s.tar/{number:03}.png" for number in range(12)), str(paths[4]), str(paths[5])
    )  # fmt: skip
    assert read.ids.tolist() == [*range(13), 14, 15]
    wanted = model.embed_images([paths[3], *paths, paths[4], paths[5]])
    np.testing.assert_allclose(read.vectors, wanted, rtol=0, atol=1e-6)
    assert read.facts.left_out == {"samples without an image": 1}

    code, _, err = run("embed", tiny_artifact, tar, "-o", tmp_path / "x.safetensors")
    assert (code, "name the output NAME.parquet" in err) == (2, True)


def test_a_damaged_shard_writes_nothing_and_keeps_what_was_done(model, images, tmp_path):
    contents = {path.name: path.read_bytes() for path in find_images([images]) if "b." not in path.name}
    tar, out = shard(tmp_path / "s.tar", contents), tmp_path / "out.parquet"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"s\.tar: not a whole tar"):
        written(model, [images, tar], out)
    assert not out.exists()
    assert list((tmp_path / "out.parquet.unfinished").glob("part-*.parquet"))
    tar.write_bytes(whole)
    assert written(model, [images, tar], out).count == 24


def test_nothing_readable_and_no_place_to_write(run, tiny_artifact, model, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    code, _, err = run("embed", tiny_artifact, bad, "-o", tmp_path / "out.parquet", "--quiet")
    assert (code, "no image could be read; nothing was written" in err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png"]
    code, _, err = run("embed", tiny_artifact, bad, "-o", "/proc/nowhere/x.parquet", "--quiet")
    assert (code, "cannot be written" in err, "Traceback" in err) == (2, True, False)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        written(model, [bad], tmp_path / "folder.parquet")


ROWS = EmbeddingRows(
    TableFacts("images", "float32", 4, 5, "space", "", "model", "float32", "onnxruntime"),
    np.arange(5),
    tuple(f"{number}.png" for number in range(5)),
    np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32),
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_changed_or_cut_file_is_refused(tmp_path_factory, data):
    content = bytearray(table_bytes(ROWS))
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flipped") / "e.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_table(path)
    with pytest.raises(InputError):
        read_embeddings(path)


def resealed(tmp_path, facts, table=None, **how):
    """A file that anybody can write: a digest detects corruption, not tampering."""
    import pyarrow

    stream = io.BytesIO()
    table = pyarrow.table({"id": [0], "path": ["a"], "embedding": [[0.0]]}) if table is None else table
    writer = parquet.ParquetWriter(stream, table.schema, **{"compression": "none", "use_dictionary": False, **how})
    writer.write_table(table)
    writer.add_key_value_metadata({EMBEDDINGS_TABLE.key: EMBEDDINGS_TABLE.text(facts)})
    writer.close()
    seal_footer(stream, embeddings_table._footer_start(stream), EMBEDDINGS_TABLE.key)
    path = tmp_path / "crafted.parquet"
    path.write_bytes(stream.getvalue())
    return path


@pytest.mark.parametrize(
    ("changed", "how", "said"),
    [
        ({"count": 1 << 40}, {}, "its facts say"),
        ({"count": 1, "dimensions": 1 << 40}, {}, "its facts say"),
        ({"count": 1, "dimensions": -1}, {}, "its facts say"),
        ({"count": 1, "dimensions": 7}, {}, "its columns are|its vectors are not"),
        ({"count": 1, "dimensions": 1}, {"compression": "gzip"}, "its column id is compressed"),
        ({"count": 1, "dimensions": 1}, {"use_dictionary": ["path"]}, "its column path is compressed"),
        ({"count": 1, "dimensions": 1, "dtype": "float8"}, {}, "available: float32, int8, binary"),
        ({"count": 1, "dimensions": 1, "more": 3}, {}, "not known: more"),
    ],
)
def test_a_file_that_promises_what_it_does_not_hold_is_refused(tmp_path, changed, how, said):
    with pytest.raises(InputError, match=said):
        read_table(resealed(tmp_path, asdict(ROWS.facts) | changed, **how))


def test_the_smallest_file_of_another_hand_is_read(tmp_path):
    import pyarrow

    rows = pyarrow.table(
        {"id": [7], "path": ["a"], "embedding": pyarrow.array([[1.0]], pyarrow.list_(pyarrow.float32(), 1))}
    )
    read = read_table(resealed(tmp_path, asdict(ROWS.facts) | {"count": 1, "dimensions": 1}, rows))
    assert (read.ids.tolist(), read.items, read.vectors.tolist()) == ([7], ("a",), [[1.0]])


def test_other_parquet_files_are_named(tmp_path):
    import pyarrow

    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="carries no digest of itself"):
        read_embeddings(tmp_path / "other.parquet")


def test_without_pyarrow_nothing_is_begun(model, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(model.__class__, "stream", None)
    out = tmp_path / "out.parquet"
    with pytest.raises(
        MissingExtraError, match=r'out\.parquet: parquet needs pyarrow: pip install "invariclip\[parquet\]"'
    ):
        written(model, [images], out)
    assert not list(tmp_path.glob("out*"))


def test_a_live_site_is_refused(model, images, tmp_path):
    live = open_live_site(model, "yard", window=SiteWindow(floor=2, step=2, block=2, blocks=8))
    with pytest.raises(InputError, match="a live site, which changed meanwhile"):
        written(model.adapting(live), [images], tmp_path / "out.parquet")
    assert not list(tmp_path.glob("out*"))
