"""What a request asks: every field in every form, and one line for what cannot be understood."""

import base64
import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.errors import InputError, InvariclipError
from invariclip.serve.limits import Limits, RefusedError
from invariclip.serve.requests import UNSAID, Body, EncodedImage, classify, embed, from_json, from_pairs, merged

IMAGE = (EncodedImage("0", b"image"),)
LIMITS = Limits(images=3, texts=4, classes=3, templates=2, prompts=4, characters=20)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def asked(**fields):
    return classify(Body(fields, IMAGE), LIMITS)


def in_form(*pairs):
    """A question whose fields came in a query or a form."""
    return classify(Body(from_pairs(pairs, LIMITS), IMAGE), LIMITS)


@pytest.mark.parametrize(
    ("given_", "read"),
    [
        ("cat", ("cat",)),
        ("cat,dog", ("cat", "dog")),
        (" cat , dog,", ("cat", "dog")),
        (["cat, sitting", "dog"], ("cat, sitting", "dog")),
        ('["corn, ear", "dog"]', ("corn, ear", "dog")),
        (' ["[UNK]"]', ("[UNK]",)),
        ("[UNK]", ("[UNK]",)),
        ("[UNK],[PAD]", ("[UNK]", "[PAD]")),
    ],
)
def test_classes(given_, read):
    if isinstance(given_, str):
        assert in_form(("classes", given_)).classes == read
    assert asked(classes=given_).classes == read


def test_templates_are_prompts_or_a_set_by_name():
    assert asked(templates="a {}").templates == ("a {}",)
    assert asked(templates=["a {}", "b {}"]).templates == ("a {}", "b {}")
    assert in_form(("templates", '["a {}, wide", "b {}"]')).templates == ("a {}, wide", "b {}")
    for numbers in ("[1, 2]", '["a", 1]', '[["a"]]', "[]"):
        for field in ("classes", "templates"):
            with pytest.raises(InputError, match=f"{field} (must be a list of texts|is empty)"):
                in_form((field, numbers))
    every = classify(Body({"templates": "ensemble"}, IMAGE), Limits())
    assert len(every.templates) > 10
    with pytest.raises(InputError, match=r"must be a set name or a prompt .*; available: ensemble"):
        asked(templates="assembly")


def test_defaults():
    plain = asked()
    assert (plain.images, plain.classes, plain.templates, plain.top) == (IMAGE, None, None, 3)
    assert plain.abstain_above is UNSAID


@pytest.mark.parametrize(
    ("said", "read"), [(0.5, 0.5), ("0.5", 0.5), (1, 1.0), ("calibrated", "calibrated"), (None, None)]
)
def test_abstain_above(said, read):
    assert asked(abstain_above=said).abstain_above == read


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"clases": "cat"}, "'clases'; available: images, classes, templates, abstain_above, uncertainty, top"),
        ({"top": 0}, "top must be a whole number from 1 to 999,999,999, not 0"),
        ({"top": 1_000_000_000}, "whole number"),
        ({"top": "1000000000"}, "whole number"),
        ({"top": "٣"}, "whole number"),
        ({"top": " 3"}, "whole number"),
        ({"top": ["1", "2"]}, "whole number"),
        ({"top": "three"}, "whole number"),
        ({"top": True}, "whole number"),
        ({"top": 1.5}, "whole number"),
        ({"top": "9" * 5000}, "whole number"),
        ({"abstain_above": "often"}, "number from 0 to 1 or 'calibrated', not 'often'"),
        ({"abstain_above": [1]}, "number from 0 to 1"),
        ({"abstain_above": True}, "number from 0 to 1"),
        ({"classes": 5}, "classes must be a list of texts"),
        ({"classes": ["cat", 5]}, "classes must be a list of texts"),
        ({"classes": []}, "classes is empty"),
        ({"classes": " , "}, "classes is empty"),
        ({"classes": ["cat", "cat"]}, "empty or repeated"),
        ({"classes": ["\ud800"]}, "half a character"),
        ({"templates": ["no slot"]}, "exactly one"),
        ({"templates": ["{}", "{}"]}, "given twice"),
        ({"images": [5]}, "image 0: give base64"),
        ({"images": ["aGk=", "*"]}, "image 1: not base64"),
        ({"images": ["é"]}, "image 0: not base64"),
        ({"images": [{"data": "aGk=", "nme": "x"}]}, "fields name and data"),
        ({"images": [{"name": "x"}]}, "give base64"),
        ({"images": [{"name": "\ud800", "data": "aGk="}]}, "an image's name must be Unicode: .* half a character"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_one_line(fields, reason):
    with pytest.raises(InputError, match=reason.replace("{", r"\{")):
        asked(**fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"classes": ["a", "b", "c", "d"]}, "4 classes are too many; up to 3"),
        ({"templates": ["a {}", "b {}", "c {}"]}, "3 templates are too many; up to 2"),
        ({"classes": ["a", "b", "c"], "templates": ["a {}", "b {}"]}, "6 prompts .* up to 4"),
        ({"classes": ["x" * 21]}, "21 characters in one of classes"),
        ({"images": ["aGk="] * 3}, "4 images are too many; up to 3"),
        ({"images": ["*"] * 1000}, "1,001 images are too many"),
        ({"images": [{"name": "x" * 21, "data": "aGk="}]}, "21 characters in an image's name are too many; up to 20"),
    ],
)
def test_too_much_is_refused(fields, reason):
    with pytest.raises(RefusedError, match=reason) as refused:
        asked(**fields)
    assert refused.value.status == 413


def test_top_is_read_in_one_way():
    for value in (1, 7, 999_999_999):
        assert asked(top=value).top == asked(top=str(value)).top == in_form(("top", str(value))).top == value


def test_names_of_files_are_held_to_what_names_in_json_are():
    for name, kind, reason in (("\udc80.png", InputError, "half a character"), ("x" * 21, RefusedError, "too many")):
        with pytest.raises(kind, match=reason):
            classify(Body({}, (EncodedImage(name, b"image"),)), LIMITS)


def test_a_json_list_in_a_form_is_not_torn_apart():
    assert embed(Body(from_pairs([("texts", '["a, b", "c"]')], LIMITS)), LIMITS).texts == ("a, b", "c")
    assert embed(Body(from_pairs([("texts", "[a, b]")], LIMITS)), LIMITS).texts == ("[a, b]",)
    images = embed(Body(from_pairs([("images", '["aGk=", "aG8="]')], LIMITS)), LIMITS).images
    assert images == (EncodedImage("0", b"hi"), EncodedImage("1", b"ho"))
    for field in ("classes", "templates", "texts"):
        for damaged in ('["corn, ear", "dog"', ' [ "a", "\\ud800"]', '["a", "b",]'):
            with pytest.raises(InputError, match=f"{field}: not readable as JSON"):
                from_pairs([(field, damaged)], LIMITS)
        with pytest.raises(InputError, match=f"{field} is given as a JSON list and once more"):
            from_pairs([(field, '["a", "b"]'), (field, "c")], LIMITS)
        with pytest.raises(RefusedError, match=f"{field} has too many values"):
            from_pairs([(field, f"[{'1,' * 50_000}1]")], LIMITS)


def test_images_in_json():
    text = base64.b64encode(b"\x89PNG").decode()
    body = Body(
        {"images": [text, f"data:image/png;base64,{text}", {"name": "cat.png", "data": f"{text[:3]}\n{text[3:]}"}]}
    )
    names = [("0", b"\x89PNG"), ("1", b"\x89PNG"), ("cat.png", b"\x89PNG")]
    assert [(one.name, one.data) for one in classify(body, LIMITS).images] == names
    assert [(one.name, one.data) for one in embed(body, LIMITS).images] == names
    assert embed(Body({"images": text}), LIMITS).images == (EncodedImage("0", b"\x89PNG"),)


def test_embed_wants_images_or_texts():
    assert embed(Body({"texts": ["a", "b, c"]}), LIMITS).texts == ("a", "b, c")
    assert embed(Body({"texts": "a, b"}), LIMITS).texts == ("a, b",)
    assert embed(Body({}, IMAGE), LIMITS).images == IMAGE
    for wrong in (Body({}), Body({"texts": "a"}, IMAGE)):
        with pytest.raises(InputError, match="give images, or texts, and not both"):
            embed(wrong, LIMITS)
    with pytest.raises(InputError, match="no image; send one as the body"):
        classify(Body({"top": 1}), LIMITS)
    with pytest.raises(RefusedError, match="5 texts are too many"):
        embed(Body({"texts": ["a"] * 5}), LIMITS)


def test_fields_of_queries_and_bodies():
    pairs = [("a", "1"), ("b", "2"), ("a", "3"), ("a", "4"), ("top", "[1]")]
    assert from_pairs(pairs, LIMITS) == {"a": ["1", "3", "4"], "b": "2", "top": "[1]"}
    assert merged({"a": 1}, {"b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(InputError, match="a is given in the query and in the body"):
        merged({"a": 1}, {"a": 2})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b"\xff",
        b"[" * 9_000,
        b'{"a": ' + b"9" * 9999 + b"}",
        b'{"top": NaN}',
        b'{"top": 1, "top": 2}',
        b'{"images": [{"data": "aGk=", "data": "aGk="}]}',
        b'{"site": "\\ud800"}',
    ],
)
def test_what_is_no_json_object_is_refused(data):
    with pytest.raises(RefusedError) as refused:
        from_json(data, LIMITS)
    assert refused.value.status == 400


@given(anything, st.sampled_from(["images", "classes", "templates", "abstain_above", "top", "texts"]))
def test_any_value_in_any_field_is_read_or_refused_in_one_line(value, field):
    for body in (Body({field: value}, IMAGE), Body({field: value})):
        for read in (classify, embed):
            with suppress(InvariclipError):
                read(body, LIMITS)


@given(st.binary(max_size=80) | anything.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_json_object_or_refused(data):
    try:
        whole, status = from_json(data, LIMITS), 200
    except RefusedError as error:
        whole, status = {}, error.status
    assert isinstance(whole, dict)
    assert status in (200, 400)
