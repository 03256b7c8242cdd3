"""Baselines against scikit-learn, and what each of them must leave alone."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from invariclip.calibrate.data.moments import empty, of_pairs, of_points
from invariclip.calibrate.evaluation import baselines
from invariclip.calibrate.projection.classifiers import prototypes, unit
from invariclip.errors import InputError, ProjectionError


@pytest.fixture(scope="module")
def data():
    """Five classes in eight dimensions that vary by very different amounts, off the origin."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 300)
    rows = rng.normal(size=(5, 8))[labels] + rng.normal(size=(300, 8)) * np.linspace(0.2, 2, 8) + 3
    return rows, labels


def cosines(vectors):
    vectors = unit(vectors)
    return vectors @ vectors.T


def test_whitening_is_sklearns_up_to_a_rotation(data):
    rows, _ = data
    ours = baselines.whitening(of_points(rows), ridge=0)
    assert np.allclose(cosines(ours.apply(rows)), cosines(PCA(whiten=True).fit_transform(rows)))
    assert np.allclose(ours.matrix, ours.matrix.T)
    spread = (rows - ours.offset) @ ours.matrix
    assert np.allclose(spread.T @ spread / len(rows), np.eye(8))


def test_pca_is_sklearns_up_to_signs(data):
    rows, _ = data
    theirs = PCA(n_components=3).fit(rows)
    ours = baselines.pca(of_points(rows), 3)
    assert np.allclose(ours.offset, theirs.mean_)
    assert np.allclose(np.abs(ours.matrix.T @ theirs.components_.T), np.eye(3), atol=1e-9)
    assert np.allclose(cosines(ours.apply(rows)), cosines(theirs.transform(rows)))


def test_lda_is_sklearns_up_to_signs(data):
    rows, labels = data
    theirs = LinearDiscriminantAnalysis(solver="eigen").fit(rows, labels)
    # Sklearn scales its directions to unit variance within classes too, and does not centre.
    for rank in (None, 2):
        ours = baselines.lda(rows, labels, rank, ridge=0)
        seen = theirs.transform(rows - rows.mean(axis=0))[:, :rank]
        assert np.allclose(cosines(ours.apply(rows)), cosines(seen))
    assert ours.matrix.shape == (8, 2)


def test_within_class_whitening(data):
    rows, labels = data
    ours = baselines.within_class(rows, labels, ridge=0)
    within = (rows - np.stack([rows[labels == label].mean(axis=0) for label in range(5)])[labels]) @ ours.matrix
    assert np.allclose(within.T @ within / len(rows), np.eye(8))


def test_centring_takes_the_weighted_mean_away(data):
    rows, _ = data
    weights = np.random.default_rng(1).uniform(0, 2, len(rows))
    ours = baselines.centring(of_points(rows, weights))
    assert np.allclose(ours.offset, np.average(rows, axis=0, weights=weights))
    assert np.allclose(ours.apply(rows), unit(rows - ours.offset))


def test_none_and_published(data):
    rows, _ = data
    assert np.allclose(baselines.none(8).apply(rows), unit(rows))
    moments = of_points(rows) + of_pairs(rows, rows[::-1])
    vectors = np.linalg.eigh(moments.sigma - 2 * moments.sigma_delta)[1][:, :3]
    assert np.allclose(baselines.published(moments, 3, 2.0).apply(rows), unit(rows @ vectors))


def test_on_the_linear_model_labels_alone_fall_behind_pairs(world):
    """The shortcut is read off the labels, so what maximises it within training environments fails elsewhere."""
    model = world.Scm(0, width=32, invariant=8)
    points, labels = (np.concatenate(part) for part in zip(*[model.sample(e) for e in range(3)], strict=True))
    unseen, answers = model.sample(3, 1000)
    moments = of_points(points)
    for environment in range(3):
        moments = moments + of_pairs(*model.pairs(environment))

    def accuracy(baseline):
        return 100 * prototypes(baseline.apply(points), labels, baseline.apply(unseen), answers).mean()

    oracle = 100 * prototypes(unit(points @ model.oracle()), labels, unit(unseen @ model.oracle()), answers).mean()
    for baseline in (
        baselines.none(32),
        baselines.centring(moments),
        baselines.whitening(moments),
        baselines.pca(moments, 8),
        baselines.published(moments, 8, 10.0),
    ):
        assert accuracy(baseline) < oracle - 5, baseline.name
        assert baseline.name in baselines.BASELINES


def test_more_dimensions_than_images(data):
    rows, labels = data
    wide = np.concatenate([rows[:20], np.zeros((20, 40))], axis=1)
    for baseline in (
        baselines.whitening(of_points(wide)),
        baselines.within_class(wide, labels[:20]),
        baselines.lda(wide, labels[:20]),
    ):
        assert np.allclose(np.linalg.norm(baseline.apply(wide), axis=1), 1)


def test_refusals(data):
    rows, labels = data
    with pytest.raises(InputError, match="no image"):
        baselines.centring(empty(3))
    with pytest.raises(InputError, match="equal embeddings"):
        baselines.whitening(of_points(np.ones((5, 3))))
    with pytest.raises(InputError, match="300 vectors and 2 labels"):
        baselines.lda(rows, labels[:2])
    with pytest.raises(InputError, match="needs two at least, not 1"):
        baselines.within_class(rows, np.zeros_like(labels))
    with pytest.raises(InputError, match="no class has two images that differ"):
        baselines.within_class(rows, np.arange(len(rows)))
    with pytest.raises(ProjectionError, match="rank 5 is not from 1 to 4"):
        baselines.lda(rows, labels, 5)
    with pytest.raises(ProjectionError, match="rank 9 is not from 1 to 8"):
        baselines.pca(of_points(rows), 9)
    with pytest.raises(ProjectionError, match="width 3, not 8"):
        baselines.none(3).apply(rows)


def test_a_zero_row_stays_zero():
    assert (baselines.none(3).apply(np.zeros((1, 3))) == 0).all()
