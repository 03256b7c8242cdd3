"""What `export` can do beside the plain case, as a user types it, and what `inspect --plan` says of it afterwards."""

import json

import numpy as np
import onnx
import pytest
from PIL import Image

import invariclip
from invariclip.artifact.folder import read_manifest
from invariclip.backends import open_backend
from invariclip.errors import InputError
from invariclip.preprocessing.pixels import pixels


def test_a_graph_of_any_size_with_a_rewrite_left_out(run, tiny_checkpoint, tiny_images, tmp_path):
    out = tmp_path / "x.icm"
    code, stdout, err = run(
        "export", "--model", tiny_checkpoint, "--images", tiny_images, "--pixels-in-graph", "matmul", "--without",
        "text-cut", "--without", "tidy", "--backend", "onnxruntime", "--backend", "openvino", "-o", out, "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "float32 on openvino" in stdout
    assert "resize in the graph" in stdout
    variant = read_manifest(out).variants["float32"]
    assert (variant.text_length, variant.front) == ("fixed", "matmul")
    assert sorted(variant.parity) == ["onnxruntime", "openvino"]
    assert all(record["passed"] for record in variant.parity.values())

    code, plan, _ = run("inspect", out, "--plan")
    assert code == 0
    rows = {tuple(line.split()[:2]): line for line in plan.splitlines()[2:]}
    assert "not applied  switched off" in rows["text", "text-cut"]
    assert "not applied  switched off" in rows["image", "tidy"]
    assert "applied      2 blocks" in rows["image", "plain-attention"]
    assert "scale and shift, into 1 convolution" in rows["image", "normalisation"]
    assert "patches of" in rows["image", "patch-product"]
    code, plain, _ = run("inspect", out, "--plan", "--json")
    steps = json.loads(plain)["text"]
    assert {"name": "text-cut", "applied": False, "detail": "switched off"} in steps

    # the graph alone gives a portrait image, as it is decoded, the answer that the runtime gives the file
    image = np.asarray(Image.open(tiny_images / "03.png").convert("RGB"))
    backend = open_backend("onnxruntime", out / "image.onnx")
    alone = backend.run({"pixels": image[None]}, ("embedding",))["embedding"]
    assert np.abs(alone - invariclip.load(out).embed_images([tiny_images / "03.png"])).max() < 2e-2


def test_the_plan_of_a_plain_export(tiny_artifact):
    manifest = read_manifest(tiny_artifact)
    variant = manifest.variants["float32"]
    assert (variant.text_length, variant.front) == ("dynamic", "host")
    assert {tower: [step.name for step in steps if step.applied] for tower, steps in manifest.plan.items()} == {
        "image": ["plain-attention", "attention-biases", "pooled-last-block", "normalisation", "patch-product"],
        "text": ["plain-attention", "attention-biases", "pooled-last-block", "text-cut", "plain-pooling", "tidy"],
    }
    stored = {item.key: item.value for item in onnx.load(tiny_artifact / "text.onnx").metadata_props}
    assert json.loads(stored["invariclip"])["plan"] == manifest.to_json()["plan"]
    kinds = {node.op_type for node in onnx.load(tiny_artifact / "text.onnx").graph.node}
    assert "GatherND" not in kinds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--without", "magic"], "no rewrite is called 'magic'; available: reparameterized, plain-attention, "),
        (["--backend", "tpu"], "no backend is called 'tpu'; available: onnxruntime, openvino"),
        (["--pixels-in-graph", "magic"], "'magic' is not one of 'resize', 'matmul'"),
    ],
)
def test_mistakes_are_one_line(run, tiny_checkpoint, tmp_path, options, words):
    code, out, err = run("export", "--model", tiny_checkpoint, *options, "-o", tmp_path / "x.icm", "--quiet")
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x.icm").exists()


def red_and_blue_swapped_where_fast(data, spec, mode="exact"):
    return pixels(data, spec)[..., :: 1 if mode == "exact" else -1]


def test_the_fast_pixel_mode_is_proved_where_it_is_asked_for(run, tiny_checkpoint, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr("invariclip.export.verification.pixel_checks.SHOWN", 2)
    out = tmp_path / "x.icm"
    wanted = ("export", "--model", tiny_checkpoint, "--images", tiny_images, "--fast-pixels", "-o", out, "--quiet")
    code, stdout, err = run(*wanted)
    assert (code, err) == (0, "")
    assert "fast pixels on 6 JPEGs: passed; cosine to the exact mode at least 0.99" in stdout
    record = read_manifest(out).fast_pixels
    assert (record["passed"], record["broken"], record["items"], record["sizes"][0]) == (True, [], 6, [640, 480])
    assert record["cosine_min"] >= record["min_cosine"] == 0.985
    assert invariclip.load(out, pixel_mode="fast").describe()["pixel_mode"] == "fast"

    monkeypatch.setattr("invariclip.export.verification.pixel_checks.pixels", red_and_blue_swapped_where_fast)
    code, stdout, err = run(*wanted)
    assert (code, err.count("\n")) == (0, 1)
    assert "the fast pixel mode is left out: cosine to the exact mode" in err
    assert "left out: cosine to the exact mode" in stdout
    with pytest.raises(InputError, match=r"the fast pixel mode failed \(cosine"):
        invariclip.load(out, pixel_mode="fast")
