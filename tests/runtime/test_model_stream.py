"""A stream's answers are those of the lists, one by one, and it can be left at any time."""

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import invariclip
from invariclip.artifact.folder import read_manifest, write_manifest
from invariclip.errors import InputError
from invariclip.preprocessing.find import find_images
from invariclip.results import Answer, class_probabilities, ranked


@pytest.fixture(scope="module")
def model(tiny_artifact):
    return invariclip.load(tiny_artifact, threads=1)


@pytest.fixture(scope="module")
def paths(tiny_images):
    return find_images([tiny_images])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.integers(0, 11), max_size=20), batch_size=st.integers(1, 9), look_ahead=st.integers(0, 3))
def test_a_stream_answers_as_the_list_does(model, paths, order, batch_size, look_ahead):
    images = [paths[place] for place in order]
    embeddings, probabilities, uncertainties, _ = model.answer(images, batch_size=batch_size)
    assert set(uncertainties) == {"energy"}
    seen = list(model.stream(iter(images), batch_size=batch_size, look_ahead=look_ahead))
    assert [(answer.place, answer.image) for answer in seen] == list(enumerate(images))
    for answer, row, chances, unsure in zip(seen, embeddings, probabilities, uncertainties["energy"], strict=True):
        np.testing.assert_array_equal(answer.embedding, row)
        np.testing.assert_array_equal(answer.probabilities, chances)
        assert answer.prediction(2) == ranked(chances, model.classes, 2, {"energy": float(unsure)})


def test_lists_may_be_iterators(model, paths):
    np.testing.assert_array_equal(model.embed_images(iter(paths)), model.embed_images(paths))
    assert model.classify(iter(paths)) == model.classify(paths)


def test_without_classes_there_are_embeddings_alone(model, paths):
    (answer,) = model.stream(paths[:1], classes=False)
    assert (answer.probabilities, answer.classes) == (None, ())
    np.testing.assert_allclose(answer.embedding, model.embed_images(paths[:1])[0], atol=1e-6)
    with pytest.raises(InputError, match="no classes"):
        answer.prediction()


def test_answers_before_a_bad_image_are_kept(model, paths):
    seen = []
    with pytest.raises(InputError, match=r"absent\.png"):
        seen.extend(itertools.takewhile(lambda _: True, model.stream([*paths[:5], "absent.png"], batch_size=4)))
    # extend takes what an iterator gave before it raised
    assert [answer.place for answer in seen] == [0, 1, 2, 3, 4]


def test_bad_images_can_be_left_out(model, paths):
    bad = []
    mixed = [paths[0], b"nothing", paths[1], "absent.png"]
    seen = list(model.stream(mixed, unreadable=lambda place, image, error: bad.append((place, image))))
    assert [answer.place for answer in seen] == [0, 2]
    assert bad == [(1, b"nothing"), (3, "absent.png")]


def test_an_endless_stream_can_be_left(model, paths):
    stream = model.stream(itertools.cycle(paths), batch_size=2)
    assert [next(stream).place for _ in range(5)] == [0, 1, 2, 3, 4]
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("invariclip-read")]


def test_a_wrong_call_is_refused_before_the_first_answer(model):
    with pytest.raises(InputError, match="batch_size"):
        model.stream([], batch_size=0)
    with pytest.raises(InputError, match="list of images"):
        model.stream("cat.png")


def test_the_pixel_mode_is_the_models(promising, tmp_path):
    from PIL import Image

    path = tmp_path / "noise.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(path)
    exact, fast = (invariclip.load(promising, threads=1, pixel_mode=mode) for mode in ("exact", "fast"))
    assert [exact.describe()["pixel_mode"], fast.describe()["pixel_mode"]] == ["exact", "fast"]
    assert np.abs(exact.embed_images([path]) - fast.embed_images([path])).max() > 1e-5
    with pytest.raises(InputError, match="no pixel mode is called 'quick'"):
        invariclip.load(promising, pixel_mode="quick")


def test_the_fast_pixel_mode_has_to_be_proved(tiny_artifact, promising):
    with pytest.raises(InputError, match=r"the fast pixel mode was not proved at its export; .* --fast-pixels"):
        invariclip.load(tiny_artifact, pixel_mode="fast")
    manifest = read_manifest(promising)
    write_manifest(promising, replace(manifest, fast_pixels={"passed": False, "broken": ["cosine 0.9, below 0.985"]}))
    with pytest.raises(InputError, match=r"the fast pixel mode failed \(cosine 0.9, below 0.985\) at its export"):
        invariclip.load(promising, pixel_mode="fast")


def test_ranking_and_probabilities_by_hand():
    row = np.array([0.2, 0.5, 0.2, 0.1], np.float32)
    answer = Answer(0, "x.png", np.ones(1, np.float32), row, ("a", "b", "c", "d"))
    assert [name for name, _ in answer.prediction(3).ranking] == ["b", "a", "c"]
    assert answer.prediction(9).label == "b"
    with pytest.raises(InputError, match="top_k must be at least 1, not 0"):
        answer.prediction(0)
    logits = np.array([[np.log(3), 0]], np.float32)
    np.testing.assert_allclose(class_probabilities(logits, None), [[0.75, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(class_probabilities(logits, 0.0), [[0.75, 0.5]], rtol=1e-6)


@given(arrays(np.float64, (1, 6), elements=st.floats(-85, 40)))
def test_weak_classes_of_a_sigmoid_keep_their_probabilities_and_all_their_order(logits):
    single = logits.astype(np.float32)
    got = class_probabilities(single, -2.0)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-(single.astype(np.float64) - 2))), rtol=1e-5)
    names = tuple("abcdef")
    by_logit = [names[place] for place in np.argsort(-single[0], kind="stable")]
    assert [one.label for one in ranked(got[0], names, 6, logits=single[0]).ranking] == by_logit
