"""`invariclip cdc` as it is typed."""

import json

import pytest

from invariclip.artifact.folder import read_manifest
from invariclip.artifact.learned_prompts import read_semantics
from invariclip.artifact.projection import read_projection, write_projection


@pytest.fixture
def common(manifest, tiny_checkpoint, tmp_path):
    return [
        "--model", tiny_checkpoint, "--images", manifest, "--cache", tmp_path / "cache", "--quiet",
        "--templates-learned", "2", "--steps", "4", "-o", tmp_path / "cdc.safetensors",
    ]  # fmt: skip


def test_cdc_writes_templates_and_says_what_they_are(run, common, tmp_path, tiny_projection):
    write_projection(tmp_path / "p.safetensors", tiny_projection)
    code, out, err = run("cdc", *common, "--projection", tmp_path / "p.safetensors", "--target-risk", "0.05")
    assert code == 0, err
    semantics = read_semantics(tmp_path / "cdc.safetensors")
    assert (semantics.learned, semantics.projection_sha256) == (2, tiny_projection.digest)
    assert semantics.abstain_above is None
    assert "no threshold was proved" in out
    assert "fitting on split train" in err


def test_json_is_one_document(run, common, tmp_path):
    code, out, _ = run("cdc", *common, "--augmentations", "none,flip", "--without", "diversity", "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["cdc"] == str(tmp_path / "cdc.safetensors")
    assert answer["facts"]["images"] == 27
    options = read_semantics(tmp_path / "cdc.safetensors").provenance["options"]
    assert options["augmentations"][0] == "none"
    assert options["augmentations"][1]["kind"] == "flip"
    assert "diversity" not in options["losses"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--templates-learned", "17"], "17 is not from 1 to 16"),
        (["--augmentations", "flip"], "1 augmentations for 2"),
        (["--augmentations", "flip,"], "one intervention a template"),
        (["--augmentations", "flip,all"], "stands for 7"),
        (["--augmentations", "flip,blurr"], "no intervention is called 'blurr'"),
        (["--target-risk", "2"], "between 0 and 1"),
        (["--without", "evidential"], "evidential and softmax must be on"),
        (["--shots", "3"], "leave none to validate on"),
        (["--projection", "/nowhere"], "no such file; `invariclip calibrate` writes a projection"),
        (["--context-tokens", "14"], "leave it no room"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(run, common, tmp_path, options, said):
    code, out, err = run("cdc", *common, *options)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "cdc.safetensors").exists()


def test_calibrate_learns_templates_in_its_own_space(run, common, tmp_path):
    fitted = ["--interventions", "none", "--estimator", "shrinkage", "--strength", "3", "--captions"]
    options = [*common[:4], "--cache", tmp_path / "cache", *fitted, "--cdc", tmp_path / "cdc.safetensors"]
    code, out, err = run("calibrate", *options, "--target-risk", "0.2", "--json", "-o", tmp_path / "p.safetensors")
    assert code == 0, err
    semantics = read_semantics(tmp_path / "cdc.safetensors")
    assert semantics.projection_sha256 == read_projection(tmp_path / "p.safetensors").digest
    assert json.loads(out)["cdc_facts"]["sha256"] == semantics.digest
    assert "threshold" in err


def test_build_learns_templates_bakes_them_in_and_resumes(run, common, tmp_path):
    fitted = ["--interventions", "none", "--estimator", "shrinkage", "--strength", "3"]
    command = [
        "build",
        *common[:4],
        "--quiet",
        *fitted,
        "--cdc",
        "--classes",
        "thing 1,thing 2",
        "-o",
        tmp_path / "x.icm",
    ]
    code, _, err = run(*command)
    assert code == 0, err
    assert "2/3 learn templates" in err
    manifest = read_manifest(tmp_path / "x.icm")
    assert manifest.cdc.learned == 4
    code, out, err = run(*command, "--report", tmp_path / "r.html")
    assert (code, err.count("done before")) == (0, 3)
    # the page of templates that were learnt before
    assert f"cdc_report {tmp_path / 'r.cdc.html'}" in out
    assert manifest.cdc.sha256 in (tmp_path / "r.cdc.html").read_text()


def test_a_target_risk_needs_templates(run, common, tmp_path):
    for command in ("calibrate", "build"):
        code, _, err = run(command, *common[:4], "--target-risk", "0.1", "-o", tmp_path / "x")
        assert code == 2
        assert "add --cdc" in err
    code, _, err = run("calibrate", "--artifact", tmp_path, "--cdc", tmp_path / "c", "-o", tmp_path / "x")
    assert code == 2
    assert "leave out --artifact" in err
