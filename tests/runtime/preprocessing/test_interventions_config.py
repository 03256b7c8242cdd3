"""Interventions by name and from files: what is taken, and one line for what is not."""

import json
import re
import sys
from pathlib import Path

import pytest

from invariclip.errors import InputError, MissingExtraError
from invariclip.preprocessing.interventions import (
    CATALOGUE,
    GROUPS,
    PAPER,
    InterventionRequest,
    parse_kinds,
    read_kinds,
    resolve,
)
from invariclip.preprocessing.interventions.base import described
from invariclip.preprocessing.interventions.scene import Fog

PAGE = (Path(__file__).parents[3] / "docs" / "interventions.md").read_text(encoding="utf-8")


def labels(kinds):
    return tuple(kind.label for kind in kinds)


def read(tmp_path, text, name="kinds.yaml"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return parse_kinds(str(tmp_path / name))


def test_names_and_groups():
    assert labels(parse_kinds("all")) == PAPER
    assert parse_kinds("none") == parse_kinds("") == ()
    assert parse_kinds("invert, greyscale,invert") == (resolve("invert"), resolve("greyscale"))
    assert labels(parse_kinds("all,style-exchange,fog")) == (*PAPER, "style-exchange", "fog")
    assert labels(parse_kinds("everything")) == tuple(CATALOGUE)
    assert set(PAPER) < set(GROUPS["extended"]) < set(GROUPS["everything"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("invert,blurr", r"'blurr'.*; available: all, none, extended, everything, colour-jitter"),
        ("gausian-blur", "'gausian-blur'; nearest: gaussian-blur; available: all"),
        ("all,none", "no intervention is called 'none'"),
    ],
)
def test_unknown_names(text, said):
    with pytest.raises(InputError, match=said):
        parse_kinds(text)


def test_a_list(tmp_path):
    kinds = read(tmp_path, "- all\n- fog\n- rotation: {degrees: [5, 15]}\n- jpeg: {quality: 30}\n- flip:\n")
    assert labels(kinds) == (*PAPER, "fog", "rotation", "jpeg", "flip")
    assert kinds[:7] == parse_kinds("all")
    assert kinds[8].change.degrees == (5.0, 15.0)
    assert kinds[9].change.quality == (30, 30)


def test_a_mapping_with_one_kind_under_two_labels(tmp_path):
    kinds = read(tmp_path, "light: {kind: fog, density: 0.5}\nheavy: {kind: fog, density: [2, 4]}\ninvert:\n")
    assert kinds == (
        InterventionRequest("light", Fog(density=(0.5, 0.5))),
        InterventionRequest("heavy", Fog(density=(2, 4))),
        resolve("invert"),
    )
    told = json.loads(json.dumps([kind.to_json() for kind in kinds]))
    assert told[0] == {"label": "light", "kind": "fog", "parameters": {"density": [0.5, 0.5], "decay": [1.5, 2.0]}}


def test_json_says_the_same_and_needs_no_yaml(tmp_path, monkeypatch):
    text = '{"light": {"kind": "fog", "density": 0.5}, "invert": null}'
    same = read(tmp_path, text)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert read(tmp_path, text, "kinds.JSON") == same
    with pytest.raises(MissingExtraError, match=r'pip install "invariclip\[calibrate\]"; JSON needs none'):
        read(tmp_path, text)


BAD = {
    "": "lists no intervention",
    "[]": "lists no intervention",
    "fog": "neither a list nor a mapping",
    "- fogg": "entry 1: no intervention is called 'fogg'; nearest: fog",
    "- none": "no intervention is called 'none'",
    "- [fog]": "must be a name, or one label",
    "- {fog: , invert: }": "must be a name, or one label",
    "- 7": "must be a name, or one label",
    "- fog\n- fog": "entry 2: 'fog' stands there twice; give one another label",
    "- all\n- invert": "entry 2: 'invert' stands there twice",
    "fog: {}\nfog: {density: 1}": "'fog' stands twice in one mapping",
    "fog: {density: 1, density: 2}": "'density' stands twice in one mapping",
    "fog: {densty: 1}": "no parameter of fog is called 'densty'; nearest: density; available: density, decay",
    "invert: {bits: 1}": "no parameter of invert is called 'bits'; available: none",
    "fog: {density: -1}": "fog: density must be a number from 0 to 10, not -1",
    "fog: {density: [3, 1]}": "fog: density: the lowest, 3, is above the highest, 1",
    "fog: {density: [1, 2, 3]}": r"a number or \[lowest, highest\], not 3 values",
    "fog: {density: thick}": "must be a number from 0 to 10, not 'thick'",
    "fog: {density: yes}": "must be a number from 0 to 10, not True",
    "fog: {density: .nan}": "must be a number from 0 to 10, not nan",
    "fog: {density: {a: 1}}": "must be a number from 0 to 10, not a dict",
    "posterize: {bits: 2.0}": "posterize: bits must be a whole number",
    "fog: 3": "fog: parameters must be a mapping",
    "my-fog: {density: 1}": "'my-fog'.*a label that is no kind needs `kind: NAME`",
    "my-fog: {kind: fogg}": "no intervention is called 'fogg'; nearest: fog",
    "my-fog: {kind: [fog]}": "no intervention is called",
    "all: {density: 1}": "no intervention is called 'all'",
    "yes: {kind: fog}": "a label must be 1 to 64 printable characters",
    '"": {kind: fog}': "a label must be",
    '"a\\nb": {kind: fog}': "a label must be",
    "fog: &a {density: 1}\nother: *a": "aliases",
    "fog: [": "not readable",
    "fog: !!python/object/apply:os.system [true]": "not readable",
    "? [a, b]\n: 1": "not readable",
    "--- 1\n--- 2": "not readable",
    "x: 2020-99-99": "not readable",
    "[" * 60_000: "more than 8 levels deep",
    "x: " + "9" * 5000: "not readable",
}


@pytest.mark.parametrize(("text", "said"), BAD.items(), ids=range(len(BAD)))
def test_bad_yaml_is_one_line_that_names_the_file(tmp_path, text, said):
    with pytest.raises(InputError, match=said) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'kinds.yaml'}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"fog": {}, "fog": {}}', "'fog' stands twice"),
        ('["fog"', "not readable"),
        ("[" * 60_000, "not readable"),
        ('{"fog": {"density": Infinity}}', "Infinity is no number in JSON"),
        ('{"fog": {"density": 1e999}}', "1e999 is beyond what a number can hold"),
        ('{"fog": {"density": 1' + "0" * 999 + "}}", "not 10{39}$"),
        ("3", "neither a list nor a mapping"),
    ],
)
def test_bad_json(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        read(tmp_path, text, "kinds.json")


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_kinds(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_kinds(tmp_path / "folder.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"- f\xf6g")
    with pytest.raises(InputError, match="not readable"):
        read_kinds(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * ((1 << 16) + 1))
    with pytest.raises(InputError, match="larger than a list of interventions can be"):
        read_kinds(tmp_path / "large.yaml")


def test_the_page_lists_every_kind_with_its_parameters():
    rows = re.findall(r"^\| `([a-z-]+)` \| .*? \| (.*?) \| .*? \|$", PAGE, re.MULTILINE)
    written = {name: cells for name, cells in rows if name not in GROUPS}
    assert list(written) == list(CATALOGUE)
    for name, kind in CATALOGUE.items():
        cells = []
        for parameter, (lowest, highest), default in described(kind):
            value = f"{default[0]:g} … {default[1]:g}" if isinstance(default, tuple) else f"{default:g}"
            cells.append(f"`{parameter}` {value} (within {lowest:g} … {highest:g})")
        assert written[name] == ("; ".join(cells) or "none")


def test_the_pages_examples_are_taken(tmp_path):
    examples = re.findall(r"```(yaml|json)\n(.*?)```", PAGE, re.DOTALL)
    assert [suffix for suffix, _ in examples] == ["yaml", "yaml", "json"]
    taken = [read(tmp_path, text, f"page.{suffix}") for suffix, text in examples]
    assert labels(taken[0]) == (*PAPER, "style-exchange", "rotation")
    assert labels(taken[1]) == ("greyscale", "light-fog", "heavy-fog")
    assert taken[2] == taken[1][:2]
