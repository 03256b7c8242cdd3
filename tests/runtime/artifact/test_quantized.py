"""int8 and binary codes: laws of their rounding, search beside plain numpy and FAISS, recall beside its definition."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import invariclip
from invariclip import embedding
from invariclip.artifact import quantized
from invariclip.artifact.embeddings import Embeddings, read_embeddings
from invariclip.artifact.embeddings_table import EmbeddingRows, TableFacts, read_table, table_bytes
from invariclip.artifact.quantized import (
    QuantizedEmbeddings,
    Quantizer,
    quantize,
    read_quantized,
    recall_places,
    search_recall,
)
from invariclip.embedding import embed_files, embed_texts_to_file
from invariclip.errors import InputError

VALUES = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.floats(-1, 1, width=32)
)


def embeddings(vectors, space="space"):
    return Embeddings(vectors, tuple(f"{number}.png" for number in range(len(vectors))), space)


def units(count, width, seed=0):
    """Unit vectors in a narrow cone with a few wide dimensions, as CLIP's are."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(0.3, 1, (count, width)) * np.geomspace(3, 0.3, width)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_int8_is_within_half_a_step_and_odd(vectors):
    codes = quantize(embeddings(vectors), "int8")
    scale = codes.quantizer.scale
    assert np.abs(codes.codes.astype(int)).max(initial=0) <= 127
    errors = np.abs(codes.codes.astype(np.float64) * scale - vectors.astype(np.float64))
    assert errors.max(initial=0) <= scale / 2 * (1 + 1e-9)
    np.testing.assert_array_equal(quantize(embeddings(-vectors), "int8").codes, -codes.codes)


@settings(max_examples=200, deadline=None)
@given(VALUES, VALUES)
def test_similarities_are_what_is_documented(vectors, others):
    width = min(vectors.shape[1], others.shape[1])
    vectors, others = vectors[:, :width], others[:, :width]
    codes = quantize(embeddings(vectors), "int8")
    exact = others.astype(np.float64) @ vectors.T.astype(np.float64)
    bound = np.abs(others).sum(axis=1, dtype=np.float64)[:, None] * codes.quantizer.scale / 2
    assert (np.abs(codes.similarity(embeddings(others)) - exact) <= bound + 1e-5).all()
    binary = quantize(embeddings(vectors), "binary")
    np.testing.assert_array_equal(np.unpackbits(binary.codes, axis=1)[:, :width], vectors > 0)
    assert not np.unpackbits(binary.codes, axis=1)[:, width:].any()
    differ = ((others > 0)[:, None] != (vectors > 0)[None]).sum(axis=2)
    np.testing.assert_allclose(binary.similarity(embeddings(others)), 1 - 2 * differ / width, rtol=0, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.sampled_from(["int8", "binary"]))
def test_a_file_gives_the_codes_back(tmp_path_factory, vectors, dtype):
    pytest.importorskip("pyarrow")
    codes = quantize(embeddings(vectors), dtype)
    facts = TableFacts(
        "images", dtype, vectors.shape[1], len(vectors), "space", "", "m", "v", "b", scale=codes.quantizer.scale
    )
    path = tmp_path_factory.mktemp("codes") / "e.parquet"
    path.write_bytes(table_bytes(EmbeddingRows(facts, np.arange(len(vectors)), codes.items, codes.codes)))
    read = read_quantized(path)
    np.testing.assert_array_equal(read.codes, codes.codes)
    assert replace(read, codes=codes.codes) == codes
    with pytest.raises(InputError, match="read it with read_quantized"):
        read_embeddings(path)


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_search_finds_what_sorting_all_finds(dtype, monkeypatch):
    monkeypatch.setattr(quantized, "BLOCK_ROWS", 37)
    vectors, queries = units(300, 40), embeddings(units(7, 40, seed=1))
    codes = quantize(embeddings(vectors), dtype)
    similarities, places = codes.search(queries, 12)
    everything = codes.similarity(queries)
    order = np.argsort(-everything, axis=1, kind="stable")[:, :12]
    if dtype == "binary":  # whole numbers of bits: equal ones are equal, and the first comes first
        np.testing.assert_array_equal(places, order)
    np.testing.assert_allclose(similarities, np.take_along_axis(everything, order, 1), rtol=0, atol=1e-6)
    assert quantize(embeddings(vectors[:5]), dtype).search(queries, 12)[1].shape == (7, 5)
    with pytest.raises(InputError, match="count must be at least 1"):
        codes.search(queries, 0)


def test_faiss_finds_the_same():
    faiss = pytest.importorskip("faiss")
    vectors, queries = units(500, 64), units(9, 64, seed=1)
    codes = quantize(embeddings(vectors), "binary")
    index = faiss.IndexBinaryFlat(64)
    index.add(codes.codes)
    distances, _ = index.search(codes.quantizer.encode(queries), 10)
    np.testing.assert_allclose(codes.search(embeddings(queries))[0], 1 - 2 * distances / 64, rtol=0, atol=1e-6)
    codes = quantize(embeddings(vectors), "int8")
    index = faiss.IndexFlatIP(64)
    index.add(codes.codes.astype(np.float32))
    found, places = index.search(queries, 10)
    similarities, ours = codes.search(embeddings(queries))
    np.testing.assert_array_equal(ours, places)
    np.testing.assert_allclose(similarities, found * codes.quantizer.scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_recall_is_what_its_definition_says(dtype, monkeypatch):
    monkeypatch.setattr(quantized, "BLOCK_ROWS", 41)
    one = embeddings(units(400, 48))
    measured = search_recall(one, dtype)
    codes, exact = quantize(one, dtype), one.vectors @ one.vectors.T
    by_codes = codes.similarity(one)
    found = wide = 0
    places = recall_places(400)
    assert len(places) == measured.queries == 256
    for query in places:
        others = np.delete(np.arange(400), query)
        best = set(others[np.argsort(-exact[query, others], kind="stable")[:10]])
        order = others[np.argsort(-by_codes[query, others], kind="stable")]
        found += len(best & set(order[:10]))
        wide += len(best & set(order[:40]))
    assert measured.recall == pytest.approx(found / 2560, abs=2e-3)
    assert measured.recall_in_wider == pytest.approx(wide / 2560, abs=2e-3)
    assert measured.recall <= measured.recall_in_wider <= 1
    assert measured.recall > {"int8": 0.9, "binary": 0.1}[dtype]


def test_recall_of_few_and_of_equal_vectors():
    assert search_recall(embeddings(units(99, 8)), "int8") is None
    same = embeddings(np.repeat(units(1, 8), 100, axis=0))
    assert search_recall(same, "binary").recall == 1  # any of them is as near


def test_recall_can_fail():
    """Vectors that differ in less than a step of the codes cannot be told apart by them."""
    rng = np.random.default_rng(0)
    vectors = (np.eye(1, 32, dtype=np.float32) + rng.normal(0, 1e-4, (1000, 32))).astype(np.float32)
    assert search_recall(embeddings(vectors), "int8").recall < 0.2


def test_what_is_refused():
    one = embeddings(units(3, 8))
    codes = quantize(one, "int8")
    with pytest.raises(InputError, match="cannot be compared"):
        codes.similarity(replace(one, space_id="another"))
    with pytest.raises(InputError, match="cannot be compared"):
        codes.search(replace(one, space_id="another"))
    with pytest.raises(InputError, match="available: int8, binary"):
        quantize(one, "float16")
    for dtype in ("int8", "binary"):
        for strange in (np.nan, np.inf):
            with pytest.raises(InputError, match="not finite"):
                quantize(embeddings(np.full((2, 3), strange, dtype=np.float32)), dtype)
    with pytest.raises(InputError, match="are not int8 of 8 dimensions"):
        QuantizedEmbeddings(codes.codes.astype(np.int16), codes.quantizer, codes.items, "space")
    with pytest.raises(InputError, match=r"are not \[N, 8\]"):
        codes.quantizer.encode(units(3, 9))
    assert quantize(embeddings(np.zeros((2, 3), dtype=np.float32)), "int8").quantizer == Quantizer("int8", 3, 1.0)


@pytest.mark.parametrize(("dtype", "scale"), [("int8", None), ("int8", 0.0), ("int8", float("nan")), ("binary", 0.1)])
def test_facts_without_their_scale_are_refused(dtype, scale):
    with pytest.raises(InputError, match="does not go with a scale"):
        TableFacts("images", dtype, 8, 1, "space", "", "m", "v", "b", scale=scale)


@pytest.fixture(scope="module")
def model(tiny_artifact):
    return invariclip.load(tiny_artifact)


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_the_command_writes_codes_and_measures_them(
    run, tiny_artifact, model, tiny_images, tmp_path, monkeypatch, dtype
):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(embedding, "PART_IMAGES", 5)
    monkeypatch.setattr(embedding, "GROUP_ROWS", 50)
    many = [tiny_images] * 10
    plain = tmp_path / "plain.parquet"
    embed_files(model, many, plain, batch_size=5)
    out = tmp_path / "codes.parquet"
    code, said, err = run("embed", tiny_artifact, *many, "-o", out, "--dtype", dtype, "--quiet", "--batch-size", 5)
    assert (code, err) == (0, "")
    whole = read_embeddings(plain)
    measured, codes = search_recall(whole, dtype), read_quantized(out)
    facts = read_table(out).facts
    np.testing.assert_array_equal(codes.codes, quantize(whole, dtype).codes)
    assert (facts.recall.recall, facts.recall.recall_in_wider) == pytest.approx(
        (measured.recall, measured.recall_in_wider), abs=1e-6
    )
    assert (facts.dtype, facts.dimensions, facts.scale) == (dtype, 8, codes.quantizer.scale)
    assert f"recall@10 of {dtype} search beside exact search: {measured.recall:.3f}" in said
    assert codes.similarity(whole).shape == (120, 120)

    code, _, err = run("embed", tiny_artifact, tiny_images, "-o", out, "--dtype", dtype, "--quiet")
    assert (code, read_table(out).facts.recall) == (0, None)
    assert f"the recall of {dtype} search is not known" in err


def test_codes_of_texts_and_of_other_outputs(run, tiny_artifact, model, tmp_path):
    pytest.importorskip("pyarrow")
    embed_texts_to_file(model, ["a cat", "a dog"], tmp_path / "t.parquet", dtype="binary")
    read = read_quantized(tmp_path / "t.parquet")
    vectors = model.embed_texts(["a cat", "a dog"])
    np.testing.assert_array_equal(read.codes, np.packbits(vectors > 0, axis=1))
    for more in (["-o", tmp_path / "x.safetensors"], ["-o", tmp_path / "x.parquet", "--engine", "ray"]):
        code, _, err = run("embed", tiny_artifact, "--text", "a", "--dtype", "int8", *more)
        assert (code, "goes with -o NAME.parquet and --engine local" in err) == (2, True)
    with pytest.raises(InputError, match="available: float32, int8, binary"):
        embed_files(model, [tmp_path], tmp_path / "x.parquet", dtype="float16")
    embed_texts_to_file(model, ["a cat"], tmp_path / "f.parquet")
    with pytest.raises(InputError, match="holds float32"):
        read_quantized(tmp_path / "f.parquet")
