"""The estimators on a linear SCM whose answer is known, and the algebra that holds for any moments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.calibrate.data.moments import of_pairs, of_points
from invariclip.calibrate.projection.classifiers import prototypes, unit
from invariclip.calibrate.projection.estimators import decompose, fit, published, removed
from invariclip.errors import InputError, ProjectionError

RANK = 24


@pytest.fixture(scope="module", params=range(4))
def scm(request, world):
    """Moments of three training environments, and a function that scores a matrix on the unseen fourth."""
    model = world.Scm(request.param)
    seen = [model.sample(environment) for environment in range(3)]
    points, labels = (np.concatenate(part) for part in zip(*seen, strict=True))
    moments = of_points(points)
    for environment in range(3):
        moments = moments + of_pairs(*model.pairs(environment))
    unseen, answers = model.sample(3, 2000)

    def accuracy(matrix):
        return 100 * prototypes(unit(points @ matrix), labels, unit(unseen @ matrix), answers).mean()

    return moments, accuracy, accuracy(model.oracle())


def test_without_projection_in_between_and_published_order_at_chance(scm):
    """The published code takes eigh's first columns, which move most: 4-9 % where chance is 10 %."""
    moments, accuracy, oracle = scm
    none = accuracy(np.eye(128))
    assert 40 < none < oracle - 10
    assert accuracy(published(moments, RANK, 10).A_inv) < 15 < none
    assert np.allclose(published(moments, 128, 10).A_inv[:, ::-1], fit(moments, "icm", None, 10).A_inv)


def test_published_is_no_estimator_to_choose(scm):
    with pytest.raises(ProjectionError, match=r"'published'; available: icm, generalised, shrinkage, identity"):
        fit(scm[0], "published", 24, 1)


def test_icm_keeps_the_largest_eigenvalues(scm):
    moments, _, _ = scm
    projection = fit(moments, "icm", RANK, 3.0)
    matrix = moments.sigma - 3 * moments.sigma_delta
    kept = np.diag(projection.A_inv.T @ matrix @ projection.A_inv)
    assert kept == pytest.approx(np.linalg.eigvalsh(matrix)[::-1][:RANK])
    assert np.allclose(projection.A_inv.T @ projection.A_inv, np.eye(RANK))
    assert (np.diff(projection.eigenvalues) <= 0).all()
    assert len(projection.eigenvalues) == 128


def test_generalised_subspaces_are_those_of_the_pencil(scm):
    from scipy.linalg import eigh, subspace_angles

    moments, _, _ = scm
    ridge = 1e-4 * np.trace(moments.sigma) / 128 * np.eye(128)
    _, vectors = eigh(moments.sigma_delta + ridge, moments.sigma + ridge)
    for rank in (8, RANK, 64):
        columns = fit(moments, "generalised", rank).A_inv
        assert subspace_angles(columns, vectors[:, :rank]).max() < 1e-6
        assert np.allclose(columns.T @ columns, np.eye(rank))


def test_shrinkage_is_the_symmetric_inverse_root(scm):
    moments, _, _ = scm
    A_inv = fit(moments, "shrinkage", None, 3.0).A_inv
    delta = moments.sigma_delta
    mean = np.linalg.eigvalsh(delta).mean()
    assert np.allclose(A_inv, A_inv.T)
    assert np.allclose(A_inv @ A_inv @ (np.eye(128) + 3 * delta / mean), np.eye(128))


def sample(seed, points, pairs, width):
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.1, 2, width)
    rows = rng.normal(size=(points, width)) * scale
    return of_points(rows) + of_pairs(rng.normal(size=(pairs, width)), rng.normal(size=(pairs, width)) * scale)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 8),
    st.sampled_from([("icm", 2.0), ("generalised", None), ("shrinkage", 5.0)]),
    st.floats(0.01, 100),
)
def test_units_do_not_matter(seed, width, how, factor):
    """Embeddings in another unit give the same cosines: λ means the same."""
    rng = np.random.default_rng(seed)
    a, b, queries = rng.normal(size=(3, 20, width))
    first = fit(of_points(a) + of_pairs(a, b), how[0], None if how[0] == "shrinkage" else 2, how[1])
    other = fit(
        of_points(a * factor) + of_pairs(a * factor, b * factor), how[0], None if how[0] == "shrinkage" else 2, how[1]
    )
    p, q = first.apply(queries), other.apply(queries)
    assert np.allclose(p @ p.T, q @ q.T, atol=1e-6)


@pytest.mark.parametrize(("estimator", "strength"), [("icm", 1.0), ("generalised", None)])
def test_fewer_images_than_dimensions(estimator, strength):
    """What no image excites must not pass for invariant: signal comes first, whatever its movement."""
    rng = np.random.default_rng(0)
    rows = np.zeros((10, 30))
    rows[:, :6] = rng.normal(size=(10, 6))
    moved = rows.copy()
    moved[:, 3:6] += 0.1 * rng.normal(size=(10, 3))
    projection = fit(of_points(rows) + of_pairs(rows, moved), estimator, 3, strength)
    assert np.isfinite(projection.A_inv).all()
    assert np.linalg.norm(projection.A_inv[6:]) < 1e-6


def test_full_rank_cut_changes_no_cosine():
    moments = sample(0, 50, 50, 6)
    queries = np.random.default_rng(1).normal(size=(9, 6))
    plain = unit(queries) @ unit(queries).T
    for estimator, strength in (("icm", 3.0), ("generalised", None), ("identity", None)):
        projected = fit(moments, estimator, None, strength).apply(queries)
        assert np.allclose(projected @ projected.T, plain)


def test_shrinkage_goes_to_the_identity():
    moments = sample(0, 50, 50, 6)
    assert np.allclose(fit(moments, "shrinkage", None, 1e-9).A_inv, np.eye(6), atol=1e-6)


def test_removed_is_one_scale():
    assert removed(np.ones(6), 24) == pytest.approx(1 - 6 / 24)
    assert removed(np.ones(24), 24) == pytest.approx(0)
    moments = sample(0, 50, 50, 6)
    taken = [removed(decompose(moments, "shrinkage", strength).factors, 6) for strength in (0.1, 1, 10, 100)]
    assert taken == sorted(taken)
    assert 0 < taken[0] < taken[-1] < 1


def test_refusals():
    moments = sample(0, 20, 20, 4)
    with pytest.raises(ProjectionError, match=r"icm needs a strength"):
        fit(moments, "icm", 2)
    with pytest.raises(ProjectionError, match=r"above zero, not -1"):
        fit(moments, "shrinkage", None, -1)
    with pytest.raises(ProjectionError, match=r"generalised has no strength"):
        fit(moments, "generalised", 2, 3.0)
    with pytest.raises(ProjectionError, match=r"rank 5 is not from 1 to the encoder's width 4"):
        fit(moments, "icm", 5, 1.0)
    with pytest.raises(ProjectionError, match=r"shrinkage keeps the full rank"):
        fit(moments, "shrinkage", 2, 1.0)
    rows = np.ones((3, 4))
    with pytest.raises(ProjectionError, match=r"no pair differs"):
        fit(of_points(rows) + of_pairs(rows, rows), "shrinkage", None, 1.0)
    with pytest.raises(InputError, match=r"no pair"):
        fit(of_points(rows), "icm", 2, 1.0)
