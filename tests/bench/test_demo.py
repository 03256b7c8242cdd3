"""The demo's scoring and its page; the whole demo is run by `make demo`."""

from pathlib import Path

import numpy as np
import pytest

from invariclip.artifact import read_manifest
from invariclip.bench.bundled import FIT_SPLITS, Accuracy, Answers, bundle, score, verdict
from invariclip.bench.demo_page import Demo, write_page
from invariclip.bench.demo_unsure import SHOWN, Told, Unsure
from invariclip.bench.latency import Timing
from invariclip.calibrate.fit import Calibration


@pytest.fixture(scope="module")
def bundled():
    return bundle()


def answers(bundled, right):
    """Zero-shot right where `right` says, and embeddings that are one-hot by class where it says so too."""
    labels = np.array([bundled.classes.index(p.name) for p in bundled.pictures])
    indices = np.where(right, labels, (labels + 1) % len(bundled.classes))
    return Answers(indices, np.eye(len(bundled.classes), dtype=np.float32)[indices])


def test_nothing_of_a_held_out_style_or_test_concept_is_fitted(bundled):
    assert {"openmoji", "openmoji-black", "fluent-high-contrast"} == set(bundled.held_out_styles)
    assert {"noto", "twemoji", "fluent-flat", "fluent-3d"} <= set(bundled.training_styles)
    assert {p.environment for p in bundled.fit} == set(bundled.training_styles)
    assert {p.split for p in bundled.fit} == set(FIT_SPLITS)


def test_scores_are_those_of_the_held_out_styles(bundled):
    held_out = np.isin([p.environment for p in bundled.pictures], bundled.held_out_styles)
    rows = score(bundled, answers(bundled, ~held_out), answers(bundled, held_out | True))
    assert [row.style for row in rows] == [*bundled.held_out_styles, "mean"] * 2
    for row in rows:
        assert (row.before, row.after, row.difference) == (0, 1, 1)
        assert (row.low, row.high) == (1, 1)
    same = answers(bundled, np.arange(len(bundled.pictures)) % 3 > 0)
    assert all(row.difference == row.low == row.high == 0 for row in score(bundled, same, same))


def rows_with(difference, low):
    return [
        Accuracy("mean", protocol, 0.2, 0.2 + difference, difference, low, 0.3)
        for protocol in ("zero-shot", "prototypes")
    ]


def test_the_verdict_claims_a_gain_only_where_the_interval_does():
    assert verdict(rows_with(0.05, 0.01), "shrinkage")[0] is True
    assert verdict(rows_with(0.05, -0.01), "shrinkage")[0] is False
    assert verdict(rows_with(-0.05, -0.1), "shrinkage")[0] is False
    helped, sentence = verdict(rows_with(0, 0), "identity")
    assert not helped
    assert "no gain" in sentence


def unsure_of(bundled, right):
    """Held-out pictures in their order, each less sure than the one before."""
    held_out = [p for p in bundled.pictures if p.environment in bundled.held_out_styles]
    told = [
        Told(picture, picture.name if right(place) else "another <thing>", place / len(held_out))
        for place, picture in enumerate(held_out)
    ]
    return Unsure(Path("unsure.icm"), tuple(told))


def test_how_unsure_is_said_in_halves(bundled):
    count = len(unsure_of(bundled, lambda place: True).told)
    apart = unsure_of(bundled, lambda place: place < count // 2)
    assert (apart.halves, apart.separation) == ((1, 0), 1)
    assert "100.0% are answered right; of the other half, 0.0% (AUROC 1.00)" in apart.sentence
    assert unsure_of(bundled, lambda place: place >= count // 2).separation == 0
    assert np.isnan(unsure_of(bundled, lambda place: True).separation)
    assert apart.least_sure[0] == apart.told[-1]
    assert apart.surest[0] == apart.told[0]


def test_the_page_is_one_file_that_shows_what_changed(bundled, tiny_artifact, tiny_projection, tmp_path):
    before = answers(bundled, np.zeros(len(bundled.pictures), bool))
    after = answers(bundled, np.arange(len(bundled.pictures)) % 2 == 0)
    demo = Demo(
        bundled=bundled,
        calibration=Calibration(tiny_projection, None, {}),
        answers=(before, after),
        accuracy=score(bundled, before, after),
        timings=[Timing("PyTorch <eager>", 1, 2.0, 3.0, 1.0, 1.0, 1.0, 10)],
        manifest=read_manifest(tiny_artifact),
        artifact=Path(tiny_artifact),
        unsure=unsure_of(bundled, lambda place: place % 3 > 0),
        helped=True,
        verdict="A gain.",
    )
    write_page(tmp_path / "index.html", demo)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "PyTorch &lt;eager&gt;" in page
    assert 'src="http' not in page
    assert page.count("<figure>") == len({p.environment for p in bundled.pictures}) + 14 + 2 * SHOWN
    assert "another &lt;thing&gt;" in page
    assert "<svg" in page
