"""`export` and `verify` as a user types them: results on stdout, one line for each mistake, exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from invariclip.artifact.projection import Projection, write_projection


def one_line(code, out, err, *, exit_code=2):
    assert code == exit_code, err
    assert out == ""
    assert err.startswith("invariclip: ")
    assert err.count("\n") == 1
    return err


def test_export_then_verify(run, tiny_checkpoint, tiny_images, tiny_projection, tmp_path):
    write_projection(tmp_path / "p.safetensors", tiny_projection)
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    out = tmp_path / "x.icm"
    code, stdout, err = run(
        "export", "--model", tiny_checkpoint, "--projection", tmp_path / "p.safetensors", "--images", tiny_images,
        "--classes-file", tmp_path / "names.txt", "--template", "a {}", "--template", "the {}", "-o", out, "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "icm 24 → 8 (image folded, text folded), 2 classes" in stdout
    assert "max |Δ|" in stdout
    assert "1e-05" in stdout
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["classes"], manifest["templates"]) == (["cat", "dog"], ["a {}", "the {}"])

    code, stdout, err = run("verify", out, "--model", tiny_checkpoint, "--images", tiny_images, "--json", "--quiet")
    assert (code, err) == (0, "")
    report = json.loads(stdout)
    assert report["passed"] is True
    assert report["variants"]["float32"]["onnxruntime"]["image"]["items"] == 12

    code, stdout, err = run(
        "verify", out, "--model", tiny_checkpoint, "--images", tiny_images, "--max-abs-diff", "1e-12", "--quiet"
    )
    assert code == 1
    assert "max |Δ|" in stdout
    assert "does not answer like its checkpoint: float32 on onnxruntime: " in err
    assert "image max |Δ|" in err
    assert err.count("\n") == 1

    code, stdout, err = run(
        "verify", out, "--model", tiny_checkpoint, "--images", tiny_images, "--min-cosine", "1", "--json", "--quiet"
    )
    assert code == 1
    assert json.loads(stdout)["passed"] is False
    assert json.loads(stdout)["failures"]


def test_other_classes_without_a_checkpoint(run, tiny_artifact, tiny_checkpoint, tiny_images, tmp_path):
    (tmp_path / "forms.txt").write_text("# mine\na {} in words\na {} in an image\n")
    out = tmp_path / "new.icm"
    code, stdout, err = run(
        "export", "--classes-only", tiny_artifact, "--classes", "sun,moon", "--templates-file", tmp_path / "forms.txt",
        "--images", tiny_images, "-o", out, "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "2 classes" in stdout
    assert "with the new classes probabilities are within" in stdout
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["classes"], manifest["templates"]) == (["sun", "moon"], ["a {} in words", "a {} in an image"])
    # the contract holds as it does for an artifact from a checkpoint
    code, _, err = run("verify", out, "--model", tiny_checkpoint, "--images", tiny_images, "--quiet")
    assert (code, err) == (0, "")

    code, stdout, err = run(
        "export", "--classes-only", out, "--classes", "cat", "--templates", "ensemble", "--images", tiny_images,
        "-o", out, "--json", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert (json.loads(stdout)["classes"], len(json.loads(stdout)["templates"])) == (["cat"], 80)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name them with --classes or --classes-file"),
        (["--classes", "a", "--model", "ViT-B-32"], "leave --model out, or export from the checkpoint"),
        (["--classes", "a", "--checkpoint", "x.pt"], "leave --checkpoint out"),
        (["--classes", "a", "--projection", "p"], "leave --projection out"),
        (["--classes", "a", "--min-cosine", "0.9"], "leave --min-cosine out"),
        (["--classes", "a", "--projection-as-input-initializer"], "leave --projection-as-input-initializer out"),
        (["--classes", "a", "--templates", "ensembl"], "available: ensemble"),
        (["--classes", "a", "--templates", "ensemble", "--template", "{}"], "give one of --template, --templates-file"),
        (["--classes", "a", "--templates-file", "absent.txt"], "absent.txt: cannot be read"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_mistakes_with_classes_only(run, tiny_artifact, tmp_path, options, message):
    out = tmp_path / "x.icm"
    err = one_line(*run("export", "--classes-only", tiny_artifact, *options, "-o", out, "--quiet"))
    assert message in err
    assert not out.exists()


def test_verify_against_another_checkpoint(run, tiny_artifact, model_folder):
    err = one_line(*run("verify", tiny_artifact, "--model", model_folder("vit"), "--quiet"))
    assert "was exported from another checkpoint" in err


def test_verify_against_another_projection(run, tiny_artifact, tiny_checkpoint, tiny_images, tmp_path):
    write_projection(tmp_path / "p.safetensors", Projection(np.random.default_rng(9).normal(size=(24, 8)), "icm"))
    code, _, err = run(
        "verify", tiny_artifact, "--model", tiny_checkpoint, "--images", tiny_images, "--projection",
        tmp_path / "p.safetensors", "--quiet",
    )  # fmt: skip
    assert code == 1
    assert "top-1" in err


def test_verify_a_damaged_artifact(run, tiny_artifact, tiny_checkpoint, tmp_path):
    import shutil

    copy = shutil.copytree(tiny_artifact, tmp_path / "a.icm")
    with (copy / "text.onnx").open("r+b") as stream:
        stream.seek(3000)
        stream.write(b"\xff")
    err = one_line(*run("verify", copy, "--model", tiny_checkpoint, "--quiet"))
    assert "text.onnx is not the file that was exported" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "ViT-B-33"], "nearest names: ViT-B-32"),
        (["--model", "ViT-B-32"], "no weights; pass --checkpoint FILE"),
        (["--model", "ViT-B-32", "--checkpoint", "none.safetensors"], "no such checkpoint file"),
        (["--model", "{tiny}", "--checkpoint", "{garbage}"], "not a checkpoint, or damaged"),
        (["--model", "{tiny}", "--checkpoint", "{other}"], "belongs to another model than"),
        (["--model", "{tiny}", "--projection", "{wide}"], "for embeddings of width 32, but"),
        (["--model", "{tiny}", "--projection", "none"], "no such file; `invariclip calibrate` writes a projection"),
        (["--model", "{tiny}", "--images", "none"], "no such file or folder"),
        (["--model", "{tiny}", "--images", "{garbage}"], "none of the 1 images can be read"),
        (["--model", "{tiny}", "--images", "{empty}"], "no image in this folder"),
        (["--model", "{tiny}", "--classes", "a,a"], "empty or repeated"),
        (["--model", "{tiny}", "--checkpoint", "x.pt", "--random-weights", "1"], "not both"),
        (["--model", "{tiny}", "--random-weights", "1"], "has weights of its own"),
        (["--model", "{tiny}", "--min-cosine", "2"], "--min-cosine"),
        (["--model", "{tiny}", "--projection-as-input-initializer"], "give --projection FILE"),
        (["--model", "{tiny}", "--classes", "a", "--template", "{{}}", "--template", "{{}}"], "is given twice"),
        (["--model", "{tiny}", "--without", "speed"], "no rewrite is called 'speed'; available: "),
        (["--model", "{tiny}", "--pixels-in-graph", "crop"], "--pixels-in-graph"),
        (["--model", "{tiny}", "--backend", "tf"], "no backend is called 'tf'; available: onnxruntime"),
        (["--classes-only", "{tiny}", "--classes", "a"], "not an artifact"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[:40],
)
@pytest.mark.filterwarnings("ignore::invariclip.export.verification.evidence.UnreadableImageWarning")
def test_mistakes_are_one_line_and_exit_2(run, tiny_checkpoint, model_folder, tmp_path, options, message):
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 30)
    (tmp_path / "empty").mkdir()
    write_projection(tmp_path / "wide.safetensors", Projection(np.eye(32)[:, :4], "icm"))
    places = {
        "tiny": tiny_checkpoint,
        "garbage": tmp_path / "garbage.safetensors",
        "other": f"{model_folder('timm, linear head')}/open_clip_model.safetensors",
        "wide": tmp_path / "wide.safetensors",
        "empty": tmp_path / "empty",
    }
    out = tmp_path / "x.icm"
    code, stdout, err = run("export", *(option.format(**places) for option in options), "-o", out, "--quiet")
    lines = [line for line in err.splitlines() if "warning: " not in line]
    assert (code, stdout, len(lines)) == (2, "", 1), err
    assert message in err
    assert not out.exists()


def test_a_real_process_prints_no_chatter(tiny_checkpoint, tiny_images, tmp_path):
    command = [sys.executable, "-m", "invariclip", "export", "--model", tiny_checkpoint, "--images", tiny_images]
    done = subprocess.run(
        [*map(str, command), "-o", tmp_path / "x.icm", "--json", "--quiet"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["out"].endswith("x.icm")
