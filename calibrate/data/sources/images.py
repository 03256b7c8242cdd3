"""Images of a manifest or a folder as a source: points, natural pairs, pairs with changed versions.

A shard holds whole concepts, so that every natural pair lies in one shard, and the shards add up to what
`pairs.fitted_moments` makes of the same images in memory. Only a concept of more than `LARGE` images is cut: its
natural pairs are a shard of their own, drawn from at most `LARGE` of its images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
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
    NOT_FINITE,
    SINGLE_OF_CLASS,
    UNREADABLE,
    ZERO,
    count_unpaired,
)
from invariclip.calibrate.data.stream.blocks import (
    BLOCK_ROWS,
    INTERVENTIONS,
    NATURAL,
    BlockBuilder,
    Shard,
    require_encoder,
    stamp,
    unchanged,
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
"""Of every image: path below the root, concept, environment, stamp (see `blocks.stamp`)."""


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
    """A manifest or a folder of images (see `data.images.read_images`).

    Attributes:
        name: See `PairSource`.
        path: The manifest or the folder.
        weight: See `PairSource`.
        environments: The environments to take; None takes all.
        splits: The splits to take; None takes all.
        natural: Pair images of one concept in two environments.
        changes: Pair every image with changed versions of itself.
        points: Take the images as points.
        seed: Draws natural pairs where a concept has very many.
        allow_outside: Accept a manifest whose paths leave its folder.
        pairs_by: What makes images of a folder one concept, see `data.images.read_images`.
        layout: A set of DomainBed by name, whose folder `path` is (see `data.domainbed`); empty for any other.
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
    needs_encoder = True

    def shards(self) -> list[Shard]:
        """Whole concepts, in the order in which they are listed.

        Raises:
            InputError: The manifest or folder cannot be used, or there is nothing to take from it.
        """
        require_something(self.name, self.natural, self.changes, self.points)
        images, empty = self._images()
        concepts: dict[str, Files] = defaultdict(list)
        for image in images:
            place = _below(self._root, image.path)
            concepts[image.concept].append([place, image.concept, image.environment, stamp(image.path)])
        shards: list[Shard] = []
        for group in _groups(list(concepts.values())):
            if len(group) <= LARGE:
                shards.append(self._shard(group, self.natural, self.points, self.changes))
                continue
            if self.natural:
                shards.append(self._shard(_drawn(group, self.seed), True, False, NO_CHANGES))
            if self.points or self.changes.kinds:
                parts = [group[start : start + LARGE] for start in range(0, len(group), LARGE)]
                shards += [self._shard(part, False, self.points, self.changes) for part in parts]
        classes = Counter(image.name for image in images)
        problems = {"empty": empty, "single": sorted(name for name, number in classes.items() if number == 1)}
        if any(problems.values()):  # those of the whole set are counted with its first shard
            shards[0] = replace(shards[0], spec={**shards[0].spec, **problems})
        return shards

    def read(self, shard: Shard, encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
        """Points, natural pairs and interventions of a shard's concepts (see `PairSource`).

        Raises:
            InputError: There is no encoder, or a file has changed since it was listed.
        """
        encoder, spec = require_encoder(self.name, encoder), shard.spec
        tally.add(EMPTY, spec.get("empty", ()))
        tally.add(SINGLE_OF_CLASS, spec.get("single", ()))
        files, root = spec["files"], Path(spec["root"])
        changes = self.changes if spec["changes"] else NO_CHANGES
        with unchanged((root / file, file_stamp) for file, _, _, file_stamp in files):
            yield from self._blocks(shard, encoder, tally, changes)

    def _blocks(self, shard: Shard, encoder: Encoder, tally: ProblemCounts, changes: Changes) -> Iterator[RowBlock]:
        spec, root = shard.spec, Path(shard.spec["root"])
        files = spec["files"]
        blocks, good = BlockBuilder(), list[EmbeddedVersions]()
        environments = Environments(environment for _, _, environment, _ in files)
        requests, donor = _requests(root, files, tally), _donor(root, files, changes)
        for image in encode_images(encoder, requests, tally, changes=changes, donor=donor):
            if take(image, blocks, tally, points=spec["points"]):
                environments.add(files[image.place][2], image.row)
                good += [image] if spec["natural"] else []
            yield from blocks.full()
        # otherwise these are only the natural pairs of a concept whose images are counted with other shards
        if spec["points"] == self.points:
            environments.tell(tally)
        if spec["natural"]:
            _pair_up(good, files, self.seed, blocks, tally)
        yield from blocks.rest()

    @property
    def _root(self) -> Path:
        where = Path(self.path)
        return where if where.is_dir() else where.parent

    def _images(self) -> tuple[list[ImageRecord], list[str]]:
        """The images to take, and the environments that a folder names and that hold none."""
        if self.layout:
            images = read_layout(find_layout(self.layout), self.path)  # whole, or it raises
            return keep(images, environments=self.environments, splits=self.splits), []
        images = read_images(self.path, allow_outside=self.allow_outside, pairs_by=self.pairs_by)
        empty: list[str] = []
        if Path(self.path).is_dir():
            used = {image.environment for image in images}
            folders = sorted(entry.name for entry in Path(self.path).iterdir() if entry.is_dir())
            chosen = folders if self.environments is None else self.environments
            empty = [name for name in folders if name in chosen and name not in used and not name.startswith(".")]
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


def require_something(source: str, natural: bool, changes: Changes, points: bool) -> None:
    """Makes sure that a source is to give points or pairs.

    Raises:
        InputError: It is not.
    """
    if not (natural or changes.kinds or points):
        raise InputError(f"{source}: neither points nor natural pairs nor interventions are to be taken")


def take(image: EmbeddedVersions, blocks: BlockBuilder, tally: ProblemCounts, *, points: bool) -> bool:
    """Adds an image as a point, and its pairs with its versions: it weighs one, shared by those that are usable.

    An image whose embedding is not usable is counted where points are summed up, or here where there are no points.

    Returns:
        Whether the image may stand in further pairs.
    """
    if points:
        blocks.point(image.row, image.name)
    if not usable(image.row):
        if not points:
            tally.add(NOT_FINITE if not np.isfinite(image.row).all() else ZERO, [image.name])
        return False
    good = usable(image.versions)
    for version, label in zip(image.versions, image.labels, strict=True):
        blocks.pair(INTERVENTIONS, image.row, version, 1 / max(1, good.sum()), f"{image.name} ({label})")
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
    for place, (file, _, _, file_stamp) in enumerate(files):
        if file_stamp:
            yield Request(root / file, file, place)
        else:
            tally.add(UNREADABLE, [file])


def _donor(root: Path, files: Files, changes: Changes) -> Donor:
    """Second images from the same shard, of another environment where there is one."""
    candidates = []
    for file, _, environment, file_stamp in files if changes.needs_donor else ():
        with suppress(OSError):  # it is counted where it is decoded
            candidates += [(sha256_file(root / file), environment, root / file)] if file_stamp else []
    donors = Donors(candidates)
    return lambda request, digest, label: donors.choose(digest, files[request.place][2], label, changes.seed)


def _pair_up(
    good: Sequence[EmbeddedVersions], files: Files, seed: int, blocks: BlockBuilder, tally: ProblemCounts
) -> None:
    """Natural pairs of the images that could be embedded, and what has no partner."""
    concepts, concept_names = codes([files[image.place][1] for image in good])
    environments, environment_names = codes([files[image.place][2] for image in good])
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
        blocks.pair(NATURAL, one.row, other.row, float(weight), f"{one.name} | {other.name}", tie)
    count_unpaired(table, tally)


def _below(root: Path, path: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
