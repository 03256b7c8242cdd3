"""Worlds of sites, before and after a projection, and what their training environments say of forms and settings.

Each training environment is a site in turn, with the projection of the others. Nothing that a table scores is looked at
there: a choice is of one world, from the images that its projection was fitted on.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.projection import identity
from invariclip.bench.studies.sites.peers import (
    FILTERS,
    SHRINKAGES,
    Classes,
    Colours,
    colours,
    nearest,
    recoloured,
    t3a,
)
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
    from collections.abc import Mapping

    from invariclip.bench.studies.trials import Resampler


DRAWS = 6
"""Halves of every training environment that forms are scored on, where there are few classes."""
SETTING_DRAWS = 2
"""Halves that γ and M are scored on."""
HARM = 0.5
"""Points below the projection alone, on the mean over training environments, that skewed contents may cost."""


def _alone(ward: Ward, vectors: Vectors, _: Vectors) -> Rows:
    return ward.rule(vectors)


def _site(ward: Ward, vectors: Vectors, sample: Vectors) -> Rows:
    return ward.rule(measured(ward, sample).apply(vectors))


def _aligned(ward: Ward, vectors: Vectors, sample: Vectors) -> Rows:
    return ward.aligned(measured(ward, sample).apply(vectors))


def _centring(ward: Ward, vectors: Vectors, sample: Vectors) -> Rows:
    return ward.centred(unit(vectors - sample.mean(axis=0)))


ALONE, ALIGNED = "projection", "projection, site, classes aligned"
FORMS: dict[str, tuple[str, Callable[[Ward, Vectors, Vectors], Rows]]] = {
    ALONE: ("projection", _alone),
    "projection, site": ("projection", _site),
    ALIGNED: ("projection", _aligned),
    "projection, centring": ("projection", _centring),
    "no projection, site": ("no projection", _site),
    "no projection, site, classes aligned": ("no projection", _aligned),
    "no projection, centring": ("no projection", _centring),
}
"""Form → the space, and (its ward, images, sample) → labels."""


def answers(form: str, both: Mapping[str, Ward], name: str, asked: NDArray[np.bool_], sample: Rows) -> Rows:
    """How some images of a site are named in one of `FORMS`.

    Args:
        form: Which.
        both: The world by space.
        name: The site.
        asked: bool [N], the images.
        sample: Rows of the images that it is measured on.
    """
    space, how = FORMS[form]
    vectors = both[space].sites[name]
    return how(both[space], vectors[asked], vectors[sample])


@dataclass(frozen=True)
class FormChoice:
    """What a world's training environments chose.

    Attributes:
        form: One of `FORMS`.
        shrinkages: γ of CORAL by sample.
        recolours: Whether CORAL's γ is more than one standard error better than the shift alone, by sample.
        filters: M of T3A by sample.
        gains: Form → sample → points over the projection alone.
    """

    form: str
    shrinkages: Mapping[str, float]
    recolours: Mapping[str, bool]
    filters: Mapping[str, int]
    gains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For files."""
        gains = {form: {sample: round(gain, 3) for sample, gain in by.items()} for form, by in self.gains.items()}
        return {"form": self.form, "shrinkages": dict(self.shrinkages), "recolours": dict(self.recolours),
                "filters": dict(self.filters), "gains": gains}  # fmt: skip


@dataclass
class FormTrials:
    """Shares of right answers by candidate and sample, over training environments and their halves.

    Attributes:
        right: (candidate, sample) → for each environment, shares of right answers, [N].
        drawn: For each environment what the bootstrap draws, int64 [N].
    """

    right: dict[tuple[str, str], list[Vectors]] = field(default_factory=lambda: defaultdict(list))
    drawn: list[Rows] = field(default_factory=list)

    def means(self, resampler: Callable[..., Resampler]) -> dict[tuple[str, str], Vectors]:
        """Percent right on the mean over environments, as it is and resampled: [1 + resamples]."""
        codes = np.concatenate([np.full(len(each), number) for number, each in enumerate(self.drawn)])
        drawn = resampler(np.concatenate(self.drawn), codes)
        return {key: drawn.samples(np.concatenate(shares))[:, -1] for key, shares in self.right.items()}


def choose(place: Place, way: str, seed: int, resampler: Callable[..., Resampler], draws: int = DRAWS) -> FormChoice:
    """Scores every candidate on each training environment in turn and chooses.

    - The form with the most right answers from mixed images, of those that cost no more than `HARM` where contents
      are skewed. The projection alone is taken if it is within one standard error of that.
    - γ of CORAL and M of T3A by the most right answers from the sample's images.

    Args:
        place: The world; its sites are not looked at.
        way: `zero-shot`, `prototypes` or `probe`.
        seed: Of the halves and samples.
        resampler: As the table's.
        draws: Halves of every training environment.
    """
    trials = FormTrials()
    for number, both in enumerate(left_out(place, way)):
        for name in both[ALONE].sites:
            _try(both, name, np.random.default_rng([seed, number, 73]), draws, trials)
    means = trials.means(resampler)

    def most(candidates: list[str], sample: str) -> str:
        return max(candidates, key=lambda each: float(means[each, sample][0]))

    def clearly(better: str, than: str, sample: str) -> bool:
        gain = means[better, sample] - means[than, sample]
        return bool(gain[0] > np.nanstd(gain[1:]))

    gains = {
        form: {sample: float(means[form, sample][0] - means[ALONE, sample][0]) for sample in (SHOWN, *GUARDS)}
        for form in FORMS
    }
    first = most([form for form in FORMS if min(gains[form][sample] for sample in GUARDS) >= -HARM], SHOWN)
    gammas, kept = {_gamma(each): each for each in SHRINKAGES}, {_keep(each): each for each in FILTERS}
    coral = {sample: most(list(gammas), sample) for sample in (SHOWN, HALF)}
    return FormChoice(
        first if clearly(first, ALONE, SHOWN) else ALONE,
        {sample: gammas[each] for sample, each in coral.items()},
        {sample: clearly(each, _SHIFT, sample) for sample, each in coral.items()},
        {sample: kept[most(list(kept), sample)] for sample in (SHOWN, HALF)},
        gains,
    )


_SHIFT = "the shift alone"


def _gamma(shrinkage: float) -> str:
    return f"γ = {shrinkage:g}"


def _keep(count: int) -> str:
    return f"M = {count}"


def _try(both: Mapping[str, Ward], name: str, rng: np.random.Generator, draws: int, trials: FormTrials) -> None:
    """Adds one training environment's answers."""
    ward = both[ALONE]
    labels, vectors = ward.labels[name], ward.sites[name]
    right: dict[tuple[str, str], Vectors] = defaultdict(lambda: np.zeros(len(labels)))
    asks: dict[tuple[str, str], Vectors] = defaultdict(lambda: np.zeros(len(labels)))

    def add(candidate: str, sample: str, told: Rows, asked: NDArray[np.bool_]) -> None:
        right[candidate, sample][asked] += told == labels[asked]
        asks[candidate, sample][asked] += 1

    for number in range(draws):
        order = rng.permutation(len(labels))
        asked = np.isin(np.arange(len(order)), order[len(order) // 2 :])
        for sample, rows in samples(ward.contents[name], order[: len(order) // 2], rng):
            if sample in (SHOWN, *GUARDS):
                for form in FORMS:
                    add(form, sample, answers(form, both, name, asked, rows), asked)
            if sample in (SHOWN, HALF) and number < SETTING_DRAWS:
                for candidate, told in _settings(ward, vectors[asked], vectors[rows]).items():
                    add(candidate, sample, told, asked)
    for key, values in right.items():
        # an image that no half scored counts as wrong for every candidate alike
        trials.right[key].append(values / np.maximum(1, asks[key]))
    trials.drawn.append(ward.concepts[name])


def _settings(ward: Ward, vectors: Vectors, sample: Vectors) -> dict[str, Rows]:
    """The answers of the shift, of every γ and of every M."""
    site, own, mean = measured(ward, sample), colours(sample), sample.mean(axis=0)
    supports = t3a(ward.rule, sample)
    shift = site.shift.astype(np.float64)
    return {
        _SHIFT: ward.rule(site.apply(vectors)),
        **{_gamma(g): ward.rule(recoloured(vectors, shift, mean, own, ward.colours, g)) for g in SHRINKAGES},
        **{_keep(keep): supports.filtered(keep)(vectors) for keep in FILTERS},
    }


SIZES = (1, 2, 5, 10, 20, 50, 100)
SKEWED = 20
"""Images of a sample whose contents are skewed, of a wrong site, and of the rows beside."""
HALF = "half of them"
SHOWN = f"{SKEWED} images"
GUARDS = (f"{SKEWED} of one kind", f"{SKEWED} of two kinds")


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
