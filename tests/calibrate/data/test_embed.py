"""Embeddings come from the serving pixels, are kept, and survive kills and damage."""

import hashlib

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from invariclip.calibrate.data import embed as module
from invariclip.calibrate.data.embed import embed, encoder_input
from invariclip.calibrate.data.encode import embed_texts
from invariclip.calibrate.data.images import SkippedImageWarning, read_images
from invariclip.calibrate.data.versions import EmbeddingJob
from invariclip.errors import InputError
from invariclip.files import sha256_file
from invariclip.preprocessing.interventions import CATALOGUE, InterventionRequest, intervene, resolve
from invariclip.preprocessing.pixels import stack


@pytest.fixture
def jobs(manifest):
    return [EmbeddingJob(image.path) for image in read_images(manifest)]


def expected(encoder, batch):
    raw = encoder.encode_images(batch).astype(np.float64)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def test_unit_length_and_equal_to_the_encoder(world, jobs):
    result = embed(world.LinearEncoder(), jobs)
    batch = stack([job.path for job in jobs], world.SPEC)
    assert np.allclose(result.vectors, expected(world.LinearEncoder(), batch))
    assert result.kept.tolist() == list(range(30))
    assert result.skipped == ()


def test_changed_images_are_changed_as_the_tower_sees_them(world, jobs):
    job = EmbeddingJob(jobs[0].path, "invert", 5)
    (image,) = stack([job.path], world.SPEC)
    changed = np.asarray(intervene(Image.fromarray(image), "invert", sha256_file(job.path), 5))
    result = embed(world.LinearEncoder(), [jobs[0], job])
    assert np.allclose(result.vectors[1], expected(world.LinearEncoder(), changed[None])[0])


def test_a_donor_is_seen_as_the_tower_sees_it(world, jobs):
    job = EmbeddingJob(jobs[0].path, "style-exchange", 5, jobs[25].path)
    image, donor = map(Image.fromarray, stack([job.path, job.donor], world.SPEC))
    changed = np.asarray(intervene(image, "style-exchange", sha256_file(job.path), 5, donor))
    result = embed(world.LinearEncoder(), [job])
    assert np.allclose(result.vectors[0], expected(world.LinearEncoder(), changed[None])[0])


def test_keys_of_the_papers_seven_stay_as_they_are(world, jobs, tmp_path):
    """Else what caches hold would be made again; version 2 leaves out what changes nothing in an image."""
    embed(world.LinearEncoder(), [jobs[0], EmbeddingJob(jobs[0].path, "invert", 5)], cache=tmp_path)
    (part,) = tmp_path.rglob("*.safetensors")
    digest = sha256_file(jobs[0].path)
    keys = [hashlib.sha256(text.encode()).digest() for text in (f"{digest}\n-", f"{digest}\ninvert-2\n5")]
    assert [bytes(key) for key in load_file(part)["keys"]] == keys


def test_all_that_a_changed_image_depends_on_is_in_its_key(world, jobs, tmp_path):
    path, donor, other = (job.path for job in jobs[:3])
    exchange = InterventionRequest("style-exchange", CATALOGUE["style-exchange"](window=0.4))
    weaker = InterventionRequest("style-exchange", CATALOGUE["style-exchange"](window=0.4, strength=0.1))
    blur = InterventionRequest("gaussian-blur", CATALOGUE["gaussian-blur"](deviation=3))
    different = [
        EmbeddingJob(path, exchange, 0, donor),
        EmbeddingJob(path, exchange, 0, other),
        EmbeddingJob(path, exchange, 1, donor),
        EmbeddingJob(path, weaker, 0, donor),
        EmbeddingJob(path, InterventionRequest("again", exchange.change), 0, donor),
        EmbeddingJob(path, blur),
        EmbeddingJob(path, "gaussian-blur"),
    ]
    vectors = embed(world.LinearEncoder(), different, cache=tmp_path).vectors
    assert len({row.tobytes() for row in vectors}) == len(different)
    encoder = world.LinearEncoder()
    named = [EmbeddingJob(path, resolve("gaussian-blur")), *different]
    assert np.array_equal(embed(encoder, named, cache=tmp_path).vectors, vectors[[-1, *range(7)]])
    assert encoder.batches == []


def test_interventions_that_do_not_apply_are_counted_with_one_warning(world, jobs):
    """The drawn patterns run to the border, so there is no background."""
    asked = [*jobs[:5], *(EmbeddingJob(job.path, "background-texture") for job in jobs[:5])]
    with pytest.warns(SkippedImageWarning, match="left out on 5 images: background-texture: the border") as caught:
        result = embed(world.LinearEncoder(), asked)
    assert len(caught) == 1
    assert result.kept.tolist() == [0, 1, 2, 3, 4]
    assert [index for index, _ in result.declined] == [5, 6, 7, 8, 9]
    assert result.skipped == ()


@pytest.mark.filterwarnings("ignore:left out on")
def test_what_does_not_apply_is_not_tried_again(world, jobs, tmp_path, monkeypatch):
    asked = [*jobs[:2], *(EmbeddingJob(job.path, "background-texture") for job in jobs[:5])]
    first = embed(world.LinearEncoder(), asked, cache=tmp_path)
    tried = []
    monkeypatch.setattr(module, "encoder_input", lambda job, *rest: tried.append(job) or encoder_input(job, *rest))
    again = embed(world.LinearEncoder(), asked, cache=tmp_path)
    assert again.declined == first.declined
    assert [index for index, _ in again.declined] == [2, 3, 4, 5, 6]
    assert tried == []
    # another seed, another image, and another size of the texture are other questions
    wider = InterventionRequest("background-texture", CATALOGUE["background-texture"](tolerance=7))
    path = jobs[0].path
    others = [
        EmbeddingJob(path, "background-texture", 1),
        EmbeddingJob(jobs[7].path, "background-texture"),
        EmbeddingJob(path, wider),
    ]
    embed(world.LinearEncoder(), [*asked, *others], cache=tmp_path)
    assert tried == others


@pytest.mark.filterwarnings("ignore:left out on")
@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"xy": "a"}', b"\xff" * 9, b'{"00": "' + b"a" * (1 << 20) + b'"}'])
def test_a_damaged_record_of_what_does_not_apply_costs_a_try(world, jobs, tmp_path, damage):
    asked = [jobs[0], EmbeddingJob(jobs[0].path, "background-texture")]
    first = embed(world.LinearEncoder(), asked, cache=tmp_path)
    (kept,) = tmp_path.rglob("*.declined.json")
    whole = kept.read_bytes()
    kept.write_bytes(damage)
    assert embed(world.LinearEncoder(), asked, cache=tmp_path).declined == first.declined
    assert kept.read_bytes() == whole


def test_a_donor_that_cannot_be_read_is_named(world, jobs):
    jobs[2].path.unlink()
    with pytest.warns(SkippedImageWarning) as caught:
        result = embed(world.LinearEncoder(), [jobs[0], EmbeddingJob(jobs[0].path, "style-exchange", 0, jobs[2].path)])
    assert len(caught) == 1
    assert str(jobs[2].path) in result.skipped[0][1]
    with pytest.raises(InputError, match="style-exchange needs a second image"):
        embed(world.LinearEncoder(), [EmbeddingJob(jobs[0].path, "style-exchange")])


def test_order_and_batches_do_not_matter(world, jobs, monkeypatch):
    kinds = [EmbeddingJob(job.path, kind, 0) for job in jobs for kind in (None, "colour-jitter")]
    whole = embed(world.LinearEncoder(), kinds).vectors
    monkeypatch.setattr(module, "BATCH", 7)
    backwards = embed(world.LinearEncoder(), kinds[::-1]).vectors
    assert np.allclose(backwards[::-1], whole)


def test_equal_jobs_are_computed_once(world, jobs):
    encoder = world.LinearEncoder()
    result = embed(encoder, [jobs[0]] * 5)
    assert sum(encoder.batches) == 1
    assert result.vectors.shape == (5, 24)


def test_second_run_computes_nothing(world, jobs, tmp_path):
    first = embed(world.LinearEncoder(), jobs, cache=tmp_path)
    encoder = world.LinearEncoder()
    again = embed(encoder, jobs, cache=tmp_path)
    assert encoder.batches == []
    assert np.array_equal(first.vectors, again.vectors)


def test_other_checkpoint_other_cache(world, jobs, tmp_path):
    embed(world.LinearEncoder(), jobs, cache=tmp_path)
    encoder = world.LinearEncoder(seed=1, sha256="1" * 64)
    embed(encoder, jobs, cache=tmp_path)
    assert sum(encoder.batches) == 30


def test_changed_file_is_embedded_again(world, jobs, tmp_path):
    embed(world.LinearEncoder(), jobs, cache=tmp_path)
    Image.new("RGB", (5, 5), (9, 200, 30)).save(jobs[3].path)
    encoder = world.LinearEncoder()
    embed(encoder, jobs, cache=tmp_path)
    assert sum(encoder.batches) == 1


def test_killed_and_continued_equals_uninterrupted(world, jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "PART", 8)

    class Killed(world.LinearEncoder):
        def encode_images(self, batch):
            if len(self.batches) == 4:
                raise KeyboardInterrupt
            return super().encode_images(batch)

    with pytest.raises(KeyboardInterrupt):
        embed(Killed(), jobs, cache=tmp_path)
    encoder = world.LinearEncoder()
    result = embed(encoder, jobs, cache=tmp_path)
    assert sum(encoder.batches) == 30 - 16
    assert np.array_equal(result.vectors, embed(world.LinearEncoder(), jobs).vectors)


def test_damaged_cache_costs_its_own_rows_only(world, jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 10)
    monkeypatch.setattr(module, "PART", 10)
    whole = embed(world.LinearEncoder(), jobs, cache=tmp_path).vectors
    parts = sorted(tmp_path.rglob("*.safetensors"))
    assert len(parts) == 3
    parts[0].write_bytes(parts[0].read_bytes()[:50])
    encoder = world.LinearEncoder()
    assert np.array_equal(embed(encoder, jobs, cache=tmp_path).vectors, whole)
    assert sum(encoder.batches) == 10


def test_bad_images_are_named_counted_and_left_out(world, jobs):
    jobs[2].path.write_bytes(jobs[2].path.read_bytes()[:40])
    jobs[5].path.write_text("not an image")
    jobs[7].path.unlink()
    with pytest.warns(SkippedImageWarning) as caught:
        result = embed(world.LinearEncoder(), jobs)
    assert [index for index, _ in result.skipped] == [2, 5, 7]
    assert result.kept.tolist() == [index for index in range(30) if index not in (2, 5, 7)]
    assert sum(issubclass(one.category, SkippedImageWarning) for one in caught) == 3
    assert all(str(jobs[index].path) in reason for index, reason in result.skipped)


def test_embeddings_that_are_not_numbers_are_left_out(world, jobs):
    class Broken(world.LinearEncoder):
        def encode_images(self, batch):
            vectors = super().encode_images(batch)
            vectors[1], vectors[2] = np.nan, 0
            return vectors

    with pytest.warns(SkippedImageWarning, match="zero or not finite"):
        result = embed(Broken(), jobs)
    assert [index for index, _ in result.skipped] == [1, 2]


def test_nothing_left(world, tmp_path):
    with pytest.warns(SkippedImageWarning), pytest.raises(InputError, match="no image could be embedded"):
        embed(world.LinearEncoder(), [EmbeddingJob(tmp_path / "none.png")])
    with pytest.raises(InputError, match="there are no images"):
        embed(world.LinearEncoder(), [])


def test_texts(world, monkeypatch):
    monkeypatch.setattr("invariclip.calibrate.data.encode.TEXTS_AT_ONCE", 2)
    vectors = embed_texts(world.LinearEncoder(), ["a dog", "a cat", "a tree"])
    assert vectors.shape == (3, 24)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3))
