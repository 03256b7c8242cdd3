"""The reference model, trained weights and all: both towers, every engine, as the parity command measures them.

The families' full sizes are that command's (`python -m invariclip.bench.studies.parity`): minutes, not seconds.
"""

import numpy as np
import pytest

from invariclip.bench.studies.parity import family as family_parity
from invariclip.export.checkpoints.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def loaded(reference_folder):
    del reference_folder
    return load_checkpoint("reference")


@pytest.fixture(scope="module")
def measured(loaded):
    """The bundled checkpoint under a family's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family_parity, "load_family", lambda name, seed: loaded)
        return family_parity.family_parity("ViT-B-32")


def test_the_bundled_checkpoint_is_within_every_bound(measured, loaded):
    assert loaded.embed_dim >= 64
    assert [tower.tower for tower in measured.towers] == ["image", "text"]
    image, text = measured.towers
    for tower in measured.towers:
        assert set(tower.diffs) == set(family_parity.ENGINES)
        assert all(len(values) == len(family_parity.SIZES) for values in tower.diffs.values())
        assert max(max(values) for values in tower.diffs.values()) <= 1e-5 < tower.spread
        assert tower.fold == "folded"
        assert tower.seconds > 0
    assert image.cut_diff is None
    assert text.cut_diff <= 1e-5
    if all(tower.tensorrt.startswith("built") for tower in measured.towers):
        assert measured.broken == []
    else:
        assert all("pip install" in tower.tensorrt for tower in measured.towers)


def test_its_memory_is_told(measured, loaded):
    weights = sum(value.numel() * value.element_size() for value in loaded.module.state_dict().values())
    assert measured.weights == weights
    assert measured.peak > weights
    assert 0 < sum(tower.weights for tower in measured.towers) < weights


def test_a_difference_that_is_not_a_number_breaks_every_bound():
    assert family_parity._diff(np.array([[np.nan]]), np.zeros((1, 1))) == float("inf")
    assert family_parity._diff(np.array([[1.5]], dtype=np.float32), np.ones((1, 1))) == 0.5
