"""LEACE and SPLINCE: what must be zero, what must stay, and that no other map does it with less change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from invariclip.calibrate.evaluation.baselines import BASELINES
from invariclip.calibrate.evaluation.erasure import leace, room, splince
from invariclip.calibrate.projection.classifiers import unit
from invariclip.errors import InputError

WIDTH = 12


def draw(seed, *, count=400, width=WIDTH, environments=3, classes=4, flat=0):
    """Classes and environments that are correlated, in rows of very different variances, `flat` dimensions constant."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(environments, size=count)
    labels = np.where(rng.random(count) < 0.4, codes % classes, rng.integers(classes, size=count))
    rows = rng.normal(size=(count, width)) * np.geomspace(0.2, 3, width)
    rows += rng.normal(size=(environments, width))[codes] + rng.normal(size=(classes, width))[labels] + 2
    rows[:, :flat] = 1.5
    return rows @ np.linalg.qr(rng.normal(size=(width, width)))[0], codes, labels


def mapped(baseline, rows):
    return (rows - baseline.offset) @ baseline.matrix + baseline.shift


def covariance(rows, labels):
    one_hot = np.eye(labels.max() + 1)[labels]
    return (rows - rows.mean(axis=0)).T @ (one_hot - one_hot.mean(axis=0)) / len(rows)


cases = given(
    seed=st.integers(0, 10_000), environments=st.integers(2, 4), classes=st.integers(2, 5), flat=st.integers(0, 3)
)


@settings(max_examples=30, deadline=None)
@cases
def test_nothing_linear_is_left_of_the_environment_and_the_mean_stays(seed, environments, classes, flat):
    rows, codes, labels = draw(seed, environments=environments, classes=classes, flat=flat)
    for baseline in (leace(rows, codes), leace(rows, codes, shrink=True), splince(rows, codes, labels)):
        erased = mapped(baseline, rows)
        assert np.abs(covariance(erased, codes)).max() < 1e-10
        assert np.allclose(erased.mean(axis=0), rows.mean(axis=0))
        assert np.allclose(mapped(baseline, erased), erased)  # a projection
        assert np.allclose(baseline.apply(rows), unit(erased))
        assert baseline.name in BASELINES


@settings(max_examples=30, deadline=None)
@cases
def test_splince_leaves_the_covariance_with_classes_and_leace_does_not(seed, environments, classes, flat):
    rows, codes, labels = draw(seed, environments=environments, classes=classes, flat=flat)
    before = covariance(rows, labels)
    assert np.allclose(covariance(mapped(splince(rows, codes, labels), rows), labels), before, atol=1e-9)
    assert np.abs(covariance(mapped(leace(rows, codes), rows), labels) - before).max() > 1e-4


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), other=st.integers(0, 10_000), size=st.floats(1e-3, 3))
def test_no_other_erasure_changes_embeddings_less(seed, other, size):
    """Any matrix whose product with the covariance is zero erases too: x ↦ μ + (P + E(I - V(VᵀV)⁻¹Vᵀ))(x - μ)."""
    rows, codes, labels = draw(seed)
    rng = np.random.default_rng(other)
    cross = covariance(rows, codes)
    kernel = np.linalg.svd(cross)[0][:, : np.linalg.matrix_rank(cross)]
    away = np.eye(WIDTH) - kernel @ kernel.T
    baseline = leace(rows, codes)
    centred = rows - rows.mean(axis=0)
    least = ((mapped(baseline, rows) - rows) ** 2).sum(axis=1).mean()
    for start in (baseline.matrix.T, np.eye(WIDTH)):
        rival = (start + size * rng.normal(size=(WIDTH, WIDTH))) @ away
        assert np.abs(covariance(centred @ rival.T, codes)).max() < 1e-10
        assert ((centred @ rival.T - centred) ** 2).sum(axis=1).mean() >= least - 1e-9
    # the plain orthogonal projection, and SPLINCE, which must do more
    for erased in (centred @ away, mapped(splince(rows, codes, labels), rows) - rows.mean(axis=0)):
        assert ((erased - centred) ** 2).sum(axis=1).mean() >= least - 1e-9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), other=st.integers(0, 10_000), size=st.floats(1e-3, 3))
def test_no_other_erasure_that_spares_the_classes_changes_embeddings_less(seed, other, size):
    rows, codes, labels = draw(seed)
    centred = rows - rows.mean(axis=0)
    baseline = splince(rows, codes, labels)
    both = np.concatenate([covariance(rows, codes), covariance(rows, labels)], axis=1)
    basis = np.linalg.svd(both)[0][:, : np.linalg.matrix_rank(both)]
    noise = size * np.random.default_rng(other).normal(size=(WIDTH, WIDTH))
    rival = baseline.matrix.T + noise @ (np.eye(WIDTH) - basis @ basis.T)
    assert np.allclose(rival @ covariance(rows, labels), covariance(rows, labels))
    assert np.abs(rival @ covariance(rows, codes)).max() < 1e-9
    least = ((centred @ baseline.matrix - centred) ** 2).sum(axis=1).mean()
    assert ((centred @ rival.T - centred) ** 2).sum(axis=1).mean() >= least - 1e-9


def test_a_linear_classifier_is_at_chance_afterwards_and_was_not_before():
    rows, codes, labels = draw(0, count=3000)
    share = np.bincount(codes).max() / len(codes)

    def accuracy(vectors):
        return LogisticRegression(C=1e6, max_iter=5000).fit(vectors, codes).score(vectors, codes)

    assert accuracy(rows) > share + 0.15
    for baseline in (leace(rows, codes), splince(rows, codes, labels)):
        assert accuracy(mapped(baseline, rows)) < share + 0.01


def test_without_correlation_of_classes_and_environments_both_are_one_map():
    codes, labels = np.meshgrid(np.arange(3), np.arange(4), indexing="ij")
    codes, labels = codes.ravel(), labels.ravel()
    means = np.eye(WIDTH)[:7]
    rows = np.repeat(means[codes] + means[3 + labels], 2, axis=0)
    rows[::2, 7] += 1  # variance of its own, in every cell the same
    codes, labels = np.repeat(codes, 2), np.repeat(labels, 2)
    one, other = leace(rows, codes), splince(rows, codes, labels)
    assert np.allclose(one.matrix, other.matrix)


def test_shrinkage_is_the_published_formula_and_fits_less_noise():
    rows, codes, _ = draw(2, count=60, width=30)
    S = np.cov(rows, rowvar=False, bias=True)
    alpha = 1 - np.trace(S) ** 2 / (60 * ((S**2).sum() - np.trace(S) ** 2 / 30))
    sigma = alpha * S + (1 - alpha) * np.trace(S) / 30 * np.eye(30)
    assert 0 < alpha < 1
    cross = covariance(rows, codes)
    inverse = np.linalg.inv(sigma)
    # W⁻¹ P W Σ_XZ's projection in the metric of Σ⁻¹: Σ_XZ (Σ_XZᵀ Σ⁻¹ Σ_XZ)⁺ Σ_XZᵀ Σ⁻¹
    wanted = np.eye(30) - cross @ np.linalg.pinv(cross.T @ inverse @ cross, rcond=1e-10) @ cross.T @ inverse
    assert np.allclose(leace(rows, codes, shrink=True).matrix.T, wanted)


def test_of_few_rows_shrinkage_leaves_less_of_the_environment_in_others():
    left = []
    for seed in range(8):
        rows, codes, _ = draw(seed, count=2060, width=30)
        maps = [leace(rows[:60], codes[:60], shrink=shrink) for shrink in (True, False)]
        left.append([np.linalg.norm(covariance(mapped(each, rows[60:]), codes[60:])) for each in maps])
    shrunk, plain = np.mean(left, axis=0)
    assert shrunk < plain


def complement(columns):
    """Orthonormal basis of what is orthogonal to all columns."""
    left, values, _ = np.linalg.svd(columns)
    return left[:, (values > 1e-9 * values[0]).sum() :]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_splince_is_what_the_paper_writes_by_bases_of_range_and_of_the_kernels_complement(seed):
    """P = W⁺ R (KᵀR)⁻¹ Kᵀ W: K spans what is orthogonal to the kernel, R the range."""
    rows, codes, labels = draw(seed)
    values, axes = np.linalg.eigh(np.cov(rows, rowvar=False, bias=True))
    whiten, colour = axes / np.sqrt(values) @ axes.T, axes * np.sqrt(values) @ axes.T
    kernel, kept = whiten @ covariance(rows, codes), whiten @ covariance(rows, labels)
    both = np.concatenate([kernel, kept], axis=1)
    span = np.linalg.svd(both)[0][:, : np.linalg.matrix_rank(both, tol=1e-9)]
    outside = span @ complement(span.T @ kept)  # in the span of both, orthogonal to what is kept
    R, K = complement(outside), complement(kernel)
    wanted = colour @ R @ np.linalg.inv(K.T @ R) @ K.T @ whiten
    assert np.allclose(splince(rows, codes, labels).matrix.T, wanted, atol=1e-8)


def test_a_table_gives_all_directions_where_there_is_room_and_a_projections_rank_otherwise():
    rows, codes, labels = draw(0)
    assert room(codes, labels, rows, 3) is None
    rows, codes, labels = draw(0, classes=30, count=900)
    assert [room(codes, labels, rows, rank) for rank in (1, 5, 12)] == [1, 5, 9]
    for rank in (1, 5, 12):
        splince(rows, codes, labels, directions=room(codes, labels, rows, rank))


def test_more_classes_than_dimensions_need_a_number_of_directions():
    rows, codes, labels = draw(3, classes=30, count=900)
    with pytest.raises(InputError, match="meet in 12 dimensions"):
        splince(rows, codes, labels)
    part = splince(rows, codes, labels, directions=5)
    erased = mapped(part, rows)
    assert np.abs(covariance(erased, codes)).max() < 1e-10

    def lost(baseline):
        return np.abs(covariance(mapped(baseline, rows), labels) - covariance(rows, labels)).max()

    assert lost(part) < lost(leace(rows, codes))
    few = draw(3)
    assert np.allclose(splince(*few, directions=50).matrix, splince(*few).matrix)


def test_fewer_images_than_dimensions():
    rows, codes, labels = draw(1, count=20, width=40)
    assert np.abs(covariance(mapped(leace(rows, codes), rows), codes)).max() < 1e-10
    assert np.abs(covariance(mapped(splince(rows, codes, labels), rows), codes)).max() < 1e-10


def test_environments_that_share_their_mean_leave_everything_as_it_is():
    rows = np.concatenate([np.eye(5), np.eye(5)])
    assert np.allclose(leace(rows, np.repeat([0, 1], 5)).apply(rows), rows)


def test_refusals():
    rows, codes, labels = draw(0)
    with pytest.raises(InputError, match="400 vectors and 3 environment labels"):
        leace(rows, codes[:3])
    with pytest.raises(InputError, match="two values of the environment label at least, not 1"):
        leace(rows, np.zeros_like(codes))
    with pytest.raises(InputError, match="two values of the class label at least, not 1"):
        splince(rows, codes, np.zeros_like(codes))
    with pytest.raises(InputError, match="all embeddings are equal"):
        leace(np.ones((4, 3)), np.asarray([0, 0, 1, 1]))
    with pytest.raises(InputError, match="no embedding"):
        leace(np.ones((0, 3)), np.zeros(0, dtype=np.int64))
    with pytest.raises(InputError, match="1 or more, not 0"):
        splince(rows, codes, labels, directions=0)
