"""A collection embedded by Ray: the rows that the model gives, in parts that are made once."""

import json

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install invariclip[ray]")
from pyarrow import parquet

from invariclip import load
from invariclip.artifact.embeddings import read_embeddings
from invariclip.artifact.embeddings_table import read_table
from invariclip.calibrate.data.stream import collection


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(collection, "PART_IMAGES", 3)


def rows(folder):
    facts = json.loads((folder / "collection.json").read_text())
    tables = [parquet.read_table(folder / part["file"]) for part in facts["parts"]]
    items = [item for table in tables for item in table["path"].to_pylist()]
    return facts, items, np.concatenate([np.stack(table["embedding"].to_numpy()) for table in tables])


def test_parts_hold_what_the_model_answers(run, tiny_artifact, tiny_images, tmp_path, parts, request):
    out, bad = tmp_path / "out", tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    images = [*sorted(tiny_images.iterdir())[:7], bad]
    code, said, err = run("embed", tiny_artifact, *images, "-o", out, "--engine", "ray", "--workers", "1", "--quiet")
    assert code == 2  # one image could not be read
    assert "bad.jpg" in err
    assert f"7 embeddings in 3 parts in {out}" in said
    facts, items, vectors = rows(out)
    assert items == [str(path) for path in images[:7]]
    assert [part["count"] for part in facts["parts"]] == [3, 3, 1]
    assert [path for path, _ in facts["unreadable"]] == [str(bad)]
    model = load(tiny_artifact)
    assert facts["space_id"] == model.space_id
    np.testing.assert_allclose(vectors, model.embed_images(images[:7]), rtol=0, atol=1e-6)

    # Of parts that are there nothing is made again; one that is gone is.
    files = sorted(out.glob("*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()
    request.getfixturevalue("cluster")  # the first run started one of its own, and stopped it
    run("embed", tiny_artifact, *images, "-o", out, "--engine", "ray", "--workers", "1", "--quiet")
    after = {path: path.stat().st_mtime_ns for path in sorted(out.glob("*.parquet"))}
    assert [after[path] == before[path] for path in files] == [True, False, True]
    assert rows(out)[1] == items
    assert read_embeddings(files[1]).items == tuple(items[3:6])  # a part is a file as any other
    assert read_table(files[1]).ids.tolist() == [3, 4, 5]


def test_what_does_not_go_with_ray(run, tiny_artifact, tmp_path):
    code, _, err = run("embed", tiny_artifact, "--text", "a dog", "-o", tmp_path / "out", "--engine", "ray")
    assert (code, "goes without --text" in err) == (2, True)
