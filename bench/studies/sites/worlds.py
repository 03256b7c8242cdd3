"""Worlds of sites for `bench.sites`: before and after a projection, and each training environment as a site."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from invariclip.artifact.projection import identity
from invariclip.bench.studies.sites.peers import Classes, Colours, colours, nearest
from invariclip.calibrate.fit import training_mean
from invariclip.calibrate.projection.classifiers import fit_probe, prototype_bank, unit
from invariclip.sites.site import Site, new_site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.pairs import EmbeddingTable

    Vectors = NDArray[np.float64]
    Rows = NDArray[np.int64]

SIZES = (1, 2, 5, 10, 20, 50, 100)
SKEWED = 20
"""Images of a sample whose contents are skewed, of a wrong site, and of the rows beside."""
HALF = "half of them"


@dataclass(frozen=True, eq=False)
class Place:
    """A world and its sites, before any projection.

    Attributes:
        seen: The training images.
        sites: Unseen images by site; labels are matched by name.
        others: Images of another place by site; may be empty where nobody asks for rows of a wrong site.
        kinds: Kinds of things in a table, int64 [N]: what skewed samples are drawn by.
        bank: [K, D], of `names`.
        names: K class names.
        refit: The projection without one training environment, by its name.
    """

    seen: EmbeddingTable
    sites: dict[str, EmbeddingTable]
    others: dict[str, EmbeddingTable]
    kinds: Callable[[EmbeddingTable], Rows]
    bank: Vectors
    names: Sequence[str]
    refit: Callable[[str], Projection]


@dataclass(frozen=True, eq=False)
class Ward:
    """Sites of one world in one space, and how an image is named there.

    Attributes:
        sites: Name → unit embeddings [N, d].
        labels: Name → int64 [N].
        concepts: Name → int64 [N], what the bootstrap draws.
        contents: Name → int64 [N], the kinds of things that skewed samples are drawn by.
        others: Name → unit embeddings of another place.
        rule: The classes.
        bank: [K, d], embeddings of the classes' names.
        training: m₀.
        aligned: The classes where every environment's images are moved to m₀ as a whole before.
        centred: The classes where every environment's images lost their own mean before; by name, names less theirs.
        residues: [M, d], training images less their own environment's mean.
        learn: Classes from vectors and labels in the same way, or None by name.
    """

    sites: dict[str, Vectors]
    labels: dict[str, Rows]
    concepts: dict[str, Rows]
    contents: dict[str, Rows]
    others: dict[str, Vectors]
    rule: Classes
    bank: Vectors
    training: Vectors
    aligned: Classes
    centred: Classes
    residues: Vectors
    learn: Callable[[Vectors, Rows], Classes] | None

    @cached_property
    def colours(self) -> Colours:
        """Of the training images, each environment about its own mean."""
        return colours(self.residues)


def ward(what: Projection, place: Place, way: str) -> Ward:
    """A world in the space of one projection.

    Args:
        what: The projection.
        place: The world.
        way: `zero-shot`, `prototypes` or `probe`.
    """
    seen, sites, names = place.seen, place.sites, place.names
    places = {name: number for number, name in enumerate(names)}

    def labels(table: EmbeddingTable) -> Rows:
        return np.asarray([places[name] for name in table.label_names])[table.labels]

    plain = seen.where(seen.unchanged)
    shown, given, bank = what.apply(plain.vectors), labels(plain), what.apply(place.bank)
    training = training_mean(what, plain)
    residues = shown.copy()
    for code in np.unique(plain.environments):
        own = plain.environments == code
        residues[own] -= shown[own].mean(axis=0)
    learn = None if way == "zero-shot" else (probe if way == "probe" else prototypes)
    every = np.arange(len(names))
    rules = (
        [nearest(bank, every), nearest(bank, every), nearest(unit(bank - bank.mean(axis=0)), every)]
        if learn is None
        else [learn(vectors, given) for vectors in (shown, unit(residues + training), unit(residues))]
    )
    return Ward(
        sites={name: what.apply(table.vectors) for name, table in sites.items()},
        labels={name: labels(table) for name, table in sites.items()},
        concepts={name: table.concepts for name, table in sites.items()},
        contents={name: place.kinds(table) for name, table in sites.items()},
        others={name: what.apply(table.vectors) for name, table in place.others.items()},
        rule=rules[0],
        bank=bank,
        training=training,
        aligned=rules[1],
        centred=rules[2],
        residues=residues,
        learn=learn,
    )


def prototypes(vectors: Vectors, labels: Rows) -> Classes:
    """Classes told by the nearest mean."""
    codes, means = prototype_bank(vectors, labels)
    return nearest(means, codes)


def probe(vectors: Vectors, labels: Rows) -> Classes:
    """Classes told by a linear probe at the published C."""
    found = fit_probe(vectors, labels)
    return Classes(found.classes, found.weights, found.bias)


def left_out(place: Place, way: str) -> Iterator[dict[str, Ward]]:
    """Each training environment as a site of the others, projected without it and not projected at all.

    Nothing but `Place.seen` is looked at.

    Args:
        place: The world.
        way: See `ward`.
    """
    plain = place.seen.where(place.seen.unchanged)
    for code in np.unique(plain.environments):
        left, name = plain.environments == code, plain.environment_names[code]
        inner = replace(place, seen=plain.where(~left), sites={name: plain.where(left)}, others={})
        yield wards(place.refit(name), inner, way)


def wards(what: Projection, place: Place, way: str) -> dict[str, Ward]:
    """A world by space: `projection` and `no projection`."""
    return {"projection": ward(what, place, way), "no projection": ward(identity(place.bank.shape[1]), place, way)}


def measured(ward: Ward, sample: Vectors) -> Site:
    """A sample's site, by the very code that serves."""
    return new_site("bench", "bench", ward.training, len(ward.bank), {}).adding(sample, ward.bank)


def samples(contents: Rows, shown: Rows, rng: np.random.Generator) -> Iterator[tuple[str, Rows]]:
    """Rows of the table, and the images of those shown that a site is measured on."""
    for size in SIZES:
        if size <= len(shown):
            yield f"{size} images" if size > 1 else "1 image", shown[:size]
    yield HALF, shown
    kinds = np.unique(contents[shown])
    for number, word in ((1, "one kind"), (2, "two kinds")):
        pool = shown[np.isin(contents[shown], rng.choice(kinds, number, replace=False))]
        yield f"20 of {word}", pool[:SKEWED]
        yield f"half of {word}", pool
    odds = rng.permutation(1 / np.arange(1, len(kinds) + 1))[np.searchsorted(kinds, contents[shown])]
    yield "20, kinds by Zipf's law", rng.choice(shown, SKEWED, replace=False, p=odds / odds.sum())
