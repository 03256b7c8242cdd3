"""The projection file: what is written is read, and what is wrong is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.artifact.projection import PROJECTION_FILE, Projection, identity, read_projection, write_projection
from invariclip.errors import ProjectionError


def some(D=6, d=3, seed=0):
    return np.random.default_rng(seed).normal(size=(D, d))


def test_round_trip_keeps_every_bit(tmp_path):
    made = Projection(some(), "icm", 3.0, np.arange(6.0), {"seed": 1, "pairs": {"natural": 7}})
    write_projection(tmp_path / "p.safetensors", made)
    read = read_projection(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(read.A_inv, made.A_inv)
    np.testing.assert_array_equal(read.eigenvalues, made.eigenvalues)
    assert (read.estimator, read.strength, read.provenance, read.digest) == ("icm", 3.0, made.provenance, made.digest)


@settings(max_examples=30, deadline=None)
@given(D=st.integers(1, 12), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_rows_have_unit_length_and_the_input_scale_does_not_matter(D, seed, scale):
    rng = np.random.default_rng(seed)
    projection = Projection(rng.normal(size=(D, max(1, D // 2))), "icm")
    embeddings = rng.normal(size=(5, D))
    answer = projection.apply(embeddings)
    np.testing.assert_allclose(np.linalg.norm(answer, axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(projection.apply(embeddings * scale), answer, atol=1e-9)


def test_identity_changes_nothing_but_the_length():
    embeddings = np.random.default_rng(0).normal(size=(4, 5))
    expected = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(identity(5).apply(embeddings), expected, atol=1e-15)


def test_digest_depends_on_values_and_shape():
    A = some(4, 2)
    assert Projection(A, "icm").digest == Projection(A.copy(order="F"), "other").digest
    assert Projection(A, "icm").digest != Projection(A + 1e-15, "icm").digest


@pytest.mark.parametrize(
    "matrix", [np.ones((3, 4)), np.ones(3), np.full((3, 2), np.nan), np.ones((3, 2)), np.empty((3, 0))]
)
def test_useless_matrices_are_refused(matrix):
    with pytest.raises(ProjectionError):
        Projection(matrix, "icm")


def test_wrong_width_names_both_widths():
    projection = Projection(some(6, 3), "icm")
    with pytest.raises(ProjectionError, match=r"width 6.*512"):
        projection.require_width(512, "the checkpoint")
    with pytest.raises(ProjectionError, match="width 6"):
        projection.apply(np.ones((1, 7)))


def test_bad_files_are_one_typed_line(tmp_path):
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"\x80\x04garbage")
    good = tmp_path / "good.safetensors"
    write_projection(good, Projection(some(), "icm"))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-9])
    for path in (tmp_path / "absent", garbage, cut):
        with pytest.raises(ProjectionError) as caught:
            read_projection(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"eigenvalues": np.zeros(24, np.complex64)}, "its arrays are not three of float64"),
        ({"eigenvalues": np.full(24, np.nan)}, "the eigenvalues are no vector of finite numbers"),
        ({"more": np.zeros(2)}, "its arrays are not three of float64"),
    ],
)
def test_other_arrays_are_refused_under_a_digest_that_is_right(tmp_path, tiny_projection, changed, said):
    arrays = {
        "A_inv": tiny_projection.A_inv,
        "training_mean": tiny_projection.training_mean,
        "eigenvalues": np.zeros(24),
    }
    facts = {"estimator": "icm", "strength": 1.0, "provenance": {}}
    (tmp_path / "p").write_bytes(PROJECTION_FILE.to_bytes(arrays, facts))
    read_projection(tmp_path / "p")
    (tmp_path / "p").write_bytes(PROJECTION_FILE.to_bytes(arrays | changed, facts))
    with pytest.raises(ProjectionError, match=said):
        read_projection(tmp_path / "p")
