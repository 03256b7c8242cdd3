"""The embedded picture set as one encoder sees it under one seed, and who names which held-out picture right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from invariclip.bench.stylebench.encoders import REFERENCE, RESNET18
from invariclip.bench.stylebench.sources import HELD_OUT_STYLES, STYLES, TRAINING_STYLES
from invariclip.calibrate.evaluate import prototypes, unit, zero_shot
from invariclip.calibrate.fit import Options, bank_of, tabulate
from invariclip.calibrate.maps import for_texts
from invariclip.calibrate.modality import projectors
from invariclip.calibrate.style_prompts import embed_style_prompts
from invariclip.console import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.bench.stylebench.encoders import Trunk
    from invariclip.calibrate.maps import Map
    from invariclip.calibrate.modality import Projectors
    from invariclip.calibrate.pairs import Table
    from invariclip.calibrate.pictures import Picture
    from invariclip.calibrate.style_prompts import StylePrompts
    from invariclip.export.models.checkpoint import Checkpoint

TEMPLATES = ("a picture of a {}.",)
DRAWS = 2
"""Changed versions of every picture, as `calibrate` has by default."""
PROMPTED_CLASSES = 128
"""Most classes that prompts name in every style; evenly spread over the training concepts' names."""
Way = Literal["zero-shot", "prototypes"]


@dataclass(frozen=True)
class World:
    """The embedded picture set.

    Attributes:
        table: All pictures, unchanged.
        bank: float64 [K, D], its class embeddings by label code; None where the encoder takes no texts.
        train: What is fitted on, by the list that changed versions were drawn from: training styles, splits train and
            calibrate. All hold the same pictures.
        train_bank: The class embeddings of `train`, or None.
        learnt: Concepts that the reference checkpoint was trained on.
        seed: Of everything that is drawn.
        layers: The last linear layers of both towers; None where the encoder takes no texts.
        styles: What the text tower makes of the training styles' phrases; None likewise.
    """

    table: Table
    bank: NDArray[np.float64] | None
    train: Mapping[str, Table]
    train_bank: NDArray[np.float64] | None
    learnt: frozenset[str]
    seed: int
    layers: Projectors | None = None
    styles: StylePrompts | None = None

    @property
    def ways(self) -> tuple[Way, ...]:
        """How classes are named here."""
        return ("prototypes",) if self.bank is None else ("zero-shot", "prototypes")

    def rows(self, styles: Sequence[str]) -> NDArray[np.bool_]:
        """Pictures of some styles, bool [N]."""
        codes = [self.table.environment_names.index(style) for style in styles if style in self.table.environment_names]
        return np.isin(self.table.environments, codes)

    @property
    def queries(self) -> NDArray[np.bool_]:
        """Pictures of the held-out styles, bool [N]: what is scored."""
        return self.rows(HELD_OUT_STYLES)

    @property
    def is_learnt(self) -> NDArray[np.bool_]:
        """Of the queries, those whose concept the reference checkpoint was trained on; bool [Q]."""
        known = np.asarray([name in self.learnt for name in self.table.concept_names])
        return np.asarray(known[self.table.concepts[self.queries]])


def answers(world: World, what: Map, way: Way) -> NDArray[np.bool_]:
    """Which queries are named right, bool [Q]: by the names' embeddings, or by prototypes from the training styles."""
    table, queries = world.table, world.queries
    images = what.apply(table.vectors[queries])
    if way == "zero-shot":
        if world.bank is None:
            raise ValueError("zero-shot needs class embeddings")
        return zero_shot(images, table.labels[queries], for_texts(what).apply(world.bank))
    support = world.rows(TRAINING_STYLES)
    return prototypes(what.apply(table.vectors[support]), table.labels[support], images, table.labels[queries])


def embed_worlds(
    checkpoint: Checkpoint,
    trunk: Trunk,
    pictures: Sequence[Picture],
    kinds: Mapping[str, tuple[str, ...]],
    cache: Path,
    seed: int,
    progress: Progress = silent,
) -> dict[str, World]:
    """Embeds the set; what is fitted on also under interventions, exactly as `calibrate` does it.

    Args:
        checkpoint: The reference, for its texts.
        trunk: Its trunk.
        pictures: The whole set.
        kinds: Lists of interventions by name.
        cache: Keeps embeddings across runs.
        seed: Of the interventions.
        progress: Progress display.

    Returns:
        The worlds of `encoders.ENCODERS`.
    """
    fit_on = [p for p in pictures if p.environment in TRAINING_STYLES and p.split in ("train", "calibrate")]
    table, _ = tabulate(trunk, pictures, Options(seed=seed), cache=cache, progress=progress)
    train = {
        name: tabulate(
            trunk, fit_on, Options(interventions=listed, draws=DRAWS, seed=seed), cache=cache, progress=progress
        )[0]
        for name, listed in kinds.items()
    }
    learnt = frozenset(picture.concept for picture in fit_on if picture.split == "train")
    bank = bank_of(checkpoint, table.label_names, TEMPLATES)
    some = next(iter(train.values()))
    train_bank = bank[[table.label_names.index(name) for name in some.label_names]]
    phrases = [phrase for style in TRAINING_STYLES for phrase in STYLES[style].phrases]
    named = some.label_names[:: -(-len(some.label_names) // PROMPTED_CLASSES)]
    return {
        RESNET18: World(table, None, train, None, learnt, seed),
        REFERENCE: World(
            _through(trunk, table), bank, {name: _through(trunk, each) for name, each in train.items()},
            train_bank, learnt, seed, projectors(checkpoint), embed_style_prompts(checkpoint, phrases, named),
        ),
    }  # fmt: skip


def _through(trunk: Trunk, table: Table) -> Table:
    return replace(table, vectors=unit(table.vectors @ trunk.head.T))
