"""A picture's way to the tower: faults in the host's pixels and in a graph's own resize, planted and named."""

import math
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from PIL import Image

from invariclip import pixels as host
from invariclip.export.contract import evidence, verify
from invariclip.export.contract.diagnose_pixels import pixel_causes
from invariclip.export.contract.pictures_check import cut, pixel_levels
from invariclip.export.graphs.front import add_front
from invariclip.export.models.checkpoint import load_checkpoint
from invariclip.pixels import PixelSpec, find_pictures

SPEC = PixelSpec((224, 224), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


@pytest.fixture(scope="module")
def bundled():
    """A few of the bundled pictures; all of them are square."""
    return evidence.spread(evidence.pictures_of(None, SPEC).paths, 8)


@given(st.integers(40, 500), st.integers(40, 500), st.sampled_from([32, 64, 224, 336]), st.booleans())
def test_a_cut_picture_tells_rounding_from_cutting_off(width, height, side, upright):
    image = cut(Image.new("L", (width, height)), side, upright=upright)
    short, long = sorted(image.size)
    offset = (int(side * long / short) - side) / 2
    if image.size == (width, height):
        return  # too small for that; whether it was is the next test's
    assert image.mode == "L"
    assert round(offset) == math.floor(offset) + 1


@given(st.integers(100, 2000), st.sampled_from([32, 224, 384]), st.booleans())
def test_every_picture_of_usual_size_can_be_cut(size, side, upright):
    assert cut(Image.new("L", (size, size)), side, upright=upright).size != (size, size)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("filter_", ["bicubic", "bilinear"])
def test_the_runtimes_pixels_are_open_clips(bundled, mode, filter_):
    assert pixel_levels(bundled, replace(SPEC, resize_mode=mode, interpolation=filter_)) == 0


def test_pictures_in_other_modes_too(tmp_path, bundled):
    for mode in ("P", "L", "RGBA", "LA"):
        Image.open(bundled[0]).convert(mode).save(tmp_path / f"{mode}.png")
    assert pixel_levels(find_pictures([tmp_path]), SPEC) == 0


def in_floats(image, spec):
    """What a resize of float32 channels gives, as a preprocessor on tensors does it."""
    channels = [Image.fromarray(part.astype(np.float32)) for part in np.asarray(image).transpose(2, 0, 1)]
    short, long = sorted(image.size)
    scaled = int(spec.image_size[0] * long / short)
    size = (spec.image_size[0], scaled) if image.width <= image.height else (scaled, spec.image_size[0])
    parts = [np.asarray(part.resize(size, Image.Resampling.BICUBIC)) for part in channels]
    whole = Image.fromarray(np.clip(np.round(np.stack(parts, -1)), 0, 255).astype(np.uint8))
    return host._crop_or_pad(whole, spec)


def floored(image, spec):
    left, top = ((image.width - spec.image_size[1]) // 2, (image.height - spec.image_size[0]) // 2)
    return image.crop((left, top, left + spec.image_size[1], top + spec.image_size[0]))


def swapped(image, spec, fit=host._fit):
    return Image.merge("RGB", fit(image, spec).split()[::-1])


# fault: (what is replaced, by what, levels that it costs at least on the bundled pictures, its name)
HOST_FAULTS = {
    "float-first resize": ("_fit", in_floats, 5, "pixels: it is resized in floats, not in bytes"),
    "floor crop": ("_crop_or_pad", floored, 60, "pixels: the crop's offset is cut off, not rounded"),
    "swapped channels": ("_fit", swapped, 60, "pixels: red and blue are swapped"),
}


@pytest.mark.parametrize("fault", HOST_FAULTS)
def test_a_fault_in_the_runtimes_pixels_is_found_and_named(bundled, monkeypatch, fault):
    name, replacement, least, words = HOST_FAULTS[fault]
    monkeypatch.setattr(host, name, replacement)
    assert pixel_levels(bundled, SPEC) >= least
    assert pixel_causes(bundled, SPEC) == [words]


def test_the_contract_fails_by_it(tiny_checkpoint, tiny_artifact, tiny_projection, bundled, monkeypatch):
    loaded = load_checkpoint(str(tiny_checkpoint))
    job = verify.prepare(loaded, tiny_projection, ("cat", "dog", "tree"), ("a photo of a {}.",))
    candidate = verify.Candidate.open(tiny_artifact / "image.onnx", tiny_artifact / "text.onnx", job, threads=1)
    monkeypatch.setattr(host, "_crop_or_pad", floored)
    verdict = verify.check({"float32": candidate}, evidence.pictures_of(bundled, loaded.pixels))["float32"]
    assert verdict.parity["image"]["failed"] == ["pixel_levels"]
    assert verdict.broken[0].startswith("image pixels, max levels from open_clip's transform, ")
    assert verdict.reason.endswith("; cause: pixels: the crop's offset is cut off, not rounded")


def resizing(path, *, floats=False, floor=False, bgr=False):
    """Puts a resize for any size before an image graph: right, or with a fault."""
    model = onnx.load(path)
    graph, nodes = model.graph, []
    side = graph.input[0].type.tensor_type.shape.dim[1].dim_value

    def constant(value, kind=np.int64):
        name = f"front_c{len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(np.array(value, kind), name))
        return name

    def op(kind, *inputs, out=None, **attributes):
        name = out or f"front_{len(nodes)}"
        nodes.append(onnx.helper.make_node(kind, list(inputs), [name], name=f"front_node_{len(nodes)}", **attributes))
        return name

    sides = op("Shape", "pixels", start=1, end=3)
    short = op("ReduceMin", sides, constant([0]))
    scaled = op("Div", op("Mul", sides, constant([side])), short)
    image = op("Cast", "pixels", to=TensorProto.FLOAT) if floats else "pixels"
    sizes = op("Concat", op("Shape", "pixels", end=1), scaled, constant([3]), axis=0)
    resize = {"mode": "cubic", "antialias": 1, "cubic_coeff_a": -0.5, "exclude_outside": 1}
    image = op("Resize", image, "", "", sizes, **resize)
    excess = op("Sub", scaled, constant([side]))
    start = op("Div", excess, constant([2]))
    if not floor:  # round half to even: up where the offset is odd and a half remains
        odd = op("Mul", op("Mod", start, constant([2])), op("Mod", excess, constant([2])))
        start = op("Add", start, odd)
    image = op("Slice", image, start, op("Add", start, constant([side])), constant([1, 2]))
    if bgr:
        image = op("Gather", image, constant([2, 1, 0]), axis=3)
    if floats:
        image = op("Clip", op("Round", image), constant(0, np.float32), constant(255, np.float32))
    op("Cast", image, out="front_fitted", to=TensorProto.UINT8)
    for node in graph.node:
        node.input[:] = ["front_fitted" if name == "pixels" else name for name in node.input]
    for node in reversed(nodes):
        graph.node.insert(0, node)
    for axis, name in ((1, "height"), (2, "width")):
        graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    del graph.value_info[:]
    onnx.save(model, path)


FRONTS = {
    "honest": ({}, []),
    "float-first resize": ({"floats": True}, ["resize in the graph: it is resized in floats, not in bytes"]),
    "floor crop": ({"floor": True}, ["resize in the graph: the crop's offset is cut off, not rounded"]),
    "swapped channels": (
        {"bgr": True},
        ["image: red and blue are swapped", "resize in the graph: red and blue are swapped"],
    ),
}


@pytest.fixture
def with_front(tiny_checkpoint, tiny_artifact, tiny_projection, bundled, tmp_path):
    """The verdict over the tiny artifact once `damage(image path)` gave it a resize of its own."""

    def of(damage, backend="onnxruntime"):
        loaded = load_checkpoint(str(tiny_checkpoint))
        (tmp_path / "image.onnx").write_bytes((tiny_artifact / "image.onnx").read_bytes())
        damage(tmp_path / "image.onnx", loaded.pixels)
        job = verify.prepare(loaded, tiny_projection, ("cat", "dog", "tree"), ("a photo of a {}.",))
        text = tiny_artifact / "text.onnx"
        candidate = verify.Candidate.open(tmp_path / "image.onnx", text, job, backend=backend, threads=1)
        return verify.check({"float32": candidate}, evidence.pictures_of(bundled, loaded.pixels))["float32"]

    return of


@pytest.mark.parametrize("front", FRONTS)
def test_a_resize_in_the_graph_is_held_against_the_hosts(with_front, front):
    faults, causes = FRONTS[front]
    verdict = with_front(lambda image, _: resizing(image, **faults))
    assert verdict.causes == causes
    assert ("max_abs_diff" in verdict.parity["image"]["failed"]) == ("channels" in front)  # the rest is as prepared
    if causes:
        assert "front_levels" in verdict.parity["image"]["failed"]
        assert verdict.image.front_levels >= 4
    else:
        assert verdict.broken == []
        assert verdict.image.front_levels <= 1
        assert verdict.image.front_cosine > 0.9999


@pytest.mark.parametrize(
    ("form", "backend"), [("resize", "onnxruntime"), ("matmul", "onnxruntime"), ("matmul", "openvino")]
)
def test_the_fronts_that_we_ship_pass(with_front, form, backend):
    def add(image, spec):
        model = ir.load(image)
        add_front(model, spec, form)
        ir.save(model, image)

    verdict = with_front(add, backend)
    assert verdict.broken == []
    assert verdict.image.front_levels <= 1
    assert verdict.image.front_cosine > 0.9999
