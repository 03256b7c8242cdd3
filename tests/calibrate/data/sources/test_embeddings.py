"""Embeddings from files: the same moments from every kind of file; files that cannot be used are named."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from invariclip.calibrate.data.moments import of_pairs, of_points
from invariclip.calibrate.data.problems import ProblemCounts
from invariclip.calibrate.data.sources import embeddings
from invariclip.calibrate.data.sources.embeddings import EmbeddingSource
from invariclip.calibrate.data.stream.collect import collect
from invariclip.errors import InputError

WIDTH, ROWS = 5, 1000


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    return first, first + rng.normal(size=first.shape).astype(np.float32), rng.uniform(0.5, 2, ROWS)


def unit(rows):
    plain = rows.astype(np.float64)
    return plain / np.linalg.norm(plain, axis=1, keepdims=True)


def parquet(path, columns, **options):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install invariclip[parquet]")
    from pyarrow import parquet as pq

    table = {name: list(rows) if rows.ndim == 2 else rows for name, rows in columns.items()}
    pq.write_table(pyarrow.table(table), path, **options)


def test_every_kind_of_file_gives_the_same_moments(given, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD_ROWS", 300)
    first, second, weights = given
    save_file({"first": first, "second": second, "weights": weights}, tmp_path / "all.safetensors")
    parquet(tmp_path / "all.parquet", {"first": first, "second": second, "weights": weights}, row_group_size=256)
    wanted = of_points(unit(first)) + of_pairs(unit(first), unit(second), weights)
    for file, shards in (("all.safetensors", 4), ("all.parquet", 4)):
        source = EmbeddingSource("e", path=str(tmp_path / file), points="first")
        assert len(source.shards()) == shards
        found = collect([source]).combined()
        np.testing.assert_allclose(found.sigma, wanted.sigma, rtol=1e-12, atol=1e-14, err_msg=file)
        np.testing.assert_allclose(found.sigma_delta, wanted.sigma_delta, rtol=1e-12, atol=1e-14, err_msg=file)
        assert (found.points, found.pairs) == (ROWS, ROWS)


@pytest.mark.parametrize(("points", "count"), [("first", ROWS), ("both", 2 * ROWS), ("none", 0)])
def test_npy_files_and_which_members_are_points(given, tmp_path, points, count):
    first, second, _ = given
    for place, part in enumerate((slice(0, 400), slice(400, ROWS))):
        np.save(tmp_path / f"a{place}.npy", first[part])
        np.save(tmp_path / f"b{place}.npy", second[part])
    source = EmbeddingSource("e", first=str(tmp_path / "a*.npy"), second=str(tmp_path / "b*.npy"), points=points)
    found = collect([source]).combined()
    assert (found.points, found.pairs) == (count, ROWS)
    delta = of_pairs(unit(first), unit(second)).sigma_delta
    np.testing.assert_allclose(found.sigma_delta, delta, rtol=1e-12, atol=1e-14)
    if count == 2 * ROWS:
        sigma = of_points(unit(np.concatenate([first, second]))).sigma
        np.testing.assert_allclose(found.sigma, sigma, rtol=1e-12, atol=1e-14)


def test_points_alone(given, tmp_path):
    save_file({"points": given[0]}, tmp_path / "p.safetensors")
    state = collect([EmbeddingSource("e", path=str(tmp_path / "p.safetensors"))])
    assert state.counts() == {"e": {"points": ROWS}}


def test_lists_of_different_lengths(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install invariclip[parquet]")
    from pyarrow import parquet as pq

    rows = pyarrow.array([[1.0, 2.0], [3.0, 4.0, 5.0], [1.0], [2.0, 2.0]], type=pyarrow.list_(pyarrow.float32()))
    pq.write_table(pyarrow.table({"points": rows}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="not of one length"):
        collect([EmbeddingSource("e", path=str(tmp_path / "p.parquet"))])


def files(folder, case):
    rows = np.ones((4, 3), np.float32)
    if case == "pickled":
        np.save(folder / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    elif case == "short":
        np.save(folder / "a.npy", rows)
        (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:-8])
    elif case == "whole numbers":
        np.save(folder / "a.npy", rows.astype(np.int64))
    elif case == "lengths":
        np.save(folder / "a.npy", rows[:2])
    elif case == "widths":
        np.save(folder / "a.npy", rows[:, :2].copy())
    elif case == "flat":
        np.save(folder / "a.npy", rows[0])
    if case != "no second":
        np.save(folder / "b.npy", rows)


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("pickled", r"a\.npy: not an npy file of numbers"),
        ("short", r"a\.npy: not an npy file of numbers"),
        ("whole numbers", r"a\.npy: not an npy file of floating numbers"),
        ("lengths", r"columns of different lengths: first \[2, 3\], second \[4, 3\]"),
        ("widths", r"all of one width: first \[4, 2\], second \[4, 3\]"),
        ("flat", "columns of different lengths"),
        ("missing", r"e: no file matches .*a\.npy"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, case, told):
    files(tmp_path, case)
    with pytest.raises(InputError, match=told):
        collect([EmbeddingSource("e", first=str(tmp_path / "a.npy"), second=str(tmp_path / "b.npy"))])


def test_columns_that_are_missing_or_strange(tmp_path):
    rows = np.ones((4, 3), np.float32)
    save_file({"first": rows}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no columns first and second, nor points; it has first"):
        collect([EmbeddingSource("e", path=str(tmp_path / "a.safetensors"))])
    save_file({"points": rows, "pionts": rows}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no use for column 'pionts'; available: points, first, second, weights"):
        collect([EmbeddingSource("e", path=str(tmp_path / "a.safetensors"))])
    (tmp_path / "a.csv").touch()
    with pytest.raises(InputError, match=r"a\.csv: not a \.safetensors or \.parquet file"):
        collect([EmbeddingSource("e", path=str(tmp_path / "a.csv"))])
    with pytest.raises(InputError, match="e: name either path, or first and second"):
        collect([EmbeddingSource("e")])


def test_npy_files_of_every_order(given, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK_ROWS", 64)
    monkeypatch.setattr(embeddings, "SHARD_ROWS", 300)
    first, second, _ = given
    np.save(tmp_path / "b.npy", second)
    found = []
    for rows in (first, np.asfortranarray(first), first.astype(">f4"), first.astype(np.float64)):
        np.save(tmp_path / "a.npy", rows)
        source = EmbeddingSource("e", first=str(tmp_path / "a.npy"), second=str(tmp_path / "b.npy"), points="first")
        blocks = [block for shard in source.shards() for block in source.read(shard, None, ProblemCounts())]
        assert max(len(block.first) for block in blocks) == 64
        np.testing.assert_array_equal(np.concatenate([block.first for block in blocks]), first)
        found.append(collect([source]).combined().sigma)
    assert all(np.array_equal(found[0], sigma) for sigma in found)


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
@pytest.mark.parametrize("how", ["written over", "cut", "replaced"])
def test_a_file_that_is_changed_while_it_is_read_is_refused(given, tmp_path, monkeypatch, kind, how):
    monkeypatch.setattr(embeddings, "BLOCK_ROWS", 100)
    first, second, _ = given
    path = tmp_path / f"a.{kind}"
    if kind == "npy":
        np.save(path, first)
        np.save(tmp_path / "b.npy", second)
    elif kind == "safetensors":
        save_file({"first": first, "second": second}, path)
    else:
        parquet(path, {"first": first, "second": second})
    named = {"first": str(path), "second": str(tmp_path / "b.npy")} if kind == "npy" else {"path": str(path)}
    source = EmbeddingSource("e", **named)
    (shard,) = source.shards()
    content, facts = path.read_bytes(), path.stat()
    blocks = source.read(shard, None, ProblemCounts())
    next(blocks)
    if how == "written over":
        path.write_bytes(content[:-100] + bytes(100))
    elif how == "cut":
        os.truncate(path, len(content) // 2)
    else:
        (tmp_path / "other").write_bytes(content)
        os.utime(tmp_path / "other", ns=(facts.st_atime_ns, facts.st_mtime_ns))
        (tmp_path / "other").replace(path)
    with pytest.raises(
        InputError, match=rf"a\.{kind}: (has changed while|was replaced while|ends before|cannot be read)"
    ):
        list(blocks)


def test_safetensors_of_other_numbers(tmp_path):
    save_file({"points": np.ones((4, 3), np.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="holds I64; store float32"):
        EmbeddingSource("e", path=str(tmp_path / "a.safetensors")).shards()
