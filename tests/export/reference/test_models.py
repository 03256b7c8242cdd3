"""The reference model: put together from its parts, and open_clip alone loads it and finds it as good as its record."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from invariclip.errors import CheckpointError
from invariclip.export import reference
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.libraries import declare_missing_ops
from invariclip.export.reference import models
from invariclip.files import sha256_file
from invariclip.preprocessing.pixels import stack

RECIPE = reference.RECIPES["reference"]
RECORD = json.loads((RECIPE.folder / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(reference_folder, tmp_path_factory) -> Any:
    """Loaded by open_clip alone; without a hub it must be told that the text tower's config lies beside the weights."""
    declare_missing_ops()
    import open_clip

    folder = tmp_path_factory.mktemp("reference")
    for path in reference_folder.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / models.CONFIG_FILE).read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"] |= {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    (folder / models.CONFIG_FILE).unlink()
    (folder / models.CONFIG_FILE).write_text(json.dumps(config))
    location = f"local-dir:{folder}"
    loaded, transform = open_clip.create_model_from_pretrained(location)
    return loaded.eval(), transform, open_clip.get_tokenizer(location)


def shown(style: str) -> list[dict[str, str]]:
    lines = reference.manifest_path().read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["style"] == style]


def test_the_record_belongs_to_what_was_learnt():
    assert RECORD["learnt_sha256"] == sha256_file(RECIPE.folder / models.LEARNT_FILE)
    for package in (RECIPE.image, RECIPE.text):
        assert RECORD["packages"][package.name]["sha256"] == package.sha256


def test_what_is_committed_is_small():
    assert sum(path.stat().st_size for path in RECIPE.folder.iterdir()) < 4e6


def test_an_image_embedding_is_the_trunks_features_moved(model):
    module, transform, _ = model
    batch = torch.stack(
        [transform(Image.open(reference.manifest_path().parent / e["file"])) for e in shown("noto")[:3]]
    )
    with torch.no_grad():
        moved = module.encode_image(batch) - module.visual.head.proj.bias
        assert torch.allclose(moved, module.visual.trunk(batch), atol=1e-4)


def test_open_clip_alone_names_drawings_and_photographs(model):
    module, transform, tokenize = model
    root = reference.manifest_path().parent
    for style, least in (("noto", 0.4), ("photograph", 0.35)):
        entries = shown(style)[:80]
        names = sorted({entry["name"] for entry in entries})
        with torch.no_grad():
            texts = module.encode_text(tokenize([f"a picture of a {name}." for name in names]), normalize=True)
            images = torch.stack([transform(Image.open(root / entry["file"]).convert("RGB")) for entry in entries])
            best = (module.encode_image(images, normalize=True) @ texts.T).argmax(dim=1).tolist()
        right = np.mean([names[k] == entry["name"] for k, entry in zip(best, entries, strict=True)])
        assert right > least, style


def test_the_loader_reads_it_as_open_clip_does(model):
    module, transform, tokenize = model
    checkpoint = load_checkpoint("reference")
    path = reference.manifest_path().parent / shown("photograph")[0]["file"]
    with torch.no_grad():
        whole = module.encode_image(transform(Image.open(path))[None]).numpy()
        texts = module.encode_text(tokenize(["a photo of a dog"])).numpy()
    assert np.allclose(checkpoint.encode_images(stack([path], checkpoint.pixels)), whole, atol=1e-4)
    assert np.allclose(checkpoint.encode_texts(checkpoint.tokenizer(["a photo of a dog"])), texts, atol=1e-5)
    assert checkpoint.logit_scale == pytest.approx(RECORD["logit_scale"], rel=1e-5)


def test_without_the_learnt_part_it_says_where_that_is(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "LEARNT_FILE", "nothing.safetensors")
    with pytest.raises(CheckpointError, match="in the repository, not in the wheel"):
        models.assembled("reference", tmp_path)


def test_a_file_of_another_network_is_refused(tmp_path):
    path = tmp_path / models.LITE2_FILE
    path.parent.mkdir(parents=True)
    torch.save({"_conv_stem.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="does not hold the tensors"):
        models.lite2_weights(tmp_path)


def test_the_cache_is_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path / "here"))
    assert reference.cache_folder() == tmp_path / "here"
