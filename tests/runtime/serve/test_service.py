"""Many callers' images and texts, answered as `Model` answers them one at a time."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from invariclip.errors import InputError, TruncatedTextWarning
from invariclip.preprocessing.tokenizer import hearing_cuts
from invariclip.serve.limits import Held, Limits, RefusedError
from invariclip.serve.service import Batching, EncodedImage, Processors, Service

# What the contract allows between a row alone and in a batch (`max_batch_diff`), a component in float32
IN_A_BATCH = 1e-5


def asked(images, classes=True):
    return [(EncodedImage(str(place), data), classes) for place, data in enumerate(images)]


@pytest.mark.parametrize("which", ["model", "unsure_model"])
def test_answers_are_the_models_own(which, images, request):
    model = request.getfixturevalue(which)
    service = Service(model, batching=Batching(max_batch=8, decoders=2))
    other = model.with_classes(["sun", "moon", "a red house"])
    with ThreadPoolExecutor(6) as pool:
        tickets = list(pool.map(lambda one: service.images.submit([one]), asked(images) * 3))
    rows = [ticket.future.result(20)[0] for ticket in tickets]
    for place, row in enumerate(rows):
        one = [images[place % len(images)]]
        np.testing.assert_allclose(row.embedding, model.embed_images(one)[0], atol=IN_A_BATCH)
        for own, whose in ((model, service.model), (other, other)):
            [told] = service.predictions([row], whose, 3, service.uncertainty, None)
            [alone] = own.classify(one, top_k=3)
            assert told.label == alone.label
            assert [name for name, _ in told.ranking] == [name for name, _ in alone.ranking]
            np.testing.assert_allclose([p for _, p in told.ranking], [p for _, p in alone.ranking], atol=1e-4)
            assert told.uncertainty_kind == alone.uncertainty_kind == service.uncertainty
            assert told.uncertainty == pytest.approx(alone.uncertainty, abs=1e-4)
    assert service.close(20)


class Crowd:
    """How many threads are in a function at a time, at most; each waits a moment for others to come."""

    def __init__(self, function, wait):
        self.function, self.wait = function, wait
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def __call__(self, *given):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            time.sleep(self.wait)
            return self.function(*given)
        finally:
            with self.lock:
                self.now -= 1


@pytest.mark.parametrize("shared", [True, False])
def test_models_of_one_process_take_no_more_of_it_than_one(model, images, shared):
    """Without anything shared, more threads come together: so this can fail."""
    processors = Processors(2)
    services = [
        Service(model, batching=Batching(max_batch=1, decoders=2), processors=processors if shared else None)
        for _ in range(3)
    ]
    decoding, running = Crowd(model.prepare, 0.005), Crowd(Service._rows, 0.005)
    for service in services:
        service.model = SimpleNamespace(prepare=decoding, manifest=model.manifest)
        service._rows = partial(running, SimpleNamespace(model=model))
    tickets = [service.images.submit(asked(images)) for service in services]
    for ticket in tickets:
        for row, image in zip(ticket.future.result(20), images, strict=True):
            np.testing.assert_array_equal(row.embedding, model.embed_images([image])[0])
    for service in services:
        service.close()
    if shared:
        assert (decoding.most, running.most) == (2, 1)
    else:
        assert decoding.most > 2
        assert running.most > 1


def test_one_at_a_time_is_equal_bit_by_bit(model, unsure_model, images):
    for one in (model, unsure_model):
        service = Service(one, batching=Batching(max_batch=1))
        rows = service.images.submit(asked(images)).future.result(20)
        told = list(service.predictions(rows, one, 3, service.uncertainty, None))
        assert told == one.classify(images, top_k=3, batch_size=1)
        service.close()


def test_embeddings_alone_ask_the_graph_for_no_classes(model, images):
    service = Service(model)
    [row] = service.images.submit(asked(images[:1], classes=False)).future.result(20)
    assert row.probabilities is None
    np.testing.assert_array_equal(row.embedding, model.embed_images(images[:1])[0])
    service.close()


def test_images_are_bounded_before_they_are_decoded(model, encoded, images):
    service = Service(model, Limits(pixels=8000))
    small, large = encoded((80, 100)), encoded((81, 100))
    assert service.images.submit(asked([small])).future.result(20)
    with pytest.raises(RefusedError, match=r"image 1: 81x100 pixels are too many; up to 8,000") as refused:
        service.images.submit(asked([small, large])).future.result(20)
    assert refused.value.status == 413
    with pytest.raises(
        InputError,
        match=r"^image 0: not an image of a known format: AVIF, BMP, .*, WEBP$",
    ):
        service.images.submit(asked([b"nothing"])).future.result(20)
    with pytest.raises(InputError, match=r"^image 0: damaged image"):
        service.images.submit(asked([images[0][:200]])).future.result(20)
    service.close()


def test_images_are_bounded_by_what_the_resize_makes_of_them(model, encoded):
    service = Service(model)
    with pytest.raises(RefusedError, match=r"image 1: an image of 60000x1 becomes .* pixels .*; crop it") as refused:
        service.images.submit(asked([encoded(), encoded((60_000, 1))])).future.result(20)
    assert refused.value.status == 413
    service.close()


def test_images_of_a_request_are_bounded_together(model, encoded):
    side = model.manifest.pixels.image_size[0]
    one = 80 * 100 + side * (side * 100 // 80)
    service = Service(model, Limits(pixels=8000, request_pixels=2 * one))
    image = EncodedImage("x", encoded((80, 100)))
    service.require_bearable([image] * 2)
    with pytest.raises(
        RefusedError,
        match=rf"the images of the request have {3 * one:,} pixels, decoded and resized; up to {2 * one:,}",
    ) as no:
        service.require_bearable([image] * 3)
    assert no.value.status == 413
    with pytest.raises(InputError, match="image y: not an image of a known format"):
        service.require_bearable([image, EncodedImage("y", b"nothing")])
    service.close()


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX"])
def test_formats_that_nobody_sends_are_not_decoded(model, kind):
    """EPS above all: Pillow starts Ghostscript for it."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, kind)
    service = Service(model)
    with pytest.raises(InputError, match="not an image of a known format: AVIF, BMP"):
        service.images.submit(asked([stream.getvalue()])).future.result(20)
    service.close()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats_that_people_send_are(model, encoded, kind):
    service = Service(model)
    data = encoded(kind=kind)
    [row] = service.images.submit(asked([data])).future.result(20)
    np.testing.assert_array_equal(row.embedding, model.embed_images([data])[0])
    service.close()


def test_a_failing_engine_is_not_the_images_fault(model, images):
    class Broken(Service):
        def _rows(self, batch, seen):
            raise InputError("ONNX Runtime cannot answer this input")

    service = Broken(model)
    with pytest.raises(RuntimeError, match="cannot answer"):
        service.images.submit(asked(images[:1])).future.result(20)
    service.close()


def test_texts_are_cut_with_a_warning_to_their_own_callers(model):
    service = Service(model)
    long, short = "word " * 30, "a cat"
    mine, other = service.texts.submit([long, short]), service.texts.submit([short])
    [cut, whole], [alone] = mine.future.result(20), other.future.result(20)
    assert "cut to context_length 16" in cut.warning
    assert whole.warning is None
    assert alone.warning is None
    np.testing.assert_array_equal(alone.embedding, model.embed_texts([short])[0])
    assert service.close(20)


def test_cut_texts_are_heard_in_their_own_thread_alone(model):
    long = "word " * 30
    with hearing_cuts() as heard, ThreadPoolExecutor(1) as pool:
        with pytest.warns(TruncatedTextWarning, match="cut to context_length 16"):
            pool.submit(model.embed_texts, [long]).result(20)
        assert heard == {}
        model.embed_texts([long, "short"])
    assert list(heard) == [long]
    with pytest.warns(TruncatedTextWarning):
        model.embed_texts([long])


def test_which_classes_are_meant(model):
    service = Service(model)
    own = model.classes
    assert service.class_key(None, None) is None
    assert service.class_key(own, model.templates) is None
    assert service.class_key(("sun",), None) == (("sun",), model.templates)
    assert service.class_key(None, ("a {}",)) == (own, ("a {}",))
    service.close()
    bare = Service(model._but(classes=()))
    with pytest.raises(InputError, match="no classes; give some in the field classes"):
        bare.class_key(None, None)
    bare.close()


def test_abstaining_is_settled_at_the_start(model, unsure_model):
    with pytest.raises(InputError, match="energy is not; give a number"):
        Service(model, abstain_above="calibrated")
    with pytest.raises(InputError, match="no learned templates, so its uncertainty is energy"):
        Service(model, uncertainty="evidence")
    service = Service(unsure_model, abstain_above="calibrated")
    assert (service.uncertainty, service.abstain_above) == ("evidence", 0.3)
    assert service.abstaining(None, None, said=False) == ("evidence", 0.3)
    assert service.abstaining("energy", None, said=False) == ("energy", None)  # 0.3 is of the evidence
    assert service.abstaining("energy", 0.4, said=True) == ("energy", 0.4)
    service.close()


def test_limits_are_above_zero_and_fit_together():
    for wrong in ({"body": 0}, {"seconds": 0.0}, {"pixels": -1}):
        with pytest.raises(InputError, match="must be above 0"):
            Limits(**wrong)
    with pytest.raises(InputError, match="--queue"):
        Limits(images=9, queue=8)
    with pytest.raises(InputError, match="in all"):
        Limits(body=9, bodies=8)
    with pytest.raises(InputError, match="--max-request-pixels"):
        Limits(pixels=9, request_pixels=8)


def test_bytes_held_are_counted():
    held = Held(10)
    held.take(6)
    with pytest.raises(RefusedError, match="up to 10 are held") as refused:
        held.take(5)
    assert refused.value.status == 503
    held.take(4)
    held.give_back(10)
    held.take(10)
