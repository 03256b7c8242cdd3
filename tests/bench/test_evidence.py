"""The bench of learned templates' cost: the graphs it times, and the page it writes."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from invariclip.bench import ends, evidence
from invariclip.bench.candidates import Timing
from invariclip.bench.engines import Opened
from invariclip.bench.summary import Interval


def timing(name, batch, ratio):
    return Timing(name, batch, 12.34, 13.0, ratio, ratio * 0.99, ratio * 1.01, 30)


def spread(value, below, above):
    return Interval(value, value - below, value + above, 9)


def test_the_graphs_differ_in_their_ends_alone(tiny_checkpoint, tmp_path, monkeypatch):
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    monkeypatch.setattr(evidence, "load_checkpoint", lambda *_, **__: load_checkpoint(str(tiny_checkpoint)))
    written = evidence.write_graphs("tiny", 7, tmp_path, 1)
    graphs = {name: onnx.load(path).graph for name, path in written.whole.items()}
    outputs = {name: [output.name for output in graph.output] for name, graph in graphs.items()}
    assert outputs[evidence.BARE] == ["embedding"]
    assert outputs[evidence.SOFTMAX] == ["embedding", "logits", "probabilities"]
    assert outputs[evidence.ONE] == outputs[evidence.EIGHT] == [*outputs[evidence.SOFTMAX], "uncertainty"]
    banks = {
        name: list(item.dims) for name, graph in graphs.items() for item in graph.initializer if "_bank" in item.name
    }
    assert banks == {evidence.SOFTMAX: [24, 7], evidence.ONE: [24, 16], evidence.EIGHT: [24, 72]}
    alone = {name: onnx.load(path).graph for name, path in written.ends.items()}
    assert list(alone) == [evidence.ONE, evidence.EIGHT, evidence.SOFTMAX]
    for name, graph in alone.items():
        assert [output.name for output in graph.output] == outputs[name]
        own = [item for item in graphs[name].initializer if "_bank" in item.name]
        assert [item for item in graph.initializer if "_bank" in item.name] == own
    assert evidence._bank_bytes(written.ends[evidence.EIGHT]) == 4 * 24 * 72
    # eight templates take no more nodes than one
    assert len(graphs[evidence.ONE].node) == len(graphs[evidence.EIGHT].node)


def test_the_command_writes_both_files(tmp_path, monkeypatch):
    asked = []

    def measure(candidates, *, batches, **_):
        asked.extend((one.name, one.kind, one.backend) for one in candidates)
        return [
            timing(one.name, batch, 0.98 if one.name == evidence.EIGHT else 1.0)
            for one in candidates
            for batch in batches
        ]

    def measure_ends(tower, given, backend, *, batches, processes, **_):
        assert (tower, backend, processes) == (tmp_path / f"{evidence.BARE}.onnx", "openvino", 9)
        over = {evidence.ONE: 1.0, evidence.EIGHT: 1.005, evidence.SOFTMAX: 0.999}
        took = {evidence.ONE: 0.5, evidence.EIGHT: 0.75, evidence.SOFTMAX: 0.5}
        spread = {name: (value - 0.001, value + 0.001) for name, value in over.items()}
        return [
            ends.EndCost(
                name,
                batch,
                50.0,
                took[name],
                Interval(over[name], spread[name][0], spread[name][1] + 0.001 * (batch - 1), 9),
            )
            for name in given
            for batch in batches
        ]

    names = (evidence.BARE, evidence.SOFTMAX, evidence.ONE, evidence.EIGHT)
    files = {name: tmp_path / f"{name}.onnx" for name in names}
    alone = {name: files[name] for name in (evidence.ONE, evidence.EIGHT, evidence.SOFTMAX)}
    monkeypatch.setattr(evidence, "write_graphs", lambda *_: evidence.Graphs(files, alone))
    monkeypatch.setattr(evidence, "measure", measure)
    monkeypatch.setattr(evidence, "measure_ends", measure_ends)
    monkeypatch.setattr(evidence, "_bank_bytes", lambda path: 9_000_000 if path == files[evidence.EIGHT] else 2_000_000)
    monkeypatch.setattr(evidence, "version", lambda _: "1.0")
    out = tmp_path / "evidence.md"
    run = CliRunner().invoke(evidence.evidence, ["--backend", "openvino", "-o", str(out)], standalone_mode=False)
    assert run.return_value == 0
    assert asked[0] == (evidence.ONE, "whole", "openvino")  # the yardstick comes first
    assert {name for name, _, _ in asked} == set(names)
    stored = json.loads(out.with_suffix(".json").read_text())
    assert (stored["model"], stored["classes"], len(stored["groups"][0]["timings"])) == ("ViT-B-32", 1000, 8)
    text = out.read_text()
    # 1 / 0.98 is two percent more, and the interval turns round with it
    assert "| evidence, M = 8 | 12.34 | +2.04% [+1.03%, +3.07%] | 12.34 | +2.04% [+1.03%, +3.07%] |" in text
    assert "| evidence, M = 1 | 12.34 | – | 12.34 | – |" in text
    assert "| evidence, M = 8 | 0.750 | +0.50% [+0.40%, +0.60%] | 0.750 | +0.50% [+0.40%, +3.70%] |" in text
    assert "## openvino" in text
    assert "batch 1: kept." in text
    assert "7.0 MB more of class embeddings are read, in 0.25 ms more, 28 GB/s." in text
    assert "batch 32: not told: the interval holds both." in text


def test_ends_are_timed_behind_the_tower(tmp_path, monkeypatch):
    """One turn after the other, each end on what the tower answered; then put together by the definition."""
    asked = []

    class Backend:
        def __init__(self, name):
            self.name = name

        def run(self, feeds):
            asked.append((self.name, feeds[ends.EMBEDDING_INPUT].shape))

    monkeypatch.setattr("invariclip.backends.open_backend", lambda _, path, **__: Backend(path.name))
    tower = Opened(lambda batch: batch * 2, lambda count: np.ones((count, 3)), {})
    question = {"ends": {"a": "a.onnx", "b": "b.onnx"}, "backend": "openvino", "threads": 1, "batch": 4}
    found = ends.time_ends(tower, {**question, "repetitions": 3})
    assert [name for name, _ in asked[:4]] == ["a.onnx", "b.onnx", "b.onnx", "a.onnx"]
    assert {shape for _, shape in asked} == {(4, 3)}
    assert {part: {name: len(times) for name, times in own.items()} for part, own in found.items()} == {
        "tower": {"a": 3, "b": 3}, "end": {"a": 3, "b": 3},
    }  # fmt: skip
    answers = [
        {"tower": {"a": [1.0, 1.0], "b": [1.0, 3.0]}, "end": {"a": [0.1], "b": [0.21]}},
        {"tower": {"a": [2.0], "b": [2.0]}, "end": {"a": [0.1], "b": [0.52]}},
    ]
    first, other = ends.costs(answers, 4)
    assert (first.name, first.over.value, other.end_ms) == ("a", 1.0, pytest.approx(365))
    assert other.over.value == pytest.approx(np.mean([1.21 / 1.1, 2.52 / 2.1]))


def test_ends_run_in_a_process(tiny_checkpoint, tmp_path, monkeypatch):
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    monkeypatch.setattr(evidence, "load_checkpoint", lambda *_, **__: load_checkpoint(str(tiny_checkpoint)))
    graphs = evidence.write_graphs("tiny", 7, tmp_path, 1)
    found = ends.measure_ends(
        graphs.whole[evidence.BARE], graphs.ends, "onnxruntime", batches=(1, 2), processes=1, repetitions={1: 3, 2: 2},
        threads=1,
    )  # fmt: skip
    assert [(one.name, one.batch) for one in found] == [(name, batch) for batch in (1, 2) for name in graphs.ends]
    assert all(one.end_ms > 0 < one.tower_ms for one in found)


def test_an_image_graph_is_asked_for_all_its_answers(tiny_artifact):
    from invariclip.bench.candidates import Candidate
    from invariclip.bench.engines import open_candidate

    opened = open_candidate(Candidate("x", "whole", str(tiny_artifact / "image.onnx")), 1)
    assert set(opened.run(opened.make(2))) == {"embedding", "logits", "probabilities"}
    assert opened.engine["engine"] == "onnxruntime"


def test_too_few_rounds_are_refused():
    run = CliRunner().invoke(evidence.evidence, ["--rounds", "1"])
    assert run.exit_code == 2
    assert "3" in run.output


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.98, 1.005, "kept."), (1.02, 1.1, "missed."), (0.95, 1.05, "not told: ")]
)
def test_the_goal_is_kept_missed_or_not_told(low, high, verdict):
    over = Interval(1.0, low, high, 9).to_json()
    assert f"batch 1: {verdict}" in evidence._verdict({"batch": 1, "over": over})
