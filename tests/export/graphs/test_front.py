"""Pixels in the graph: against Pillow on awkward sizes, at the tower's own size, per engine, and what is refused."""

from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.errors import ArtifactError, InputError
from invariclip.export.checkpoints.check_texts import spread
from invariclip.export.graphs.front import BOUNDS, FITTED, TALLEST, add_front, form_of, front_alone
from invariclip.export.reference import images_path
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import PixelSpec, open_image, pixels

FORMS, FILTERS = ("matmul", "resize"), ("bicubic", "bilinear")
# height, width: non-square, portrait, odd, tiny, whole and half multiples, one and three pixels beside the tower's 64
SIZES = [
    (48, 64), (120, 90), (90, 120), (37, 1000), (1000, 37), (333, 251), (5, 7), (1, 1), (1, 9), (63, 64), (65, 64),
    (128, 192), (96, 112), (480, 640), (256, 64), (21, 32), (64, 67), (67, 64),
]  # fmt: skip


def spec_of(size=64, filter_="bicubic", mode="shortest"):
    size = (size, size) if isinstance(size, int) else size
    return PixelSpec(size, (0.5,) * 3, (0.5,) * 3, interpolation=filter_, resize_mode=mode)


def tower(spec, opset=20, consumer="Cast"):
    """A graph that takes images as the towers do and answers them as floats."""
    height, width = spec.image_size
    info = onnx.helper.make_tensor_value_info
    outputs = [info("out", onnx.TensorProto.FLOAT, ["batch", height, width, 3])]
    nodes = [onnx.helper.make_node("Cast", ["pixels"], ["floats"], to=1)]
    if consumer != "Cast":  # someone who wants the bytes themselves
        nodes = [onnx.helper.make_node("Identity", ["pixels"], ["bytes"]), *nodes]
        nodes[1].input[0] = "bytes"
        outputs.append(info("bytes", onnx.TensorProto.UINT8, ["batch", height, width, 3]))
    nodes.append(onnx.helper.make_node("Div", ["floats", "scale"], ["out"]))
    graph = onnx.helper.make_graph(
        nodes,
        "tower",
        [info("pixels", onnx.TensorProto.UINT8, ["batch", height, width, 3])],
        outputs,
        [onnx.helper.make_tensor("scale", 1, [], [255.0])],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    return ir.from_proto(proto)


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    file = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@cache
def front(spec, form):
    """The front alone, as a function of a batch."""
    model = tower(spec)
    add_front(model, spec, form)
    ready = session(front_alone(model))
    return lambda batch: ready.run(None, {"pixels": batch})[0]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image(height, width, kind, seed=0):
    """Noise, black and white (whose sums overshoot a byte), or waves."""
    if kind == "noise":
        return noise(height, width, seed)
    if kind == "black and white":
        return noise(height, width, seed) // 128 * 255
    y, x = np.mgrid[0:height, 0:width]
    wave = np.stack([np.sin(x / (3 + seed % 5) + k) + np.cos(y / (2 + k)) for k in range(3)], axis=-1)
    return ((wave + 2) / 4 * 255).astype(np.uint8)


KINDS = ("noise", "black and white", "waves")


def apart(run, image, spec):
    """How many levels a front is off the host at most, and the share of values that differ; of one image.

    It is converted to RGB first, because that is what a front takes: the host resizes a palette or a transparent
    image in the mode it is stored in, which is no fault of the front.
    """
    whole = open_image(image).convert("RGB")
    wanted, got = pixels(whole, spec), np.asarray(run(np.asarray(whole)[None]))
    assert got.shape == (1, *wanted.shape)
    assert ((got >= 0) & (got <= 255) & (got == np.floor(got))).all()  # whole numbers; NaN compares false
    difference = np.abs(got[0].astype(np.int16) - wanted)
    return int(difference.max()), np.count_nonzero(difference) / difference.size


def within(found, form, filter_):
    bounds = BOUNDS[form, filter_]
    return found[0] <= bounds.max_levels and found[1] <= bounds.share_off


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("form", FORMS)
def test_awkward_sizes_keep_their_bounds(form, filter_, mode):
    spec = spec_of(64, filter_, mode)
    for height, width in SIZES:
        for kind in KINDS:
            found = apart(front(spec, form), image(height, width, kind), spec)
            assert within(found, form, filter_), (height, width, kind)
            if form == "matmul":
                assert found[0] == 0, (height, width, kind)


@given(
    height=st.integers(1, 300),
    width=st.integers(3, 400),  # Pillow goes another way above 100 times as tall as wide
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
    spec=st.builds(
        spec_of, st.sampled_from([32, 48, (32, 40)]), st.sampled_from(FILTERS), st.sampled_from(["shortest", "squash"])
    ),
    form=st.sampled_from(FORMS),
)
@settings(max_examples=150, deadline=None)
def test_any_size_keeps_its_bounds(height, width, kind, seed, spec, form):
    if spec.resize_mode == "shortest" and spec.image_size == (32, 40):
        spec = spec_of(40, spec.interpolation)
    found = apart(front(spec, form), image(height, width, kind, seed), spec)
    assert within(found, form, spec.interpolation), found


@given(size=st.sampled_from([32, 64, 224]), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_prepared_image_passes_unchanged(size, kind, seed):
    given_ = image(size, size, kind, seed)
    for form in FORMS:
        for filter_ in FILTERS:
            for mode in ("shortest", "squash"):
                np.testing.assert_array_equal(front(spec_of(size, filter_, mode), form)(given_[None])[0], given_)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("filter_", FILTERS)
def test_real_images(form, filter_):
    spec = spec_of(224, filter_)
    found = [apart(front(spec, form), path, spec) for path in spread(find_images([images_path()]), 8)]
    assert len(found) == 8
    assert all(within(one, form, filter_) for one in found)
    assert form == "resize" or {levels for levels, _ in found} == {0}


@pytest.mark.parametrize("form", FORMS)
def test_twelve_megapixels(form):
    spec = spec_of(224)
    found = apart(front(spec, form), noise(3000, 4000), spec)
    assert within(found, form, "bicubic")
    assert form == "resize" or found[0] == 0


def test_a_panorama_costs_only_what_the_crop_sees():
    # only some 66 columns reach the products; for all places the weights alone would be 64 x 200,001 x 8 bytes
    spec = spec_of(64)
    wide = noise(64, 200_001)
    np.testing.assert_array_equal(front(spec, "matmul")(wide[None])[0], wide[:, 99_968 : 99_968 + 64])
    tall = noise(4, 30_000).transpose(1, 0, 2)
    # the host would make 64 x 480,000 pixels of it; what the crop sees is the same on a shorter image
    short = tall[15_000 - 50 : 15_000 + 50]
    np.testing.assert_array_equal(front(spec, "matmul")(tall[None])[0], pixels(np.ascontiguousarray(short), spec))


@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("given_", [1, 2, 5, 63, 64, 65, 100, 128, 251, 1000])
def test_weights_are_pillows_and_fit_eleven_bits(filter_, given_):
    # 11 bits are what TensorFloat-32 keeps of a float32
    spec = spec_of(64, filter_, "squash")
    model = tower(spec)
    add_front(model, spec, "matmul")
    alone = front_alone(model)
    products = [node for node in alone.graph if node.op_type == "MatMul"]
    parts = [products[2].inputs[0], products[3].inputs[0]]
    alone.graph.outputs.extend(parts)
    _, high, low = session(alone).run(None, {"pixels": noise(given_, 64)[None]})
    for part in (high, low):
        np.testing.assert_array_equal(part, np.round(part))
        assert np.abs(part).max() <= 2048
    np.testing.assert_array_equal(high.astype(int) * 4096 + low.astype(int), pillow_weights(given_, 64, filter_))


def pillow_weights(given_, kept, filter_):
    """Pillow's precompute_coeffs and normalize_coeffs_8bpc, in float64: int [kept, given]."""
    scale = given_ / kept
    stretch = max(scale, 1.0)
    support = (2 if filter_ == "bicubic" else 1) * stretch
    table = np.zeros((kept, given_), dtype=int)
    for place in range(kept):
        centre = (place + 0.5) * scale
        first, end = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), given_)
        t = np.abs((np.arange(first, end) - centre + 0.5) / stretch)
        if filter_ == "bilinear":
            row = np.maximum(1 - t, 0)
        else:
            row = np.where(t < 1, (1.5 * t - 2.5) * t * t + 1, np.where(t < 2, -0.5 * (((t - 5) * t + 8) * t - 4), 0))
        row = row / row.sum() * 2**22
        table[place, first:end] = np.trunc(row + np.copysign(0.5, row))
    return table


def test_what_is_said_of_very_tall_images_is_so():
    spec = spec_of(64, mode="squash")
    assert TALLEST == 100
    assert apart(front(spec, "matmul"), image(100 * 8, 8, "black and white"), spec)[0] == 0
    assert 1 < apart(front(spec, "matmul"), image(100 * 8 + 1, 8, "black and white"), spec)[0] <= 40


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_is_valid_and_the_tower_sees_the_pixels(form):
    spec = spec_of(64)
    for consumer in ("Cast", "bytes"):
        model = tower(spec, consumer=consumer)
        add_front(model, spec, form)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
        shape = [side.dim_param or side.dim_value for side in inferred.graph.input[0].type.tensor_type.shape.dim]
        assert shape == ["batch", "height", "width", 3]
        added = [node.name for node in proto.graph.node if node.name.startswith("front_")]
        assert len(added) >= len(proto.graph.node) - 3
        batch = np.stack([noise(90, 70, seed) for seed in range(3)])
        got = session(model).run(None, {"pixels": batch})[0]
        wanted = np.stack([pixels(one, spec) for one in batch]) / np.float32(255)
        assert np.abs(got - wanted).max() <= (0 if form == "matmul" else BOUNDS[form, "bicubic"].max_levels / 255)


@pytest.fixture(scope="module")
def real(checkpoint):
    """A tiny real tower: makes the graph anew from its file, and knows its pixels."""
    from invariclip.export.graphs.tower_graph import tower_graph

    loaded = checkpoint("vit")
    file = ir.to_proto(tower_graph(loaded, "image").model).SerializeToString()
    return (lambda: ir.from_proto(onnx.load_from_string(file))), loaded.pixels


def test_a_real_tower_answers_a_raw_image_like_a_prepared_one(real):
    made, spec = real
    model = made()
    prepared = session(model)
    add_front(model, spec, "matmul")
    # the tower asks for its batch too, which must not bring bytes back in: TensorRT has none inside a graph
    assert [node.name for node in model.graph if node.op_type == "Cast" and node.attributes["to"].as_int() == 2] == []
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    raw = noise(111, 77)
    got = session(model).run(["embedding"], {"pixels": raw[None]})[0]
    wanted = prepared.run(["embedding"], {"pixels": pixels(raw, spec)[None]})[0]
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("filter_", FILTERS)
def test_openvino_runs_the_matmul_form(filter_):
    openvino = pytest.importorskip("openvino")
    spec = spec_of(64, filter_)
    model = tower(spec)
    add_front(model, spec, "matmul")
    core = openvino.Core()
    # bfloat16, which OpenVINO takes on CPUs that have it, would be two levels off
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(ir.to_proto(front_alone(model)).SerializeToString()), "CPU", exact)
    assert {apart(lambda batch: compiled(batch)[0], noise(*size), spec)[0] for size in SIZES} == {0}


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_tensorrt_builds_the_matmul_form(mode, real):
    trt = pytest.importorskip("tensorrt_rtx")
    made, spec = real
    model = made()
    add_front(model, replace(spec, resize_mode=mode), "matmul")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(ir.to_proto(model).SerializeToString()), [
        parser.get_error(place).desc() for place in range(parser.num_errors)
    ]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("pixels", (1, 32, 32, 3), (1, 480, 640, 3), (8, 1024, 1024, 3))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_wrong_use_is_refused_in_one_line():
    spec = spec_of(64)
    with pytest.raises(InputError, match="form 'conv' is not known; available: resize, matmul"):
        add_front(tower(spec), spec, "conv")
    for bad in (spec_of(64, mode="longest"), spec_of((64, 32))):
        with pytest.raises(InputError, match="available: 'shortest' to a square, 'squash'"):
            add_front(tower(bad), bad, "matmul")
    with pytest.raises(ArtifactError, match="UINT8 \\['batch', 32, 32, 3\\]"):
        add_front(tower(spec), spec_of(32), "matmul")
    with pytest.raises(ArtifactError, match="opset 17 is too old"):
        add_front(tower(spec, opset=17), spec, "resize")
    nameless = tower(spec)
    nameless.graph.inputs[0].name = "image"
    with pytest.raises(ArtifactError, match="no input 'pixels'; the graph's inputs: image"):
        add_front(nameless, spec, "matmul")
    with pytest.raises(ArtifactError, match="no front"):
        front_alone(tower(spec))
    twice = tower(spec)
    add_front(twice, spec, "matmul")
    with pytest.raises(ArtifactError, match="a front is added once"):
        add_front(twice, spec, "matmul")


def test_these_tests_see_planted_faults():
    spec, good = spec_of(64), front(spec_of(64), "matmul")
    images = [noise(100, 75), Image.fromarray(noise(80, 90)).convert("P")]  # the front gets RGB of either
    for one in images:
        assert apart(good, one, spec) == (0, 0.0)
        swapped = apart(lambda batch: good(batch)[..., ::-1], one, spec)
        assert swapped[0] > 22
        assert not within((swapped[0], 0.0), "matmul", "bicubic")
        shifted = apart(lambda batch: np.roll(good(batch), 1, axis=1), one, spec)
        assert shifted[1] > 0.5
        assert not within((0, shifted[1]), "resize", "bilinear")
        brighter = apart(lambda batch: np.minimum(good(batch) + 1, 255), one, spec)
        assert (brighter[0], within(brighter, "matmul", "bicubic")) == (1, False)
        for fault in (
            lambda batch: np.minimum(good(batch), 254) + np.float32(0.5),
            lambda batch: good(batch) * np.float32(np.nan),
            lambda batch: good(batch)[:, 1:],
        ):
            with pytest.raises(AssertionError):
                apart(fault, one, spec)


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_read_off_the_graph(form):
    spec = spec_of(64)
    model = tower(spec)
    model.graph.append(ir.node("Resize", [model.graph.outputs[0], None, None, None], name="the_towers_own"))
    add_front(model, spec, form)
    assert form_of(model) == form
    assert form_of(front_alone(model)) == form


def test_names_are_the_fronts_own():
    spec = spec_of(64)
    model = tower(spec)
    before = {node.name for node in model.graph} | set(model.graph.initializers)
    add_front(model, spec, "matmul")
    after = {node.name for node in model.graph} | set(model.graph.initializers)
    assert before < after
    assert all(name.startswith("front_") for name in after - before)
    assert front_alone(model).graph.outputs[0].name == FITTED
    assert [value.name for value in model.graph.outputs] == ["out"]
