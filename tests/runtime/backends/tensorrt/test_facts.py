"""Keys of engines: everything that matters changes the name, and a sidecar comes back as it was."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.backends.tensorrt.facts import EngineKey, ShapeProfile, engine_path, graph_digest, read_facts
from invariclip.errors import ArtifactError
from invariclip.records import seal

PROFILE = ShapeProfile({"pixels": ((1, 32), (4, 32), (8, 32))})
KEY = EngineKey("a" * 64, "tensorrt", "11.4.0", "GPU", "9.0", "float16", (PROFILE,), ("projection",), False)
CHANGES = [
    {"graph_sha256": "b" * 64}, {"library": "tensorrt_rtx"}, {"library_version": "11.4.1"}, {"gpu": "GPU 2"},
    {"capability": "8.9"}, {"precision": "float32"}, {"profiles": (PROFILE, PROFILE)}, {"refit": ()}, {"tf32": True},
    {"profiles": (ShapeProfile({"pixels": ((1, 32), (4, 32), (9, 32))}),)},
]  # fmt: skip


def test_every_part_of_a_key_changes_the_name(tmp_path):
    names = {engine_path(tmp_path, "image.onnx", replace(KEY, **change)).name for change in CHANGES}
    names.add(engine_path(tmp_path, "image.onnx", KEY).name)
    assert len(names) == len(CHANGES) + 1
    assert engine_path(tmp_path, "image.onnx", KEY).parent == tmp_path / "engines"
    assert all(name.startswith("image.") and name.endswith(".engine") for name in names)


SIDES = st.lists(st.integers(1, 50), min_size=2, max_size=2).map(tuple)


@given(SIDES, SIDES, SIDES)
def test_a_profile_takes_what_lies_between_its_ends(one, other, given_shape):
    low, high = tuple(map(min, one, other)), tuple(map(max, one, other))
    profile = ShapeProfile({"x": (low, low, high)})
    inside = all(a <= side <= b for a, side, b in zip(low, given_shape, high, strict=True))
    assert profile.takes({"x": given_shape}) == inside
    assert profile.takes({"x": low})
    assert profile.takes({"x": high})
    assert not profile.takes({"x": (*low, 1)})
    assert not profile.takes({})
    assert ShapeProfile({}).takes({"x": given_shape})


def test_a_sidecar_comes_back_as_it_was(graph, tools):
    path = tools.place(graph)
    facts = read_facts(path.with_name(f"{path.name}.json"))
    assert facts.key == tools.key(graph)
    assert (facts.graph, facts.seconds, facts.size_bytes) == ("image.onnx", 1.5, 9)


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.pop("engine_sha256"),
        lambda plain: plain.update(other=1),
        lambda plain: plain["key"].pop("gpu"),
        lambda plain: plain["key"]["profiles"][0]["shapes"]["pixels"].pop(),
        lambda plain: plain["key"].update(profiles="all"),
        lambda plain: plain.pop("schema_version"),
    ],
)
def test_a_damaged_sidecar_is_refused(graph, tools, change):
    path = tools.place(graph)
    sidecar = path.with_name(f"{path.name}.json")
    plain = json.loads(sidecar.read_text())
    change(plain)
    sidecar.write_bytes(seal(json.dumps(plain).encode()))
    with pytest.raises(ArtifactError, match=r"\.engine\.json: "):
        read_facts(sidecar)


def test_weights_beside_a_graph_are_part_of_it(graph):
    before = graph_digest(graph)
    data = graph.with_name("image.onnx.data")
    data.write_bytes(b"weights")
    with_data = graph_digest(graph)
    data.write_bytes(b"other weights")
    assert len({before, with_data, graph_digest(graph)}) == 3
