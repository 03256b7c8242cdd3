"""Strict JSON, typed records, and files that notice any change of themselves."""

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.artifact.embeddings import Embeddings, read_embeddings, write_embeddings
from invariclip.artifact.folder import read_manifest
from invariclip.artifact.projection import Projection, read_projection, write_projection
from invariclip.errors import ArtifactError, InputError, InvariclipError, SiteError
from invariclip.records import Record, parse_json, read_json, read_sealed_json, seal, sealed_json, to_record
from invariclip.sites.site import new_site, read_site, write_site


@dataclass(frozen=True)
class Facts:
    name: str
    n: int = 0


KIND = Record("invariclip.test", "a test", "`a test`", 1, 1 << 16, SiteError, Facts)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not readable as JSON"),
        (b"\xff", "not readable as JSON"),
        ('{"a": 1, "a": 1}', "'a' stands twice in one object"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "'b' stands twice"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e999", "1e999 is beyond what a number can hold"),
        ("1" * 5000, "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        (r'"\ud800"', "not readable as JSON"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_is_no_strict_json_is_one_line(text, reason):
    with pytest.raises(InputError, match=r"^here: ") as refused:
        parse_json(text, "here")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
)  # fmt: skip


@given(JSON, st.booleans())
def test_all_json_is_read_as_the_standard_library_reads_it(plain, ascii_only):
    text = json.dumps(plain, ensure_ascii=ascii_only)
    assert parse_json(text, "x") == json.loads(text)
    assert parse_json(b"\xef\xbb\xbf" + text.encode(), "x") == json.loads(text)


def test_a_json_file_is_bounded_and_one_object(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_json(path, "a test", max_bytes=9, error=ArtifactError)
    path.write_text("[1, 2, 3]")
    with pytest.raises(InputError, match="must hold a JSON object, not list"):
        read_json(path, "a test", max_bytes=9)
    path.write_text('{"abc": 1}')
    with pytest.raises(InputError, match="larger than a test can be"):
        read_json(path, "a test", max_bytes=9)
    assert read_json(path, "a test", max_bytes=10) == {"abc": 1}


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    inner: dict[str, Inner]
    scale: float | None = None

    def __post_init__(self):
        if self.name == "bad":
            raise ArtifactError("a bad name")


def test_a_record_is_made_of_plain_types():
    plain = {"name": "x", "inner": {"i": {"size": [1, 2], "mode": "b"}}, "scale": 1}
    assert to_record(Outer, plain, "x") == Outer("x", {"i": Inner((1, 2), "b")}, 1.0)


@pytest.mark.parametrize(
    ("plain", "reason"),
    [
        ({}, "name"),
        ({"name": 5, "inner": {}}, "$.name"),
        ({"name": "x", "inner": {"i": {"size": [1, 2.5]}}}, "$.inner[...].size[1]"),
        ({"name": "x", "inner": {"i": {"size": [1, True]}}}, "size[1]"),
        ({"name": "x", "inner": {"i": {"size": [1]}}}, "length 2"),
        ({"name": "x", "inner": {"i": {"size": [1, 2], "mode": "c"}}}, "available: a, b"),
        ({"name": "x", "inner": {}, "more": 1}, "a field that is not known: more"),
        ({"name": "x", "inner": {"i": {"size": [1, 2], "deep": 0}}}, "a field that is not known: inner.i.deep"),
        ({"name": "bad", "inner": {}}, "a bad name"),
        (None, "object"),
    ],
)
def test_a_field_that_is_not_as_it_should_be_is_named(plain, reason):
    with pytest.raises(SiteError, match=r"^there: ") as refused:
        to_record(Outer, plain, "there", error=SiteError)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def read_back(content, path):
    path.write_bytes(content)
    return KIND.read(path)


def test_a_record_comes_back_as_it_was(tmp_path):
    tensors = {"b": np.arange(6.0).reshape(2, 3), "a": np.zeros(0, np.float32)}
    content = KIND.to_bytes(tensors, {"name": 'a "file_sha256": "' + "1" * 64 + '"', "n": 3})
    assert content == KIND.to_bytes(tensors, {"name": 'a "file_sha256": "' + "1" * 64 + '"', "n": 3})
    for read, facts in (read_back(content, tmp_path / "x"), KIND.from_bytes(content, "x")):
        assert facts == Facts('a "file_sha256": "' + "1" * 64 + '"', 3)
        assert set(read) == {"a", "b"}
        np.testing.assert_array_equal(read["b"], tensors["b"])


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "name"),
        ({"name": 1}, "name"),
        ({"name": "x", "n": 1.5}, "n"),
        ({"name": "x", "more": 1}, "not known: more"),
        ({"name": "x", "": 1}, "not known: ''"),
    ],
)
def test_facts_of_another_kind_are_refused_under_a_digest_that_is_right(tmp_path, facts, reason):
    content = KIND.to_bytes({"a": np.zeros(1)}, facts)
    for read in (lambda: KIND.from_bytes(content, "x"), lambda: read_back(content, tmp_path / "x")):
        with pytest.raises(SiteError, match=r"x: not a test written by `a test`: ") as refused:
            read()
        assert reason in str(refused.value)


def flips(content):
    for place in range(len(content)):
        for bit in range(8):
            yield content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_every_flipped_bit_of_a_record_is_refused(tmp_path):
    content = KIND.to_bytes({"a": np.arange(4.0)}, {"name": "x"})
    for place, damaged in enumerate(flips(content)):
        with pytest.raises(SiteError):
            KIND.from_bytes(damaged, "x")
        if place % 7 == 0:
            with pytest.raises(SiteError):
                read_back(damaged, tmp_path / "x")
    for damaged in (content[:-1], content + b"\0", b"", content[:9]):
        with pytest.raises(SiteError, match="x: "):
            KIND.from_bytes(damaged, "x")


def test_every_flipped_bit_of_a_sealed_file_is_refused(tmp_path):
    path = tmp_path / "x.json"
    content = sealed_json({"schema_version": 1, "names": ["ü", "b"], "value": 0.125})
    how = {"schema": 1, "remedy": "make it again", "max_bytes": 1 << 16, "error": ArtifactError}
    path.write_bytes(content)
    assert read_sealed_json(path, "a test", **how) == {"schema_version": 1, "names": ["ü", "b"], "value": 0.125}
    for damaged in flips(content):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            read_sealed_json(path, "a test", **how)
    path.write_bytes(sealed_json({"schema_version": True}))  # equals 1 in Python
    with pytest.raises(ArtifactError, match="schema_version True is not known"):
        read_sealed_json(path, "a test", **how)
    path.write_text('{"schema_version": 2}')
    with pytest.raises(ArtifactError, match="schema_version 2 is not known; this version reads 1: make it again"):
        read_sealed_json(path, "a test", **how)


def test_a_seal_is_the_digest_of_the_rest():
    content = sealed_json({"a": 1})
    assert seal(content) == content
    assert seal(content.replace(b'"a": 1', b'"a": 2')) == sealed_json({"a": 2})
    with pytest.raises(ValueError, match="no field file_sha256"):
        seal(b"{}")


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_artifact):
    """A file of every kind that the runtime writes, with its reader."""
    folder = tmp_path_factory.mktemp("written")
    rng = np.random.default_rng(0)
    write_projection(folder / "projection", Projection(rng.normal(size=(4, 3)), "generalised", 1.0))
    write_site(folder / "site", new_site("yard", "space", np.full(8, 0.05), 4, {"why": "a test"}))
    write_embeddings(folder / "embeddings", Embeddings(np.eye(2, 3, dtype=np.float32), ("a", "ü"), "space"))
    (folder / "x.icm").mkdir()
    (folder / "x.icm" / "manifest.json").write_bytes((tiny_artifact / "manifest.json").read_bytes())
    return {
        folder / "projection": read_projection,
        folder / "site": read_site,
        folder / "embeddings": read_embeddings,
        folder / "x.icm" / "manifest.json": lambda path: read_manifest(path.parent),
    }


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_flip_anywhere_in_what_we_write_is_refused(written, tmp_path_factory, data):
    path = data.draw(st.sampled_from(sorted(written)))
    content = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    copy = tmp_path_factory.mktemp("flipped") / "x.icm" / path.name
    copy.parent.mkdir()
    copy.write_bytes(content)
    written[path](copy)
    copy.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
    with pytest.raises(InvariclipError) as refused:
        written[path](copy)
    assert "\n" not in str(refused.value)
