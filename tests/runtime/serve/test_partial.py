"""`partial=true`: an image that cannot be read has its error in its place, and the others are answered as ever."""

import base64

import numpy as np
import pytest

from invariclip.serve.limits import Limits
from invariclip.serve.service import Service
from invariclip.serve.sites import SiteRegistry
from invariclip.sites.measuring import begun, training_mean


@pytest.fixture(scope="module")
def ask(model, serving, tiny_artifact):
    yard = begun(model, "yard", training_mean(tiny_artifact, model.manifest), None)
    service = Service(model, Limits(pixels=50_000), sites=SiteRegistry(model, known={"yard": yard}))
    service.warm_up()
    with serving(service) as client:
        yield client


@pytest.fixture(scope="module")
def parts(images, encoded):
    """Good images between an empty file, one that is no image, one that is cut, and one that is too large."""
    return [
        ("images", "a.png", images[0]), ("images", "none.png", b""), ("images", "text.png", b"nothing"),
        ("images", "b.png", images[1]), ("images", "cut.png", images[2][: len(images[2]) // 2]),
        ("images", "large.png", encoded((400, 400))), ("images", "c.png", images[3]),
    ]  # fmt: skip


GOOD, BAD = [0, 3, 6], [1, 2, 4, 5]
WARNING = "4 of 7 images could not be read; their errors are in their places"


@pytest.mark.parametrize("query", ["", "&classes=sun,moon", "&site=yard"])
def test_others_are_classified_as_without_them(ask, parts, query):
    told = ask.form(f"/v1/classify?partial=true{query}", parts)
    assert told.status == 200
    alone = ask.form(f"/v1/classify?top=3{query}", [parts[place] for place in GOOD]).json
    predictions = told.json["predictions"]
    assert [one["image"] for one in predictions] == [name for _, name, _ in parts]
    for place, one in zip(GOOD, alone["predictions"], strict=True):
        assert predictions[place]["label"] == one["label"]
        assert predictions[place]["probability"] == pytest.approx(one["probability"], abs=1e-4)
    for place in BAD:
        assert set(predictions[place]) == {"image", "error"}
    assert predictions[2]["error"].startswith("not an image of a known format")
    assert predictions[5]["error"] == "400x400 pixels are too many; up to 50,000 are taken"
    assert told.json["warnings"] == [WARNING]
    assert {**told.json, "predictions": 0, "warnings": 0} == {**alone, "predictions": 0, "warnings": 0}


def test_others_are_embedded_as_without_them(ask, parts, model, images):
    told = ask.form("/v1/embed", [*parts, ("partial", "true")]).json
    assert told["items"] == [name for _, name, _ in parts]
    assert [place for place, row in enumerate(told["embeddings"]) if row is None] == BAD
    rows = np.float32([told["embeddings"][place] for place in GOOD])
    np.testing.assert_allclose(rows, model.embed_images([images[0], images[1], images[3]]), atol=1e-5)
    assert [(one["index"], one["image"]) for one in told["errors"]] == [(place, parts[place][1]) for place in BAD]
    assert told["warnings"] == [WARNING]


def test_base64_that_is_none_is_the_image_s_own_error(ask, images):
    good = base64.b64encode(images[0]).decode()
    asked = {"images": ["%%%", {"name": "b", "data": good}], "partial": True}
    first, second = ask.json("/v1/classify", asked).json["predictions"]
    assert first["image"] == "0"
    assert first["error"].startswith("not base64 (")
    assert second["label"]
    assert ask.json("/v1/classify", {**asked, "partial": False}).status == 422
    assert ask.json("/v1/classify", {**asked, "images": [{"nmae": "b"}]}).status == 422


def test_all_may_fail(ask):
    two = [("images", "a", b"x"), ("images", "b", b"y")]
    for query in ("", "&classes=sun,moon", "&site=yard"):
        told = ask.form(f"/v1/classify?partial=true{query}", two)
        assert told.status == 200
        assert all(set(one) == {"image", "error"} for one in told.json["predictions"])
    told = ask.form("/v1/embed?partial=true", two).json
    assert told["embeddings"] == [None, None]
    assert len(told["errors"]) == 2


def test_it_is_all_or_nothing_otherwise(ask, parts):
    for query in ("", "?partial=false"):
        refused = ask.form(f"/v1/classify{query}", parts)
        assert refused.status == 422
        assert refused.error.startswith("image none.png: ")
    whole = ask.form("/v1/embed?partial=true", [parts[0]]).json
    assert (whole["errors"], whole["warnings"]) == ([], [])
    assert "errors" not in ask.form("/v1/embed", [parts[0]]).json


def test_what_it_cannot_mean_is_refused(ask, parts):
    assert "partial must be true or false, not 'yes'" in ask.form("/v1/classify?partial=yes", parts).error
    assert "leave the field partial out" in ask.json("/v1/embed", {"texts": ["a"], "partial": True}).error
    file = ask("POST", "/v1/embed?partial=true", parts[0][2], "image/png", {"accept": "application/octet-stream"})
    assert (file.status, "ask for JSON" in file.error) == (422, True)


def test_failed_images_are_counted(ask, parts):
    def failed():
        return ask.api.metrics.registry.get_sample_value("invariclip_images_failed_total")

    before = failed()
    ask.form("/v1/classify?partial=true", parts)
    ask("GET", "/metrics")
    assert failed() == before + 4


def test_pixels_of_a_request_are_bounded_all_the_same(model, serving, encoded):
    with serving(Service(model, Limits(pixels=8_000, request_pixels=20_000))) as client:
        large = [("images", f"{place}.png", encoded((80, 100))) for place in range(3)]
        refused = client.form("/v1/classify?partial=true", [*large, ("images", "x", b"x")])
        assert refused.status == 413
        assert "up to 20,000 are taken at once" in refused.error
