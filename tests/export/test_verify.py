"""Planted faults: each must break the contract, and by the figure that is about it."""

import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from invariclip.errors import ContractError, InputError
from invariclip.export import evidence, figures, verify
from invariclip.export.evidence import UnreadablePictureWarning
from invariclip.pixels import find_pictures
from invariclip.projection import Projection

CLASSES = ("cat", "dog", "tree")


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    from invariclip.export.checkpoint import load_checkpoint

    return load_checkpoint(str(tiny_checkpoint))


@pytest.fixture
def judge(loaded, tiny_artifact, tiny_projection, tiny_pictures, tmp_path):
    """Checks the tiny artifact after `damage(image path, text path)`, optionally against another reference."""

    def of(damage=None, *, projection=tiny_projection, wrap=None, bounds=figures.FLOAT32):
        folder = shutil.copytree(tiny_artifact, tmp_path / "a.icm")
        image, text = folder / "image.onnx", folder / "text.onnx"
        if damage:
            damage(image, text)
        job = verify.prepare(loaded, projection, CLASSES, ("a photo of a {}.",))
        candidate = verify.Candidate.open(image, text, job, threads=1)
        if wrap:
            candidate = verify.Candidate(wrap(candidate.image), candidate.text, job)
        pictures = evidence.pictures_of(find_pictures([tiny_pictures]), loaded.pixels)
        return verify.check({"float32": candidate}, pictures, bounds)["float32"]

    return of


def test_the_artifact_passes(judge):
    verdict = judge()
    assert verdict.broken == []
    verdict.require("it")
    assert verdict.parity["passed"] is True
    assert verdict.image.items == 12
    assert verdict.image.top1_of == 3
    assert verdict.text.items == len(evidence.TEXTS) >= 200
    assert verdict.text.top1_of == 12
    assert verdict.image.max_abs_diff < 2e-6
    assert verdict.image.probability_diff < 1e-5


def rewrite(path, change):
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def weight(model, shape):
    """The largest-index initializer of a shape, and a writable copy of its values."""
    found = [item for item in model.graph.initializer if list(item.dims) == shape][-1]
    return found, numpy_helper.to_array(found).copy()


def tamper(model):
    found, values = weight(model, [64, 8])  # the fused projection
    values[3, 2] += 0.01
    found.CopyFrom(numpy_helper.from_array(values, found.name))


def swap_channels(model):
    for node in model.graph.node:
        if "pixels" in node.input:
            node.input[:] = ["pixels_bgr" if name == "pixels" else name for name in node.input]
    gather = onnx.helper.make_node("Gather", ["pixels", "bgr"], ["pixels_bgr"], axis=3)
    model.graph.node.insert(0, gather)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "bgr"))


def poison(model):
    found, values = weight(model, [64, 8])
    values[0, 0] = np.nan
    found.CopyFrom(numpy_helper.from_array(values, found.name))


def other_activation(model):
    for node in model.graph.node:
        if node.op_type == "Gelu":
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("approximate", "tanh"))


@pytest.mark.parametrize(
    ("tower", "change", "figure"),
    [
        (0, tamper, "image max |Δ|"),
        (0, swap_channels, "image cosine, min"),
        (0, poison, "image answers 96 values that are NaN or infinite"),
        (0, other_activation, "image max |Δ|"),
        (1, other_activation, "text max |Δ|"),
    ],
    ids=["tampered weight", "swapped channels", "NaN weight", "other activation", "other activation in text"],
)
def test_a_planted_fault_is_found(judge, tower, change, figure):
    verdict = judge(lambda *paths: rewrite(paths[tower], change))
    assert any(line.startswith(figure) for line in verdict.broken), verdict.broken
    other = ("text", "image")[tower]
    assert not any(line.startswith(other) for line in verdict.broken)
    with pytest.raises(ContractError, match=r"a\.icm does not answer like its checkpoint: ") as caught:
        verdict.require("a.icm")
    assert "\n" not in str(caught.value)


def test_a_dropped_causal_mask_is_found(judge):
    def unmask(model):
        masks = [item for item in model.graph.initializer if np.isinf(numpy_helper.to_array(item)).any()]
        assert masks
        for item in masks:
            item.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(item)), item.name))

    verdict = judge(lambda _, text: rewrite(text, unmask))
    assert any(line.startswith("text max |Δ|") for line in verdict.broken)


def test_another_projection_is_found(judge):
    verdict = judge(projection=Projection(np.random.default_rng(2).normal(size=(24, 8)), "icm", 3.0))
    assert any("top-1" in line for line in verdict.broken)


class Wrapped:
    """A backend whose answers are changed."""

    def __init__(self, inner, change):
        self.inner, self.change = inner, change
        self.input_names, self.output_names = inner.input_names, inner.output_names
        self.calls = 0

    def describe(self):
        return self.inner.describe()

    def run(self, inputs, outputs=None):
        self.calls += 1
        answers = self.inner.run(inputs, outputs)
        return self.change(dict(answers), self.calls, len(next(iter(inputs.values()))))


def shifted(amount):
    return lambda answers: {**answers, "embedding": answers["embedding"] + np.float32(amount)}


def test_an_engine_that_is_not_deterministic_is_found(judge):
    verdict = judge(wrap=lambda inner: Wrapped(inner, lambda a, calls, _: shifted(calls * 1e-7)(a)))
    assert [line for line in verdict.broken if line.startswith("image run-to-run")]


def test_rows_that_depend_on_their_batch_are_found(judge):
    verdict = judge(wrap=lambda inner: Wrapped(inner, lambda a, _, rows: shifted(1e-3 if rows == 1 else 0)(a)))
    assert [line.split(" ")[1] for line in verdict.broken] == ["batch"]


def test_wrong_probabilities_are_found(judge):
    def sharpen(answers, *_):
        return {**answers, "probabilities": answers["probabilities"] ** 2} if "probabilities" in answers else answers

    verdict = judge(wrap=lambda inner: Wrapped(inner, sharpen))
    assert [line.split(",")[0] for line in verdict.broken] == ["image probability"]


def test_bounds_can_be_moved(judge):
    verdict = judge(bounds=figures.Thresholds(max_abs_diff=1e-12))
    assert verdict.broken[0].startswith("image max |Δ| ")
    assert verdict.broken[0].endswith(" is above 1e-12")
    assert verdict.parity["thresholds"]["max_abs_diff"] == 1e-12
    assert verdict.parity["passed"] is False


def test_near_ties_are_told_from_disagreement():
    bank = np.array([[1, 0], [np.cos(1e-4), np.sin(1e-4)], [0, 1.0]])
    seen = figures.Comparison(
        reference=[np.array([[1, 0.0], [0, 1.0]])],
        candidate=[np.array([bank[1], [0, 1]], dtype=np.float32)],
    )
    result = figures.measure(seen, bank)
    assert (result.top1_agreement, result.top1_ties) == (1.0, 1)
    far = figures.Comparison(reference=[np.array([[1, 0.0]])], candidate=[np.array([[0, 1]], dtype=np.float32)])
    assert figures.measure(far, bank).top1_agreement == 0


def test_nan_breaks_every_bound_and_stays_valid_json():
    seen = figures.Comparison(reference=[np.eye(2)], candidate=[np.full((2, 2), np.nan, dtype=np.float32)])
    result = figures.measure(seen, np.eye(2))
    broken = figures.failures("image", result, figures.FLOAT32)
    assert broken[0] == "image answers 4 values that are NaN or infinite"
    assert {"image max |Δ| nan is above 1e-05", "image cosine, min nan is below 0.999999"} <= set(broken)
    assert result.to_json()["max_abs_diff"] is None


def test_unreadable_pictures_are_warned_of_and_counted(loaded, tmp_path):
    Image.new("RGB", (40, 50), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pictures = evidence.pictures_of([tmp_path], loaded.pixels)
    with pytest.warns(UnreadablePictureWarning, match=r"left out of the check: .*bad\.png"):
        batches = list(pictures.batches(4))
    assert [batch.shape for batch in batches] == [(1, 32, 32, 3)]
    assert (pictures.read, len(pictures.unreadable)) == (1, 1)


def test_no_readable_picture_is_an_error(loaded, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pictures = evidence.pictures_of([tmp_path], loaded.pixels)
    with pytest.warns(UnreadablePictureWarning), pytest.raises(InputError, match="none of the 1 pictures can be read"):
        list(pictures.batches(4))


def test_missing_pictures_are_named(loaded, tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        evidence.pictures_of([tmp_path / "none"], loaded.pixels)


def test_the_bundled_pictures_are_enough(loaded):
    pictures = evidence.pictures_of(None, loaded.pixels)
    assert 200 <= len(pictures.paths) <= evidence.BUNDLED_LIMIT
    assert len(set(pictures.paths)) == len(pictures.paths)
