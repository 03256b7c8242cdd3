"""Values are counted before they are parsed: never too few, and none where a text only looks like them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.serve.json_size import MAX_QUOTES, holds_more_values
from invariclip.serve.limits import Limits, RefusedError
from invariclip.serve.requests import from_json

text = st.text(max_size=8) | st.sampled_from(['"', '\\"', "\\", "\\\\", 'a, b: [{"', '","', "\\\\\\"])
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(text, inner, max_size=5),
    max_leaves=15,
)


def marks(value):
    """What stands before all names and values: brackets, colons and commas, from the values themselves."""
    if isinstance(value, dict):
        return 1 + len(value) + max(0, len(value) - 1) + sum(map(marks, value.values()))
    return 1 + max(0, len(value) - 1) + sum(map(marks, value)) if isinstance(value, list) else 0


@given(plain, st.booleans(), st.sampled_from([None, 2]))
def test_every_value_is_counted_and_no_text(value, ascii_, indent):
    content = json.dumps(value, ensure_ascii=ascii_, indent=indent).encode()
    count = marks(value)
    assert not holds_more_values(content, count)
    assert holds_more_values(content, count - 1)


@given(st.binary(max_size=60), st.integers(0, 5))
def test_any_bytes_are_counted_to_an_end(content, most):
    assert holds_more_values(content, most) in (True, False)


@pytest.mark.parametrize(
    "data",
    [
        b"{" + b",".join(b'"k%d":1' % number for number in range(100_000)) + b"}",
        b"[" + b",".join([b'""'] * 100_000) + b"]",
        b"[" * 100_000,
        b'{"images": "' + b'\\"' * MAX_QUOTES + b'"}',
        b'{"images": "' + b"\\" * (3 * MAX_QUOTES) + b'"}',
    ],
)
def test_bodies_of_too_many_values_are_refused_before_they_are_parsed(data, monkeypatch):
    monkeypatch.setattr("invariclip.serve.requests.parse_json", lambda *_: pytest.fail("it was parsed"))
    with pytest.raises(RefusedError, match=r"too many names and values in JSON; up to 31,640 are read") as refused:
        from_json(data, Limits())
    assert refused.value.status == 413


def test_a_request_of_everything_that_is_allowed_is_read():
    limits = Limits()
    fields = {
        "images": [{"name": f'"{number}", \\', "data": "aGk="} for number in range(limits.images)],
        "classes": [f"{number}, {'x, ' * 600}" for number in range(limits.classes)],
        "templates": [f"{number}: [{{}}]" for number in range(limits.templates)],
        "texts": [f'{number}, {"y," * 900}"' for number in range(limits.texts)],
    }
    assert from_json(json.dumps(fields).encode(), limits) == fields
