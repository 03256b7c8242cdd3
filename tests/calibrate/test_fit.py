"""The whole of calibration on drawn images and a linear encoder, and from collected moments."""

import json

import numpy as np
import pytest

from invariclip.artifact.projection import read_projection, write_projection
from invariclip.calibrate.data.images import SkippedImageWarning, read_images
from invariclip.calibrate.data.moments import of_pairs, of_points
from invariclip.calibrate.fit import FitOptions, calibrate, tabulate
from invariclip.calibrate.projection.estimators import fit
from invariclip.calibrate.report.summary import projection_text
from invariclip.errors import InputError
from invariclip.preprocessing.interventions import parse_kinds


@pytest.fixture
def images(manifest):
    return read_images(manifest)


def test_table_lists_what_was_embedded(world, images):
    table, facts = tabulate(world.LinearEncoder(), images, FitOptions(interventions=("invert", "greyscale"), draws=1))
    assert table.unchanged.sum() == 30
    assert len(table.vectors) == 60
    assert (table.concepts[table.origins] == table.concepts).all()
    assert facts["environments"] == {"blue": 10, "green": 10, "red": 10}
    assert table.kind_names == ("invert", "greyscale")


def test_strengths_and_labels_go_into_table_and_provenance(world, images, tmp_path):
    file = tmp_path / "kinds.json"
    file.write_text('{"weak": {"kind": "style-exchange", "strength": 0.2}, "style-exchange": null, "invert": null}')
    options = FitOptions(interventions=parse_kinds(str(file)), draws=3, estimator="shrinkage", strength=1.0)
    table, facts = tabulate(world.LinearEncoder(), images, options)
    assert table.kind_names == ("weak", "style-exchange", "invert")
    assert np.bincount(table.kinds[~table.unchanged]).tolist() == [30, 30, 30]
    moved = [np.linalg.norm((table.vectors - table.vectors[table.origins])[table.kinds == k]) for k in range(2)]
    assert moved[0] < moved[1]
    assert facts["declined"] == {}
    told = calibrate(world.LinearEncoder(), images, options).projection.provenance["options"]["interventions"]
    assert told[0] == {
        "label": "weak",
        "kind": "style-exchange",
        "parameters": {"strength": [0.2, 0.2], "window": [0.01, 0.05]},
    }
    named = FitOptions(interventions=("invert",)).to_json()
    assert named["interventions"] == [{"label": "invert", "kind": "invert", "parameters": {}}]


def test_interventions_that_do_not_apply_are_counted(world, images):
    options = FitOptions(interventions=("invert", "background-texture"), estimator="shrinkage", strength=1.0)
    with pytest.warns(SkippedImageWarning, match="left out on 30 images: background-texture"):
        result = calibrate(world.LinearEncoder(), images, options)
    assert result.facts["declined"] == {"background-texture": 30}
    assert result.facts["interventional_pairs"] == 30
    assert "declined   interventions that did not apply to an image: background-texture 30" in projection_text(result)


def test_the_training_mean_counts_every_environment_the_same(world, images, tmp_path):
    red = [image for image in images if image.environment == "red"]
    few = [image for image in images if image not in red[3:]]
    options = FitOptions(interventions=("invert",), draws=1, estimator="shrinkage", strength=1.0)
    found = calibrate(world.LinearEncoder(), few, options).projection
    table, _ = tabulate(world.LinearEncoder(), few, options)
    plain = table.where(table.unchanged)
    vectors = found.apply(plain.vectors)
    means = [vectors[plain.environments == code].mean(axis=0) for code in range(len(plain.environment_names))]
    np.testing.assert_allclose(found.training_mean, sum(means) / len(means), atol=1e-12)
    assert np.abs(found.training_mean - vectors.mean(axis=0)).max() > 1e-3
    write_projection(tmp_path / "p.safetensors", found)
    np.testing.assert_array_equal(read_projection(tmp_path / "p.safetensors").training_mean, found.training_mean)


def test_one_image_cannot_borrow(world, images):
    with pytest.raises(InputError, match="style-exchange needs a second image and there is none"):
        tabulate(world.LinearEncoder(), images[:1], FitOptions(interventions=("style-exchange",)))


def test_a_bad_image_takes_its_versions_with_it(world, images):
    images[4].path.write_text("no image")
    with pytest.warns(SkippedImageWarning):
        table, facts = tabulate(world.LinearEncoder(), images, FitOptions(interventions=("invert",)))
    assert len(table.vectors) == 58
    assert len(facts["skipped"]) == 1
    assert facts["images"] == 29


def test_colour_is_found_and_removed(world, tmp_path):
    images = read_images(world.draw_images(tmp_path, concepts=16))
    result = calibrate(world.LinearEncoder(), images, FitOptions(objective="prototypes"))
    assert result.selection is not None
    assert result.projection.estimator != "identity"
    assert result.selection.result().gain.low > 0
    assert result.facts["kept_movement"] < result.facts["kept_variation"]
    assert result.facts["natural_pairs"] == 48


def test_provenance_tells_all_and_survives_the_file(world, images, tmp_path):
    options = FitOptions(interventions=("invert", "equalize"), objective="both", seed=4)
    result = calibrate(world.LinearEncoder(), images, options)
    write_projection(tmp_path / "p.safetensors", result.projection)
    provenance = read_projection(tmp_path / "p.safetensors").provenance
    assert provenance["checkpoint_sha256"] == "0" * 64
    assert provenance["options"]["seed"] == 4
    assert len(provenance["selection"]["curve"]) > 20
    assert provenance["images"]["skipped"] == []
    assert provenance["images"]["sigma"]["effective"] == 30


def test_the_summary_says_how_sure_and_from_how_little(world, tmp_path):
    images = read_images(world.draw_images(tmp_path, concepts=30))
    for options, sure in (
        (FitOptions(estimator="icm", rank=8, strength=3.0), "of the kept subspace on average"),
        (FitOptions(estimator="shrinkage", strength=3.0), "directions that move most; similarities to"),
        (FitOptions(estimator="icm", rank=24, strength=3.0), "not known"),
    ):
        result = calibrate(world.LinearEncoder(), images, options)
        text = projection_text(result)
        assert sure in text
        assert "few data   as good as 90 independent images and" in text
        assert (result.facts["confidence"] is None) == (sure == "not known")
        assert result.projection.provenance["images"]["confidence"] == result.facts["confidence"]


def test_reproducible_whatever_the_order(world, images):
    options = FitOptions(interventions=("colour-jitter",), estimator="shrinkage", strength=3.0, objective="prototypes")
    first = calibrate(world.LinearEncoder(), images, options).projection
    other = calibrate(world.LinearEncoder(), images[::-1], options).projection
    assert np.allclose(first.A_inv, other.A_inv, atol=1e-12)
    assert first.provenance["images"]["images_sha256"] == other.provenance["images"]["images_sha256"]


def test_a_named_candidate_is_taken_even_where_it_loses(world, images):
    result = calibrate(world.LinearEncoder(), images, FitOptions(estimator="icm", rank=1, strength=1.0))
    assert (result.projection.estimator, result.projection.rank, result.projection.strength) == ("icm", 1, 1.0)
    assert result.selection is not None
    assert len(result.selection.curve) == 2


def test_a_named_candidate_needs_nothing_to_leave_out(world, images):
    few = [p for p in images if p.concept in ("c1", "c2", "c3") and p.environment != "red"]
    result = calibrate(world.LinearEncoder(), few, FitOptions(estimator="shrinkage", strength=1.0))
    assert result.selection is None
    with pytest.raises(InputError, match="nothing can be left out"):
        calibrate(world.LinearEncoder(), few, FitOptions())


def test_one_environment(world, images):
    red = [image for image in images if image.environment == "red"]
    with pytest.raises(InputError, match=r"no pair: 10 of 10 concepts stand in one environment only"):
        calibrate(world.LinearEncoder(), red, FitOptions())
    kinds = ("invert", "equalize", "posterize")
    result = calibrate(world.LinearEncoder(), red, FitOptions(interventions=kinds, draws=3))
    assert result.selection is not None
    assert result.selection.left_out.startswith("each of 3 kinds")


def test_encoder_without_texts(world, images):
    class Blind(world.LinearEncoder):
        encode_texts = property(lambda self: self.missing)

    with pytest.raises(InputError, match="takes no texts; use --objective prototypes"):
        calibrate(Blind(), images, FitOptions(objective="both"))


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
