"""What was embedded is found again, by its ids alone, in bounded memory, and answers are those of an empty cache."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import invariclip
from invariclip.errors import InputError
from invariclip.text_tower import MAX_TEXT_CACHE, TextCache


def ids_of(*numbers):
    return np.array([[number, 1, 0] for number in numbers], dtype=np.int64)


class Tower:
    """Embeds the id and its square, and remembers what it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, ids):
        self.seen.append(ids[:, 0].tolist())
        return np.stack([ids[:, 0], ids[:, 0] ** 2], axis=1).astype(np.float32)


def test_only_what_is_new_is_embedded_and_once():
    cache, tower = TextCache(), Tower()
    np.testing.assert_array_equal(cache.rows(ids_of(3, 4, 3), tower), [[3, 9], [4, 16], [3, 9]])
    np.testing.assert_array_equal(cache.rows(ids_of(4, 5, 3), tower), [[4, 16], [5, 25], [3, 9]])
    cache.rows(ids_of(5), tower)
    assert tower.seen == [[3, 4], [5]]
    assert cache.describe() == {"rows": 3, "limit": 10_000, "hits": 4, "misses": 3}


def test_every_id_of_a_text_counts():
    cache, tower = TextCache(), Tower()
    cache.rows(np.array([[3, 1, 0]]), tower)
    cache.rows(np.array([[3, 1, 2]]), tower)
    assert tower.seen == [[3], [3]]


@given(
    batches=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), max_size=12),
    limit=st.sampled_from([0, 1, 2, 5, 100]),
)
def test_any_history_gives_the_rows_of_an_empty_cache(batches, limit):
    cache, tower = TextCache(limit), Tower()
    for batch in batches:
        np.testing.assert_array_equal(cache.rows(ids_of(*batch), tower), Tower()(ids_of(*batch)))
        assert cache.describe()["rows"] <= limit
    asked = cache.describe()
    assert asked["hits"] + asked["misses"] == (sum(map(len, batches)) if limit else 0)


def test_the_least_recently_used_go_first():
    cache, tower = TextCache(2), Tower()
    for number in (1, 2, 1, 3, 1, 2):
        cache.rows(ids_of(number), tower)
    assert tower.seen == [[1], [2], [3], [2]]  # 2 made room for 3, because 1 was asked for since


def test_rows_are_the_callers_own():
    cache = TextCache()
    rows = cache.rows(ids_of(3), Tower())
    rows[:] = 0
    again = cache.rows(ids_of(3), Tower())
    again[:] = 0
    np.testing.assert_array_equal(cache.rows(ids_of(3), Tower()), [[3, 9]])


def test_a_kept_row_does_not_keep_its_batch():
    cache = TextCache()
    cache.rows(ids_of(*range(50)), Tower())
    assert all(row.base is None for row in cache._rows.values())


def test_the_first_answer_stays_where_threads_meet():
    cache, meeting, count = TextCache(), threading.Barrier(2, timeout=10), iter(range(9))
    lock = threading.Lock()

    def tower(ids):
        meeting.wait()  # both have looked, and neither found it
        with lock:
            return np.full((len(ids), 2), next(count), dtype=np.float32)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: cache.rows(ids_of(3), tower), range(2))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(cache.rows(ids_of(3), tower), one)


def test_many_threads_get_their_own_rows():
    cache, tower = TextCache(7), Tower()

    def ask(seed):
        numbers = np.random.default_rng(seed).integers(0, 20, 12).tolist()
        return np.array_equal(cache.rows(ids_of(*numbers), tower), Tower()(ids_of(*numbers)))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))
    assert cache.describe()["rows"] == 7


@pytest.mark.parametrize("limit", [-1, MAX_TEXT_CACHE + 1])
def test_a_limit_out_of_range_is_refused(limit):
    with pytest.raises(InputError, match=r"text_cache is a number of rows from 0 \(none\) to 10,000,000"):
        TextCache(limit)


TEXTS = ["a cat", "two dogs on a hill", "a cat", "", "A  CAT"]


def test_a_model_keeps_texts_and_counts_them(tiny_artifact):
    kept, fresh = invariclip.load(tiny_artifact, threads=1), invariclip.load(tiny_artifact, threads=1, text_cache=0)
    wanted = fresh.embed_texts(TEXTS)
    first = kept.embed_texts(TEXTS)
    np.testing.assert_allclose(first, wanted, atol=1e-6)
    np.testing.assert_array_equal(kept.embed_texts(TEXTS), first)
    # "A  CAT" is the same text to the tokenizer
    assert kept.describe()["text_cache"] == {"rows": 3, "limit": 10_000, "hits": 7, "misses": 3}
    assert fresh.describe()["text_cache"] == {"rows": 0, "limit": 0, "hits": 0, "misses": 0}
    kept.with_classes(["cat", "dog"], ["{}"])
    other = kept.with_classes(["dog", "cat", "tree"], ["{}"])
    assert other.describe()["text_cache"] == {"rows": 6, "limit": 10_000, "hits": 9, "misses": 6}


def test_another_projection_has_a_cache_of_its_own(tmp_path, tiny_checkpoint, tiny_projection, tiny_images):
    from invariclip.artifact.projection import Projection
    from invariclip.export.build import export_artifact
    from invariclip.export.checkpoints.checkpoint import load_checkpoint
    from invariclip.export.config import ExportConfig
    from invariclip.preprocessing.find import find_images

    out = tmp_path / "input.icm"
    export_artifact(
        load_checkpoint(str(tiny_checkpoint)),
        out,
        ExportConfig(images=find_images([tiny_images]), projection_as_input=True),
        projection=tiny_projection,
    )
    model = invariclip.load(out, threads=1, text_cache=50)
    plain = model.embed_texts(["a cat"])
    other = model.with_projection(Projection(np.random.default_rng(5).normal(size=(24, 8)), "icm", 3.0))
    moved = other.embed_texts(["a cat"])
    assert np.abs(moved - plain).max() > 0.01
    np.testing.assert_array_equal(model.embed_texts(["a cat"]), plain)
    assert other.describe()["text_cache"] == {"rows": 1, "limit": 50, "hits": 0, "misses": 1}
