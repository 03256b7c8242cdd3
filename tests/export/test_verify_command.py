"""`verify` as a user types it: a table per variant and backend, the failing rows marked, one line that says why."""

import json
import shutil
import socket
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import invariclip
from invariclip.artifact.folder import describe_file, read_manifest, write_manifest
from invariclip.artifact.parity import FAILED, PARITY_HEADER, parity_rows
from invariclip.cli.main import main
from invariclip.export.build import export_artifact
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.config import ExportConfig
from invariclip.export.options import bounds_of
from invariclip.export.site import bake_site
from invariclip.export.verification.figures import THRESHOLDS
from invariclip.preprocessing.pixels import pixels
from invariclip.sites.measuring import begun


@pytest.fixture
def run(capsys, tiny_checkpoint, tiny_images):
    def of(artifact, *options):
        common = ("--model", tiny_checkpoint, "--images", tiny_images, "--threads", 1, "--quiet")
        with pytest.raises(SystemExit) as stopped:
            main(["verify", *map(str, (artifact, *common, *options))])
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return of


@pytest.fixture
def blue(tiny_artifact, tmp_path):
    """The tiny artifact with red and blue swapped in its image graph, and a manifest that says nothing of it."""
    folder = shutil.copytree(tiny_artifact, tmp_path / "blue.icm")
    model = onnx.load(folder / "image.onnx")
    for node in model.graph.node:
        node.input[:] = ["pixels_bgr" if name == "pixels" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Gather", ["pixels", "bgr"], ["pixels_bgr"], axis=3))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "bgr"))
    onnx.save(model, folder / "image.onnx")
    manifest = read_manifest(folder)
    variant = manifest.variants["float32"]
    object.__setattr__(variant, "image", describe_file(folder, "image.onnx"))
    write_manifest(folder, manifest)
    return folder


@pytest.mark.parametrize("name", ["hf-hub:owner/name", "vit", "../vit", "local-dir:/tmp"])
def test_a_manifest_is_not_followed_to_a_hub_or_a_folder(tiny_artifact, tmp_path, monkeypatch, capsys, name):
    def refuse(*_, **__):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    folder = shutil.copytree(tiny_artifact, tmp_path / "x.icm")
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, model=replace(manifest.model, name=name)))
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(folder), "--quiet"])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert f"was exported from {name!r}" in said.err
    assert said.err.endswith("say where the model is with --model\n")


@pytest.mark.parametrize(("name", "message"), [("reference", "from another checkpoint"), ("ViT-B-32", "no weights")])
def test_a_manifest_is_followed_to_what_comes_along(tiny_artifact, tmp_path, capsys, name, message):
    folder = shutil.copytree(tiny_artifact, tmp_path / "x.icm")
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, model=replace(manifest.model, name=name)))
    with pytest.raises(SystemExit):
        main(["verify", str(folder), "--quiet"])
    assert message in capsys.readouterr().err


BOTH = ("--backend", "onnxruntime", "--backend", "openvino")


def test_every_backend_has_its_own_record(run, tiny_artifact):
    code, out, err = run(tiny_artifact, *BOTH, "--backend", "openvino", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["passed"], report["failures"]) == (True, [])
    records = report["variants"]["float32"]
    assert list(records) == ["onnxruntime", "openvino"]
    for name, record in records.items():
        assert record["engine"]["engine"] == name
        assert record["engine"]["threads"] == 1
        assert record["passed"] is True
        for row in parity_rows(record):
            assert len(row) == len(PARITY_HEADER)
    code, out, err = run(tiny_artifact, *BOTH)
    assert (code, err) == (0, "")
    assert out.count("max |Δ|, batches of 17") == 2
    assert FAILED not in out


def test_a_failure_is_marked_and_said_in_one_line(run, blue):
    code, out, err = run(blue, *BOTH)
    assert code == 1
    assert err.count("\n") == 1
    for name in ("onnxruntime", "openvino"):
        assert f"float32 on {name}: image max |Δ| " in err
    assert " is below 0.999999, by " in err
    assert err.count("cause: image: red and blue are swapped") == 2
    marked = [line.split("  ")[0] for line in out.splitlines() if FAILED in line]
    assert marked[:2] == ["max |Δ|", "cosine min"]
    assert "NaN or infinite" not in marked


def test_the_same_as_json(run, blue):
    code, out, _ = run(blue, "--json")
    report = json.loads(out)
    record = report["variants"]["float32"]["onnxruntime"]
    assert (code, report["passed"], record["passed"]) == (1, False, False)
    assert record["causes"] == ["image: red and blue are swapped"]
    assert "max_abs_diff" in record["image"]["failed"]
    assert record["text"]["failed"] == []
    assert all(line.startswith("float32 on onnxruntime: image ") for line in report["failures"])


@pytest.mark.parametrize(
    ("option", "bound"),
    [
        ("--min-cosine", "min_cosine"),
        ("--max-abs-diff", "max_abs_diff"),
        ("--min-top1", "min_top1"),
        ("--min-top5", "min_top5"),
        ("--max-invariance-gap", "max_invariance_gap"),
    ],
)
def test_each_bound_can_be_moved(run, tiny_artifact, option, bound):
    code, out, _ = run(tiny_artifact, option, "0.5", "--json")
    thresholds = json.loads(out)["variants"]["float32"]["onnxruntime"]["thresholds"]
    assert code == 0
    assert thresholds[bound] == 0.5
    assert sum(value == 0.5 for value in thresholds.values()) == 1


def test_bounds_of_a_level():
    nothing = dict.fromkeys(("min_cosine", "max_abs_diff", "min_top1", "min_top5", "max_invariance_gap"))
    assert bounds_of(nothing).min_cosine == 0.999999
    assert bounds_of(nothing, "near").min_cosine == 0.9999
    moved = bounds_of({**nothing, "max_abs_diff": 0.0}, "fast")
    assert (moved.max_abs_diff, moved.min_cosine) == (0.0, 0.985)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "abacus"), "no backend is called 'abacus'; available: onnxruntime, openvino"),
        (("--min-top5", "2"), "--min-top5"),
        (("--max-invariance-gap", "-1"), "--max-invariance-gap"),
    ],
)
def test_mistakes_are_one_line(run, tiny_artifact, options, message):
    code, out, err = run(tiny_artifact, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_promised_pixel_mode_is_looked_at_again(run, promising, monkeypatch):
    monkeypatch.setattr("invariclip.export.verification.pixel_checks.SHOWN", 2)
    code, out, err = run(promising, "--json")
    assert (code, err, json.loads(out)["fast_pixels"]) == (0, "", [])
    monkeypatch.setattr(
        "invariclip.export.verification.pixel_checks.pixels",
        lambda data, spec, mode="exact": pixels(data, spec)[..., :: 1 if mode == "exact" else -1],
    )
    code, out, err = run(promising)
    assert (code, err.count("\n")) == (1, 1)
    assert "the fast pixel mode: cosine to the exact mode 0." in err
    assert "below 0.985" in err


def test_where_it_goes_wrong_is_named_and_written(run, blue, tiny_artifact, tmp_path):
    code, out, _ = run(blue, "--bisect", tmp_path / "parts")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("  first wrong: ")]
    assert "(Gather)" in line
    assert "(float32); in the right graph: Cast" in line
    folder = tmp_path / "parts" / "float32-on-onnxruntime-image"
    assert {path.name for path in folder.iterdir()} == {"part.onnx", "values.npz"}
    assert "float32 on onnxruntime, text tower: " in out
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [folder.name]  # the text tower is right
    code, out, _ = run(tiny_artifact, "--bisect", tmp_path / "none", "--json")
    told = json.loads(out)["bisect"]
    assert code == 0
    assert set(told) == {"float32 on onnxruntime, image tower", "float32 on onnxruntime, text tower"}
    assert all(one["wrong"] == [] and one["parts"] > 20 and one["prefix"] is None for one in told.values())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("as input", {"projection_as_input": True}),
        ("front", {"pixels_in_graph": "matmul"}),
        ("without rewrites", {"without_rewrites": ["plain-attention", "tidy"]}),
        ("float16", {"variants": ["float16"], "variant_thresholds": THRESHOLDS["fast"]}),
        ("site", {}),
    ],
)
def test_right_artifacts_of_every_kind_are_right(
    run, tiny_checkpoint, tiny_images, tiny_projection, tmp_path, kind, options
):
    """The fresh export has the same values, however the artifact was made."""
    config = ExportConfig(classes=("cat", "dog"), images=[tiny_images], threads=1, **options)
    export_artifact(load_checkpoint(str(tiny_checkpoint)), tmp_path / "x.icm", config, projection=tiny_projection)
    artifact = tmp_path / "x.icm"
    if kind == "site":
        model = invariclip.load(artifact, threads=1)
        rows = model.embed_images(sorted(tiny_images.iterdir()))
        site = begun(model, "yard", np.zeros(model.width), None).adding(rows, model.class_bank())
        bake_site(artifact, tmp_path / "y.icm", site, images=[tiny_images], threads=1)
        artifact = tmp_path / "y.icm"
    code, out, err = run(artifact, "--bisect", tmp_path / "parts", "--json")
    told = json.loads(out)["bisect"]
    assert code == 0, err
    assert len(told) == (4 if kind == "float16" else 2)
    for name, one in told.items():
        assert (one["wrong"], one["reshaped"], one["prefix"]) == ([], 0, None), name
        assert one["nodes"] > 20
