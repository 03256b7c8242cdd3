"""Faulty input of a calibration: every kind is named, counted, and not in the moments."""

import numpy as np
import pytest
from PIL import Image

from invariclip.calibrate.data.images import ImageRecord, SkippedImageWarning, read_images
from invariclip.calibrate.data.pairs import fitted_moments
from invariclip.calibrate.fit import FitOptions, calibrate, tabulate
from invariclip.calibrate.report.summary import projection_text

OPTIONS = FitOptions(interventions=("greyscale", "invert"), estimator="shrinkage", strength=1.0)


def counted(result):
    return {reason: told["count"] for reason, told in result.facts["problems"].items()}


@pytest.fixture
def images(manifest):
    return read_images(manifest)


def test_a_clean_set_has_no_problem(world, images):
    assert counted(calibrate(world.LinearEncoder(), images, OPTIONS)) == {}


@pytest.mark.filterwarnings("ignore:left out on 1 images")
def test_an_image_that_cannot_be_read_and_one_that_is_alone(world, images):
    (path := images[3].path).write_bytes(path.read_bytes()[:60])
    alone = Image.effect_noise((16, 16), 60).convert("RGB")
    alone.save(path.with_name("alone.png"))
    given = [*images, ImageRecord(path.with_name("alone.png"), "alone", "alone", "red")]
    with pytest.warns(SkippedImageWarning, match="skipped: .*3.png"):
        result = calibrate(world.LinearEncoder(), given, OPTIONS)
    assert counted(result) == {
        "unreadable": 1, "concept with a single image": 1, "class with a single image": 1,
    }  # fmt: skip
    assert result.facts["problems"]["unreadable"]["examples"] == [str(path)]
    assert result.facts["problems"]["concept with a single image"]["examples"] == ["alone"]
    without = calibrate(world.LinearEncoder(), [image for image in given if image.path != path], OPTIONS)
    np.testing.assert_allclose(result.projection.A_inv, without.projection.A_inv, rtol=0, atol=1e-12)
    text = projection_text(result)
    assert f"problem    1 left out: cannot be read or decoded, such as {path}" in text
    assert "problem    1 classes with a single image, such as alone" in text


def test_an_embedding_that_is_none(world, images):
    class Faulty(world.LinearEncoder):
        def encode_images(self, batch):
            rows = super().encode_images(batch)
            rows[batch.reshape(len(batch), -1).max(axis=1) == 0] = np.nan
            return rows

    Image.new("RGB", (16, 16)).save(images[4].path)
    with pytest.warns(SkippedImageWarning, match="zero or not finite"):
        result = calibrate(Faulty(), images, OPTIONS)
    assert counted(result) == {"not finite": 1}
    without = calibrate(Faulty(), [image for image in images if image is not images[4]], OPTIONS)
    np.testing.assert_allclose(result.projection.A_inv, without.projection.A_inv, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:left out on 1 images")
def test_one_file_in_two_environments_and_changes_that_change_nothing(world, images):
    (twin := images[12].path).write_bytes(images[2].path.read_bytes())
    assert images[12].concept == images[2].concept
    grey = Image.open(images[5].path).convert("L").convert("RGB")
    grey.save(images[5].path)
    result = calibrate(world.LinearEncoder(), images, OPTIONS)
    told = result.facts["problems"]["pair of one thing with itself"]
    assert told == {"count": 1, "examples": [images[2].concept]}
    assert result.facts["declined"] == {"greyscale": 1}  # it changes nothing in a grey image
    # What is no pair has no weight: the moments are those of the other pairs alone.
    table, _ = tabulate(world.LinearEncoder(), images, OPTIONS)
    moments = fitted_moments(table)
    assert moments.pairs == 30 - 1 + 60 - 1
    assert moments.pair_weight == pytest.approx(2.0)
    assert twin.is_file()


def test_environments_that_are_empty_or_all_alike(world, images):
    plain = Image.new("RGB", (16, 16), (90, 20, 200))
    for image in images:
        if image.environment == "blue":
            plain.save(image.path)
    gone = [ImageRecord(images[0].path.with_name(f"gone{k}.png"), "c1", "thing 1", "mist") for k in range(2)]
    with pytest.warns(SkippedImageWarning):
        result = calibrate(world.LinearEncoder(), [*images, *gone], OPTIONS)
    problems = result.facts["problems"]
    assert problems["environment without an image"]["examples"] == ["mist"]
    assert problems["environment without variance"]["examples"] == ["blue"]
    assert problems["unreadable"]["count"] == 2
