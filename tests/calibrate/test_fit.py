"""The whole of calibration on drawn pictures and a linear encoder."""

import numpy as np
import pytest

from invariclip.artifact.projection import read_projection, write_projection
from invariclip.calibrate.data.pictures import SkippedPictureWarning, read_pictures
from invariclip.calibrate.fit import FitOptions, calibrate, tabulate
from invariclip.calibrate.report import summary_text
from invariclip.errors import InputError
from invariclip.preprocessing.interventions import parse_kinds


@pytest.fixture
def pictures(manifest):
    return read_pictures(manifest)


def test_table_lists_what_was_embedded(world, pictures):
    table, facts = tabulate(world.LinearEncoder(), pictures, FitOptions(interventions=("invert", "greyscale"), draws=1))
    assert table.unchanged.sum() == 30
    assert len(table.vectors) == 60
    assert (table.concepts[table.origins] == table.concepts).all()
    assert facts["environments"] == {"blue": 10, "green": 10, "red": 10}
    assert table.kind_names == ("invert", "greyscale")


def test_strengths_and_labels_go_into_table_and_provenance(world, pictures, tmp_path):
    file = tmp_path / "kinds.json"
    file.write_text('{"weak": {"kind": "style-exchange", "strength": 0.2}, "style-exchange": null, "invert": null}')
    options = FitOptions(interventions=parse_kinds(str(file)), draws=3, estimator="shrinkage", strength=1.0)
    table, facts = tabulate(world.LinearEncoder(), pictures, options)
    assert table.kind_names == ("weak", "style-exchange", "invert")
    assert np.bincount(table.kinds[~table.unchanged]).tolist() == [30, 30, 30]
    moved = [np.linalg.norm((table.vectors - table.vectors[table.origins])[table.kinds == k]) for k in range(2)]
    assert moved[0] < moved[1]
    assert facts["declined"] == {}
    told = calibrate(world.LinearEncoder(), pictures, options).projection.provenance["options"]["interventions"]
    assert told[0] == {
        "label": "weak",
        "kind": "style-exchange",
        "parameters": {"strength": [0.2, 0.2], "window": [0.01, 0.05]},
    }
    named = FitOptions(interventions=("invert",)).to_json()
    assert named["interventions"] == [{"label": "invert", "kind": "invert", "parameters": {}}]


def test_interventions_that_do_not_apply_are_counted(world, pictures):
    options = FitOptions(interventions=("invert", "background-texture"), estimator="shrinkage", strength=1.0)
    with pytest.warns(SkippedPictureWarning, match="left out on 30 pictures: background-texture"):
        result = calibrate(world.LinearEncoder(), pictures, options)
    assert result.facts["declined"] == {"background-texture": 30}
    assert result.facts["interventional_pairs"] == 30
    assert "declined   interventions that did not apply to a picture: background-texture 30" in summary_text(result)


def test_the_training_mean_counts_every_environment_the_same(world, pictures, tmp_path):
    red = [picture for picture in pictures if picture.environment == "red"]
    few = [picture for picture in pictures if picture not in red[3:]]
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


def test_one_picture_cannot_borrow(world, pictures):
    with pytest.raises(InputError, match="style-exchange needs a second picture and there is none"):
        tabulate(world.LinearEncoder(), pictures[:1], FitOptions(interventions=("style-exchange",)))


def test_a_bad_picture_takes_its_versions_with_it(world, pictures):
    pictures[4].path.write_text("no picture")
    with pytest.warns(SkippedPictureWarning):
        table, facts = tabulate(world.LinearEncoder(), pictures, FitOptions(interventions=("invert",)))
    assert len(table.vectors) == 58
    assert len(facts["skipped"]) == 1
    assert facts["pictures"] == 29


def test_colour_is_found_and_removed(world, tmp_path):
    pictures = read_pictures(world.draw_pictures(tmp_path, concepts=16))
    result = calibrate(world.LinearEncoder(), pictures, FitOptions(objective="prototypes"))
    assert result.selection is not None
    assert result.projection.estimator != "identity"
    assert result.selection.result().gain.low > 0
    assert result.facts["kept_movement"] < result.facts["kept_variation"]
    assert result.facts["natural_pairs"] == 48


def test_provenance_tells_all_and_survives_the_file(world, pictures, tmp_path):
    options = FitOptions(interventions=("invert", "equalize"), objective="both", seed=4)
    result = calibrate(world.LinearEncoder(), pictures, options)
    write_projection(tmp_path / "p.safetensors", result.projection)
    provenance = read_projection(tmp_path / "p.safetensors").provenance
    assert provenance["checkpoint_sha256"] == "0" * 64
    assert provenance["options"]["seed"] == 4
    assert len(provenance["selection"]["curve"]) > 20
    assert provenance["pictures"]["skipped"] == []
    assert provenance["pictures"]["sigma"]["effective"] == 30


def test_the_summary_says_how_sure_and_from_how_little(world, tmp_path):
    pictures = read_pictures(world.draw_pictures(tmp_path, concepts=30))
    for options, sure in (
        (FitOptions(estimator="icm", rank=8, strength=3.0), "of the kept subspace on average"),
        (FitOptions(estimator="shrinkage", strength=3.0), "directions that move most; similarities to"),
        (FitOptions(estimator="icm", rank=24, strength=3.0), "not known"),
    ):
        result = calibrate(world.LinearEncoder(), pictures, options)
        text = summary_text(result)
        assert sure in text
        assert "few data   as good as 90 independent pictures and" in text
        assert (result.facts["confidence"] is None) == (sure == "not known")
        assert result.projection.provenance["pictures"]["confidence"] == result.facts["confidence"]


def test_reproducible_whatever_the_order(world, pictures):
    options = FitOptions(interventions=("colour-jitter",), estimator="shrinkage", strength=3.0, objective="prototypes")
    first = calibrate(world.LinearEncoder(), pictures, options).projection
    other = calibrate(world.LinearEncoder(), pictures[::-1], options).projection
    assert np.allclose(first.A_inv, other.A_inv, atol=1e-12)
    assert first.provenance["pictures"]["pictures_sha256"] == other.provenance["pictures"]["pictures_sha256"]


def test_a_named_candidate_is_taken_even_where_it_loses(world, pictures):
    result = calibrate(world.LinearEncoder(), pictures, FitOptions(estimator="icm", rank=1, strength=1.0))
    assert (result.projection.estimator, result.projection.rank, result.projection.strength) == ("icm", 1, 1.0)
    assert result.selection is not None
    assert len(result.selection.curve) == 2


def test_a_named_candidate_needs_nothing_to_leave_out(world, pictures):
    few = [p for p in pictures if p.concept in ("c1", "c2", "c3") and p.environment != "red"]
    result = calibrate(world.LinearEncoder(), few, FitOptions(estimator="shrinkage", strength=1.0))
    assert result.selection is None
    with pytest.raises(InputError, match="nothing can be left out"):
        calibrate(world.LinearEncoder(), few, FitOptions())


def test_one_environment(world, pictures):
    red = [picture for picture in pictures if picture.environment == "red"]
    with pytest.raises(InputError, match=r"no pair: 10 of 10 concepts stand in one environment only"):
        calibrate(world.LinearEncoder(), red, FitOptions())
    kinds = ("invert", "equalize", "posterize")
    result = calibrate(world.LinearEncoder(), red, FitOptions(interventions=kinds, draws=3))
    assert result.selection is not None
    assert result.selection.left_out.startswith("each of 3 kinds")


def test_encoder_without_texts(world, pictures):
    class Blind(world.LinearEncoder):
        encode_texts = property(lambda self: self.missing)

    with pytest.raises(InputError, match="takes no texts; use --objective prototypes"):
        calibrate(Blind(), pictures, FitOptions(objective="both"))
