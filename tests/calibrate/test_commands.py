"""`calibrate` and `build` as they are typed, with a genuine tiny open_clip checkpoint."""

import json
import re

import pytest
from PIL import Image

from invariclip.artifact.projection import read_projection
from invariclip.errors import ContractError


@pytest.fixture
def common(manifest, tiny_checkpoint, tmp_path):
    return ["--model", tiny_checkpoint, "--images", manifest, "--cache", tmp_path / "cache", "--quiet"]


def test_calibrate_writes_a_projection(run, common, tmp_path):
    code, out, err = run("calibrate", *common, "--interventions", "none", "-o", tmp_path / "p.safetensors")
    assert code == 0, err
    projection = read_projection(tmp_path / "p.safetensors")
    assert projection.embed_dim == 24
    assert "left out" in out
    assert "fitting on split train" in err
    assert projection.provenance["images"]["images"] == 27  # concept 0 is marked test


def test_json_is_one_document(run, common, tmp_path):
    code, out, _ = run(
        "calibrate", *common, "--estimator", "shrinkage", "--strength", "3", "--json", "-o", tmp_path / "p.safetensors"
    )
    assert code == 0
    answer = json.loads(out)
    assert (answer["estimator"], answer["strength"], answer["rank"]) == ("shrinkage", 3.0, 24)
    assert answer["facts"]["interventional_pairs"] == 54
    assert answer["projection"] == str(tmp_path / "p.safetensors")


def test_strengths_come_from_a_file(run, common, tmp_path):
    (tmp_path / "kinds.yaml").write_text("- style-exchange\n- fog: {density: 0.5}\n")
    fitted = ["--estimator", "shrinkage", "--strength", "3", "--interventions", tmp_path / "kinds.yaml"]
    code, _, err = run("calibrate", *common, *fitted, "-o", tmp_path / "p.safetensors")
    assert code == 0, err
    provenance = read_projection(tmp_path / "p.safetensors").provenance
    assert [kind["label"] for kind in provenance["options"]["interventions"]] == ["style-exchange", "fog"]
    assert provenance["options"]["interventions"][1]["parameters"]["density"] == [0.5, 0.5]
    assert provenance["images"]["interventional_pairs"] == 54


def test_a_report_is_written_beside_and_again_from_a_finished_build(run, common, tmp_path):
    command = [*common, "--interventions", "invert,equalize", "--estimator", "shrinkage", "--strength", "3"]
    first = tmp_path / "first.html"
    code, out, err = run("calibrate", *command, "--report", first, "--json", "-o", tmp_path / "p.safetensors")
    assert code == 0, err
    assert json.loads(out)["report"] == str(first)
    run("build", *command, "-o", tmp_path / "x.icm")
    second = tmp_path / "second.html"
    code, out, err = run("build", *command, "-o", tmp_path / "x.icm", "--report", second)
    assert (code, err.count("done before")) == (0, 2)
    assert str(second) in out
    # A finished build's scores come from the file, rounded to a thousandth of a point: plots may differ in places.
    pages = [
        re.sub(r"<svg.*?</svg>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL) for page in (first, second)
    ]
    assert pages[0] == pages[1]
    assert "shrinkage λ=3 was asked for" in pages[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rank", "many"], "--rank must be auto or a number, not 'many'"),
        (["--rank", "-3"], "above zero"),
        (["--strength", "inf"], "above zero"),
        (["--interventions", "blurr"], "available: all, none"),
        (["--interventions", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--environments", "mauve"], "available: blue, green, red"),
        (["--split", "val"], "no image has split 'val'"),
        (["--estimator", "icm", "--rank", "99", "--strength", "1"], "rank 99 is not from 1 to the encoder's width 24"),
        (["--images", "/nowhere"], "no such file or folder"),
        (["--environments", "red", "--interventions", "none"], "no pair: 9 of 9 concepts"),
        (["--model", "ViT-B-23"], "ViT-B-32"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(run, common, tmp_path, options, said):
    code, out, err = run("calibrate", *common, *options, "-o", tmp_path / "p.safetensors")
    assert code == 2
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "p.safetensors").exists()


def test_bad_images_are_warned_of(run, common, manifest, tmp_path):
    (manifest.parent / "red" / "3.png").write_text("broken")
    code, out, err = run("calibrate", *common, "--interventions", "none", "-o", tmp_path / "p.safetensors")
    assert code == 0
    assert "warning: skipped" in err
    assert "problem    1 left out: cannot be read or decoded" in out


def test_build_goes_all_the_way_and_resumes(run, common, manifest, tmp_path, monkeypatch):
    fitted = ["--estimator", "shrinkage", "--strength", "3", "--interventions", "none", "--classes", "thing 1,thing 2"]
    command = ["build", *common, *fitted, "-o", tmp_path / "x.icm"]
    code, out, err = run(*command)
    assert code == 0, err
    assert "1/2 calibrate" in err
    assert "2/2 export and verify" in err
    assert "artifact" in out
    assert re.search(
        r"^parity +float32 on onnxruntime: max \|Δ\| \d.*e-\d+ of images, .* of texts \(≤ 1e-05\), passed$", out, re.M
    )
    assert f"invariclip predict {tmp_path / 'x.icm'} IMAGES" in out
    first = json.loads((tmp_path / "x.icm" / "manifest.json").read_text())
    assert first["projection"]["estimator"] == "shrinkage"
    assert first["classes"] == ["thing 1", "thing 2"]

    code, again, err = run(*command)
    assert code == 0
    assert err.count("done before") == 2
    assert again == out

    exported = []
    monkeypatch.setattr("invariclip.export.build.export_artifact", stub(exported))
    (tmp_path / "x.icm" / "image.onnx").write_bytes(b"damaged")
    code, _, err = run(*command)
    assert code == 1  # the stub ends the export stage as a broken contract does
    assert err.count("done before") == 1
    Image.new("RGB", (16, 16), (1, 2, 3)).save(manifest.parent / "red" / "4.png")
    code, _, err = run(*command)
    assert code == 1
    assert "done before" not in err
    assert exported[0].digest == first["projection"]["sha256"] != exported[1].digest


def stub(exported):
    """An export that only notes the projection it was given."""

    def export_artifact(checkpoint, out, config, *, projection, **rest):
        exported.append(projection)
        raise ContractError("not today")

    return export_artifact


def test_build_makes_variants_and_judges_them_on_other_images(run, common, manifest, tmp_path, monkeypatch):
    command = ["build", *common, "--estimator", "identity", "--variant", "float16", "--fidelity", "near"]
    code, _, err = run(*command, "--backend", "onnxruntime", "--backend", "openvino", "-o", tmp_path / "x.icm")
    assert code == 0, err
    made = json.loads((tmp_path / "x.icm" / "manifest.json").read_text())["variants"]
    assert sorted(made) == ["float16", "float32"]
    assert sorted(made["float16"]["parity"]) == ["onnxruntime", "openvino"]
    judged = made["float16"]["parity"]["openvino"]["image"]["items"]
    assert 0 < judged < len(list(manifest.parent.rglob("*.png")))
    exported = []
    monkeypatch.setattr("invariclip.export.build.export_artifact", stub(exported))
    code, _, err = run(*command, "-o", tmp_path / "x.icm")  # another engine: exported again, not fitted again
    assert (code, err.count("done before"), exported) == (1, 1, [None])
    code, _, err = run("build", *common, "--variant", "int4", "-o", tmp_path / "y.icm")
    assert (code, err.count("\n")) == (2, 1)
    assert "no variant is called 'int4'" in err


def test_build_without_gain_exports_the_checkpoint_alone(run, common, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr("invariclip.export.build.export_artifact", stub(exported))
    code, _, err = run("build", *common, "--estimator", "identity", "-o", tmp_path / "x.icm")
    assert code == 1
    assert "not today" in err
    assert exported == [None]
