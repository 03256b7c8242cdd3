"""Tiny open_clip models with every kind of last layer, written to folders and loaded once."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from invariclip.artifact.manifest import METADATA_KEY
from invariclip.export import graph_files
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.libraries import declare_missing_ops

declare_missing_ops()
torch.set_num_threads(2)

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
TIMM = {"image_size": 64, "timm_model_name": "resnet10t", "timm_pool": "avg"}
WIDTH = 24

# name: (vision_cfg, text_cfg, rest of the model_cfg, image fold, text fold)
ENDINGS = {
    "vit": (VIT, {}, {}, "folded", "folded"),
    "vit, mean pooled": ({**VIT, "pool_type": "avg", "final_ln_after_pool": True}, {}, {}, "folded", "folded"),
    "vit, quick_gelu": (VIT, {}, {"quick_gelu": True}, "folded", "folded"),
    "vit, sigmoid": (VIT, {}, {"init_logit_bias": -10.0, "init_logit_scale": 2.3}, "folded", "folded"),
    "resnet, attention pool with bias": (
        {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}, {}, {}, "folded", "folded",
    ),
    "timm, linear head": ({**TIMM, "timm_proj": "linear"}, {}, {}, "folded", "folded"),
    "timm, head with bias": ({**TIMM, "timm_proj": "linear", "timm_proj_bias": True}, {}, {}, "folded", "folded"),
    "timm, MLP head": ({**TIMM, "timm_proj": "mlp"}, {}, {}, "folded", "folded"),
    "timm, classifier as head": ({**TIMM, "timm_proj": ""}, {}, {}, "folded", "folded"),
    "timm, attention as head": ({**TIMM, "timm_pool": "rot_attn", "timm_proj": ""}, {}, {}, "matmul", "folded"),
    "text tower of its own": (VIT, {}, {"custom_text": True}, "folded", "folded"),
    "text projection with bias": (VIT, {"proj_bias": True}, {"custom_text": True}, "folded", "folded"),
    "text without projection": (VIT, {"proj_type": "none", "width": WIDTH}, {"custom_text": True}, "folded", "matmul"),
}  # fmt: skip


def write_model(folder, vision, text=None, rest=None, seed=0, preprocess=None):
    """A folder in open_clip's layout with seeded random weights; returns it as a string."""
    from open_clip.factory import create_model
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model_cfg = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": {**TEXT, **(text or {})}, **(rest or {})}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = create_model(f"local-dir:{folder}", load_weights=False)
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            # biases and batch norms that do something: zeros would hide a bias that was not folded
            if name.endswith(("bias", "running_mean")) and "logit" not in name:
                torch.nn.init.normal_(value, 0, 0.1)
            if name.endswith("bn3.weight"):
                torch.nn.init.constant_(value, 0.5)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Writes the model of an ending once: name to folder."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def folder(name):
        vision, text, rest, _, _ = ENDINGS[name]
        return write_model(root / name.replace(" ", "_").replace(",", ""), vision, text, rest)

    return folder


@pytest.fixture(scope="session")
def checkpoint(model_folder):
    """Loads the checkpoint of an ending once: name to Checkpoint."""
    return cache(lambda name: load_checkpoint(model_folder(name)))


@pytest.fixture(scope="session")
def batch():
    """Noise images for a checkpoint: uint8 [n, H, W, 3]."""

    def of(loaded, count=5, seed=0):
        rng = np.random.default_rng(seed)
        return rng.integers(0, 256, (count, *loaded.pixels.image_size, 3), dtype=np.uint8)

    return of


@pytest.fixture(scope="session")
def facts_in():
    """The artifact's facts that an ONNX file carries; of several the last ones count: path to facts."""

    def of(path):
        stored = {item.key: item.value for item in onnx.load(path, load_external_data=False).metadata_props}
        return json.loads(stored[METADATA_KEY])

    return of


@pytest.fixture(scope="session")
def write():
    """`write_model`, for tests that need a model of their own."""
    return write_model


@pytest.fixture
def vit():
    """The vision_cfg of the tiny ViT."""
    return dict(VIT)


# name: (vision_cfg, text_cfg, rest of the model_cfg); towers that rewrites treat differently, two blocks each
KINDS = {
    "clip": (VIT, {}, {}),
    "quick": ({**VIT, "ls_init_value": 0.1}, {"pool_type": "eos", "eos_id": 49407}, {"quick_gelu": True}),
    "mean": (
        {**VIT, "pool_type": "avg", "final_ln_after_pool": True},
        {"pool_type": "last", "no_causal_mask": True, "proj_bias": True},
        {"custom_text": True},
    ),
    "first": ({**VIT, "attentional_pool": True}, {"pool_type": "first", "no_causal_mask": True}, {"custom_text": True}),
    "last": ({**VIT, "qk_norm": True}, {"pool_type": "last"}, {"custom_text": True}),
    "coca": (VIT, {"embed_cls": True, "pad_id": 0}, {"custom_text": True}),
    "resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}, {}, {}),
    "stem": ({"timm_model_name": "resnet10t", "timm_pool": "avg", "image_size": 64}, {}, {}),
    "timm": ({"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}, {}, {}),
    "timm, mean": ({"timm_model_name": "test_vit", "timm_pool": "avg", "image_size": 160}, {}, {}),
    # as the published ones, whose projection is the trunk's own classifier
    "eva": (
        {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None, "image_size": 224},
        {}, {},
    ),
    "eva, norm": (
        {"timm_model_name": "eva02_base_patch16_clip_224", "timm_pool": "token", "timm_proj": None, "image_size": 224},
        {}, {},
    ),
    "pe": (
        {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map", "timm_proj": None, "image_size": 384},
        {}, {},
    ),
    "mobile": (
        {"timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": None, "image_size": 64}, {}, {},
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def kind(tmp_path_factory):
    """A tiny model of a kind whose every weight counts, loaded once: name to Checkpoint."""
    root = tmp_path_factory.mktemp("kinds")

    @cache
    def load(name):
        vision, text, rest = KINDS[name]
        folder = root / name.replace(", ", "_")
        folder.mkdir()
        config = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": {**TEXT, "layers": 2, **text}, **rest}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        return load_checkpoint(str(folder), allow_random=True, short=True)

    return load


@pytest.fixture(scope="session", autouse=True)
def translations_once():
    """torch reads its table of translations anew for every export, a sixth of a tiny tower's time: once is enough."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            from torch.onnx._internal.exporter._registration import ONNXRegistry
        except ImportError:  # it is torch's own affair where that lies; then tests are slower
            pass
        else:
            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session", autouse=True)
def towers_once():
    """The same tower of the same `Checkpoint`, exported again for another test, is not traced again."""
    done = {}

    def once(checkpoint, tower, projection=None, **options):
        key = (checkpoint, tower, None if projection is None else projection.digest, repr(sorted(options.items())))
        if key not in done:
            done[key] = tower_graph(checkpoint, tower, projection, **options)
        # a copy, because a head and a front are put on
        return replace(done[key], model=ir.from_proto(ir.to_proto(done[key].model)))

    with pytest.MonkeyPatch.context() as patch:
        # where `graph_files` gets its graphs from elsewhere, tests are slower and no less
        patch.setattr(graph_files, "tower_graph", once, raising=False)
        yield
