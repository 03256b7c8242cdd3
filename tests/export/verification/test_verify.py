"""Planted faults: each must break the contract, by the figure that is about it, and for the right reason."""

import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file

from invariclip.artifact.projection import Projection
from invariclip.backends import open_backend
from invariclip.errors import CheckpointError, ContractError, InputError
from invariclip.export.build import export_artifact
from invariclip.export.checkpoints import check_texts
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.config import ExportConfig
from invariclip.export.verification import evidence, figures, verify
from invariclip.export.verification.candidate import VerificationCandidate, prepare
from invariclip.export.verification.evidence import UnreadableImageWarning

CLASSES = ("cat", "dog", "tree", "house", "horse", "boat", "owl")
TEMPLATES = ("a photo of a {}.",)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return load_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def twin(tmp_path_factory, tiny_checkpoint):
    """The folder of a checkpoint with the tiny one's weights and another config; `scale` multiplies weights."""

    def of(*, scale=None, **changes):
        folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("twin") / "vit")
        config = json.loads((folder / "open_clip_config.json").read_text())
        for part, values in changes.items():
            inner = config["preprocess_cfg"] if part == "preprocess_cfg" else config["model_cfg"]
            inner.update(values) if part in ("preprocess_cfg", "model_cfg") else inner[part].update(values)
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        weights = load_file(folder / "open_clip_model.safetensors")
        for name, factor in (scale or {}).items():
            weights[name] *= factor
        save_file(weights, folder / "open_clip_model.safetensors")
        return load_checkpoint(str(folder))

    return of


@pytest.fixture(scope="module")
def shipped(tmp_path_factory, tiny_projection, tiny_images):
    """Exports a checkpoint once: checkpoint to folder. What is exported from another one is a planted fault."""
    done = {}

    def of(checkpoint):
        if id(checkpoint) not in done:
            out = tmp_path_factory.mktemp("shipped") / "a.icm"
            config = ExportConfig(classes=CLASSES, templates=TEMPLATES, images=[tiny_images], threads=1)
            export_artifact(checkpoint, out, config, projection=tiny_projection)
            done[id(checkpoint)] = checkpoint, out
        return done[id(checkpoint)][1]

    return of


@pytest.fixture
def judge(loaded, shipped, tiny_projection, tiny_images, tmp_path):
    """Holds an artifact (the tiny checkpoint's own, after `damage(image, text)`) against a reference."""

    def of(
        damage=None, *, made_of=None, reference=None, projection=tiny_projection, wrap=None, bounds=None,
        backend="onnxruntime", images=None,
    ):  # fmt: skip
        reference = reference or loaded
        folder = shutil.copytree(shipped(made_of or reference), tmp_path / "a.icm", dirs_exist_ok=True)
        image, text = folder / "image.onnx", folder / "text.onnx"
        if damage:
            damage(image, text)
        job = prepare(reference, projection, CLASSES, TEMPLATES)
        candidate = VerificationCandidate.open(image, text, job, backend=backend, threads=1)
        if wrap:
            opener = candidate.opener
            candidate = replace(
                candidate, opener=lambda name, path, **options: wrap(path, opener(name, path, **options))
            )
        looked_at = evidence.images_of(images or [tiny_images], reference.pixels)
        return verify.check({"float32": candidate}, looked_at, bounds)["float32"]

    return of


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_artifact_passes(judge, backend):
    verdict = judge(backend=backend)
    assert (verdict.broken, verdict.causes) == ([], [])
    verdict.require("it")
    assert verdict.parity["passed"] is True
    assert verdict.parity["engine"]["engine"] == backend
    assert verdict.image.items == verdict.image.gap_items == 12
    assert verdict.image.top1_of == len(CLASSES)
    assert verdict.image.top5_agreement == verdict.text.top5_agreement == 1
    assert verdict.text.items == len(check_texts.TEXTS) >= 200
    assert verdict.text.top1_of == 12
    assert verdict.image.max_abs_diff < 2e-6
    assert all(0 < getattr(verdict.text, f"batch_{size}") < 2e-6 for size in figures.SIZES)
    assert verdict.image.probability_diff < 1e-5
    assert verdict.image.gap_reference == pytest.approx(verdict.image.gap, abs=1e-6)
    assert verdict.image.gap_reference > 1e-4
    assert (verdict.image.pixel_levels, verdict.image.front_levels, verdict.text.gap) == (0, None, None)
    json.dumps(verdict.parity, allow_nan=False)


def rewrite(path, change):
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def noisy(model, value=None):
    """Damages the last large weight that nothing but the projection can be: [64, 8], or as it was folded."""
    found = [item for item in model.graph.initializer if list(item.dims) in ([64, 8], [8, 64])][-1]
    values = numpy_helper.to_array(found).copy()
    values[3, 2] = values[3, 2] + 0.01 if value is None else value
    found.CopyFrom(numpy_helper.from_array(values, found.name))


def swap_channels(model):
    for node in model.graph.node:
        node.input[:] = ["pixels_bgr" if name == "pixels" else name for name in node.input]
    gather = onnx.helper.make_node("Gather", ["pixels", "bgr"], ["pixels_bgr"], axis=3)
    model.graph.node.insert(0, gather)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "bgr"))


@pytest.mark.parametrize(
    ("change", "figure", "cause"),
    [
        (noisy, "image max |Δ|", None),
        (swap_channels, "image cosine, min", "image: red and blue are swapped"),
        (lambda model: noisy(model, np.nan), "image answers ", None),
    ],
    ids=["tampered weight", "swapped channels", "NaN weight"],
)
def test_a_damaged_graph_is_found(judge, change, figure, cause):
    verdict = judge(lambda image, _: rewrite(image, change))
    assert any(line.startswith(figure) for line in verdict.broken), verdict.broken
    assert not any(line.startswith("text") for line in verdict.broken)
    assert verdict.causes == ([cause] if cause else [])
    with pytest.raises(ContractError, match=r"a\.icm does not answer like its checkpoint: ") as caught:
        verdict.require("a.icm")
    assert "\n" not in str(caught.value)


def test_nan_in_any_float_output_is_counted(judge):
    def poison(model):
        (node,) = [node for node in model.graph.node if "probabilities" in node.output]
        node.output[:] = ["clean"]
        model.graph.node.append(onnx.helper.make_node("Div", ["clean", "nothing"], ["probabilities"]))
        model.graph.initializer.append(numpy_helper.from_array(np.float32([0]), "nothing"))

    verdict = judge(lambda image, _: rewrite(image, poison))
    assert verdict.image.non_finite == 12 * len(CLASSES)
    assert verdict.image.max_abs_diff < 1e-5
    assert {"non_finite", "probability_diff"} <= set(verdict.parity["image"]["failed"])


@pytest.mark.parametrize("quick", [True, False], ids=["QuickGELU for GELU", "GELU for QuickGELU"])
def test_a_wrong_activation_is_found(judge, loaded, twin, quick):
    other = twin(model_cfg={"quick_gelu": True})
    verdict = judge(made_of=other, reference=loaded) if quick else judge(made_of=loaded, reference=other)
    name = "QuickGELU" if quick else "GELU"
    assert {"max_abs_diff", "cosine_min"} <= set(verdict.parity["image"]["failed"])
    assert "max_abs_diff" in verdict.parity["text"]["failed"]
    assert verdict.causes == [
        f"{t}: it computes {name} where the checkpoint has another activation" for t in verify.TOWERS
    ]


def test_a_dropped_causal_mask_is_found(judge, loaded, twin):
    verdict = judge(made_of=twin(text_cfg={"no_causal_mask": True}), reference=loaded)
    assert "max_abs_diff" in verdict.parity["text"]["failed"]
    assert not any(line.startswith("image max") for line in verdict.broken)
    assert verdict.causes == ["text: the causal mask is missing"]


def test_other_statistics_are_found(judge, loaded, twin):
    verdict = judge(made_of=twin(preprocess_cfg={"mean": [0.5] * 3, "std": [0.5] * 3}), reference=loaded)
    assert "cosine_min" in verdict.parity["image"]["failed"]
    (cause,) = verdict.causes
    assert cause == "image: images are normalised with 0.5 mean and standard deviation, not the checkpoint's"


def test_a_missing_projection_is_found(judge, loaded, tiny_images, tmp_path):
    square = Projection(np.random.default_rng(0).normal(size=(24, 24)), "icm", 3.0)
    export_artifact(
        loaded, tmp_path / "b.icm", ExportConfig(images=[tiny_images], classes=CLASSES, templates=TEMPLATES)
    )

    def replaced(image, text):
        shutil.copy(tmp_path / "b.icm" / "image.onnx", image)
        shutil.copy(tmp_path / "b.icm" / "text.onnx", text)

    verdict = judge(replaced, projection=square)
    assert verdict.causes == [f"{tower}: the projection is not in the graph" for tower in verify.TOWERS]


def test_another_projection_is_found_and_no_cause_is_made_up(judge):
    verdict = judge(projection=Projection(np.random.default_rng(2).normal(size=(24, 8)), "icm", 3.0))
    assert any("top-1" in line for line in verdict.broken)
    assert verdict.causes == []


def test_a_projection_of_another_width_is_one_line(judge):
    with pytest.raises(ContractError, match=r"float32: its embeddings are \[12, 8\] where .* give \[12, 4\]"):
        judge(projection=Projection(np.random.default_rng(2).normal(size=(24, 4)), "icm", 3.0))


def half_norm(model):
    """The first LayerNormalization as a careless cast to float16 computes it: every step rounded to half."""
    place, node = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "LayerNormalization")
    made = []

    def op(kind, *inputs, **attributes):
        name = f"half_{len(made)}"
        made.append(onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def half(name):
        return op("Cast", op("Cast", name, to=onnx.TensorProto.FLOAT16), to=onnx.TensorProto.FLOAT)

    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "half_axes"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1e-5), "half_eps"))
    x = half(node.input[0])
    centred = half(op("Sub", x, half(op("ReduceMean", x, "half_axes"))))
    variance = half(op("ReduceMean", half(op("Mul", centred, centred)), "half_axes"))
    scaled = op("Div", centred, half(op("Sqrt", half(op("Add", variance, "half_eps")))))
    made.append(onnx.helper.make_node("Mul", [half(scaled), node.input[1]], ["half_weighted"]))
    made.append(onnx.helper.make_node("Add", ["half_weighted", node.input[2]], [node.output[0]]))
    del model.graph.node[place]
    for step in reversed(made):
        model.graph.node.insert(place, step)


def test_a_layer_norm_that_overflows_in_half_precision_is_found(judge, twin):
    inner = ("conv1.weight", "class_embedding", "positional_embedding")
    loud = twin(scale={f"visual.{name}": 2e4 for name in inner})
    assert judge(reference=loud).broken == []
    verdict = judge(lambda image, _: rewrite(image, half_norm), reference=loud)
    assert "cosine_min" in verdict.parity["image"]["failed"]
    (cause,) = verdict.causes
    assert cause.startswith("image: a LayerNorm overflows in float16: its input is ")
    # the same graph is harmless where nothing is that large
    quiet = judge(lambda image, _: rewrite(image, half_norm), bounds=figures.THRESHOLDS["near"])
    assert quiet.broken == []


class Wrapped:
    """A backend whose answers are changed."""

    def __init__(self, inner, change):
        self.inner, self.change = inner, change
        self.input_names, self.output_names, self.input_shapes = (
            inner.input_names,
            inner.output_names,
            inner.input_shapes,
        )
        self.calls = 0

    def describe(self):
        return self.inner.describe()

    def run(self, inputs, outputs=None):
        self.calls += 1
        answers = self.inner.run(inputs, outputs)
        return self.change(dict(answers), self.calls, len(next(iter(inputs.values()))))


def images_only(change):
    return lambda path, inner: Wrapped(inner, change) if path.name == "image.onnx" else inner


def shifted(amount):
    return lambda answers: {**answers, "embedding": answers["embedding"] + np.float32(amount)}


def test_an_engine_that_is_not_deterministic_is_found(judge):
    verdict = judge(wrap=images_only(lambda a, calls, _: shifted(calls * 1e-7)(a)))
    assert "rerun_diff" in verdict.parity["image"]["failed"]


def test_a_nan_in_a_later_run_alone_is_found(judge):
    def spoilt(answers, calls, _):
        return shifted(np.nan)(answers) if calls == 3 else answers

    verdict = judge(wrap=images_only(spoilt))
    assert "rerun_diff" in verdict.parity["image"]["failed"]


@pytest.mark.parametrize("bad", [1, 2, 5, 17])
def test_rows_that_depend_on_their_batch_are_found(judge, bad):
    verdict = judge(wrap=images_only(lambda a, _, rows: shifted(1e-3 if rows == bad else 0)(a)))
    # 17 is also how altered images are shown; here there are twelve of those
    assert verdict.parity["image"]["failed"] == [f"batch_{bad}", "batch_diff"]
    assert verdict.broken[0].startswith(f"image max |Δ| in batches of {bad} 0.001 is above 1e-05, by 0.0009")


def test_a_graph_that_refuses_a_batch_is_one_line(judge):
    def refuse(answers, _, rows):
        if rows == 5:
            raise RuntimeError("no such shape\nin this engine")
        return answers

    with pytest.raises(
        ContractError, match=r"float32: the graph cannot answer a batch of \[5, 32, 32, 3\]: no such"
    ) as e:
        judge(wrap=images_only(refuse))
    assert "\n" not in str(e.value)


def test_wrong_probabilities_are_found(judge):
    def sharpen(answers, *_):
        return {**answers, "probabilities": answers["probabilities"] ** 2} if "probabilities" in answers else answers

    verdict = judge(wrap=images_only(sharpen))
    assert verdict.parity["image"]["failed"] == ["probability_diff"]


def test_one_tower_is_open_at_a_time(loaded, shipped, tiny_projection, tiny_images):
    alive, most = weakref.WeakSet(), []

    def opener(name, path, threads, compute):
        backend = Wrapped(open_backend(name, path, threads=threads), lambda answers, *_: answers)
        alive.add(backend)
        most.append(len(alive))
        return backend

    folder = shipped(loaded)
    job = prepare(loaded, tiny_projection, CLASSES, TEMPLATES)
    one = VerificationCandidate(folder / "image.onnx", folder / "text.onnx", job, threads=1, opener=opener)
    verdicts = verify.check({"a": one, "b": one}, evidence.images_of([tiny_images], loaded.pixels))
    assert [verdict.broken for verdict in verdicts.values()] == [[], []]
    assert most == [1, 1, 1]  # two image graphs and the text graph that both have: it is asked once


def test_bounds_can_be_moved_for_one_candidate(judge):
    verdict = judge(bounds={"float32": figures.Thresholds(max_abs_diff=1e-12)})
    assert verdict.broken[0].startswith("image max |Δ| ")
    assert " is above 1e-12, by " in verdict.broken[0]
    assert verdict.parity["thresholds"]["max_abs_diff"] == 1e-12
    assert verdict.parity["passed"] is False
    assert judge(bounds={"another": figures.Thresholds(max_abs_diff=1e-12)}).broken == []


def test_a_checkpoint_that_answers_nan_is_no_reference(loaded, twin, judge):
    broken = twin(scale={"visual.proj": 3e38})  # finite weights, and answers that are not
    with pytest.raises(CheckpointError, match=r"the checkpoint itself answers \d+ values that are NaN or infinite"):
        judge(made_of=loaded, reference=broken, projection=None)


def test_unknown_engines_and_levels_are_refused(loaded, tmp_path):
    job = prepare(loaded, None, (), ())
    with pytest.raises(InputError, match="'abacus'; available: onnxruntime, openvino"):
        VerificationCandidate.open(tmp_path, tmp_path, job, backend="abacus")
    with pytest.raises(InputError, match="no fidelity is called 'close'; available: exact, near, fast"):
        VerificationCandidate.open(tmp_path, tmp_path, job, level="close")


def test_unreadable_images_are_warned_of_once_and_counted(loaded, tmp_path):
    Image.new("RGB", (40, 50), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = evidence.images_of([tmp_path], loaded.pixels)
    with pytest.warns(UnreadableImageWarning, match=r"left out of the check: .*bad\.png") as seen:
        batches = [*images.batches(4), *images.batches(4)]
    assert len(seen) == 1
    assert [batch.shape for batch in batches] == [(1, 32, 32, 3)] * 2
    assert (images.read, len(images.unreadable), images.readable) == (1, 1, [tmp_path / "good.png"])


def test_no_readable_image_is_an_error(loaded, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = evidence.images_of([tmp_path], loaded.pixels)
    with pytest.warns(UnreadableImageWarning), pytest.raises(InputError, match="none of the 1 images can be read"):
        list(images.batches(4))


def test_missing_images_are_named(loaded, tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        evidence.images_of([tmp_path / "none"], loaded.pixels)


def test_the_bundled_images_are_enough(loaded):
    images = evidence.images_of(None, loaded.pixels)
    assert 200 <= len(images.paths) <= evidence.BUNDLED_LIMIT
    assert len(set(images.paths)) == len(images.paths)
