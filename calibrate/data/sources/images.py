"""Images of a manifest or a folder as a source: points, concepts in two environments, changed versions.

A shard holds whole concepts, so that every natural pair lies in one. What it gives adds up to what
`pairs.fitted_moments` makes of the same images in memory. Only a concept of more than `LARGE` images is cut: its
natural pairs are a shard of their own, drawn from at most `LARGE` of its images.

Environments of a shard that tell nothing: none of their images can be used, or all of them have one embedding.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.data.domainbed import find_layout, read_layout
from invariclip.calibrate.data.encode import Donor, EmbeddedVersions, Request, encode_images, usable
from invariclip.calibrate.data.images import keep, read_images
from invariclip.calibrate.data.pairs import SAME_DISTANCE, UNCHANGED, EmbeddingTable, codes, natural_pairs, seeded
from invariclip.calibrate.data.problems import (
    ALIKE_HERE,
    EMPTY,
    EMPTY_HERE,
    LONE,
    NOT_FINITE,
    SINGLE,
    SINGLE_OF_CLASS,
    UNREADABLE,
    ZERO,
)
from invariclip.calibrate.data.stream.blocks import (
    BLOCK_ROWS,
    INTERVENTIONS,
    NATURAL,
    Gather,
    Shard,
    require_unchanged,
    stamp,
)
from invariclip.calibrate.data.versions import NO_CHANGES, Changes, Donors
from invariclip.errors import InputError
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.calibrate.data.images import ImageRecord, PairsBy
    from invariclip.calibrate.data.problems import ProblemCounts
    from invariclip.calibrate.data.stream.blocks import RowBlock

CONCEPTS = 64
"""Concepts of a shard at most."""
LARGE = BLOCK_ROWS
"""Images of a shard at most: their embeddings are held until its natural pairs are made."""
Files = list[list[Any]]
"""Of every image: path below the root, concept, environment, stamp (see `stamps.stamp`)."""


class Environments:
    """What has been seen of every environment: one row, how many there were, and whether any was another."""

    def __init__(self, names: Iterable[str]) -> None:
        """Starts with nothing seen of the environments that are listed."""
        self._first: dict[str, NDArray[np.float64] | None] = dict.fromkeys(names)
        self._counts = dict.fromkeys(self._first, 0)
        self._differ = dict.fromkeys(self._first, False)

    def add(self, name: str, row: NDArray[np.float64]) -> None:
        """Takes in the embedding of an image, [D], unit length."""
        first = self._first[name]
        if first is None:
            self._first[name] = row.copy()
        elif not self._differ[name]:
            self._differ[name] = bool(np.linalg.norm(row - first) > SAME_DISTANCE)
        self._counts[name] += 1

    def tell(self, tally: ProblemCounts) -> None:
        """Counts the environments that tell nothing."""
        counts = self._counts.items()
        tally.add(EMPTY_HERE, [name for name, count in counts if count == 0])
        tally.add(ALIKE_HERE, [name for name, count in counts if count > 1 and not self._differ[name]])


@dataclass(frozen=True)
class ImageSource:
    """A manifest or a folder of images (see `calibrate.images.read_images`).

    Attributes:
        name: See `Source`.
        path: The manifest or the folder.
        weight: See `Source`.
        environments: The environments to take; None takes all.
        splits: The splits to take; None takes all.
        natural: Pair images of one concept in two environments.
        changes: Pair every image with changed versions of itself.
        points: Take the images as points.
        seed: Draws natural pairs where a concept has very many.
        allow_outside: Accept a manifest whose paths leave its folder.
        pairs_by: What makes images of a folder one concept, see `calibrate.images.read_images`.
        layout: A set of DomainBed by name, whose folder `path` is (see `calibrate.layouts`); empty for any other.
    """

    name: str
    path: str
    weight: float = 1.0
    environments: tuple[str, ...] | None = None
    splits: tuple[str, ...] | None = None
    natural: bool = True
    changes: Changes = NO_CHANGES
    points: bool = True
    seed: int = 0
    allow_outside: bool = False
    pairs_by: PairsBy = "auto"
    layout: str = ""

    @property
    def needs_encoder(self) -> bool:
        """True."""
        return True

    def shards(self) -> list[Shard]:
        """Whole concepts, in the order in which they are listed.

        Raises:
            InputError: The manifest or folder cannot be used, or there is nothing to take from it.
        """
        if not (self.natural or self.changes.kinds or self.points):
            raise InputError(f"{self.name}: neither points nor natural pairs nor interventions are to be taken")
        images, empty = self._listed()
        concepts: dict[str, Files] = defaultdict(list)
        for image in images:
            place = _below(self._root, image.path)
            concepts[image.concept].append([place, image.concept, image.environment, stamp(image.path)])
        found: list[Shard] = []
        for group in _groups(list(concepts.values())):
            if len(group) <= LARGE:
                found.append(self._shard(group, self.natural, self.points, self.changes))
                continue
            if self.natural:
                found.append(self._shard(_drawn(group, self.seed), True, False, NO_CHANGES))
            if self.points or self.changes.kinds:
                parts = [group[start : start + LARGE] for start in range(0, len(group), LARGE)]
                found += [self._shard(part, False, self.points, self.changes) for part in parts]
        classes = Counter(image.name for image in images)
        told = {"empty": empty, "single": sorted(name for name, number in classes.items() if number == 1)}
        if any(told.values()):  # what is known of the whole set is told with its first shard
            found[0] = Shard(found[0].source, found[0].name, {**found[0].spec, **told})
        return found

    def read(self, shard: Shard, encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
        """Points, natural pairs and interventions of a shard's concepts (see `Source`).

        Raises:
            InputError: There is no encoder, or a file has changed since it was listed.
        """
        if encoder is None:
            raise InputError(f"{self.name}: images need an encoder; name a checkpoint")
        spec = shard.spec
        tally.add(EMPTY, spec.get("empty", ()))
        tally.add(SINGLE_OF_CLASS, spec.get("single", ()))
        files, root = spec["files"], Path(spec["root"])
        changes = self.changes if spec["changes"] else NO_CHANGES
        gather, good = Gather(), list[EmbeddedVersions]()
        environments = Environments(environment for _, _, environment, _ in files)
        requests, donor = _requests(root, files, tally), _donor(root, files, changes)
        for seen in encode_images(encoder, requests, tally, changes=changes, donor=donor):
            if take(seen, gather, tally, points=spec["points"]):
                environments.add(files[seen.place][2], seen.row)
                good += [seen] if spec["natural"] else []
            yield from gather.full()
        if (
            spec["points"] == self.points
        ):  # else it is the natural pairs of a concept whose images are told of elsewhere
            environments.tell(tally)
        if spec["natural"]:
            _pair_up(good, files, self.seed, gather, tally)
        yield from gather.rest()

    @property
    def _root(self) -> Path:
        where = Path(self.path)
        return where if where.is_dir() else where.parent

    def _listed(self) -> tuple[list[ImageRecord], list[str]]:
        """The images to take, and the environments that a folder names and that hold none."""
        if self.layout:
            images = read_layout(find_layout(self.layout), self.path)  # whole, or it raises
            return keep(images, environments=self.environments, splits=self.splits), []
        images = read_images(self.path, allow_outside=self.allow_outside, pairs_by=self.pairs_by)
        empty: list[str] = []
        if Path(self.path).is_dir():
            have = {image.environment for image in images}
            folders = sorted(entry.name for entry in Path(self.path).iterdir() if entry.is_dir())
            wanted = folders if self.environments is None else self.environments
            empty = [name for name in folders if name in wanted and name not in have and not name.startswith(".")]
        environments = None
        if self.environments is not None:
            environments = [name for name in self.environments if name not in empty]
        return keep(images, environments=environments, splits=self.splits), empty

    def _shard(self, files: Files, natural: bool, points: bool, changes: Changes) -> Shard:
        first, last = files[0][1], files[-1][1]
        what = first if first == last else f"{first} … {last}"
        kinds = "" if points or changes.kinds else ", natural pairs"
        return Shard(
            self.name,
            f"{self.path}[{what}]: {len(files)} images{kinds}",
            {
                "kind": "images",
                "root": str(self._root),
                "files": files,
                "natural": natural,
                "points": points,
                "changes": changes.to_json(),
                "seed": self.seed if natural else None,
            },
        )


def take(seen: EmbeddedVersions, gather: Gather, tally: ProblemCounts, *, points: bool) -> bool:
    """Gathers an image as a point, and its pairs with its versions: it weighs one, shared by those that are usable.

    An image whose embedding is not usable goes on as a point, where it is counted; it is told here where there are no
    points.

    Returns:
        Whether the image may stand in further pairs.
    """
    if points:
        gather.point(seen.row, seen.name)
    if not usable(seen.row):
        if not points:
            tally.add(NOT_FINITE if not np.isfinite(seen.row).all() else ZERO, [seen.name])
        return False
    good = usable(seen.versions)
    for version, label in zip(seen.versions, seen.labels, strict=True):
        gather.pair(INTERVENTIONS, seen.row, version, 1 / max(1, good.sum()), f"{seen.name} ({label})")
    return True


def _groups(concepts: Sequence[Files]) -> Iterator[Files]:
    """Consecutive concepts of at most `CONCEPTS` and `LARGE` images; one that is larger stands alone."""
    group: Files = []
    count = 0
    for files in concepts:
        if group and (count == CONCEPTS or len(group) + len(files) > LARGE):
            yield group
            group, count = [], 0
        group, count = group + files, count + 1
    yield group


def _drawn(files: Files, seed: int) -> Files:
    """At most `LARGE` images of one concept, as many of every environment as of the others; as they are listed."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, (_, _, environment, _) in enumerate(files):
        places[environment].append(place)
    each = max(1, LARGE // len(places))
    chosen: list[int] = []
    for environment, have in places.items():
        rng = seeded(seed, "large", files[0][1], environment)
        chosen += rng.choice(have, min(each, len(have)), replace=False).tolist()
    return [files[place] for place in sorted(chosen)]


def _requests(root: Path, files: Files, tally: ProblemCounts) -> Iterator[Request]:
    for place, (file, _, _, listed) in enumerate(files):
        require_unchanged(root / file, listed)
        if listed:
            yield Request(root / file, file, place)
        else:
            tally.add(UNREADABLE, [file])


def _donor(root: Path, files: Files, changes: Changes) -> Donor:
    """Second images from the same shard, of another environment where there is one."""
    there = []
    for file, _, environment, listed in files if changes.needs_donor else ():
        with suppress(OSError):  # it is told where it is decoded
            there += [(sha256_file(root / file), environment, root / file)] if listed else []
    donors = Donors(there)
    return lambda request, digest, label: donors.choose(digest, files[request.place][2], label, changes.seed)


def _pair_up(good: Sequence[EmbeddedVersions], files: Files, seed: int, gather: Gather, tally: ProblemCounts) -> None:
    """Natural pairs of the images that could be embedded, and what has no partner."""
    concepts, concept_names = codes([files[seen.place][1] for seen in good])
    environments, environment_names = codes([files[seen.place][2] for seen in good])
    count = len(good)
    table = EmbeddingTable(
        vectors=np.empty((count, 0)),
        concepts=concepts,
        labels=concepts,
        environments=environments,
        kinds=np.full(count, UNCHANGED),
        origins=np.arange(count),
        concept_names=concept_names,
        label_names=concept_names,
        environment_names=environment_names,
    )
    pairs = natural_pairs(table, seed=seed)
    for first, second, weight in zip(pairs.first, pairs.second, pairs.weights, strict=True):
        one, other = good[first], good[second]
        tie = (int(first), int(second), int(concepts[first]))
        gather.pair(NATURAL, one.row, other.row, float(weight), f"{one.name} | {other.name}", tie)
    seen_in: dict[str, set[str]] = defaultdict(set)
    for seen in good:
        seen_in[files[seen.place][1]].add(files[seen.place][2])
    images = np.bincount(concepts, minlength=len(concept_names))
    lone = [(name, images[code]) for code, name in enumerate(concept_names) if len(seen_in[name]) < 2]
    tally.add(SINGLE, [name for name, number in lone if number == 1])
    tally.add(LONE, [name for name, number in lone if number > 1])


def _below(root: Path, path: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
