"""Lists of sources: the example of the documentation runs, and a wrong entry is named in one line."""

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from invariclip.calibrate.data.sources.config import COMMON, KINDS, sources_of
from invariclip.calibrate.data.stream.collect import collect
from invariclip.errors import InputError, MissingExtraError

PAGE = (Path(__file__).parents[4] / "docs" / "sources.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture
def desk(tmp_path, reading):
    """A folder with the files that the example names."""
    rng = np.random.default_rng(0)
    for place in ("day/dog", "night/dog", "day/cat", "night/cat"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        for number in range(2):
            array = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(array).save(tmp_path / "photos" / place / f"{number}.png")
    (tmp_path / "pairs.csv").write_text("first,second\nphotos/day/dog/0.png,photos/night/dog/0.png\n")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"first": "a dog", "second": "a dog in the rain"}))
    (tmp_path / "shards").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "shards" / f"{number:03d}.tar", "w") as tar:
            for member, file in (("0.first.png", "day/cat/0.png"), ("0.second.png", "night/cat/0.png")):
                content = (tmp_path / "photos" / file).read_bytes()
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for name in ("clean", "changed"):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(10, 24)).astype(np.float32))
    (tmp_path / "sources.yaml").write_text(EXAMPLE)
    return tmp_path


def test_the_example_runs(desk, reading):
    sources = sources_of(desk / "sources.yaml")
    assert [source.name for source in sources] == [
        "photos", "pairs", "webdataset", "captions", "templates", "embeddings",
    ]  # fmt: skip
    assert [source.weight for source in sources] == [1, 2, 1, 0.5, 0.5, 1]
    state = collect(sources, reading.Rowwise())
    counts = state.counts()
    assert counts["photos"]["natural"] == 4
    assert counts["photos"]["interventions"] == 16
    assert counts["pairs"] == {"natural": 1, "points": 2}
    assert counts["webdataset"]["natural"] == 2
    assert (counts["captions"]["texts"], counts["templates"]["texts"]) == (1, 9)
    assert counts["embeddings"]["points"] == 10


def test_json_and_a_mapping_say_the_same(desk):
    content = yaml.safe_load(EXAMPLE)
    (desk / "sources.json").write_text(json.dumps(content))
    assert sources_of(desk / "sources.json") == sources_of(desk / "sources.yaml")
    entry = {"kind": "images", "path": str(desk / "photos")}
    (source,) = sources_of({"sources": [entry]})
    assert len(source.shards()) == 1


def test_every_kind_and_key_is_documented():
    documented = dict(re.findall(r"\n## `(\w+)`\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL))
    assert set(documented) == set(KINDS)
    for name, kind in KINDS.items():
        missing = [key for key in kind.keys if f"`{key}`" not in documented[name]]
        assert not missing, name
    assert all(f"`{key}`" in PAGE for key in COMMON)


def test_interventions_of_a_file(desk):
    (desk / "strengths.yaml").write_text("light-fog: {kind: fog, density: 0.5}\n")
    (desk / "s.yaml").write_text("sources: [{kind: images, path: photos, interventions: strengths.yaml, seed: 3}]")
    (source,) = sources_of(desk / "s.yaml")
    assert [kind.label for kind in source.changes.kinds] == ["light-fog"]
    assert (source.seed, source.changes.seed) == (3, 3)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("kind: image", r"source 1: no kind of source is called 'image'; nearest: images; available: images, "),
        ("path: a", "'kind' must be a text, it is missing"),
        ("{kind: pairs, paht: a}", "no key is called 'paht'; nearest: path; available: kind, name, weight, path, "),
        ("{kind: pairs}", "source 1: 'path' must be a text, it is missing"),
        ("{kind: pairs, path: 3}", "'path' must be a text, not 3"),
        ("{kind: pairs, path: a, weight: -1}", "'weight' must be a number above zero, not -1"),
        ("{kind: pairs, path: a, weight: .nan}", "'weight' must be a number above zero"),
        ("{kind: pairs, path: a, points: all}", "'points' must be one of both, first, none, not 'all'"),
        ("{kind: images, path: a, natural: 1}", "'natural' must be true or false, not 1"),
        ("{kind: images, path: a, draws: 0, interventions: all}", "source 1: draws must be one or more"),
        ("{kind: images, path: a, draws: 1.5}", "'draws' must be a whole number"),
        ("{kind: images, path: a, interventions: fogg}", "no intervention is called 'fogg'; nearest: fog"),
        ("{kind: images, path: a, interventions: [fog, fog]}", "interventions: entry 2: 'fog' stands there twice"),
        ("{kind: images, path: a, environments: []}", "'environments' must be a text or a list of texts"),
        ("{kind: webdataset, path: []}", "'path' must be a text or a list of texts"),
        ("{kind: webdataset}", "'path' must be a path or a list of paths, it is missing"),
        ("{kind: texts, classes: dog}", "'templates' or 'templates_file', one of the two"),
        ("{kind: texts, path: a, classes: dog}", "`path`, or classes and templates, not both"),
        ("{kind: texts, classes: dog, templates: 'a {}'}", "source 1: .*one template gives no pair"),
        ("{kind: pairs, path: a.csv, weight: 1" + "0" * 400 + "}", "'weight' must be a number above zero"),
        ("{kind: texts, classes_file: none.txt, templates: 'a {}'}", "none.txt: cannot be read"),
        ("just a text", "source 1: must be a mapping with a `kind`"),
    ],
)
def test_a_wrong_entry_is_told_in_one_line(tmp_path, entry, said):
    (tmp_path / "s.yaml").write_text(f"sources:\n  - {entry}\n")
    with pytest.raises(InputError, match=said) as caught:
        sources_of(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "one key `sources`"),
        ("sources: []", "lists no source; available kinds: images, "),
        ("[{kind: pairs}]", "one key `sources`"),
        ("sources: [{kind: pairs, path: a}, {kind: pairs, path: b}]", "source 2: another one is called 'pairs'"),
        ("sources: {", "not readable"),
        ("!!python/object/apply:os.getcwd []", "not readable"),
    ],
)
def test_a_wrong_file(tmp_path, content, said):
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(InputError, match=said):
        sources_of(tmp_path / "s.yaml")


def test_yaml_needs_its_package(tmp_path, monkeypatch):
    (tmp_path / "s.yaml").write_text(EXAMPLE)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtraError, match=r'sources in YAML need the package pyyaml: pip install "invariclip\['):
        sources_of(tmp_path / "s.yaml")


def test_domainbed(desk, reading):
    classes = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    for turns, environment in enumerate(("art_painting", "cartoon", "photo", "sketch")):
        for name in classes:
            folder = desk / "data" / "PACS" / environment / name
            folder.mkdir(parents=True)
            Image.open(desk / "photos" / "day" / "dog" / "0.png").rotate(90 * turns).save(folder / "1.png")
    entry = {"kind": "domainbed", "set": "pacs", "path": str(desk / "data"), "environments": ["photo", "sketch"]}
    (source,) = sources_of({"sources": [entry]})
    read = reading.read_all(source, reading.Rowwise())
    assert (read.points.points, read.parts["interventions"].pairs) == (14, 28)
    assert "natural" not in read.parts
    (source,) = sources_of({"sources": [{**entry, "natural": True, "interventions": "none"}]})
    assert reading.read_all(source, reading.Rowwise()).parts["natural"].pairs == 7
    with pytest.raises(InputError, match="no set is called 'pax'"):
        sources_of({"sources": [{**entry, "set": "pax"}]})[0].shards()


@pytest.mark.parametrize("kind", ["kind: images", "kind: domainbed, set: PACS", "kind: webdataset"])
def test_a_path_that_no_file_can_have_is_told(tmp_path, kind):
    (tmp_path / "s.yaml").write_text(f"sources: [{{{kind}, path: {'x' * 300}}}]")
    with pytest.raises(InputError, match=r"cannot be read|no such file"):
        sources_of(tmp_path / "s.yaml")[0].shards()


def test_classes_of_a_file_are_read_as_any_list_is(tmp_path):
    (tmp_path / "names.txt").write_bytes("cat\ndog\n".encode("utf-16-le"))
    (tmp_path / "s.yaml").write_text("sources: [{kind: texts, classes_file: names.txt, templates: ['a {}', 'the {}']}]")
    with pytest.raises(InputError, match=r"line 1 holds the character U\+0000"):
        sources_of(tmp_path / "s.yaml")
