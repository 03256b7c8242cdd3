"""The table: one trial of a small world, trials that resume, seeds put together, and the page."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from invariclip.bench.stylebench.encoders import Trunk
from invariclip.bench.stylebench.evaluate_page import plot, render
from invariclip.bench.stylebench.reference import untrained
from invariclip.bench.stylebench.sources import HELD_OUT_STYLES, TRAINING_STYLES
from invariclip.bench.stylebench.summary import intervals, summarise
from invariclip.bench.stylebench.trial import EVERYTHING, SEVEN, _baselines, pairs, rows, run_trial, unpack
from invariclip.bench.stylebench.world import World, answers, embed_worlds
from invariclip.calibrate.baselines import Baseline, none
from invariclip.calibrate.candidates import Candidate
from invariclip.calibrate.evaluate import Bootstrap, unit
from invariclip.calibrate.maps import PerModality
from invariclip.calibrate.modality import Projectors
from invariclip.calibrate.pairs import UNCHANGED, Table
from invariclip.calibrate.pictures import Picture
from invariclip.calibrate.style_prompts import StylePrompts
from invariclip.errors import CheckpointError
from invariclip.export.models.checkpoint import load_checkpoint
from invariclip.interventions import PAPER
from invariclip.pixels import PixelSpec
from invariclip.projection import identity

if TYPE_CHECKING:
    from pathlib import Path

CONCEPTS, WIDTH, SIGNAL = 24, 16, 8
NAMES = tuple(f"c{code:02d}" for code in range(CONCEPTS))
STYLES = (*TRAINING_STYLES, *HELD_OUT_STYLES)


def table_of(styles: tuple[str, ...], concepts: int, *, changed: bool, seed: int) -> Table:
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
    return Table(
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


def world_of(seed: int, *, texts: bool) -> World:
    train = table_of(TRAINING_STYLES, 20, changed=True, seed=seed)
    rng = np.random.default_rng(7)
    words = np.concatenate(
        [rng.normal(size=(CONCEPTS, SIGNAL)), 2 * rng.normal(size=(CONCEPTS, WIDTH - SIGNAL))], axis=1
    )
    bank = unit(words) if texts else None
    shown = words[None, :20] + np.eye(WIDTH)[SIGNAL : SIGNAL + 4, None]  # phrases differ along style's own dimensions
    return World(
        table=table_of(STYLES, CONCEPTS, changed=False, seed=0),
        bank=bank,
        train={SEVEN: train, EVERYTHING: train},
        train_bank=None if bank is None else bank[:20],
        learnt=frozenset(NAMES[:12]),
        seed=seed,
        layers=Projectors(rng.normal(size=(WIDTH, 20)), rng.normal(size=(WIDTH, 18))) if texts else None,
        styles=StylePrompts(unit(rng.normal(size=(4, WIDTH))), unit(shown)) if texts else None,
    )


@pytest.fixture(scope="module")
def trials() -> dict[str, list[dict[str, Any]]]:
    return {
        "prototypes": [rows(world_of(seed, texts=False), "prototypes") for seed in (0, 1)],
        "zero-shot": [rows(world_of(0, texts=True), "zero-shot")],
    }


def test_every_row_is_there_and_what_styles_change_is_removed(trials: dict[str, list[dict[str, Any]]]):
    for way, results in trials.items():
        world = world_of(0, texts=way == "zero-shot")
        count = int(world.queries.sum())
        share = {name: unpack(row["answers"], count).mean() for name, row in results[0]["rows"].items()}
        by_text = ["gr-clip", "isoclip", "text-styles", "text-styles, equal rank", "prism-mini"]
        assert list(share) == [
            "none", "centring", "whitening", "lda", "pca", "published", "leace", "leace, shrunk", "splince",
            *(by_text if way == "zero-shot" else []), "icm", "generalised", "shrinkage", "auto",
        ]  # fmt: skip
        assert share["auto"] > share["none"] + 0.1
        assert share["published"] < share["none"]


def test_answers_are_the_nearest_prototype_and_the_nearest_name():
    world = world_of(0, texts=True)
    table, plain = world.table, identity(WIDTH)
    queries = table.vectors[world.queries]
    support = world.rows(TRAINING_STYLES)
    means = np.stack([table.vectors[support & (table.labels == code)].mean(axis=0) for code in range(CONCEPTS)])
    assert world.bank is not None
    for way, bank in (("prototypes", means), ("zero-shot", world.bank)):
        nearest = (queries @ unit(bank).T).argmax(axis=1)
        assert (answers(world, plain, way) == (nearest == table.labels[world.queries])).all()  # type: ignore[arg-type]


def test_names_and_pictures_may_go_through_maps_of_their_own():
    world = world_of(0, texts=True)
    assert world.bank is not None
    table, shift = world.table, np.random.default_rng(0).normal(size=WIDTH)
    images, texts = none(WIDTH), Baseline("x", shift, np.eye(WIDTH))
    what = PerModality(images, texts)
    nearest = (table.vectors[world.queries] @ unit(world.bank - shift).T).argmax(axis=1)
    assert (answers(world, what, "zero-shot") == (nearest == table.labels[world.queries])).all()
    assert (answers(world, what, "prototypes") == answers(world, images, "prototypes")).all()


def test_a_trial_is_run_once_and_another_seed_or_encoder_is_another(tmp_path: Path):
    made = []

    def make() -> World:
        made.append(1)
        return world_of(1, texts=False)

    key = {"encoder": "resnet18", "seed": 1, "trunk": "a"}
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
    world = world_of(0, texts=False)
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
    # Both lists hold the same pictures here.
    twins = [found["pairs"][name] for name in ("natural + the seven", "natural + all eighteen")]
    assert twins[0] == twins[1]
    assert twins[0]["difference"]["value"] > 10
    assert twins[0]["left_out"] > 10
    texts = summarise(world_of(0, texts=True), trials["zero-shot"], None)
    result = {
        "checkpoint_sha256": "0" * 64, "precision": "float32", "seeds": 2, "concepts": CONCEPTS, "learnt_concepts": 12,
        "pictures": dict.fromkeys(STYLES, CONCEPTS),
        "tables": {"resnet18, prototypes": found, "reference, zero-shot": texts, "reference, prototypes": found},
    }  # fmt: skip
    page = render(json.loads(json.dumps(result)))
    assert f"**auto** | {found['rows']['auto']['openmoji']['value']:.1f}" in page
    assert page.count(": reached.") == 2
    assert page.count("\n| LEACE |") == 3
    assert page.count("\n| IsoCLIP |") == 1
    assert "Which pairs" not in page  # one table lacks them
    result["tables"]["reference, zero-shot"] = found  # type: ignore[index]
    assert page.count("Which pairs") < render(result).count("Which pairs")
    assert plot(result).startswith("<?xml")


def test_worlds_of_the_reference_know_its_layers_and_what_it_makes_of_styles(tmp_path: Path):
    rng = np.random.default_rng(0)
    pictures = []
    for style in (*TRAINING_STYLES[:2], HELD_OUT_STYLES[0]):
        for name in ("cat", "dog", "bus"):
            file = tmp_path / f"{style}-{name}.png"
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
            pictures.append(Picture(file, concept=name, name=name, environment=style, split="train"))
    checkpoint = load_checkpoint("reference")
    worlds = embed_worlds(checkpoint, Trunk(checkpoint), pictures, {SEVEN: PAPER[:2]}, tmp_path / "cache", 0)
    plain, world = worlds["resnet18"], worlds["reference"]
    assert (plain.layers, plain.styles, plain.train_bank) == (None, None, None)
    assert world.layers is not None
    assert world.layers.image.shape == (256, 512)
    assert world.layers.text.shape == (256, 128)
    assert world.styles is not None
    assert world.styles.words.shape == (15, 256)  # three phrases for every training style, none for others
    assert world.styles.prompts.shape == (15, 3, 256)
    # what the layers make of the trunk's features is what is scored
    assert np.allclose(unit(plain.table.vectors @ world.layers.image.T), world.table.vectors)
    maps = _baselines(world, Candidate("icm", 64, 1.0))
    for name in ("isoclip", "leace", "text-styles, equal rank"):
        assert answers(world, maps[name], "zero-shot").shape == (3,)


def test_the_trunk_gives_the_references_embeddings_up_to_its_head():
    model = untrained(0).eval()
    spec = PixelSpec((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    checkpoint: Any = SimpleNamespace(name="x", module=model, pixels=spec, sha256="0" * 64)
    batch = np.random.default_rng(0).integers(0, 255, (2, 224, 224, 3), dtype=np.uint8)
    trunk = Trunk(checkpoint)
    with torch.no_grad():
        image = torch.from_numpy(batch).permute(0, 3, 1, 2) / 255
        whole = model.encode_image((image - 0.5) / 0.5, normalize=True).numpy()
    assert trunk.encode_images(batch).shape == (2, trunk.embed_dim)
    assert np.allclose(unit(trunk.encode_images(batch) @ trunk.head.T), whole, atol=1e-5)
    coarse = unit(Trunk(checkpoint, "bfloat16").encode_images(batch) @ trunk.head.T)
    assert (coarse * whole).sum(axis=1).min() > 0.999
    model.visual.head = torch.nn.Identity()
    with pytest.raises(CheckpointError, match="linear head"):
        Trunk(checkpoint)
