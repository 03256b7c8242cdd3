"""The page of learned templates: its figures are those of the answers themselves, and it needs no other file."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from invariclip.artifact.learned_prompts import read_semantics
from invariclip.artifact.projection import Projection
from invariclip.calibrate.data.images import ImageRecord, read_images
from invariclip.calibrate.prompts.learn import LearnedResult, learn, recall
from invariclip.calibrate.prompts.options import PromptOptions
from invariclip.calibrate.prompts.scales import Scales
from invariclip.calibrate.prompts.scores import ScoredImages
from invariclip.calibrate.prompts.threshold import Threshold
from invariclip.calibrate.prompts.views import LabelledEmbeddings
from invariclip.calibrate.report.prompts_figures import figures_of
from invariclip.calibrate.report.prompts_page import conclude, page_beside, write_page
from invariclip.errors import InputError, MissingExtraError, SemanticsError
from invariclip.preprocessing.interventions import resolve
from invariclip.uncertainty import fuse, opinions

OPTIONS = PromptOptions(
    learned=2, context_tokens=3, steps=4, check_every=2, classes=6, images=16, held=0.3,
    augmentations=(None, resolve("flip")),
)  # fmt: skip
FACTS = {
    "images": 100, "classes": 5, "environments": {"one": 100}, "train": 20, "validation": 20, "held": 60,
    "skipped": [], "declined": {}, "images_sha256": "0" * 64, "curve": [[0, 2.0], [2, 1.5], [4, 1.75]], "steps": 4,
    "best_step": 2, "evidence_loss": 1.0, "threshold": None,
}  # fmt: skip
VERSIONS = {"options": {"seed": 0}, "invariclip": "0", "numpy": "0", "torch": "0"}


class Page(HTMLParser):
    """Its words, and its tables by id."""

    def __init__(self, file):
        super().__init__()
        self.source, self.tables, self.words, self.table = file.read_text(encoding="utf-8"), {}, [], []
        self.feed(self.source)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "table":
            self.table = self.tables[given["id"]] = []
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.table = []

    def handle_data(self, data):
        self.words.append(data)
        if self.table and self.table[-1]:
            self.table[-1][-1] += data

    def rows(self, name, head=1):
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[name][head:]]


@pytest.fixture
def made(manifest, tiny_projection, world):
    """What a learning might have given: made vectors, answers that are often wrong, and real image files."""

    def of(seed=0, count=60, noise=1.0, above=None, name="thing {}"):
        rng = np.random.default_rng(seed)
        classes, width = 5, 8
        bank = rng.normal(size=(3, classes, width)) * 0.3 + rng.normal(size=(1, classes, width))
        bank /= np.linalg.norm(bank, axis=2, keepdims=True)
        labels = np.arange(count) % classes
        vectors = bank[0, labels] + noise * rng.normal(size=(count, width)) / np.sqrt(width)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        paths = [image.path for image in read_images(manifest)]
        names = tuple(name.format(number) for number in range(classes))
        used = tuple(ImageRecord(paths[i % len(paths)], "c", names[labels[i]], "one") for i in range(count))
        images = LabelledEmbeddings(vectors, labels, names, used, tuple(f"{i:064x}" for i in range(count)), ())
        scales = Scales(np.array([1.0, 1.5, 0.7]), np.array([-2.0, -1.5, -3.0]), np.array([0.1, 0.2, -0.1]), 0.5)
        scored = ScoredImages(True, images, bank, 10.0, scales, world.SPEC)
        semantics = SimpleNamespace(
            learned=2, context_tokens=3, abstain_above=above, templates=("a {}.",), digest="1" * 64,
            checkpoint_sha256="2" * 64, projection_sha256=tiny_projection.digest, provenance=VERSIONS,
        )  # fmt: skip
        threshold = None if above is None else Threshold(above, 0.2, 0.95, 1, 0, 0.1, count)
        facts = FACTS | {"threshold": threshold and threshold.to_json()}
        return LearnedResult(semantics, threshold, facts, scored, tiny_projection)

    return of


def fused_of(scored, places=slice(None)):
    cosines = np.einsum("nd,mkd->nmk", scored.images.vectors, scored.bank[places])
    return fuse(*opinions(cosines, scored.logit_scale, *(own[places] for own in scored.scales.numbers)))


def test_the_page_shows_what_the_answers_are(made, tmp_path):
    learnt = made(above=0.3)
    options = replace(OPTIONS, target_risk=0.2)
    write_page(tmp_path / "page.html", learnt, options, [])
    page, scored = Page(tmp_path / "page.html"), learnt.scored
    labels, count = scored.images.labels, len(scored.images.labels)
    fused = fused_of(scored)
    logits = scored.logit_scale * scored.images.vectors @ scored.bank[0].T
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ways = [
        (softmax.max(axis=1), logits.argmax(axis=1) == labels, 1 - softmax.max(axis=1)),
        (fused.probabilities.max(axis=1), fused.probabilities.argmax(axis=1) == labels, fused.uncertainty),
    ]
    assert 0 < ways[1][1].sum() < count

    curves = []
    for row, (sure, right, doubt) in zip(page.rows("scores"), ways, strict=True):
        inside = [(sure > low / 15) & (sure <= (low + 1) / 15) for low in range(15)]
        error = sum(abs(right[one].sum() - sure[one].sum()) for one in inside if one.any()) / count
        apart = np.mean([(w > doubt[right]).mean() for w in doubt[~right]])
        curves.append(np.cumsum(~right[np.argsort(doubt)]) / np.arange(1, count + 1))
        assert row[1].split()[0] == f"{100 * right.mean():.1f}"
        assert [float(cell) for cell in row[2:]] == pytest.approx([error, apart, curves[-1].mean()], abs=6e-4)

    covered = [row for row in page.rows("risk") if "threshold" not in row[0]]
    assert [int(row[0]) for row in covered] == list(range(6, 61, 6))
    for row in covered:
        n = int(row[0])
        assert row[2:4] == [f"{100 * curve[n - 1]:.2f}" for curve in curves]
        assert float(row[4]) == pytest.approx(np.sort(fused.uncertainty)[n - 1], rel=1e-3)

    bins = page.rows("reliability", head=2)
    assert [sum(int(row[place]) for row in bins) for place in (1, 4)] == [count, count]
    for row in bins:
        low = round(float(row[0].split()[0]) * 15 / 100) / 15
        for place, (sure, right, _) in zip((1, 4), ways, strict=True):
            inside = (sure > low) & (sure <= low + 1 / 15)
            assert int(row[place]) == inside.sum()
            if inside.any():
                expected = [f"{100 * sure[inside].mean():.1f}", f"{100 * right[inside].mean():.1f}"]
                assert row[place + 1 : place + 3] == expected

    for row in page.rows("histogram"):
        low, high = (float(edge) for edge in row[0].split(" … "))
        inside = (fused.uncertainty > low - 1e-12) & (fused.uncertainty <= high + 1e-12)
        assert [int(cell) for cell in row[1:]] == [(inside & ways[1][1]).sum(), (inside & ~ways[1][1]).sum()]
    assert sum(int(cell) for row in page.rows("histogram") for cell in row[1:]) == count

    for m, row in enumerate(page.rows("templates")):
        alone = (scored.images.vectors @ scored.bank[m].T).argmax(axis=1)
        rest = fused_of(scored, [one for one in range(3) if one != m]).probabilities.argmax(axis=1)
        assert row[1] == f"{scored.scales.scale[m]:.3f}"
        assert float(row[2].replace("−", "-")) == scored.scales.bias[m]
        assert row[3].split()[0] == f"{100 * (alone == labels).mean():.1f}"
        assert row[4] == f"{100 * (alone == fused.probabilities.argmax(axis=1)).mean():.1f}"
        assert row[5] == f"{fused_of(scored, [m]).uncertainty.mean():.3f}"
        assert row[6] == f"{100 * (rest == labels).mean():.1f}"
    assert [row[0] for row in page.rows("templates")] == ["hand-written", "learned 1 none", "learned 2 flip"]
    assert page.rows("course") == [["0", "2.0000", ""], ["2", "1.5000", "kept"], ["4", "1.7500", ""]]


def test_the_threshold_is_marked(made, tmp_path):
    learnt = made(above=0.3)
    write_page(tmp_path / "page.html", learnt, replace(OPTIONS, target_risk=0.2), [])
    page, fused = Page(tmp_path / "page.html"), fused_of(learnt.scored)
    accepted = fused.uncertainty <= 0.3
    wrong = fused.probabilities.argmax(axis=1) != learnt.scored.images.labels
    assert 0 < accepted.sum() < 60
    marked = next(row for row in page.rows("risk") if "threshold" in row[0])
    assert marked[0] == f"{accepted.sum()} (threshold)"
    assert marked[3:] == [f"{100 * wrong[accepted].mean():.2f}", "0.3"]
    assert ">abstain above 0.3</text>" in page.source
    assert ">target 20 %</text>" in page.source
    assert "Abstain above 0.3" in page.text


def test_without_a_target_risk_nothing_is_marked(made, tmp_path):
    write_page(tmp_path / "page.html", made(), OPTIONS, [])
    page = Page(tmp_path / "page.html")
    assert "No target risk was asked for" in page.text
    assert not any("threshold" in row[0] for row in page.rows("risk"))
    assert ">abstain above" not in page.source
    # The same figures give the same page
    write_page(tmp_path / "again.html", made(), OPTIONS, [])
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()


def test_examples_are_the_most_unsure_and_the_surest_wrong(made):
    learnt = made(seed=3)
    figures, fused = figures_of(learnt, OPTIONS), fused_of(learnt.scored)
    order = np.argsort(fused.uncertainty)
    wrong = fused.probabilities.argmax(axis=1) != learnt.scored.images.labels
    assert [one.row for one in figures.unsure] == order[::-1][:8].tolist()
    assert [one.row for one in figures.sure_and_wrong] == order[wrong[order]][:8].tolist()
    assert not any(one.right or one.name == one.answer for one in figures.sure_and_wrong)


def test_the_verdict_goes_by_the_interval(made):
    learnt = made()
    figures = figures_of(learnt, OPTIONS)
    for low, high, helps in ((1.0, 3.0, True), (-3.0, -1.0, False), (-1.0, 3.0, None)):
        assert conclude(learnt, replace(figures, gain=replace(figures.gain, low=low, high=high))).helps is helps
    one_class = conclude(learnt, replace(figures, telling=False))
    assert one_class.helps is None
    assert "no interval" in one_class.headline


def test_where_nothing_is_wrong_or_nothing_right_words_say_so(made, tmp_path):
    learnt = made(noise=0.0, above=0.9)
    write_page(tmp_path / "right.html", learnt, OPTIONS, [])
    page = Page(tmp_path / "right.html")
    assert "risk" not in page.tables
    for said in ("there is no risk to plot", "No answer is wrong", "CDC is never wrong here", "there is no AUROC"):
        assert said in page.text
    assert "nan" not in page.text.lower()
    away = replace(learnt.scored.images, labels=(learnt.scored.images.labels + 1) % 5)
    write_page(tmp_path / "wrong.html", replace(learnt, scored=replace(learnt.scored, images=away)), OPTIONS, [])
    page = Page(tmp_path / "wrong.html")
    assert "CDC is never right here" in page.text
    assert "nan" not in page.text.lower()


def test_names_from_outside_are_text(made, tmp_path):
    hostile = '<script>alert("x")</script> $\\frac{{$ &amp; {}'
    learnt = made(name=hostile)
    environments = {hostile.format("e"): 100}
    learnt = replace(learnt, facts=learnt.facts | {"environments": environments, "skipped": ["a: <b>bad</b>"]})
    write_page(tmp_path / "page.html", learnt, OPTIONS, [ImageRecord(tmp_path / "a", "c", "n", "e")])
    page = Page(tmp_path / "page.html")
    assert "<script" not in page.source
    assert "<b>bad" not in page.source
    assert hostile.format(0) in page.text
    assert hostile.format("e") in page.text
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page.source)
    assert addresses
    assert all(address.startswith(("data:image/webp;base64,", "#")) for address in addresses)


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint):
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    return load_checkpoint(str(tiny_checkpoint))


def test_without_held_back_images_validation_is_shown_and_said(checkpoint, manifest, tmp_path):
    options = replace(OPTIONS, held=0.0, augmentations=(None, None))
    images = read_images(manifest)
    learnt = learn(checkpoint, images, options)
    assert (learnt.scored.held, learnt.facts["scores"]["on"]) == (False, "validation")
    write_page(tmp_path / "page.html", learnt, options, images)
    text = Page(tmp_path / "page.html").text
    assert "No images were held back" in text
    assert "none: the encoder's own embeddings" in text


def test_what_was_learnt_is_recalled_from_its_file(checkpoint, manifest, tiny_projection, tmp_path):
    images, options = read_images(manifest), replace(OPTIONS, target_risk=0.9, confidence=0.6)
    learnt = learn(checkpoint, images, options, tiny_projection, cache=tmp_path / "cache")
    again = recall(checkpoint, images, options, learnt.semantics, tiny_projection, cache=tmp_path / "cache")
    assert again.threshold == learnt.threshold
    for name, one in (("a", learnt), ("b", again)):
        write_page(tmp_path / name, one, options, images)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    scores = learnt.facts["scores"]
    rows = Page(tmp_path / "a").rows("scores")
    assert [row[2] for row in rows] == [f"{scores[side]['ece']:.3f}" for side in ("hand-written", "cdc")]
    with pytest.raises(SemanticsError, match="learnt from other images"):
        recall(checkpoint, images[1:], options, learnt.semantics, tiny_projection)
    other = Projection(tiny_projection.A_inv * 2, "icm", 3.0)
    with pytest.raises(SemanticsError, match="trained in the space"):
        recall(checkpoint, images, options, learnt.semantics, other)
    learnt.scored.images.used[figures_of(learnt, options).unsure[0].row].path.unlink()
    with pytest.raises(InputError):
        write_page(tmp_path / "c", learnt, options, images)


def test_the_page_lies_beside_the_other(tmp_path):
    assert page_beside(tmp_path / "a.b.html") == tmp_path / "a.b.cdc.html"


@pytest.fixture
def common(manifest, tiny_checkpoint, tmp_path):
    return ["--model", tiny_checkpoint, "--images", manifest, "--cache", tmp_path / "cache", "--quiet"]


def test_cdc_writes_its_page(run, common, tmp_path, monkeypatch):
    small = ["--templates-learned", "1", "--steps", "2", "-o", tmp_path / "cdc.safetensors"]
    code, out, err = run("cdc", *common, *small, "--report", tmp_path / "page.html")
    assert code == 0, err
    assert f"report     {tmp_path / 'page.html'}" in out
    page = Page(tmp_path / "page.html")
    facts = read_semantics(tmp_path / "cdc.safetensors").provenance["facts"]
    assert page.rows("scores")[1][1].split()[0] == f"{facts['scores']['cdc']['accuracy']:.1f}"
    code, out, _ = run("cdc", *common, *small, "--report", tmp_path / "page.html", "--json")
    assert json.loads(out)["report"] == str(tmp_path / "page.html")
    code, _, err = run("cdc", *common, *small, "--report", tmp_path)
    assert code == 2
    assert "is a directory" in err
    monkeypatch.setattr("invariclip.calibrate.report.rendering.find_spec", lambda name: None)
    code, _, err = run("cdc", *common, "--report", tmp_path / "other.html", "--model", "/nowhere")
    assert (code, err.count("\n")) == (MissingExtraError.exit_code, 1)
    assert "needs jinja2" in err


FITTED = ["--interventions", "none", "--estimator", "shrinkage", "--strength", "3"]


def test_calibrate_writes_the_templates_page_beside_its_own(run, common, tmp_path):
    options = [*common, *FITTED, "--cdc", tmp_path / "cdc.safetensors", "--report", tmp_path / "r.html"]
    code, out, err = run("calibrate", *options, "--json", "-o", tmp_path / "p.safetensors")
    assert code == 0, err
    answer = json.loads(out)
    assert (answer["report"], answer["cdc_report"]) == (str(tmp_path / "r.html"), str(tmp_path / "r.cdc.html"))
    assert answer["cdc_facts"]["sha256"] in Page(tmp_path / "r.cdc.html").text
    assert "shrinkage, λ = 3" in Page(tmp_path / "r.cdc.html").text
