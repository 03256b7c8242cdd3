"""The bench of unseen environments: nothing of the test environment gets in, runs resume, the page says the figures."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from invariclip.artifact.projection import identity
from invariclip.bench.studies.domains import __main__ as command
from invariclip.bench.studies.domains import trial as trial_module
from invariclip.bench.studies.domains.report import summarise
from invariclip.bench.studies.domains.trial import (
    MAIN,
    DomainWorld,
    TrialSettings,
    evaluate,
    in_words,
    run_trial,
)
from invariclip.bench.studies.trials import unpack
from invariclip.calibrate.data.domainbed import LAYOUTS, read_layout
from invariclip.calibrate.data.pairs import UNCHANGED, EmbeddingTable
from invariclip.calibrate.evaluation.text_baselines import Projectors, StylePrompts
from invariclip.calibrate.projection.candidates import ProjectionCandidate
from invariclip.calibrate.projection.classifiers import unit
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.preprocessing.pixels import PixelSpec

SIZE, WIDTH = 8, 16
SPEC = PixelSpec((SIZE, SIZE), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PACS = LAYOUTS["PACS"]


@dataclass
class LinearEncoder:
    """A fixed random linear map of the pixels."""

    sha256: str = "0" * 64
    pixels: PixelSpec = SPEC
    embed_dim: int = WIDTH
    batches: list[int] = field(default_factory=list)

    def encode_images(self, batch):
        self.batches.append(len(batch))
        matrix = np.random.default_rng(0).normal(size=(SIZE * SIZE * 3, WIDTH))
        return (batch.reshape(len(batch), -1) / 255 @ matrix).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def few_candidates():
    """One of every estimator, so that a trial takes a second."""
    few = {
        "auto": [
            ProjectionCandidate("identity"),
            ProjectionCandidate("shrinkage", None, 1.0),
            ProjectionCandidate("generalised", 8),
            ProjectionCandidate("icm", 8, 1.0),
        ],
        "shrinkage": [ProjectionCandidate("identity"), ProjectionCandidate("shrinkage", None, 1.0)],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_module, "grid", lambda _, *, estimator: few[estimator])
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six images a class and environment: a pattern for the class, a tint for the environment, noise."""
    root = tmp_path_factory.mktemp("pacs")
    for place, environment in enumerate(PACS.environments):
        tint = np.random.default_rng(100 + place).uniform(0.3, 1, 3)
        for number, name in enumerate(PACS.classes):
            pattern = np.random.default_rng(number).random((SIZE, SIZE, 1))
            folder = root / environment / name
            folder.mkdir(parents=True)
            for index in range(6):
                noise = np.random.default_rng([place, number, index]).normal(0, 0.25, (SIZE, SIZE, 1))
                levels = np.clip((pattern + noise) * tint, 0, 1) * 255
                Image.fromarray(levels.astype(np.uint8)).save(folder / f"pic_{index}.png")
    return root


@pytest.fixture(scope="module")
def trial(data, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    images = read_layout(PACS, data)
    encoder = LinearEncoder()
    result = run_trial(encoder, images, "sketch", 0, TrialSettings(), folder=work / "t", cache=work / "e")
    return encoder, images, work, result


def table(environments, *, shift=0.0, kinds=1, seed=0):
    rng = np.random.default_rng([seed, *environments])
    classes, each = 4, 6
    labels = np.tile(np.repeat(np.arange(classes), each), len(environments))
    codes = np.repeat(np.arange(len(environments)), classes * each)
    centres = np.random.default_rng(7).normal(size=(classes, WIDTH))
    offsets = np.random.default_rng(8).normal(size=(9, WIDTH))
    plain = (
        centres[labels] + shift * offsets[np.asarray(environments)[codes]] + 0.4 * rng.normal(size=(len(labels), WIDTH))
    )
    moved = [plain + 0.3 * rng.normal(size=plain.shape) for _ in range(kinds)]
    count = len(labels)
    repeat = np.tile(np.arange(count), kinds + 1)
    return EmbeddingTable(
        vectors=unit(np.concatenate([plain, *moved])),
        concepts=labels[repeat],
        labels=labels[repeat],
        environments=codes[repeat],
        kinds=np.repeat(np.arange(UNCHANGED, kinds), count),
        origins=repeat,
        concept_names=tuple("abcd"),
        label_names=tuple("abcd"),
        environment_names=tuple(f"e{e}" for e in environments),
        kind_names=tuple(f"k{k}" for k in range(kinds)),
    )


def test_what_is_fitted_and_chosen_does_not_depend_on_the_test_environment():
    seen = table([0, 1, 2], kinds=2)
    unseen = [table([3], shift=s, kinds=2, seed=s) for s in (0, 3)]
    results = [evaluate(DomainWorld(seen, own.where(own.unchanged), None, 0, moved=own)) for own in unseen]
    choices = [{name: row["chosen"] for name, row in result["rows"].items()} for result in results]
    assert choices[0] == choices[1]
    assert results[0]["selections"] == results[1]["selections"]
    answers = [result["rows"]["none"]["answers"]["probe"] for result in results]
    assert answers[0] != answers[1]


def test_a_trial_is_kept_and_taken_up_again(trial):
    encoder, images, work, result = trial
    count = len(encoder.batches)
    again = run_trial(encoder, images, "sketch", 0, TrialSettings(), folder=work / "t", cache=work / "e")
    assert again == json.loads(json.dumps(result))
    assert len(encoder.batches) == count
    other = replace(TrialSettings(), draws=2)
    run_trial(encoder, images, "sketch", 0, other, folder=work / "t", cache=work / "e")
    assert len(list((work / "t").glob("*.json"))) == 2


def test_a_trial_says_everything_that_the_table_needs(trial):
    result = trial[-1]
    assert len(result["labels"]) == 42
    assert len(result["home"]["labels"]) == 3 * 7 * 3  # half of six images, in three environments
    assert set(result["home"]["rows"]) == {"none", MAIN, "auto, for prototypes"}
    baselines = {"centring", "whitening", "published", "leace", "splince"}
    assert {"none", MAIN, "icm", "generalised", "shrinkage", *baselines} <= result["rows"].keys()
    assert result["rows"].keys().isdisjoint({"gr-clip", "isoclip", "text-styles", "prism-mini"})  # no text tower
    assert {"the seven", "style exchange", "same class", "all three"} == result["sources"].keys()
    assert len(result["open"]["base"]) == 4
    assert result["rows"]["none"]["gap"] > 0
    assert result["rows"]["none"]["chance"] == 25
    accuracy = unpack(result["rows"]["none"]["answers"]["probe"], 42).mean()
    assert accuracy > 3 / 7
    assert set(result["rows"][MAIN]["answers"]) == {"probe", "probe, own C", "prototypes"}


def test_an_encoder_with_a_text_tower_is_scored_and_selected_by_name():
    seen, unseen = table([0, 1, 2], kinds=2), table([3], kinds=2)
    bank = unit(np.stack([seen.vectors[seen.labels == label].mean(axis=0) for label in range(4)]))
    result = evaluate(DomainWorld(seen, unseen, bank, 0))
    assert result["selections"]["zero-shot"]["objective"] == "zero-shot"
    right = unpack(result["rows"]["none"]["answers"]["zero-shot"], 24)
    new = unseen.where(unseen.unchanged)
    assert np.array_equal(right, np.argmax(new.vectors @ bank.T, axis=1) == new.labels)
    assert "zero-shot" in result["open"]["rows"]["auto"]["answers"]
    assert "isoclip" not in result["rows"]
    means = new.vectors - seen.vectors[seen.unchanged].mean(axis=0), bank - bank.mean(axis=0)
    centred = unpack(result["rows"]["gr-clip"]["answers"]["zero-shot"], 24)
    assert np.array_equal(centred, np.argmax(means[0] @ unit(means[1]).T, axis=1) == new.labels)


def test_text_towers_and_last_layers_give_more_baselines():
    rng = np.random.default_rng(0)
    seen, unseen = table([0, 1, 2], kinds=2), table([3], kinds=2)
    bank = unit(np.stack([seen.vectors[seen.labels == label].mean(axis=0) for label in range(4)]))
    layers = Projectors(rng.normal(size=(WIDTH, 20)), rng.normal(size=(WIDTH, 12)))
    styles = StylePrompts(unit(rng.normal(size=(3, WIDTH))), unit(rng.normal(size=(3, 4, WIDTH))))
    result = evaluate(DomainWorld(seen, unseen, bank, 0, layers, styles))
    for name in ("gr-clip", "isoclip", "text-styles", "text-styles, equal rank", "prism-mini"):
        assert set(result["rows"][name]["answers"]) == {"probe", "prototypes", "zero-shot"}


def test_a_checkpoint_is_asked_for_its_layers_and_its_words(data, tmp_path, tiny_checkpoint):
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    images = read_layout(PACS, data)
    result = run_trial(checkpoint, images, "sketch", 0, TrialSettings(), folder=tmp_path / "t", cache=tmp_path / "e")
    assert {"isoclip", "text-styles", "prism-mini"} <= result["rows"].keys()
    assert trial_module._layers(LinearEncoder()) is None


def test_what_is_fitted_on_is_half_of_a_cell_at_most_and_the_rest_is_asked_about(data):
    images = read_layout(PACS, data)
    known, asked = trial_module.divided(images, 2)
    assert (len(known), len(asked)) == (4 * 7 * 2, 4 * 7 * 4)
    known, asked = trial_module.divided(images[::-1], 70)
    assert len(known) == len(asked) == 4 * 7 * 3
    assert known == sorted(known, key=images[::-1].index)
    assert set(trial_module.divided(images, 70)[0]) == set(known)  # the order says nothing


def test_at_home_an_environment_is_asked_about_by_itself():
    seen, home = table([0, 1, 2]), table([0, 1, 2], seed=1)
    plain = home.where(home.unchanged)
    world = DomainWorld(seen, table([3]), None, 0, home=plain)
    found = trial_module._home(world, {"none": identity(WIDTH)})
    right = unpack(found["rows"]["none"]["answers"]["prototypes"], len(plain.labels))
    for code in range(3):
        own = seen.where(seen.unchanged & (seen.environments == code))
        means = unit(np.stack([own.vectors[own.labels == label].mean(axis=0) for label in range(4)]))
        rows = plain.environments == code
        assert np.array_equal(right[rows], np.argmax(plain.vectors[rows] @ means.T, axis=1) == plain.labels[rows])
    assert found["places"] == ["e0"] * 24 + ["e1"] * 24 + ["e2"] * 24


def test_environments_in_words():
    assert [in_words(name) for name in ("art_painting", "Real World", "")] == ["an art painting", "a real world", "a "]


def packed(bits):
    return np.packbits(np.asarray(bits, dtype=bool)).tobytes().hex()


def one(test, seed, none, auto, base=("a",)):
    def row(bits):
        return {"chosen": "x", "answers": {"probe": packed(bits)}, "leakage": 40.0, "chance": 25.0, "gap": 0.5}

    rows = {"none": row(none), MAIN: row(auto)}
    return {
        "test": test,
        "seed": seed,
        "labels": ["a", "b", "a", "b"],
        "rows": rows,
        "sources": {},
        "open": {"base": list(base), "rows": {"none": rows["none"], "auto": rows[MAIN]}},
        "home": {"places": ["h", "h"], "labels": ["a", "b"],
                 "rows": {"none": {"answers": {"probe": packed([1, 1])}},
                          MAIN: {"answers": {"probe": packed([seed, 1])}}}},
    }  # fmt: skip


def test_scores_are_means_over_seeds_of_the_same_images():
    trials = [
        one("p", 0, [1, 0, 0, 0], [1, 1, 1, 1]),
        one("q", 0, [1, 1, 0, 0], [1, 1, 0, 0]),
        one("p", 1, [1, 0, 0, 0], [1, 1, 0, 0]),
        one("q", 1, [1, 1, 0, 0], [1, 1, 1, 0]),
    ]
    found = summarise(trials)
    none, auto = found["rows"]["none"]["probe"], found["rows"][MAIN]["probe"]
    assert [none[k]["value"] for k in ("p", "q", "mean", "worst")] == [25, 50, 37.5, 25]
    assert [auto[k]["value"] for k in ("p", "q", "mean", "worst")] == [75, 62.5, 68.75, 62.5]
    assert auto["difference"]["value"] == 31.25
    assert none["to_own"]["value"] == -31.25
    # one image right in half of the trials, the other in all
    assert found["home"][MAIN]["probe"]["difference"] == {"value": -25.0, "low": -25.0, "high": -25.0}
    assert auto["worst_difference"]["value"] == 37.5
    assert auto["by_seed"] == [37.5, 25.0]
    assert none["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    # of the images of base classes, the first and the third
    assert found["base"]["auto"]["probe"]["p"]["value"] == 75
    assert found["open"]["auto"]["probe"]["p"]["value"] == 75
    assert found["base"]["none"]["probe"]["mean"]["value"] == 50
    assert found["open"]["none"]["probe"]["mean"]["value"] == 25


def test_the_command_writes_the_page_with_the_figures(data, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_encoder", lambda *_, **__: LinearEncoder())
    out = tmp_path / "domains.md"
    arguments = [
        "pacs",
        "--data",
        str(data),
        "--seeds",
        "1",
        "--work",
        str(tmp_path / "w"),
        "--features",
        str(tmp_path / "f"),
        "-o",
        str(out),
        "--quiet",
    ]
    done = CliRunner().invoke(command.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    result = json.loads(out.with_suffix(".json").read_text())
    gain = result["rows"][MAIN]["probe"]["difference"]
    page = out.read_text()
    assert f"**{gain['value']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}] points**" in page
    assert "What it costs where nothing has shifted" in page
    assert all(test in page for test in PACS.environments)
    assert out.with_suffix(".svg").read_text().rstrip().endswith("</svg>")
    # the same run again writes the same bytes
    CliRunner().invoke(command.main, arguments, catch_exceptions=False)
    assert out.read_text() == page
