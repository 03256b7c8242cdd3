"""The bench of learned templates' cost: the graphs it times, and the page it writes."""

import json

import onnx
from click.testing import CliRunner

from invariclip.bench import evidence
from invariclip.bench.latency import Timing


def timing(name, batch, ratio):
    return Timing(name, batch, 12.34, 13.0, ratio, ratio * 0.99, ratio * 1.01, 30)


def test_the_graphs_differ_in_their_ends_alone(tiny_checkpoint, tmp_path, monkeypatch):
    from invariclip.export.models.checkpoint import load_checkpoint

    monkeypatch.setattr(evidence, "load_checkpoint", lambda *_, **__: load_checkpoint(str(tiny_checkpoint)))
    written = evidence.write_graphs("tiny", 7, tmp_path, 1)
    graphs = {name: onnx.load(path).graph for name, path in written.items()}
    outputs = {name: [output.name for output in graph.output] for name, graph in graphs.items()}
    assert outputs[evidence.BARE] == ["embedding"]
    assert outputs[evidence.SOFTMAX] == ["embedding", "logits", "probabilities"]
    assert outputs[evidence.ONE] == outputs[evidence.EIGHT] == [*outputs[evidence.SOFTMAX], "uncertainty"]
    banks = {
        name: list(item.dims) for name, graph in graphs.items() for item in graph.initializer if "_bank" in item.name
    }
    assert banks == {evidence.SOFTMAX: [24, 7], evidence.ONE: [24, 14], evidence.EIGHT: [24, 63]}
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

    names = (evidence.BARE, evidence.SOFTMAX, evidence.ONE, evidence.EIGHT)
    monkeypatch.setattr(evidence, "write_graphs", lambda *_: {name: tmp_path / f"{name}.onnx" for name in names})
    monkeypatch.setattr(evidence, "measure", measure)
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
    assert "batch 1: missed." in text
    assert "## openvino" in text


def test_an_image_graph_is_asked_for_all_its_answers(tiny_artifact):
    from invariclip.bench.engines import open_candidate
    from invariclip.bench.latency import Candidate

    opened = open_candidate(Candidate("x", "whole", str(tiny_artifact / "image.onnx")), 1)
    assert set(opened.run(opened.make(2))) == {"embedding", "logits", "probabilities"}
    assert opened.engine["engine"] == "onnxruntime"


def test_too_few_rounds_are_refused():
    run = CliRunner().invoke(evidence.evidence, ["--rounds", "1"])
    assert run.exit_code == 2
    assert "3" in run.output


def test_the_goal_is_kept_missed_or_not_told():
    def said(low, high):
        rows = [
            Timing(name, 1, 1.0, 1.0, 1.0, low, high, 9) for name in (evidence.BARE, evidence.SOFTMAX, evidence.ONE)
        ]
        rows.append(Timing(evidence.EIGHT, 1, 1.0, 1.0, 1.0, low, high, 9))
        return evidence.page("tiny", 7, [evidence.Group("openvino", "1 thread", rows)])

    assert "batch 1: kept." in said(0.995, 1.02)
    assert "batch 1: missed." in said(0.9, 0.98)
    assert "batch 1: not told" in said(0.95, 1.05)
