"""`calibrate --sources`: moments are collected, kept, continued; and `moments`, which looks into them."""

import json

import numpy as np
import pytest

from invariclip.artifact.projection import read_projection
from invariclip.calibrate.data.moments import of_pairs, of_points
from invariclip.calibrate.projection.estimators import fit

WIDTH = 24
FIXED = ["--estimator", "shrinkage", "--strength", "3", "--quiet"]


def unit(rows):
    plain = rows.astype(np.float64)
    return plain / np.linalg.norm(plain, axis=1, keepdims=True)


@pytest.fixture
def given(tmp_path):
    """Pairs in two npy files, and the list of sources that names them."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(900, WIDTH)).astype(np.float32)
    second = first + rng.normal(size=first.shape).astype(np.float32) * np.linspace(0.1, 2, WIDTH, dtype=np.float32)
    first[5] = np.nan
    np.save(tmp_path / "a.npy", first)
    np.save(tmp_path / "b.npy", second)
    entry = {"kind": "embeddings", "name": "given", "first": "a.npy", "second": "b.npy", "points": "first"}
    (tmp_path / "sources.json").write_text(json.dumps({"sources": [entry]}))
    return first, second


def test_given_embeddings_need_no_model(run, given, tmp_path):
    out = tmp_path / "p.safetensors"
    code, said, err = run("calibrate", "--sources", tmp_path / "sources.json", *FIXED, "-o", out)
    assert code == 0, err
    assert "source     given: 899 pairs, 899 points" in said
    assert "problem    given: 2 left out: their embedding holds NaN or infinity, such as a.npy, row 5" in said
    good = np.arange(900) != 5
    first, second = (unit(rows[good]) for rows in given)
    wanted = fit(of_points(first) + of_pairs(first, second), "shrinkage", strength=3)
    projection = read_projection(out)
    np.testing.assert_allclose(projection.A_inv, wanted.A_inv, rtol=0, atol=1e-12)
    assert projection.provenance["checkpoint_sha256"] is None
    assert projection.provenance["images"]["left_out"]["given"]["not finite"]["count"] == 2


def test_moments_are_kept_and_fitted_on_again(run, given, tmp_path):
    first, again = tmp_path / "p.safetensors", tmp_path / "q.safetensors"
    kept = tmp_path / "p.moments.safetensors"
    assert run("calibrate", "--sources", tmp_path / "sources.json", *FIXED, "-o", first)[0] == 0
    (tmp_path / "a.npy").unlink()  # what is counted is not read again
    code, _, err = run("calibrate", "--moments", kept, *FIXED, "-o", again)
    assert code == 0, err
    assert read_projection(again).digest == read_projection(first).digest


def test_choosing_needs_images(run, given, tmp_path):
    code, _, err = run("calibrate", "--sources", tmp_path / "sources.json", "--quiet", "-o", tmp_path / "p.safetensors")
    assert code == 2
    assert "cannot be chosen from moments alone" in err
    assert not (tmp_path / "p.moments.safetensors").exists()  # said before the work


def test_images_are_collected_and_selected_on(run, manifest, tiny_checkpoint, tmp_path):
    entry = {"kind": "images", "path": str(manifest), "splits": ["train"], "interventions": "greyscale,invert"}
    (tmp_path / "sources.json").write_text(json.dumps({"sources": [entry]}))
    common = ["--sources", tmp_path / "sources.json", "--images", manifest, "--cache", tmp_path / "cache"]
    model = ["--model", tiny_checkpoint, "--quiet"]
    code, out, err = run("calibrate", *common, *model, "-o", tmp_path / "p.safetensors")
    assert code == 0, err
    assert "source     images: 54 interventions, 27 natural, 27 points" in out
    assert "left out   each of 3 environments in turn" in out
    provenance = read_projection(tmp_path / "p.safetensors").provenance
    assert provenance["images"]["selected_on"]["images"] == 27
    code, out, err = run("moments", "show", tmp_path / "p.moments.safetensors", "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["counts"] == {"images": {"interventions": 54, "natural": 27, "points": 27}}
    assert (shown["width"], bool(shown["encoder"])) == (24, True)


def test_an_artifact_embeds_instead_of_the_checkpoint(run, manifest, tiny_checkpoint, tiny_artifact, tmp_path):
    code, _, err = run("export", "--model", tiny_checkpoint, "-o", tmp_path / "tiny.icm", "--quiet")
    assert code == 0, err
    common = ["--images", manifest, "--cache", tmp_path / "cache", *FIXED]
    one, two = tmp_path / "torch.safetensors", tmp_path / "onnx.safetensors"
    assert run("calibrate", *common, "--model", tiny_checkpoint, "-o", one)[0] == 0
    common[3] = tmp_path / "another"
    code, _, err = run("calibrate", *common, "--artifact", tmp_path / "tiny.icm", "-o", two)
    assert code == 0, err
    first, second = read_projection(one), read_projection(two)
    assert second.provenance["checkpoint_sha256"] == first.provenance["checkpoint_sha256"]
    np.testing.assert_allclose(second.A_inv, first.A_inv, rtol=0, atol=1e-5)
    # An artifact that has a projection in it would calibrate the projected space, and say it was the checkpoint's.
    code, _, err = run("calibrate", *common, "--artifact", tiny_artifact, "-o", two)
    assert code == 2
    assert "has a projection in it (icm)" in err


def test_moments_merge_and_come_apart(run, given, tmp_path):
    entry = {"kind": "embeddings", "name": "more", "first": "a.npy", "second": "b.npy", "points": "both"}
    (tmp_path / "more.json").write_text(json.dumps({"sources": [entry]}))
    for name in ("sources", "more"):
        out = tmp_path / f"{name}.p"
        moments = ["--moments", tmp_path / f"{name}.m"]
        assert run("calibrate", "--sources", tmp_path / f"{name}.json", *moments, *FIXED, "-o", out)[0] == 0
    both = tmp_path / "both.m"
    code, out, err = run("moments", "merge", tmp_path / "sources.m", tmp_path / "more.m", "-o", both, "--json")
    assert code == 0, err
    assert json.loads(out)["counts"] == {"given": {"pairs": 899, "points": 899}, "more": {"pairs": 899, "points": 1799}}
    code, _, err = run("moments", "merge", both, tmp_path / "more.m", "-o", tmp_path / "x.m")
    assert (code, "it would count twice" in err) == (2, True)
    code, out, err = run("moments", "subtract", both, tmp_path / "more.m", "-o", tmp_path / "left.m")
    assert code == 0, err
    assert "more" not in out
    assert "899" in out
