"""Maps that differ between images and texts: each modality's mean, and IsoCLIP's middle of the spectrum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.artifact.projection import identity
from invariclip.calibrate.evaluation.baselines import BASELINES, PerModality, for_texts
from invariclip.calibrate.evaluation.text_baselines import Projectors, gr_clip, isoclip, spectrum
from invariclip.calibrate.projection.classifiers import unit, zero_shot
from invariclip.errors import InputError, ProjectionError


def layers_of(seed, D=16, image=24, text=12):
    rng = np.random.default_rng(seed)
    return Projectors(rng.normal(size=(D, image)), rng.normal(size=(D, text)))


def test_each_modality_loses_its_own_mean_and_with_it_the_gap():
    rng = np.random.default_rng(0)
    gap = 4 * np.eye(8)[0]
    shared = rng.normal(size=(50, 8))
    images, texts = unit(shared + gap), unit(shared - gap)
    what = gr_clip(images, texts)
    assert np.allclose(what.apply(images), unit(images - images.mean(axis=0)))
    assert np.allclose(what.texts.apply(texts), unit(texts - texts.mean(axis=0)))
    labels = np.arange(50)
    before = zero_shot(images, labels, texts).mean()
    assert zero_shot(what.apply(images), labels, for_texts(what).apply(texts)).mean() > before + 0.5
    # one mean for both leaves the gap where it was
    assert zero_shot(what.apply(images), labels, what.images.apply(texts)).mean() < before + 0.5
    assert what.images.name in BASELINES


def test_a_map_without_modalities_is_its_own_for_texts():
    plain = identity(4)
    assert for_texts(plain) is plain
    both = PerModality(plain, identity(5))
    assert for_texts(both) is both.texts


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    D=st.integers(4, 20),
    image=st.integers(3, 30),
    text=st.integers(3, 30),
    share=st.floats(0, 1),
)
def test_isoclip_on_embeddings_is_the_papers_layer_on_what_comes_before(seed, D, image, text, share):
    layers = layers_of(seed, D, image, text)
    most = min(D, image, text)
    assert len(spectrum(layers)) == most
    rank = max(1, round(share * most))
    left, _, right = np.linalg.svd(layers.image.T @ layers.text)
    top = round((most - rank) * 0.75)
    what = isoclip(layers, rank)
    rng = np.random.default_rng(seed)
    for own, layer, axes in ((what.images, layers.image, left), (what.texts, layers.text, right.T)):
        before = rng.normal(size=(5, layer.shape[1]))
        kept = axes[:, top : top + rank]
        wanted = before @ (layer @ kept @ kept.T).T
        np.testing.assert_allclose(own.apply(unit(before @ layer.T)), unit(wanted), atol=1e-6)
        assert np.linalg.matrix_rank(own.matrix) == rank
        np.testing.assert_allclose(own.matrix @ own.matrix, own.matrix, atol=1e-6 * np.abs(own.matrix).max() ** 2)


def test_by_default_the_published_shares_are_dropped_and_all_directions_are_no_change_within_their_span():
    layers = Projectors(*np.random.default_rng(0).normal(size=(2, 40, 64)))
    assert np.linalg.matrix_rank(isoclip(layers).images.matrix) == 40 - round(40 * 150 / 512) - round(40 * 50 / 512)
    assert np.allclose(isoclip(layers, 40).images.matrix, np.eye(40))
    assert np.allclose(isoclip(layers, 40).texts.matrix, np.eye(40))


def test_refusals():
    with pytest.raises(InputError, match="one embedding at least"):
        gr_clip(np.ones((3, 4)), np.ones((0, 4)))
    with pytest.raises(ProjectionError, match="images are 4 wide and texts 5"):
        gr_clip(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(ProjectionError, match="rank 13 is not from 1 to 12"):
        isoclip(layers_of(0), 13)
    with pytest.raises(ProjectionError, match="images end in 3 dimensions, but texts in 4"):
        isoclip(Projectors(np.ones((3, 4)), np.ones((4, 4))))
