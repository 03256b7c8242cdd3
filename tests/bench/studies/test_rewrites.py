"""What each rewrite gains: which graphs are timed, how a graph is timed, and the page."""

import json
import re
from dataclasses import asdict

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from invariclip.bench.latency.measure import Timing, measure
from invariclip.bench.latency.worker import LatencyCandidate
from invariclip.bench.studies import rewrites
from invariclip.errors import InvariclipError
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.graphs.rewrites.plan import NAMES, REWRITES


@pytest.mark.parametrize("tower", ["image", "text"])
def test_all_none_and_all_but_one(tower):
    found = dict(rewrites.variants(tower))
    assert list(found)[:2] == [rewrites.ALL, rewrites.PLAIN]
    assert (found[rewrites.ALL], found[rewrites.PLAIN]) == (NAMES, ())
    others = {name: set(NAMES) - set(chosen) for name, chosen in list(found.items())[2:]}
    assert others == {f"without {one.name}": {one.name} for one in REWRITES if tower in one.towers}


def test_a_rewrite_that_does_not_apply_is_not_timed(tiny_checkpoint, tmp_path, monkeypatch):
    both = [(rewrites.ALL, NAMES), ("without plain-mean", tuple(name for name in NAMES if name != "plain-mean"))]
    monkeypatch.setattr(rewrites, "variants", lambda tower: iter(both))
    loaded = load_checkpoint(str(tiny_checkpoint))
    written = rewrites.write_graphs(loaded, "image", tmp_path)
    assert list(written) == [rewrites.ALL]
    path, nodes, cut = written[rewrites.ALL]
    assert not cut
    assert nodes == len(onnx.load(path).graph.node)
    (row,) = measure(
        [LatencyCandidate("all", "graph", str(path))], batches=(2,), rounds=3, seconds_per_turn=0.01, threads=1
    )
    assert row.median_ms > 0
    assert [rewrites._ids(tower, cut, loaded) for tower in ("image", "text") for cut in (False, True)] == [
        None, None, 16, rewrites.TEXT_IDS,
    ]  # fmt: skip


@pytest.fixture
def text_graph(tmp_path):
    """ids int64 [batch, 5] to an embedding; a graph that takes no other length."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (int64[batch, 5] ids) => (float[batch, 5] embedding) { embedding = Cast <to = 1> (ids) }"""
    path = tmp_path / "text.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_text_graph_is_fed_ids_of_the_length_that_was_asked_for(text_graph, backend):
    turn = {"batches": (1, 3), "rounds": 3, "seconds_per_turn": 0.001, "threads": 1}
    rows = measure([LatencyCandidate("text", "graph", str(text_graph), backend=backend, ids=5)], **turn)
    assert [row.batch for row in rows] == [1, 3]


def test_a_graph_that_does_not_take_what_it_is_fed_is_named(text_graph):
    with pytest.raises(InvariclipError, match="'text' stopped"):
        measure([LatencyCandidate("text", "graph", str(text_graph), ids=4)], rounds=3, threads=1)


def timing(name, batch, ratio):
    return Timing(name, batch, 12.34, 13.0, ratio, ratio * 0.8, ratio * 1.25, 30)


def group(names, *, tower="text", model="tiny"):
    rows = [timing(name, batch, ratio) for batch in (1, 32) for name, ratio in names.items()]
    return rewrites.TowerTimings(model, tower, "onnxruntime", "2 threads", dict.fromkeys(names, 81), rows)


def test_the_page_says_how_much_longer_it_takes_without():
    page = rewrites.page([group({"all rewrites": 1, "plain export": 0.2})])
    # the yardstick's ratio is above 1 where another is faster; the page turns it round, and its interval with it
    assert "| plain export | 81 | 12.3 | 5.00 [4.00, 6.25] | 12.3 | 5.00 [4.00, 6.25] |" in page
    assert "| all rewrites | 81 | 12.3 | 1 | 12.3 | 1 |" in page
    assert {len(re.findall(r"\|", line)) for line in page.splitlines() if line.startswith("|")} == {7}
    assert "## tiny, text tower, onnxruntime" in page
    assert "prompts of 10 tokens: 12 ids" in page
    assert all(f"- `{one.name}` (" in page for one in REWRITES)


def test_the_command_writes_both_files(monkeypatch, tmp_path):
    made = {"all rewrites": (tmp_path / "a.onnx", 7, True), "plain export": (tmp_path / "b.onnx", 9, False)}
    asked = []

    def measured(candidates, *, batches, **_):
        asked.extend((one.name, one.backend, one.ids) for one in candidates)
        return [timing(one.name, batch, 1.0) for one in candidates for batch in batches]

    class Loaded:
        class tokenizer:  # noqa: N801
            class spec:  # noqa: N801
                context_length = 77

    monkeypatch.setattr(rewrites, "load_checkpoint", lambda *_, **__: Loaded)
    monkeypatch.setattr(rewrites, "write_graphs", lambda *_: made)
    monkeypatch.setattr(rewrites, "measure", measured)
    out = tmp_path / "rewrites.md"
    old = [group({"all rewrites": 1}, tower=tower, model=model) for model, tower in (("old", "text"), ("new", "text"))]
    out.with_suffix(".json").write_text(json.dumps([asdict(one) for one in old]))
    options = ["--case", "new:image", "--case", "new:text", "--backend", "onnxruntime", "--rounds", "3", "-o", str(out)]
    run = CliRunner().invoke(rewrites.rewrites, options, standalone_mode=False)
    assert run.return_value == 0
    assert asked == [
        ("all rewrites", "onnxruntime", None),
        ("plain export", "onnxruntime", None),
        ("all rewrites", "onnxruntime", rewrites.TEXT_IDS),
        ("plain export", "onnxruntime", 77),
    ]
    stored = [rewrites.TowerTimings.from_json(plain) for plain in json.loads(out.with_suffix(".json").read_text())]
    # what was not named stays, what was named is new
    assert [(one.model, one.tower) for one in stored] == [("old", "text"), ("new", "text"), ("new", "image")]
    assert stored[1].nodes == {"all rewrites": 7, "plain export": 9}
    assert [len(one.timings) for one in stored] == [2, 4, 4]
    assert np.isclose(stored[2].timings[0].median_ms, 12.34)
    assert "## new, image tower, onnxruntime" in out.read_text()


def test_a_case_that_is_none_is_refused():
    run = CliRunner().invoke(rewrites.rewrites, ["--case", "ViT-B-32"], standalone_mode=False)
    assert "'ViT-B-32' is not MODEL:TOWER" in str(run.exception)
