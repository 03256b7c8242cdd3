"""Maps from prompts of styles, each modality's mean, and IsoCLIP's middle of the spectrum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.artifact.projection import identity
from invariclip.calibrate.evaluation.baselines import BASELINES, PerModality, for_texts
from invariclip.calibrate.evaluation.text_baselines import (
    Projectors,
    embed_style_prompts,
    gr_clip,
    isoclip,
    prism_mini,
    spectrum,
    text_styles,
)
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


def prompts_of(seed, styles=4, classes=6, width=16, noise=0.0):
    """A style's direction in the first dimensions, a class's in the others."""
    rng = np.random.default_rng(seed)
    style = np.concatenate([rng.normal(size=(styles, styles)), np.zeros((styles, width - styles))], axis=1)
    content = np.concatenate([np.zeros((classes, styles)), rng.normal(size=(classes, width - styles))], axis=1)
    return style[:, None] + content[None] + noise * rng.normal(size=(styles, classes, width))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), styles=st.integers(2, 5), classes=st.integers(1, 6))
def test_what_styles_add_is_removed_and_the_class_is_not(seed, styles, classes):
    prompts = prompts_of(seed, styles, classes)
    what = text_styles(prompts)
    assert np.linalg.matrix_rank(what.matrix) == 16 - (styles - 1)
    shown = prompts @ what.matrix
    assert np.allclose(shown, shown[:1])
    rest = np.concatenate([np.zeros((3, styles)), np.random.default_rng(seed).normal(size=(3, 16 - styles))], axis=1)
    assert np.allclose(what.apply(rest), unit(rest))
    assert what.name in BASELINES


def test_more_directions_take_more_of_how_prompts_differ():
    prompts = prompts_of(0, noise=0.3)
    centred = (prompts - prompts.mean(axis=0)).reshape(-1, 16)
    left = [np.linalg.norm(centred @ text_styles(prompts, removed).matrix) for removed in (1, 3, 8, 15)]
    assert (np.diff(left) < 0).all()
    assert np.allclose(text_styles(prompts_of(0), 9).matrix, text_styles(prompts_of(0)).matrix)  # they span only three
    energies = np.linalg.svd(centred, compute_uv=False)
    assert left[1] == pytest.approx(np.linalg.norm(energies[3:]))  # no other three take as much


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), words=st.integers(1, 6))
def test_prism_mini_is_the_published_matrix_on_images_alone(seed, words):
    rng = np.random.default_rng(seed)
    V = unit(rng.normal(size=(words, 12))).T
    rows = rng.normal(size=(5, 12))
    what = prism_mini(V.T)
    wanted = np.eye(12) - V @ np.linalg.inv(V.T @ V) @ V.T
    assert np.allclose(what.apply(rows), unit(rows @ wanted))
    assert np.allclose(what.texts.apply(rows), unit(rows))
    assert what.images.name in BASELINES
    twice = prism_mini(np.concatenate([V.T, V.T]))
    assert np.allclose(twice.apply(rows), what.apply(rows))


def test_prompts_of_an_encoder(world):
    encoder = world.LinearEncoder()
    found = embed_style_prompts(encoder, ("a sketch", "a photo"), ("cat", "dog", "tree"))
    assert found.words.shape == (2, encoder.width)
    assert found.prompts.shape == (2, 3, encoder.width)
    one = encoder.encode_texts(encoder.tokenizer(["a photo of a dog."]))
    assert np.allclose(found.prompts[1, 1], unit(one)[0])


def test_refusals_of_style_prompts(world):
    encoder = world.LinearEncoder()
    with pytest.raises(InputError, match="two styles and a class at least, not 1 and 1"):
        embed_style_prompts(encoder, ("a photo",), ("cat",))
    with pytest.raises(InputError, match="two at least are needed, not 1"):
        text_styles(prompts_of(0)[:1])
    with pytest.raises(InputError, match="equal in every style"):
        text_styles(np.ones((3, 2, 4)))
    with pytest.raises(ProjectionError, match="16 directions cannot be removed of 16; choose from 1 to 15"):
        text_styles(prompts_of(0), 16)
    with pytest.raises(InputError, match="one spurious word"):
        prism_mini(np.ones((0, 4)))
    with pytest.raises(InputError, match="span all 4 dimensions"):
        prism_mini(np.eye(4))
