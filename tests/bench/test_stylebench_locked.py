"""The model of two locked towers: captions as its text tower reads them, and the matrix learnt between."""

import dataclasses

import numpy as np
import pytest
import torch

from invariclip.bench.stylebench import locked
from invariclip.bench.stylebench.manifest import Picture
from invariclip.bench.stylebench.reference import untrained
from invariclip.bench.stylebench.sources import STYLES
from invariclip.errors import CheckpointError
from invariclip.export.models.families import load_family

NAMES = ("ant", "bee", "cow", "dog")


def picture(name, style, split="train"):
    return Picture(
        f"{style}/{name}.webp", name, name, (), "Animals", style, split, split, "MIT", "0" * 64,
    )  # fmt: skip


@pytest.fixture
def module():
    return untrained(0)


def test_every_style_has_captions_of_its_own_and_they_are_cut_without_loss(monkeypatch):
    monkeypatch.setattr(locked, "PLAIN", locked.PLAIN[:1])
    monkeypatch.setattr(locked, "STYLED", locked.STYLED[:1])
    monkeypatch.setattr(locked, "STYLES", {name: STYLES[name] for name in ("noto", "openmoji")})
    checkpoint = load_family("roberta-ViT-B-32", short=True)
    found = locked._captions(checkpoint, list(NAMES))
    assert set(found) == {"", "noto"}  # no caption may describe a style that is held out
    assert found["noto"].shape[0] == len(STYLES["noto"].phrases)
    whole = checkpoint.encode_texts(checkpoint.tokenizer(["a picture of a dog."]))
    np.testing.assert_allclose(found[""][0, 3], whole[0] / np.linalg.norm(whole[0]), atol=1e-6)
    for rows in found.values():
        assert rows.shape[1] == len(NAMES)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=2), 1, atol=1e-6)


def test_pictures_are_learnt_by_the_matrix_and_nothing_else_moves(module):
    rng = np.random.default_rng(0)
    pictures = [picture(name, style) for name in NAMES for style in ("noto", "twemoji")]
    kinds = rng.normal(size=(len(NAMES), 512))
    features = np.stack([kinds[[NAMES.index(p.name) for p in pictures]] + 0.1 * rng.normal(size=(8, 512))] * 2)
    texts = rng.normal(size=(3, len(NAMES), 256))
    texts = (texts / np.linalg.norm(texts, axis=2, keepdims=True)).astype(np.float32)
    captions = dict.fromkeys(("", "noto", "twemoji"), texts[:1])
    trunk = {name: tensor.clone() for name, tensor in module.visual.trunk.state_dict().items()}
    settings = dataclasses.replace(locked.Settings(), steps=60, batch=8)
    log = locked.fit(module, features.astype(np.float32), pictures, captions, settings)
    assert log[-1]["step"] == 60
    assert log[-1]["loss"] < 0.2 < np.log(len(NAMES))
    images = features[0] @ module.visual.head.proj.weight.numpy().T
    assert [NAMES[place] for place in (images @ texts[0].T).argmax(axis=1)] == [p.name for p in pictures]
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in module.visual.trunk.state_dict().items())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_one_seed_gives_one_matrix():
    rng = np.random.default_rng(1)
    pictures = [picture(name, "noto") for name in NAMES]
    features = rng.normal(size=(1, 4, 512)).astype(np.float32)
    captions = {key: rng.normal(size=(1, 4, 256)).astype(np.float32) for key in ("", "noto")}
    settings = dataclasses.replace(locked.Settings(), steps=5, batch=4)
    found = []
    for seed in (7, 7, 8):
        module = untrained(0)
        locked.fit(module, features, pictures, captions, dataclasses.replace(settings, seed=seed))
        found.append(module.visual.head.proj.weight.numpy().copy())
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_weights_of_another_tower_are_refused(tmp_path):
    from safetensors.torch import save_file

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.text = torch.nn.Module()
            self.text.transformer = torch.nn.Linear(2, 2)

    save_file({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"model.safetensors does not fit its config: size mismatch for weight"):
        locked._fill(Tower(), tmp_path / "model.safetensors", tmp_path, 0)
