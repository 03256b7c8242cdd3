"""The table: one trial of a small world, trials that resume, seeds put together, and the page."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from invariclip.artifact.projection import identity
from invariclip.bench.studies import trials as kept
from invariclip.bench.studies.encoders import Quick, TrunkEncoder
from invariclip.bench.studies.stylebench.report import (
    above_auto,
    better,
    elsewhere_scores,
    intervals,
    plot,
    render,
    render_transfer,
    summarise,
)
from invariclip.bench.studies.stylebench.sources import HELD_OUT_STYLES, TRAINING_STYLES
from invariclip.bench.studies.stylebench.trial import (
    EVERYTHING,
    SEVEN,
    Elsewhere,
    StyleWorld,
    _baselines,
    answers,
    elsewhere_answers,
    embed_elsewhere,
    embed_world,
    group_answers,
    home_answers,
    pairs,
    rows,
    run_trial,
    tried,
)
from invariclip.bench.studies.trials import Stratified, bound_blas, kept_selection, unpack
from invariclip.calibrate.data.images import ImageRecord
from invariclip.calibrate.data.pairs import UNCHANGED, EmbeddingTable
from invariclip.calibrate.evaluation.baselines import Baseline, PerModality, none
from invariclip.calibrate.evaluation.text_baselines import Projectors, StylePrompts
from invariclip.calibrate.projection.bootstrap import Bootstrap
from invariclip.calibrate.projection.candidates import ProjectionCandidate
from invariclip.calibrate.projection.classifiers import unit
from invariclip.errors import CheckpointError, MissingExtraError
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.libraries import declare_missing_ops
from invariclip.preprocessing.interventions import PAPER
from invariclip.preprocessing.pixels import pixels

if TYPE_CHECKING:
    from pathlib import Path

CONCEPTS, WIDTH, SIGNAL = 24, 16, 8
NAMES = tuple(f"c{code:02d}" for code in range(CONCEPTS))
STYLES = (*TRAINING_STYLES, *HELD_OUT_STYLES)


def table_of(styles: tuple[str, ...], concepts: int, *, changed: bool, seed: int) -> EmbeddingTable:
    """Concepts in half of the dimensions, what styles and changes do in the other half, and louder."""
    rng = np.random.default_rng(seed)
    content = np.random.default_rng(7).normal(size=(CONCEPTS, SIGNAL))
    rows = [(concept, style) for style in range(len(styles)) for concept in range(concepts)]
    origins = list(range(len(rows))) * (2 if changed else 1)
    vectors, kinds = [], []
    for place, origin in enumerate(origins):
        own = np.random.default_rng([9, STYLES.index(styles[rows[origin][1]]), rows[origin][0]])
        noise = (own if place < len(rows) else rng).normal(size=WIDTH - SIGNAL)
        vectors.append(np.concatenate([content[rows[origin][0]], 2 * noise]))
        kinds.append(UNCHANGED if place < len(rows) else int(rng.integers(len(PAPER))))
    names = NAMES[:concepts]
    codes = np.asarray([rows[origin][0] for origin in origins])
    order = sorted(styles)
    return EmbeddingTable(
        vectors=unit(np.asarray(vectors)),
        concepts=codes,
        labels=codes,
        environments=np.asarray([order.index(styles[rows[origin][1]]) for origin in origins]),
        kinds=np.asarray(kinds),
        origins=np.asarray(origins),
        concept_names=names,
        label_names=names,
        environment_names=tuple(order),
        kind_names=PAPER,
    )


def world_of(seed: int) -> StyleWorld:
    train = table_of(TRAINING_STYLES, 20, changed=True, seed=seed)
    rng = np.random.default_rng(7)
    words = np.concatenate(
        [rng.normal(size=(CONCEPTS, SIGNAL)), 2 * rng.normal(size=(CONCEPTS, WIDTH - SIGNAL))], axis=1
    )
    bank = unit(words)
    shown = words[None, :20] + np.eye(WIDTH)[SIGNAL : SIGNAL + 4, None]  # phrases differ along style's own dimensions
    table = table_of(STYLES, CONCEPTS, changed=False, seed=0)
    return StyleWorld(
        table=table,
        bank=bank,
        train={SEVEN: train, EVERYTHING: train},
        train_bank=bank[:20],
        learnt=frozenset(NAMES[:12]),
        groups=np.arange(CONCEPTS) % 3,
        seed=seed,
        layers=Projectors(rng.normal(size=(WIDTH, 20)), rng.normal(size=(WIDTH, 18))),
        styles=StylePrompts(unit(rng.normal(size=(4, WIDTH))), unit(shown)),
        elsewhere=Elsewhere(table_of(STYLES[-2:], CONCEPTS, changed=False, seed=0), bank),
    )


@pytest.fixture
def small(tmp_path: Path) -> Any:
    """A tiny checkpoint shaped like the reference: a convolutional trunk with a linear head and a bias."""
    declare_missing_ops()
    import open_clip

    config: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 64, "timm_model_name": "resnet10t", "timm_model_pretrained": False, "timm_pool": "avg",
            "timm_proj": "linear", "timm_proj_bias": True,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    folder = tmp_path / "small"
    folder.mkdir()
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    written = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(**config)
    torch.nn.init.normal_(model.visual.head.proj.bias, std=0.1)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return load_checkpoint(str(folder))


@pytest.fixture(scope="module")
def trials() -> dict[str, list[dict[str, Any]]]:
    return {
        "prototypes": [rows(world_of(seed), "prototypes") for seed in (0, 1)],
        "zero-shot": [rows(world_of(0), "zero-shot")],
    }


def test_every_row_is_there_and_what_styles_change_is_removed(trials: dict[str, list[dict[str, Any]]]):
    for results in trials.values():
        world = world_of(0)
        count = int(world.queries.sum())
        share = {name: unpack(row["answers"], count).mean() for name, row in results[0]["rows"].items()}
        assert list(share) == [
            "none", "centring", "whitening", "lda", "pca", "published", "leace", "leace, shrunk", "splince", "gr-clip",
            "isoclip", "text-styles", "text-styles, equal rank", "prism-mini", "icm", "generalised", "shrinkage",
            "auto",
        ]  # fmt: skip
        assert share["auto"] > share["none"] + 0.1
        assert share["published"] < share["none"]


def test_what_is_tried_is_calibrates_grid_with_less_of_what_is_dear():
    by_images, by_name = tried(64, "prototypes"), tried(64, "zero-shot")
    assert by_images[0] == ProjectionCandidate("identity")
    assert {c.strength for c in by_images if c.estimator == "icm"} == {1.0, 10.0}
    assert not any(c.captions for c in by_images)
    assert {c.estimator for c in by_name if c.captions} == {"shrinkage"}
    assert len(by_name) == len(set(by_name))


def test_a_selection_is_kept_by_what_goes_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world, candidates = world_of(0), [ProjectionCandidate("identity"), ProjectionCandidate("shrinkage", None, 3.0)]
    train = world.train[SEVEN]
    first = kept_selection(tmp_path, train, candidates, objective="prototypes", bank=world.train_bank)
    assert first.chosen == candidates[1]
    assert kept_selection(None, train, candidates, objective="prototypes") == first
    monkeypatch.setattr(kept, "select", lambda *_, **__: pytest.fail("chosen anew"))
    # texts are not looked at, so others change nothing
    assert kept_selection(tmp_path, train, candidates, objective="prototypes", bank=-world.train_bank) == first
    with pytest.raises(pytest.fail.Exception):
        kept_selection(tmp_path, train, candidates, objective="zero-shot", bank=world.train_bank)
    with pytest.raises(pytest.fail.Exception):
        kept_selection(tmp_path, train, candidates, objective="prototypes", seed=1)


def test_answers_are_the_nearest_prototype_and_the_nearest_name():
    world = world_of(0)
    table, plain = world.table, identity(WIDTH)
    queries = table.vectors[world.queries]
    support = world.rows(TRAINING_STYLES)
    means = np.stack([table.vectors[support & (table.labels == code)].mean(axis=0) for code in range(CONCEPTS)])
    for way, bank in (("prototypes", means), ("zero-shot", world.bank)):
        nearest = (queries @ unit(bank).T).argmax(axis=1)
        assert (answers(world, plain, way) == (nearest == table.labels[world.queries])).all()  # type: ignore[arg-type]


def test_names_and_images_may_go_through_maps_of_their_own():
    world = world_of(0)
    table, shift = world.table, np.random.default_rng(0).normal(size=WIDTH)
    images, texts = none(WIDTH), Baseline("x", shift, np.eye(WIDTH))
    what = PerModality(images, texts)
    nearest = (table.vectors[world.queries] @ unit(world.bank - shift).T).argmax(axis=1)
    assert (answers(world, what, "zero-shot") == (nearest == table.labels[world.queries])).all()
    assert (answers(world, what, "prototypes") == answers(world, images, "prototypes")).all()


def test_names_of_the_own_group_are_told_apart_alone():
    world, plain = world_of(0), identity(WIDTH)
    table, right = world.table, group_answers(world, plain)
    for place, row in enumerate(np.flatnonzero(world.queries)):
        own = np.flatnonzero(world.groups == world.groups[table.labels[row]])
        nearest = own[(table.vectors[row] @ world.bank[own].T).argmax()]
        assert right[place] == (nearest == table.labels[row])
    assert right.mean() >= answers(world, plain, "zero-shot").mean()


def test_at_home_an_image_is_no_part_of_its_prototype_and_nothing_asked_about_was_fitted():
    world, plain = world_of(0), identity(WIDTH)
    table = world.table
    asked = np.flatnonzero(world.home)
    assert {table.concept_names[code] for code in table.concepts[asked]} == set(NAMES[20:])
    assert {table.environment_names[code] for code in table.environments[asked]} == set(TRAINING_STYLES)
    support = world.rows(TRAINING_STYLES)
    for place, row in enumerate(asked):
        others = support & (np.arange(len(support)) != row)
        means = np.stack([table.vectors[others & (table.labels == code)].sum(axis=0) for code in range(CONCEPTS)])
        nearest = (unit(means) @ table.vectors[row]).argmax()
        assert home_answers(world, plain, "prototypes")[place] == (nearest == table.labels[row])
    by_name = 20 + (table.vectors[asked] @ world.bank[20:].T).argmax(axis=1) == table.labels[asked]
    assert (home_answers(world, plain, "zero-shot") == by_name).all()


def test_blas_is_bound_and_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    bound_blas(2)
    import threadpoolctl

    counts = [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    assert max(counts) <= 2
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    with pytest.raises(MissingExtraError, match="scikit-learn"):
        bound_blas()


def test_images_are_resampled_within_environment_and_class():
    right = np.asarray([1, 1, 0, 0, 1, 0], dtype=bool)
    classes, environments = np.asarray([0, 0, 1, 1, 0, 0]), np.asarray([0, 0, 0, 0, 1, 1])
    samples = Stratified(classes, environments, resamples=500).samples(right)
    assert samples[0].tolist() == [50, 50, 50]
    # every class of the first environment is all right or all wrong, so nothing varies there
    assert (samples[:, 0] == 50).all()
    assert set(np.unique(samples[:, 1])) == {0, 50, 100}
    assert samples[1:, 1].std() == pytest.approx(100 * 0.5 / 2**0.5, rel=0.1)


def test_a_trial_is_run_once_and_another_trunk_is_another(tmp_path: Path):
    made = []

    def make() -> StyleWorld:
        made.append(1)
        return world_of(1)

    key = {"seed": 1, "trunk": "a"}
    first = run_trial(rows, make, key, "prototypes", tmp_path)
    assert run_trial(rows, make, key, "prototypes", tmp_path) == first
    assert len(made) == 1
    run_trial(rows, make, key | {"trunk": "b"}, "prototypes", tmp_path)
    assert len(made) == 2


def test_intervals_of_equal_seeds_are_the_bootstraps_own_and_unequal_seeds_widen_them():
    rng = np.random.default_rng(0)
    right = rng.random((6, 300)) < np.linspace(0.2, 0.8, 6)[:, None]
    concepts, styles = np.arange(300) % 100, np.arange(300) // 100
    bootstrap = Bootstrap(concepts, styles)
    samples = np.stack([bootstrap.samples(row) for row in right])
    one = intervals(samples[:1])
    for mine, own in zip(one, bootstrap.intervals(right[0]), strict=True):
        assert mine == own.to_json()
    assert intervals(samples[[0, 0, 0]]) == one
    width = {name: each["high"] - each["low"] for name, each in (("one", one[-1]), ("six", intervals(samples)[-1]))}
    assert intervals(samples)[-1]["value"] == pytest.approx(100 * right.mean(), abs=1e-3)
    assert width["six"] > width["one"]


def test_the_summary_means_over_seeds_and_the_page_says_so(trials: dict[str, list[dict[str, Any]]]):
    world = world_of(0)
    by_pairs = pairs(world, "prototypes")
    assert list(by_pairs["rows"]) == [
        "natural", "the seven", "natural + the seven", "all eighteen", "natural + all eighteen",
    ]  # fmt: skip
    found = summarise(world, trials["prototypes"], by_pairs)
    count = int(world.queries.sum())
    styles = world.table.environments[world.queries]
    shares = [unpack(trial["rows"]["auto"]["answers"], count) for trial in trials["prototypes"]]
    by_style = [[100 * share[styles == code].mean() for code in np.unique(styles)] for share in shares]
    assert found["rows"]["auto"]["mean"]["value"] == pytest.approx(np.mean(by_style), abs=1e-3)
    none = found["rows"]["none"]["mean"]["value"]
    own = [np.mean(each) - none for each in by_style]
    assert found["rows"]["auto"]["by_seed"] == pytest.approx(own, abs=2e-3)
    assert found["rows"]["auto"]["spread"] == pytest.approx(np.std(own, ddof=1), abs=2e-3)
    # Both lists hold the same images here.
    twins = [found["pairs"][name] for name in ("natural + the seven", "natural + all eighteen")]
    assert twins[0] == twins[1]
    assert twins[0]["difference"]["value"] > 10
    assert twins[0]["left_out"] > 10
    texts = summarise(world, trials["zero-shot"], None)
    given = {
        "model": "reference", "checkpoint_sha256": "0" * 64, "width": WIDTH, "precision": "float32", "seeds": 2,
        "concepts": CONCEPTS, "learnt_concepts": 12, "home_concepts": 4, "images": dict.fromkeys(STYLES, CONCEPTS),
    }  # fmt: skip
    result = {**given, "tables": {"zero-shot": texts, "prototypes": found}}
    page = render(json.loads(json.dumps(result)))
    assert f"**auto** | {found['rows']['auto']['openmoji']['value']:.1f}" in page
    assert page.count(": reached.") == 2
    assert page.count("\n| LEACE |") == 4  # two tables, at home, photographs
    assert "Which pairs" not in page  # one table lacks them
    result["tables"]["zero-shot"] = found | {"group": texts["group"]}
    assert "Which pairs" in render(result)
    assert plot(result).startswith("<?xml")
    moved = given | {
        "elsewhere": dict.fromkeys(STYLES[-2:], CONCEPTS), "classes": list(NAMES),
        "rows": elsewhere_scores(world, trials["zero-shot"]),
    }  # fmt: skip
    change = moved["rows"]["auto"]["difference"]
    assert f"**{change['value']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}] points**" in render_transfer(moved)


def test_a_baseline_above_ours_is_said_so():
    rows_ = {
        name: {"to_auto": {"value": value, "low": value - 1, "high": value + 1}}
        for name, value in (("none", -3.0), ("lda", 2.0), ("leace", -1.0), ("icm", 5.0), ("centring", 3.0))
    }
    assert better(rows_) == ["centring", "lda"]
    assert above_auto("X", rows_).startswith("- X: **2 of the baselines stand above `auto`**: centring (+3.0 [+2.0")
    assert above_auto("X", {"lda": rows_["leace"]}) == "- X: no baseline is above `auto`."


def test_worlds_of_a_checkpoint_know_its_layers_and_what_it_makes_of_styles(tmp_path: Path, small: Any):
    rng = np.random.default_rng(0)
    images = []
    for style in (*TRAINING_STYLES[:2], HELD_OUT_STYLES[0]):
        for name in ("cat", "dog", "bus"):
            file = tmp_path / f"{style}-{name}.png"
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
            images.append(ImageRecord(file, concept=name, name=name, environment=style, split="train"))
    trunk = TrunkEncoder(small)
    groups = {"cat": "animals", "dog": "animals", "bus": "things"}
    other = embed_elsewhere(small, trunk, images, tmp_path / "cache")
    kinds = {SEVEN: PAPER[:2]}
    world = embed_world(small, trunk, images, groups, kinds, tmp_path / "cache", 0, elsewhere=other)
    assert world.layers is not None
    assert world.layers.image.shape == (small.embed_dim, trunk.embed_dim)
    assert world.styles is not None
    assert world.styles.words.shape == (15, small.embed_dim)  # three phrases for every training style, none for others
    assert world.styles.prompts.shape == (15, 3, small.embed_dim)
    assert [world.groups[world.table.concept_names.index(name)] for name in ("cat", "dog", "bus")] == [0, 0, 1]
    # what is scored is what the checkpoint itself makes of the images
    batch = np.stack([pixels(image.path, small.pixels) for image in images])
    assert np.allclose(unit(small.encode_images(batch)), world.table.vectors, atol=1e-5)
    assert elsewhere_answers(other, identity(small.embed_dim)).shape == (9,)
    maps = _baselines(world, ProjectionCandidate("icm", 8, 1.0))
    for name in ("isoclip", "leace", "text-styles, equal rank"):
        assert answers(world, maps[name], "zero-shot").shape == (3,)


def test_a_trunk_gives_embeddings_up_to_its_head_and_features_serve_every_head(small: Any, tmp_path: Path):
    size = small.pixels.image_size
    batch = np.random.default_rng(0).integers(0, 255, (2, *size, 3), dtype=np.uint8)
    whole = unit(small.encode_images(batch))
    trunk = TrunkEncoder(small)
    assert trunk.encode_images(batch).shape == (2, trunk.embed_dim)
    # at unit length, as embeddings are kept: the bias comes right all the same
    assert np.allclose(unit(unit(trunk.encode_images(batch)) @ trunk.head.T), whole, atol=1e-5)
    coarse = unit(TrunkEncoder(small, "bfloat16").encode_images(batch) @ trunk.head.T)
    assert (coarse * whole).sum(axis=1).min() > 0.99
    quick = Quick(small, "float32", tmp_path)
    assert np.allclose(unit(quick.encode_images(batch)), whole, atol=1e-5)
    head = small.module.visual.head.proj
    with torch.no_grad():
        head.bias += 1
    other = Quick(small, "float32", tmp_path)
    assert other.trunk.sha256 == quick.trunk.sha256
    assert other.sha256 != quick.sha256
    other.trunk.encode_images = lambda _: pytest.fail("features were kept")  # type: ignore[method-assign]
    assert np.allclose(unit(other.encode_images(batch)), unit(small.encode_images(batch)), atol=1e-5)
    small.module.visual.head = torch.nn.Identity()
    with pytest.raises(CheckpointError, match="linear head"):
        TrunkEncoder(small)
