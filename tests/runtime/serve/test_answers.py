"""Answers in JSON: written piece by piece they are what `json.dumps` writes, and none is larger than is allowed."""

import asyncio
import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.results import Prediction, RankedClass
from invariclip.serve.answers import (
    LargeAnswer,
    require_classified,
    require_embedded,
    sliced_json,
    vectors_json,
)
from invariclip.serve.limits import Held, Limits, RefusedError

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), st.lists(plain, max_size=4) | plain, min_size=1, max_size=5))
def test_slices_make_the_same_text(fields):
    whole = json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")
    assert sliced_json(fields) == whole
    assert sliced_json({name: iter(v) if isinstance(v, list) else v for name, v in fields.items()}) == whole


def test_vectors_are_written_to_the_bit_or_not_at_all():
    vectors = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    vectors[0, 0], vectors[0, 1] = 1e-45, 3e38
    read = json.loads(sliced_json({"embeddings": vectors_json(vectors)}))["embeddings"]
    np.testing.assert_array_equal(np.array(read, np.float32), vectors)
    vectors[2, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        vectors_json(vectors)
    with pytest.raises(ValueError, match="not JSON compliant"):
        sliced_json({"predictions": iter([float("nan")])})


@given(
    names=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=12, unique=True),
    images=st.integers(1, 5), top=st.integers(1, 15), limit=st.integers(1, 20_000),
)  # fmt: skip
def test_a_ranking_is_no_larger_than_what_was_taken(names, images, top, limit):
    taken = []
    with suppress(RefusedError):
        require_classified(images, names, top, 30, limit)
        taken.append(top)
    if not taken:
        with pytest.raises(RefusedError, match=f"{limit:,} are sent: ") as refused:
            require_classified(images, names, top, 30, limit)
        assert refused.value.status == 413
        if "lower top to" in str(refused.value):
            fits = int(str(refused.value).rpartition(" ")[2].replace(",", ""))
            assert fits < top
            require_classified(images, names, fits, 30, limit)
        return
    ranking = tuple(RankedClass(name, 0.12345678901234567) for name in sorted(names, key=len)[::-1][:top])
    one = Prediction(None, 1e-17, ranking, 0.12345678901234567, "evidence", abstained=True)
    assert len(sliced_json({"predictions": iter([{"image": "0", **one.to_json()}] * images)})) <= limit + 100


def test_a_ranking_that_is_too_large_says_what_fits():
    names = [f"{'x' * 1990}{number:06d}" for number in range(1000)]
    with pytest.raises(
        RefusedError,
        match=r"top 1,000 of 1,000 classes for each image may take 66,\d+,\d+ bytes "
        r"\(images: 32\); up to 33,554,432 are sent: lower top to 50\d$",
    ):
        require_classified(32, names, 1000, 2000, Limits().answer)
    require_classified(32, names, 500, 2000, Limits().answer)
    with pytest.raises(RefusedError, match="send fewer images"):
        require_classified(100_000, names, 1, 2000, Limits().answer)
    require_classified(64, [f"class {number}" for number in range(1000)], 1000, 2000, Limits().answer)


def test_embeddings_that_are_too_large_name_the_file_as_a_way_out():
    require_embedded(Limits().texts, 1280, Limits().answer)
    with pytest.raises(RefusedError, match=r"10,000 embeddings of width 1,024 .* accept: application/octet-stream"):
        require_embedded(10_000, 1024, Limits().answer)


def test_a_large_answer_is_counted_until_it_is_out():
    held, parts = Held(1_000_000, "answers"), []

    async def send(message):
        assert held.now == 600_000
        parts.append(message)

    async def gone(message):
        raise ConnectionResetError

    content = bytes(range(250)) * 2400
    answer = LargeAnswer(content, held, "application/json")
    asyncio.run(answer({}, None, send))
    assert held.now == 0
    assert dict(parts[0]["headers"])[b"content-length"] == b"600000"
    assert b"".join(part["body"] for part in parts[1:]) == content
    assert [part["more_body"] for part in parts[1:]] == [True, True, False]
    with pytest.raises(ConnectionResetError):
        asyncio.run(answer({}, None, gone))
    assert held.now == 0
    held.take(500_000)
    with pytest.raises(RefusedError, match="answers of 500,000 bytes are in memory, and up to 1,000,000 are held"):
        asyncio.run(answer({}, None, send))
    assert held.now == 500_000
