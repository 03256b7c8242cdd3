"""Projections from prompts: what they remove is gone, what is orthogonal to it stays, whatever the class."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.calibrate.evaluation.baselines import BASELINES
from invariclip.calibrate.evaluation.text_baselines import embed_style_prompts, prism_mini, text_styles
from invariclip.calibrate.projection.classifiers import unit
from invariclip.errors import InputError, ProjectionError


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


def test_refusals(world):
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
