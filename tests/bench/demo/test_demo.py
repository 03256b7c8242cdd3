"""The demo's scoring, its page and the user's own images, on tiny artifacts; the whole demo is run by `make demo`."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import invariclip
from invariclip.artifact.folder import read_manifest
from invariclip.bench.demo import bundled as scoring
from invariclip.bench.demo.bundled import (
    DRAWINGS,
    FIT_SPLITS,
    MEAN,
    PHOTOGRAPHS,
    SEEN,
    UNFITTED,
    Accuracy,
    ArtifactAnswers,
    answered,
    bundle,
    classify_own,
    halves,
    score,
    verdict,
    wanted,
)
from invariclip.bench.demo.command import _print, demo
from invariclip.bench.demo.page import GALLERY, LEAST_SURE, STRIP, Demo, shown_protocol, write_page
from invariclip.bench.latency.measure import Timing
from invariclip.calibrate.data.images import SkippedImageWarning
from invariclip.calibrate.fit import Calibration
from invariclip.errors import InputError
from invariclip.export.build import export_artifact
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.config import ExportConfig

TEMPLATES = ("a picture of a {}.",)


@pytest.fixture(scope="module")
def bundled():
    """A tenth of the concepts, so that scoring takes no time."""
    everything = bundle()
    concepts = sorted({p.concept for p in everything.images})[::10]
    images = tuple(p for p in everything.images if p.concept in concepts)
    return replace(
        everything,
        images=images,
        fit=tuple(p for p in everything.fit if p.concept in concepts),
        classes=tuple(sorted({p.name for p in images})),
    )


def answers(bundled, right):
    """By names right where `right` says, and embeddings that are one-hot by class where it says so too."""
    indices = np.where(right, bundled.labels, (bundled.labels + 1) % len(bundled.classes))
    unsure = np.where(right, 0.1, 0.9).astype(np.float32)
    return ArtifactAnswers(indices, np.eye(len(bundled.classes), dtype=np.float32)[indices], unsure)


def test_nothing_of_a_held_out_style_or_test_concept_is_fitted():
    everything = bundle()
    assert set(everything.held_out_styles) == {"openmoji", "openmoji-black", "photograph"}
    assert set(everything.training_styles) == {"noto", "fluent-flat", "fluent-3d"}
    assert {p.environment for p in everything.fit} == set(everything.training_styles)
    assert {p.split for p in everything.fit} == set(FIT_SPLITS)


def test_scores_tell_drawings_photographs_and_seen_styles_apart(bundled):
    unseen = bundled.unseen
    rows = score(bundled, answers(bundled, ~unseen), *[answers(bundled, unseen | True)] * 2)
    assert [(row.style, row.protocol) for row in rows] == [
        (style, protocol)
        for protocol in ("prototypes", "names")
        for style in (DRAWINGS, PHOTOGRAPHS, MEAN, UNFITTED, SEEN)
    ]  # fmt: skip
    for row in rows:
        expected = (1, 1, 0) if row.seen else (0, 1, 1)
        assert (row.before, row.after, row.difference) == expected
        assert row.low == row.high == expected[2]
        assert (row.adapted, row.more) == ((None, None) if row.seen else (1, (0, 0, 0)))
    photographs = np.array([p.environment == "photograph" for p in bundled.images])
    parts = answers(bundled, ~unseen), answers(bundled, photographs), answers(bundled, unseen)
    rows = {(r.style, r.protocol): r for r in score(bundled, *parts)}
    assert rows[DRAWINGS, "names"].more == (1, 1, 1)
    assert rows[PHOTOGRAPHS, "names"].more == (0, 0, 0)
    assert rows[DRAWINGS, "names"].difference == 0
    assert rows[PHOTOGRAPHS, "names"].difference == 1
    assert rows[MEAN, "names"].difference == 0.5
    assert rows[SEEN, "names"].difference == -1


def test_a_seen_image_is_no_part_of_the_prototype_it_is_compared_with(bundled):
    """All images of one style are wrong: with themselves in the mean of three they would still be near it."""
    flat = np.array([p.environment == "noto" for p in bundled.images])
    found = answered(bundled, answers(bundled, ~flat), "prototypes")
    assert (found[flat] != bundled.labels[flat]).all()
    assert (found[bundled.unseen] == bundled.labels[bundled.unseen]).all()


def rows_with(**ends):
    """Per protocol the low and high end of the mean's interval."""
    return [Accuracy(MEAN, name, 0.2, 0.2 + sum(end) / 2, sum(end) / 2, *end) for name, end in ends.items()]


def test_the_verdict_names_what_gains_and_what_does_not():
    both = verdict(rows_with(prototypes=(0.01, 0.1), names=(0.01, 0.1)), "shrinkage")
    assert both.helped
    assert both.sentence.count("gains with") == 2
    one = verdict(rows_with(prototypes=(0.01, 0.1), names=(-0.05, 0.1)), "shrinkage")
    assert one.helped
    assert "gains with prototypes" in one.sentence
    assert "no clear change with names" in one.sentence
    mixed = verdict(rows_with(prototypes=(0.01, 0.1), names=(-0.1, -0.01)), "shrinkage")
    assert not mixed.helped
    assert "loses with names" in mixed.sentence
    assert not verdict(rows_with(prototypes=(-0.1, 0.1)), "shrinkage").helped
    hurt = [Accuracy(kind, "names", 0.3, 0.2, -0.1, -0.2, -0.05) for kind in (PHOTOGRAPHS, SEEN)]
    told = verdict([*rows_with(prototypes=(0.01, 0.1)), *hurt], "shrinkage").sentence
    assert "It loses on photographs with names" in told
    assert "styles that it was fitted on it costs" in told
    apart = [replace(row, style=UNFITTED) for row in rows_with(prototypes=(-0.01, 0.1), names=(0.01, 0.1))]
    told = verdict([*rows_with(prototypes=(0.01, 0.1)), *apart], "shrinkage").sentence
    assert "Those that were not: no clear change with prototypes" in told
    assert "a gain with names" in told
    none = verdict(rows_with(prototypes=(0, 0)), "identity")
    assert not none.helped
    assert "no gain" in none.sentence


def test_how_unsure_is_said_in_halves(bundled):
    asked = np.flatnonzero(bundled.unseen)
    right = np.ones(len(bundled.images), bool)
    right[asked[: len(asked) // 2]] = False
    found = halves(bundled, answers(bundled, right))
    assert (found.surer, found.auroc) == (1, 1)
    assert found.other <= 1 / len(asked[::2])
    assert "AUROC 1.00" in str(found)


@pytest.fixture(scope="module")
def own_artifacts(tiny_checkpoint, tiny_images, tiny_projection, tmp_path_factory):
    """Before and after: tiny artifacts."""
    folder = tmp_path_factory.mktemp("demo")
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    some = sorted(tiny_images.glob("*.png"))[:2]
    for name, projection in (("before", None), ("after", tiny_projection)):
        export_artifact(
            checkpoint,
            folder / f"{name}.icm",
            ExportConfig(classes=["dog", "cat"], templates=TEMPLATES, images=some),
            projection=projection,
        )
    return folder / "before.icm", folder / "after.icm"


@pytest.fixture(scope="module")
def own(own_artifacts, tiny_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for path in sorted(tiny_images.glob("*.png"))[:3]:
        shutil.copy(path, folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (900, 300), "red").save(folder / "wide.png")
    with pytest.warns(SkippedImageWarning, match=r"broken\.jpg"):
        asked = wanted(folder, "dog, cat,car", TEMPLATES)
    return classify_own(asked, *own_artifacts, TEMPLATES)


def test_own_images_are_answered_with_own_words_before_and_after(own):
    assert [one.path.name for one in own] == ["00.png", "01.png", "02.png", "wide.png"]
    for one in own:
        assert {one.before.label, one.after.label} <= {"dog", "cat", "car"}
        assert one.before.probability != one.after.probability
        assert one.changed is (one.before.label != one.after.label)


def test_own_images_need_words_and_words_images(tmp_path):
    assert wanted(None, None, TEMPLATES) is None
    with pytest.raises(InputError, match='add --classes "dog,cat,car"'):
        wanted(tmp_path, None, TEMPLATES)
    with pytest.raises(InputError, match="add --images"):
        wanted(None, "dog,cat", TEMPLATES)
    with pytest.raises(InputError, match="no image in this folder"):
        wanted(tmp_path, "dog,cat", TEMPLATES)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.warns(SkippedImageWarning), pytest.raises(InputError, match="no image there can be read"):
        wanted(tmp_path, "dog,cat", TEMPLATES)
    with pytest.raises(InputError):
        wanted(tmp_path, "dog,dog", TEMPLATES)


def test_the_command_refuses_before_any_work(tmp_path):
    result = CliRunner().invoke(demo, ["--images", str(tmp_path), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, InputError)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def result(bundled, tiny_artifact, tiny_projection, own):
    before = answers(bundled, ~bundled.unseen)
    after = answers(bundled, np.arange(len(bundled.images)) % 5 > 0)
    accuracy = score(bundled, before, after, answers(bundled, np.arange(len(bundled.images)) % 7 > 0))
    return Demo(
        bundled=bundled,
        calibration=Calibration(tiny_projection, None, {}),
        answers=(before, after),
        accuracy=accuracy,
        timings=[Timing("PyTorch <eager>", 1, 2.0, 3.0, 1.0, 1.0, 1.0, 10)],
        busy="timed on a busy machine: 40% of processor time went to others",
        manifest=read_manifest(tiny_artifact),
        artifact=Path(tiny_artifact),
        halves=halves(bundled, after),
        verdict=verdict(accuracy, "shrinkage"),
        own=tuple(own),
        seconds={"load": 1.0, "calibrate": 2.0},
    )


def test_the_page_is_one_file_that_shows_what_changed(result, tmp_path):
    write_page(tmp_path / "index.html", result)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "PyTorch &lt;eager&gt;" in page
    assert 'src="http' not in page
    styles = 6
    assert page.count("<figure>") == 2 * STRIP + styles + GALLERY + LEAST_SURE + len(result.own)
    assert "timed on a busy machine" in page
    assert "wide.png" in page
    assert page.index("95&nbsp;% interval") < page.index("<figure>") < page.index('class="verdict')
    assert "<svg" in page
    assert len(page) < 3_000_000


def test_the_strip_shows_right_and_wrong_changes(result, tmp_path):
    assert shown_protocol(result.accuracy) == "prototypes"
    swapped = replace(result, answers=result.answers[::-1])
    write_page(tmp_path / "index.html", swapped)
    assert "0 became right" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_the_terminal_says_the_same_and_what_to_type_next(result, capsys):
    _print(result, Path("index.html"))
    said = capsys.readouterr().out
    assert result.verdict.sentence in said
    assert "16 unlabelled images" in said
    assert "timed on a busy machine" in said
    assert "wide.png" in said
    assert f"invariclip serve {result.artifact}" in said
    assert "invariclip build --images" in said
    assert "Took 3 s: load 1 s, calibrate 2 s" in said


def test_artifacts_are_asked_about_every_image(bundled, own_artifacts):
    few = replace(bundled, images=bundled.images[:18], classes=("dog", "cat"))
    found = scoring.ask(own_artifacts[1], few, lambda items, **_: items)
    assert found.indices.shape == found.uncertainty.shape == (18,)
    assert np.allclose(np.linalg.norm(found.embeddings, axis=1), 1, atol=1e-5)


def test_an_image_is_not_adapted_by_a_site_that_it_was_measured_on(bundled, own_artifacts, monkeypatch):
    """Of each style two samples, each answered with the site of the other."""
    styles = np.array([image.environment for image in bundled.images])
    places = np.concatenate([np.flatnonzero(styles == style)[:8] for style in ("openmoji", "noto")])
    small = replace(bundled, images=tuple(bundled.images[place] for place in places), classes=("dog", "cat"))
    monkeypatch.setattr(scoring, "SHOWN", 4)
    rows = np.random.default_rng(0).normal(size=(16, invariclip.load(own_artifacts[1]).width)) + 1
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    plain = ArtifactAnswers(np.zeros(16, dtype=np.int64), rows, np.zeros(16, dtype=np.float32))
    adapted = scoring.adapt(own_artifacts[1], small, plain).embeddings
    assert np.allclose(np.linalg.norm(adapted, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(adapted[8:], rows[8:])  # noto was fitted on
    assert (np.abs(adapted[:8] - rows[:8]).max(axis=1) > 0).all()
    for place in range(8):
        other = rows.copy()
        other[place] = -rows[place]
        moved = scoring.adapt(own_artifacts[1], small, replace(plain, embeddings=other)).embeddings
        changed = np.abs(moved[:8] - adapted[:8]).max(axis=1) > 0
        assert changed[place]
        assert changed.sum() == 5  # itself, and the four that its site is for
