"""Graphs as text: what a dump says, what it leaves out, and that every family's graph is the committed one."""

import os
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from invariclip.bench.studies.parity import dump as module
from invariclip.bench.studies.parity.dump import AGAIN, difference, dump, dumps, family_dump, golden_path
from invariclip.export.checkpoints.families import FAMILIES

GOLDEN = Path(__file__).parents[2] / "export" / "golden"
ALL = "INVARICLIP_ALL_DUMPS"
KINDS = {
    "ViT-B-32": ("image", "text"),
    "ViT-B-32-quickgelu": ("text",),
    "RN50": ("image",),
    "ViT-B-16-SigLIP": ("image", "text"),
    "ViT-SO400M-14-SigLIP": ("text",),
    "convnext_base_w": ("image",),
    "MobileCLIP2-S0": ("image", "text"),
    "EVA02-B-16": ("image",),
    "coca_ViT-B-32": ("image", "text"),
    "PE-Core-B-16": ("image",),
    "roberta-ViT-B-32": ("image", "text"),
}
"""One tower of each kind; the others' graphs are the same but for their sizes, and a test holds them to that."""
FILES = [(family.name, tower) for family in FAMILIES for tower in ("image", "text")]


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_a_familys_graphs_are_the_committed_ones(name):
    towers = ("image", "text") if os.environ.get(ALL) else KINDS.get(name, ())
    if not towers:
        pytest.skip(f"same operators as another family's graphs; {ALL}=1 checks all, as does {AGAIN} --check")
    found = [difference(golden_path(name, tower, GOLDEN), text) for tower, text in family_dump(name, towers).items()]
    assert not any(found), "\n".join(found)


def operators(name, tower):
    lines = golden_path(name, tower, GOLDEN).read_text().splitlines()
    return tuple(re.sub(r"^.* = ([\w.]+)\(.*$", r"\1", line) for line in lines if " = " in line)


def test_every_graph_that_is_not_rebuilt_here_has_the_operators_of_one_that_is():
    rebuilt = {operators(name, tower) for name, towers in KINDS.items() for tower in towers}
    assert {(name, tower) for name, tower in FILES if operators(name, tower) not in rebuilt} == set()


def test_there_is_one_file_for_each_tower_and_no_other():
    assert {path.name for path in GOLDEN.iterdir()} == {golden_path(*one).name for one in FILES}


def test_committed_dumps_say_nothing_of_this_machine():
    for name, tower in FILES:
        text = golden_path(name, tower, GOLDEN).read_text()
        assert "/" not in text
        assert not re.search(r"val_\d|s\d\d|\d\.\d+\.\d", text), name
        assert text.startswith(f"# {name}, {tower} tower: ")


# ---------------------------------------------------------------- the text itself

SMALL = """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
g (float[batch, 4] given, float[batch, 4] second) => (float[batch, 2] answer)
<int64[2] shape = {0, -1}, float tiny = {0.000001}> {
  a = MatMul (given, weight)
  b = Add (a, bias)
  c = MatMul (second, weight)
  d = Clip (b, tiny, )
  e = Reshape <allowzero = 0> (d, shape)
  f = Cast <to = 1> (e)
  answer = Sum (f, c)
}"""
TEXT = """\
input given: float32 [batch, 4]
input second: float32 [batch, 4]
matmul_0: float32 [batch, 2] = MatMul(given, shared_0: float32 [4, 2])
add_0: float32 [batch, 2] = Add(matmul_0, float32 [8])
matmul_1: float32 [batch, 2] = MatMul(second, shared_0)
clip_0: float32 [batch, 2] = Clip(add_0, 1e-06)
reshape_0: float32 [batch, 2] = Reshape(clip_0, [0, -1], allowzero=0)
cast_0: float32 [batch, 2] = Cast(reshape_0, to=float32)
sum_0: float32 [batch, 2] = Sum(cast_0, matmul_1)
output answer: sum_0
"""


def model_of(body, seed=0):
    """The graph with random weights where it names some, and its shapes inferred."""
    proto = onnx.parser.parse_model(body)
    rng = np.random.default_rng(seed)
    for name, shape in (("weight", (4, 2)), ("bias", (2,))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def test_one_line_per_node():
    text = dump(model_of(SMALL))
    # two numbers are written out, eight are not
    assert re.sub(r"\[-?\d\.\d+, -?\d\.\d+\]", "float32 [8]", text) == TEXT


def test_the_exporters_names_and_the_weights_do_not_matter():
    renamed = re.sub(r"\b([abcdef])\b(?! *:)", r"val_\1", SMALL)
    assert renamed != SMALL
    first, again = dump(model_of(SMALL)), dump(model_of(renamed))
    assert first == again
    one, other = (re.sub(r"\[-?[\d.]+, -?[\d.]+\]", "", dump(model_of(SMALL, seed))) for seed in (0, 1))
    assert one == other


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{0, -1}", "{-1, 2}"),
        ("allowzero = 0", "allowzero = 1"),
        ("Sum (f, c)", "Sum (c, f)"),
        ("Sum (f, c)", "Max (f, c)"),
        ("{0.000001}", "{0.00001}"),
        ("MatMul (second, weight)", "MatMul (given, weight)"),
    ],
)
def test_a_change_is_seen(old, new):
    assert old in SMALL
    assert dump(model_of(SMALL.replace(old, new))) != dump(model_of(SMALL))


def test_a_node_that_comes_moves_the_names_of_its_own_kind_alone():
    before = dump(model_of(SMALL)).splitlines()
    more = SMALL.replace("f = Cast <to = 1> (e)", "x = Relu (e)\n f = Cast <to = 1> (x)")
    after = dump(model_of(more)).splitlines()
    assert len(set(after) - set(before)) == 2


def test_subgraphs_and_domains_and_unknown_dimensions_are_shown():
    body = """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
    g (float[batch, s77] given, bool yes) => (float[batch, ?] answer) {
      a = If (yes) <then_branch = one () => (float[batch, s77] t) { t = Relu (given) },
                    else_branch = two () => (float[batch, s77] u) { u = Abs (given) }>
      answer = own.Special <level = 0.5, axes = [1, 2]> (a)
    }"""
    text = dump(ir.from_proto(onnx.parser.parse_model(body)))
    assert "  then_branch:\n    relu_0: " in text
    assert "= own.Special(if_0, axes=[1, 2], level=0.5)" in text


def test_names_that_torch_makes_up_for_dimensions_are_hidden():
    model = model_of(SMALL)
    node = next(iter(model.graph))
    node.outputs[0].shape = ir.Shape(["s77", 2])
    assert "matmul_0: float32 [?, 2]" in dump(model)
    node.outputs[0].shape = ir.Shape(["4*batch", "batch*4"])
    assert "matmul_0: float32 [4*batch, 4*batch]" in dump(model)


# ---------------------------------------------------------------- the command


def test_the_command_writes_and_checks(monkeypatch, tmp_path):
    made = {"image": "one\ntwo\n", "text": "three\n"}
    monkeypatch.setattr(module, "family_dump", lambda name: made)
    arguments = ["--family", "RN50", "--out", str(tmp_path)]
    run = CliRunner().invoke(dumps, [*arguments, "--check"], standalone_mode=False)
    assert run.return_value == 1
    assert list(tmp_path.iterdir()) == []
    assert CliRunner().invoke(dumps, arguments, standalone_mode=False).return_value == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "RN50.image.txt": made["image"],
        "RN50.text.txt": made["text"],
    }
    assert CliRunner().invoke(dumps, [*arguments, "--check"], standalone_mode=False).return_value == 0
    made["image"] = "one\nthree\n"
    run = CliRunner().invoke(dumps, [*arguments, "--check"], standalone_mode=False)
    assert run.return_value == 1
    assert "-two\n+three\nif this is meant: python -m invariclip.bench.studies.parity.dump" in run.output
    assert "1 families, 1 of 2 graphs differ" in run.output


def test_the_command_knows_its_families():
    run = CliRunner().invoke(dumps, ["--family", "RN51"])
    assert run.exit_code == 2
    assert "'RN51' is no family; available: ViT-B-32, " in run.output
