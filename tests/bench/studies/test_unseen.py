"""Agreement on images that no export saw: the figures, the page, and the command on a small artifact."""

from __future__ import annotations

import json

import numpy as np
import pytest

from invariclip.bench.studies import unseen
from invariclip.errors import InputError


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    [(240, 240, 0.98425, 1.0), (397, 400, 0.97819, 0.99744), (0, 10, 0.0, 0.27753), (50, 100, 0.40383, 0.59617)],
)
def test_wilsons_interval(right, items, low, high):
    found = unseen.wilson(right, items)
    assert found == pytest.approx((low, high), abs=2e-5)


def test_a_row_counts_the_same_best_and_the_cosines_whatever_the_lengths():
    wanted = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], np.float32)
    got = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]], np.float32)
    row = unseen.compare("int8", "drawings", (wanted, np.array([0, 1, 2])), (got, np.array([0, 1, 0])))
    assert (row.items, row.same) == (3, 2)
    assert row.cosine_min == pytest.approx(0.5**0.5)
    assert row.cosine_mean == pytest.approx((2 + 0.5**0.5) / 3)
    assert row.low < 2 / 3 < row.high


def record():
    rows = [
        unseen.asdict(unseen.UnseenAgreement(name, images, 400, same, *unseen.wilson(same, 400), 0.99, 0.999))
        for name, same in (("int8", 398), (unseen.PEER, 380))
        for images in (unseen.JUDGED, "paintings")
    ]
    return {
        "model": "m", "artifact": "m.icm", "limit": 400, "min_top1": 0.97, "classes": 7,
        "schedules": ["chosen: 200 x 12"],
        "sets": [
            {"name": unseen.JUDGED, "kind": "seen", "images": 400},
            {"name": "paintings", "kind": "unseen", "images": 400},
        ],
        "candidates": [
            {"name": "float32", "megabytes": 87.0, "made": []},
            {"name": "int8", "megabytes": 23.0, "made": ["int8, whole ranges"]},
            {"name": unseen.PEER, "megabytes": 24.0, "made": []},
        ],
        "left_out": {"tokens-int8": "top-1 98 %"}, "rows": rows, "processor": "P",
        "versions": {"openvino": "1", "nncf": "2"},
    }  # fmt: skip


def test_the_page_has_every_candidate_on_every_set_with_its_interval():
    text = unseen.page(record())
    assert f"{unseen.JUDGED} (seen, 400)" in text
    assert "paintings (unseen, 400)" in text
    assert "| `int8` | 99.5 [98.2, 99.9] | 99.5 [98.2, 99.9] |" in text
    assert f"| {unseen.PEER} | 95.0 [92.4, 96.7]" in text
    assert "`tokens-int8`: top-1 98 %" in text
    assert "--min-top1 0.97" in text
    assert "- chosen: 200 x 12" in text
    assert "{" not in text


def test_the_page_can_be_written_again_from_its_record(tmp_path):
    from click.testing import CliRunner

    file = tmp_path / "page.json"
    file.write_text(json.dumps(record()))
    done = CliRunner().invoke(unseen.main, ["page", str(file)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == unseen.page(record())


@pytest.mark.parametrize("given", ["", "=path", "name", "name="])
def test_a_set_needs_a_name_and_a_path(given):
    with pytest.raises(InputError, match="NAME=PATH"):
        unseen._named(given)


def test_an_artifacts_variant_is_asked_and_its_answers_are_kept(tmp_path):
    pytest.importorskip("openvino")
    from invariclip.export.build import export_artifact
    from invariclip.export.checkpoints.checkpoint import load_checkpoint
    from invariclip.export.config import ExportConfig
    from invariclip.export.reference import images_path
    from invariclip.preprocessing.find import find_images

    images = find_images([images_path()])[::100]
    artifact = tmp_path / "small.icm"
    export_artifact(
        load_checkpoint("reference"),
        artifact,
        ExportConfig(
            classes=("a dog", "a cat", "a key"), images=images, backends=("openvino",), variants=("float16",), threads=1
        ),
    )
    where = str(images_path() / "noto")
    work = tmp_path / "work"
    found = unseen.measure(artifact, [f"noto={where}"], None, 3, work)
    rows = [(row["name"], row["images"], row["items"], row["same"]) for row in found["rows"]]
    assert rows == [("float16", unseen.JUDGED, len(images), len(images)), ("float16", "noto", 3, 3)]
    assert min(row["cosine_min"] for row in found["rows"]) > 0.9999
    before = sorted(path.stat().st_mtime_ns for path in work.iterdir())
    again = unseen.measure(artifact, [f"noto={where}"], None, 3, work)
    assert again["rows"] == found["rows"]
    assert sorted(path.stat().st_mtime_ns for path in work.iterdir()) == before


def test_an_artifact_without_classes_is_refused(tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(unseen, "read_manifest", lambda _: SimpleNamespace(classes=()))
    with pytest.raises(InputError, match="--classes-file"):
        unseen.measure(tmp_path, [], None, 3, tmp_path)
