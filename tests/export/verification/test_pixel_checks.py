"""An image's way to the tower: faults in the host's pixels and in a graph's own resize, planted and named."""

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

from invariclip.backends import open_backend
from invariclip.errors import InputError
from invariclip.export.checkpoints import check_texts
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.graphs import front as fronts
from invariclip.export.graphs.front import add_front
from invariclip.export.verification import evidence, pixel_checks, verify
from invariclip.export.verification.candidate import VerificationCandidate, prepare
from invariclip.export.verification.diagnose import pixel_causes
from invariclip.export.verification.pixel_checks import RawImages, TooLargeImageWarning, cut, pixel_levels
from invariclip.preprocessing import pixels as host
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import PixelSpec

SPEC = PixelSpec((224, 224), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


@pytest.fixture(scope="module")
def bundled():
    """A few of the bundled images; all of them are square."""
    return check_texts.spread(evidence.images_of(None, SPEC).paths, 8)


@given(st.integers(40, 500), st.integers(40, 500), st.sampled_from([32, 64, 224, 336]), st.booleans())
def test_a_cut_image_tells_rounding_from_cutting_off(width, height, side, upright):
    image = cut(Image.new("L", (width, height)), side, upright=upright)
    short, long = sorted(image.size)
    offset = (int(side * long / short) - side) / 2
    if image.size == (width, height):
        return  # too small for that; whether it was is the next test's
    assert image.mode == "L"
    assert round(offset) == math.floor(offset) + 1


@given(st.integers(100, 2000), st.sampled_from([32, 224, 384]), st.booleans())
def test_every_image_of_usual_size_can_be_cut(size, side, upright):
    assert cut(Image.new("L", (size, size)), side, upright=upright).size != (size, size)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("filter_", ["bicubic", "bilinear"])
def test_the_runtimes_pixels_are_open_clips(bundled, mode, filter_):
    assert pixel_levels(bundled, replace(SPEC, resize_mode=mode, interpolation=filter_)) == 0


def test_images_in_other_modes_too(tmp_path, bundled):
    for mode in ("P", "L", "RGBA", "LA"):
        Image.open(bundled[0]).convert(mode).save(tmp_path / f"{mode}.png")
    assert pixel_levels(find_images([tmp_path]), SPEC) == 0


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


# fault: (what is replaced, by what, levels that it costs at least on the bundled images, its name)
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
    job = prepare(loaded, tiny_projection, ("cat", "dog", "tree"), ("a photo of a {}.",))
    candidate = VerificationCandidate.open(tiny_artifact / "image.onnx", tiny_artifact / "text.onnx", job, threads=1)
    monkeypatch.setattr(host, "_crop_or_pad", floored)
    verdict = verify.check({"float32": candidate}, evidence.images_of(bundled, loaded.pixels))["float32"]
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


def added(form):
    """Puts a front of ours before an image graph."""

    def add(path, spec):
        model = ir.load(path)
        add_front(model, spec, form)
        ir.save(model, path)

    return add


def brighter(form, off):
    """The same, so many levels too bright."""
    writer = {"matmul": "write_products", "resize": "write_resize"}[form]

    kept = getattr(fronts, writer)

    def write(pen, image, axes, spec):
        whole = pen.op("Cast", kept(pen, image, axes, spec), to=TensorProto.FLOAT)
        whole = pen.op("Clip", pen.op("Add", whole, pen.real(off)), pen.real(0), pen.real(255))
        return whole if form == "matmul" else pen.op("Cast", whole, to=TensorProto.UINT8)

    def add(path, spec):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fronts, writer, write)
            added(form)(path, spec)

    return add


# name: (form, levels)
BRIGHTER = {"matmul, 1 off": ("matmul", 1), "matmul, 2 off": ("matmul", 2), "resize, 2 off": ("resize", 2)}
# name: (the engine, what gives a graph a resize of its own, the causes that are found)
FRONTS = {
    "honest": ("onnxruntime", lambda path, _: resizing(path), []),
    "float-first resize": (
        "onnxruntime", lambda path, _: resizing(path, floats=True),
        ["resize in the graph: it is resized in floats, not in bytes"],
    ),
    "floor crop": (
        "onnxruntime", lambda path, _: resizing(path, floor=True),
        ["resize in the graph: the crop's offset is cut off, not rounded"],
    ),
    "swapped channels": (
        "onnxruntime", lambda path, _: resizing(path, bgr=True),
        ["image: red and blue are swapped", "resize in the graph: red and blue are swapped"],
    ),
    "ours, resize": ("onnxruntime", added("resize"), []),
    "ours, matmul": ("onnxruntime", added("matmul"), []),
    "ours, matmul, in OpenVINO": ("openvino", added("matmul"), []),
}  # fmt: skip


@pytest.fixture(scope="module")
def contract(tiny_checkpoint, tiny_artifact, tiny_projection, bundled, tmp_path_factory):
    """The verdicts over the tiny artifact once each `damage(image path, pixels)` gave it a resize of its own."""
    loaded = load_checkpoint(str(tiny_checkpoint))
    job = prepare(loaded, tiny_projection, ("cat", "dog", "tree"), ("a photo of a {}.",))

    def of(fronts):
        candidates = {}
        for name, (backend, damage) in fronts.items():
            image = tmp_path_factory.mktemp("fronts") / "image.onnx"
            image.write_bytes((tiny_artifact / "image.onnx").read_bytes())
            damage(image, loaded.pixels)
            candidates[name] = VerificationCandidate.open(
                image, tiny_artifact / "text.onnx", job, backend=backend, threads=1
            )
        return verify.check(candidates, evidence.images_of(bundled, loaded.pixels))

    return of


@pytest.fixture(scope="module")
def opened():
    """The engines that fronts were opened with while `verdicts` came to be."""
    return []


@pytest.fixture(scope="module")
def verdicts(contract, opened):
    """All of them, held against one reference."""

    def counting(name, path, *, threads):
        opened.append(name)
        return open_backend(name, path, threads=threads)

    given = {name: (backend, damage) for name, (backend, damage, _) in FRONTS.items()}
    given |= {name: ("onnxruntime", brighter(*how)) for name, how in BRIGHTER.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixel_checks, "open_backend", counting)
        return contract(given)


@pytest.mark.parametrize("front", FRONTS)
def test_a_resize_in_the_graph_is_held_against_the_hosts(verdicts, front):
    verdict, causes = verdicts[front], FRONTS[front][2]
    assert verdict.causes == causes
    assert ("max_abs_diff" in verdict.parity["image"]["failed"]) == ("channels" in front)  # the rest is as prepared
    # the bound is the form's own, at every level of fidelity
    assert verdict.parity["thresholds"]["max_front_levels"] == (1 if "matmul" in front else 2)
    if causes:
        assert "front_levels" in verdict.parity["image"]["failed"]
        assert verdict.image.front_levels >= 4
    else:
        assert verdict.broken == []
        assert verdict.image.front_levels <= 1
        assert verdict.image.front_cosine > 0.9999


@pytest.mark.parametrize("front", BRIGHTER)
def test_each_form_is_held_to_what_it_keeps(verdicts, front):
    verdict, (form, off) = verdicts[front], BRIGHTER[front]
    assert verdict.image.front_levels == off
    too_far = off > verdict.parity["thresholds"]["max_front_levels"]
    assert too_far == ((form, off) == ("matmul", 2))
    assert ("front_levels" in verdict.parity["image"]["failed"]) == too_far
    if too_far:  # no level of fidelity loosens it
        assert verdict.parity["fidelity"] == []
        assert "resize in the graph, max levels from the host's pixels, 2 is above 1, by 1" in verdict.reason


def test_a_front_is_opened_once(verdicts, opened):
    assert len(verdicts) == len(FRONTS) + len(BRIGHTER)
    assert opened == [backend for backend, _, _ in FRONTS.values()] + ["onnxruntime"] * len(BRIGHTER)


def test_an_image_that_is_too_large_is_warned_of_and_counted(contract, bundled, monkeypatch):
    sides = {path: Image.open(path).size for path in bundled}
    most = max(width * height for width, height in sides.values()) - 1
    large = [path for path, (width, height) in sides.items() if width * height > most]
    assert len(large) > 0
    monkeypatch.setattr(pixel_checks, "_MAX_PIXELS", most)
    with pytest.warns(TooLargeImageWarning, match=f"not shown to the graph's own resize: .* is above {most:,}") as seen:
        (verdict,) = contract({"ours": ("onnxruntime", added("matmul"))}).values()
    assert len([one for one in seen if one.category is TooLargeImageWarning]) == len(large)
    assert verdict.parity["too_large_images"] == len(large)
    assert verdict.broken == []


def test_images_of_any_size_are_the_same_at_every_pass(bundled, monkeypatch):
    raw = RawImages(bundled, SPEC)
    passes = [list(raw), list(raw)]
    assert len(passes[0]) == len(passes[1]) == 2 * len(bundled)
    for one, other in zip(*passes, strict=True):
        np.testing.assert_array_equal(one, other)
    # a cut may be small enough where the whole is not
    monkeypatch.setattr(pixel_checks, "_MAX_PIXELS", max(one.shape[0] * one.shape[1] for one in passes[0][1::2]))
    with pytest.warns(TooLargeImageWarning):
        cuts = list(raw)
    assert len(cuts) == len(bundled)
    assert set(raw.too_large) == set(bundled)
    monkeypatch.setattr(pixel_checks, "_MAX_PIXELS", 10)
    with (
        pytest.warns(TooLargeImageWarning),
        pytest.raises(InputError, match=f"none of the {len(bundled)} images is small enough.*of up to 10 pixels"),
    ):
        list(RawImages(bundled, SPEC))
