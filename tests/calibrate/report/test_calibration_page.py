"""The page of a calibration: its figures are the calibration's, and it needs no other file."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from invariclip.calibrate.data.images import ImageRecord, SkippedImageWarning, read_images
from invariclip.calibrate.fit import FitOptions, calibrate
from invariclip.calibrate.report import rendering
from invariclip.calibrate.report.calibration_page import write_page
from invariclip.calibrate.report.evidence import gather
from invariclip.calibrate.report.rendering import require_page_packages, skipped_by_reason
from invariclip.calibrate.report.summary import projection_json
from invariclip.calibrate.report.verdict import signed
from invariclip.errors import MissingExtraError

SOFT = FitOptions(interventions=("invert", "equalize"), estimator="shrinkage", strength=3.0)
VOID = {"img", "meta", "br", "link"}


class Page(HTMLParser):
    """Text, tables and addresses of a page; refuses tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.source, self.open, self.images, self.addresses, self.tables, self.words = text, [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.addresses += [given[name] for name in ("src", "href", "xlink:href", "data", "action") if name in given]
        if tag == "img":
            self.images.append(given)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def rows(self, first):
        """The rows of the table whose head begins so, as lists of cells."""
        table = next(table for table in self.tables if table[0][0] == first)
        return [[" ".join(cell.split()) for cell in row] for row in table]


def report(tmp_path, encoder, images, options):
    result = calibrate(encoder, images, options, cache=tmp_path / "cache")
    evidence = gather(encoder, images, options, result, cache=tmp_path / "cache")
    write_page(tmp_path / "report.html", result, options, evidence)
    return result, evidence, Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def self_contained(page):
    assert page.images
    for image in page.images:
        assert image["src"].startswith("data:image/webp;base64,")
        assert image["alt"]
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    # The namespaces of SVG are names, not addresses that a browser opens.
    assert set(re.findall(r"https?://[^\"' )<]+", page.source)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd",
    }
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page.source)
    assert "<script" not in page.source
    assert len(page.source) < 1_400_000


@pytest.fixture
def images(world, tmp_path):
    return read_images(world.draw_images(tmp_path / "set", concepts=12))


@pytest.fixture
def options():
    return FitOptions(interventions=("invert", "equalize", "colour-jitter"), objective="both", seed=3)


def test_the_page_holds_the_figures_of_the_json(world, tmp_path, images, options):
    encoder = world.LinearEncoder()
    result, evidence, page = report(tmp_path, encoder, images, options)
    self_contained(page)
    answer = json.loads(json.dumps(projection_json(result)))
    selection = answer["selection"]
    assert answer["estimator"] != "identity"
    chosen = next(one for one in selection["curve"] if one["estimator"] == answer["estimator"] and one["behind"] == 0)
    none = selection["curve"][0]

    gain = chosen["gain"]
    words = f"{signed(gain['value'])} points (95 % interval {signed(gain['low'])} … {signed(gain['high'])})"
    assert f"{selection['chosen']} was chosen and gains {words}" in page.text

    rows = page.rows("left out")
    assert [row[0] for row in rows[1:]] == [*sorted(name for name in none["accuracy"] if name != "mean"), "mean"]
    for name, before, after, points in rows[1:]:
        old, new = none["accuracy"][name], chosen["accuracy"][name]
        assert before == f"{old['value']:.1f} {old['low']:.1f} … {old['high']:.1f}"
        assert after == f"{new['value']:.1f} {new['low']:.1f} … {new['high']:.1f}"
        assert abs(float(points.replace("−", "-")) - (new["value"] - old["value"])) < 0.051

    rows = page.rows("candidate")[1:]
    assert len(rows) == len(selection["curve"])
    for row, one in zip(rows, selection["curve"], strict=True):
        assert abs(float(row[1]) - one["accuracy"]["mean"]["value"]) < 0.0051
        assert abs(float(row[2].split()[0].replace("−", "-")) - one["gain"]["value"]) < 0.0051
    assert [row[0] for row in rows if row[0].endswith("(chosen)")] == [f"{selection['chosen']} (chosen)"]
    assert "no projection" in rows[0][0]
    for digest in (answer["sha256"], answer["facts"]["images_sha256"], encoder.sha256):
        assert digest in page.text
    assert evidence.retrieval is not None
    assert evidence.retrieval.texts is not None
    assert page.source.count("<svg ") == page.source.count('<svg role="img" aria-label="')
    assert page.source.count(">chosen</text>") >= 1


def test_the_same_calibration_gives_the_same_page_whatever_the_order(world, tmp_path, images, options):
    options = replace(options, interventions=options.interventions[:2], estimator="shrinkage", strength=3.0)
    for name, given in (("a", images), ("b", images[::-1]), ("c", images)):
        (tmp_path / name).mkdir()
        report(tmp_path / name, world.LinearEncoder(), given, options)
    pages = [(tmp_path / name / "report.html").read_text(encoding="utf-8") for name in "abc"]
    assert pages[0] == pages[2]
    shown = [[image["src"] for image in Page(page).images] for page in pages]
    assert shown[0] == shown[1]


def test_where_nothing_helps_the_page_says_so(world, tmp_path, images):
    # a single direction of 24 loses for sure
    options = FitOptions(interventions=("invert", "equalize"), estimator="icm", rank=1)
    result, _, page = report(tmp_path, world.LinearEncoder(), images, options)
    assert result.projection.estimator == "identity"
    self_contained(page)
    assert "Nothing is clearly better than no projection" in page.text
    assert "None of 6 projections gained" in page.text
    assert "became right" not in page.text
    assert page.rows("left out")[0] == ["left out", "right %"]
    assert ">chosen</text>" not in page.source


def test_a_named_candidate_that_loses_is_said_to_lose(world, tmp_path, images):
    options = FitOptions(interventions=("invert", "equalize"), estimator="icm", rank=1, strength=1.0)
    result, _, page = report(tmp_path, world.LinearEncoder(), images, options)
    assert result.selection is not None
    assert result.selection.result().gain.high < 0
    assert "icm d=1 λ=1 was asked for and loses" in page.text
    assert 'class="verdict bad"' in page.source


def test_nothing_to_leave_out(world, tmp_path, images):
    few = [p for p in images if p.concept in ("c1", "c2", "c3") and p.environment != "red"]
    result, evidence, page = report(
        tmp_path, world.LinearEncoder(), few, FitOptions(estimator="shrinkage", strength=1.0)
    )
    assert result.selection is None
    assert evidence.retrieval is not None
    assert not evidence.retrieval.left_out
    assert not evidence.concepts_left_out
    self_contained(page)
    assert "whether it helps is not known" in page.text
    assert "the projection was fitted on these very images" in page.text


def test_one_environment(world, tmp_path, images):
    red = [image for image in images if image.environment == "red"]
    options = FitOptions(interventions=("invert", "equalize", "posterize"), draws=3, estimator="shrinkage")
    _, evidence, page = report(tmp_path, world.LinearEncoder(), red, options)
    self_contained(page)
    assert evidence.leakage == ()
    assert "no figure of domain leakage" in page.text
    assert [row[0] for row in page.rows("left out")[1:]] == ["equalize", "invert", "posterize", "mean"]
    # three changed versions of each of twelve images
    assert page.rows("pairs")[1:][0][:2] == ["invert", "12"]


def test_an_encoder_without_texts(world, tmp_path, images):
    class Blind(world.LinearEncoder):
        encode_texts = property(lambda self: self.missing)

    _, evidence, page = report(tmp_path, Blind(), images, SOFT)
    assert evidence.retrieval is not None
    assert evidence.retrieval.texts is None
    self_contained(page)
    assert "Nearest image" in page.text
    assert "Nearest class text" not in page.text


def test_names_from_outside_are_text(world, tmp_path, images):
    hostile = '<script>alert("x")</script> $\\frac{$ &amp;'
    named = [
        ImageRecord(p.path, hostile + p.concept, hostile + p.name, {"red": hostile}.get(p.environment, p.environment))
        for p in images
    ]
    _, _, page = report(tmp_path, world.LinearEncoder(), named, SOFT)
    self_contained(page)
    assert hostile in " ".join(cell for row in page.rows("left out") for cell in row)
    assert any(hostile in image["alt"] for image in page.images)


def test_skipped_files_are_counted_by_reason(world, tmp_path, images):
    images[4].path.write_text("no image")
    images[9].path.write_text("no image")
    images[7].path.unlink()
    with pytest.warns(SkippedImageWarning):
        result, evidence, page = report(tmp_path, world.LinearEncoder(), images, SOFT)
    assert len(result.facts["skipped"]) == 3
    reasons = skipped_by_reason(result.facts["skipped"], evidence.paths)
    assert sorted(count for _, count, _ in reasons) == [1, 2]
    for reason, count, example in reasons:
        assert str(tmp_path) not in reason
        assert f"{count} × {reason} (such as {example})" in page.text
    self_contained(page)


def test_a_path_may_hold_colons():
    skipped = ["a: b/x.png: not an image", "c.png: not an image", "of unknown form"]
    found = skipped_by_reason(skipped, frozenset({"a: b/x.png", "c.png"}))
    assert found == [("not an image", 2, "x.png"), ("of unknown form", 1, "")]


def test_small_images_are_small_and_true():
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    assert len(rendering.data_uri(noise)) * 3 / 4 < rendering.MAX_BYTES + 100


def test_missing_packages_are_named_before_the_work(monkeypatch):
    monkeypatch.setattr(
        "invariclip.calibrate.report.rendering.find_spec", lambda name: None if name == "jinja2" else name
    )
    with pytest.raises(MissingExtraError, match=r'`--report` needs jinja2: pip install "invariclip\[calibrate\]"'):
        require_page_packages("--report")
