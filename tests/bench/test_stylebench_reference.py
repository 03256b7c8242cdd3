"""The reference folder is a genuine open_clip model, and as accurate as its record says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from invariclip.bench.stylebench.manifest import read_manifest
from invariclip.bench.stylebench.reference import CONFIG, encode_texts, load_reference, tokenizer
from invariclip.bench.stylebench.sources import HELD_OUT_STYLES, PACKAGES, TRAINING_STYLES
from invariclip.export import reference
from invariclip.export.models.torchvision_ops import declare_missing_ops
from invariclip.files import sha256_file

RECORD = json.loads(reference.record_path().read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model():
    return load_reference(reference.checkpoint_folder())


def test_config_is_what_the_script_writes():
    assert json.loads(reference.config_path().read_text(encoding="utf-8")) == CONFIG


def test_the_record_belongs_to_these_weights_and_sources():
    assert RECORD["weights_sha256"] == sha256_file(reference.checkpoint_path())
    assert RECORD["packages"] == {p.name: {"version": p.version, "sha256": p.sha256} for p in PACKAGES.values()}
    assert RECORD["learnt_from"]["styles"] == list(TRAINING_STYLES)
    assert set(RECORD["accuracy"]["prototypes"]) == set(HELD_OUT_STYLES)


def test_cut_texts_embed_as_open_clip_embeds_whole_ones(model):
    tokens = tokenizer()(["a picture of a lion.", "key", "a 3D render of a glass of milk, white."])
    with torch.no_grad():
        whole = model.encode_text(tokens, normalize=True)
        assert torch.allclose(encode_texts(model, tokens), whole, atol=1e-6)


@pytest.mark.parametrize("style", ["twemoji", "openmoji"])
def test_logged_accuracy_is_reproduced_by_open_clip_alone(style: str):
    declare_missing_ops()
    import open_clip

    location = f"local-dir:{reference.checkpoint_folder()}"
    model, transform = open_clip.create_model_from_pretrained(location)
    tokenize = open_clip.get_tokenizer(location)
    everything = read_manifest(reference.manifest_path())
    names = dict(sorted({p.concept: p.name for p in everything}.items()))
    pictures = [p for p in everything if p.style == style]
    root = reference.manifest_path().parent
    batch = torch.stack([transform(Image.open(root / p.file)) for p in pictures])
    with torch.no_grad():
        texts = model.eval().encode_text(tokenize([f"a picture of a {n}." for n in names.values()]), normalize=True)
        best = (model.encode_image(batch, normalize=True) @ texts.T).argmax(dim=1).tolist()
    hits = np.mean([list(names)[k] == p.concept for k, p in zip(best, pictures, strict=True)])
    # one picture of slack: convolutions differ in the last digits from one CPU to the next
    assert hits == pytest.approx(RECORD["bundled"]["zero_shot"][style]["all"], abs=1.01 / len(pictures))
