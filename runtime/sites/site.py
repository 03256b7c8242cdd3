"""A site (one camera, shop or style): the shift that its images share, which is removed from their embeddings.

A camera, a light or a style shifts every embedding z of a site in the same way, and with it their mean. From n
unlabelled images of the site, with mean m, and the mean m₀ of the images that were calibrated on,

    z ↦ (z − δ) / |z − δ|,   δ = e / (e + PRIOR) · (m − m₀),   e = min(n, PER_KIND · (k − 1)),

puts the mean where class embeddings, prototypes and probes of the calibrated space expect it. Those stay as they are,
so what is adapted can be compared with all that was embedded before.

What the images show moves the mean as well: of one kind of thing alone it says nothing about the site. So images
count as far as they show different kinds: k is the exponential of the entropy of what they are taken for on average,
before anything is taken away. PRIOR images stand for "nothing has moved". Both numbers, and this form among others,
were chosen on training styles under changes that no projection was fitted on (docs/sites.md).

The shift and what it leaves of an embedding are computed in a fixed order, so that the C++ runtime has the same bits:
float64, sums from the first value to the last, log and exp of the C library, rounded to float32 once at the end.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invariclip.errors import SiteError
from invariclip.files import write_atomically
from invariclip.records import Record


@dataclass(frozen=True)
class SiteFileFacts:
    """What a site's file says beside its sums; the fields of `Site`."""

    name: str
    space_id: str
    images: int
    provenance: dict[str, Any]


SITE_FILE = Record("invariclip.site", "a site", "`invariclip adapt`", 3, 1 << 24, SiteError, SiteFileFacts)
PRIOR = 10.0
"""Images that stand for an unmoved site."""
PER_KIND = 5.0
"""Images that may count for each kind of thing beyond the first."""
KIND_SCALE = 30.0
"""τ of the softmax that says what an image is taken for, whatever the checkpoint's logit_scale."""
LARGEST_SHIFT = 0.95
"""Of unit embeddings: beyond it what is left of one could have any direction."""


@dataclass(frozen=True, eq=False)
class Site:
    """A site, as the sums over its images. Sums add up: a site that was measured in parts can be put together.

    Attributes:
        name: For people.
        space_id: The embedding space that it was measured in.
        images: n, how many were added.
        total: float64 [d], the sum of their unit embeddings.
        taken_for: float64 [K], the sum of what each was taken for among some classes, see `taken_for`.
        training_mean: float64 [d], m₀, of the same space.
        provenance: JSON-ready: where the images came from, the classes, versions.
    """

    name: str
    space_id: str
    images: int
    total: NDArray[np.float64]
    taken_for: NDArray[np.float64]
    training_mean: NDArray[np.float64]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses sums that no unit embeddings have.

        Raises:
            SiteError: A shape, a value or the count is impossible, or the shift leaves nothing.
        """
        if self.total.ndim != 1 or self.total.shape != self.training_mean.shape or not len(self.total):
            raise SiteError(
                "a site has two vectors of one width, not "
                f"{list(self.total.shape)} and {list(self.training_mean.shape)}"
            )
        if type(self.images) is not int or self.images < 0:
            raise SiteError(f"a site's count of images must be a whole number from 0, not {self.images!r}")
        if not (np.isfinite(self.total).all() and np.isfinite(self.training_mean).all()):
            raise SiteError("a site's sums have values that are not finite; measure it again")
        if self.taken_for.ndim != 1 or not len(self.taken_for) or not (self.taken_for >= 0).all():
            raise SiteError("a site's classes have impossible shares; measure it again")
        if abs(float(self.taken_for.sum()) - self.images) > 1e-3 * max(1, self.images):  # a NaN is caught above
            raise SiteError("a site's classes do not add up to its images; measure it again")
        if _length(self.total) > self.images * (1 + 1e-4) or _length(self.training_mean) > 1 + 1e-4:
            raise SiteError("a site's sums are longer than unit embeddings can make them; measure it again")
        length = float(_length(self.shift))
        if length > LARGEST_SHIFT:
            raise SiteError(
                f"the site {self.name!r} lies {length:.2f} from the calibrated images, and {LARGEST_SHIFT} can be "
                "taken away: are these images, and are they prepared for this model?"
            )

    @property
    def width(self) -> int:
        """D."""
        return int(self.total.shape[0])

    @property
    def mean(self) -> NDArray[np.float64]:
        """m, float64 [d]; the training mean where there is no image."""
        return self.total / self.images if self.images else self.training_mean

    @cached_property
    def kinds(self) -> float:
        """k, the number of kinds of things: exp of the entropy of what the images are taken for; 1 or more."""
        shares = self.taken_for / max(1, self.images)
        some = shares[shares > 0]
        logs = np.fromiter(map(math.log, some), np.float64, len(some))  # NumPy's own log differs in the last place
        return math.exp(-float(_sum(some * logs))) if len(some) else 1.0

    @property
    def effective(self) -> float:
        """e, how many images count."""
        return min(float(self.images), PER_KIND * max(0.0, self.kinds - 1))

    @property
    def weight(self) -> float:
        """How much of the way to the training mean is taken back, e / (e + PRIOR), from 0 to 1."""
        return self.effective / (self.effective + PRIOR)

    @property
    def limited(self) -> bool:
        """Whether the images show too few kinds of things for their number."""
        return self.effective < min(self.images, PRIOR)

    @property
    def standard_error(self) -> float:
        """Expected distance of m from the mean of all images that the site could show; infinite below two images.

        Unit vectors with mean m vary by 1 − |m|² in all, whatever they are. Frames of one video say less than as many
        images taken apart, and this does not know.
        """
        if self.images < 2:
            return math.inf
        return math.sqrt(max(0.0, 1 - float(self.mean @ self.mean)) / (self.images - 1))

    @property
    def wanted(self) -> int | None:
        """How many images would measure m − m₀ to a third of its length; None where it is not told from chance."""
        moved = self.mean - self.training_mean
        true = float(moved @ moved) - self.standard_error**2
        varying = 1 - float(self.mean @ self.mean)
        return math.ceil(9 * varying / true) + 1 if true > 0 else None

    @cached_property
    def shift(self) -> NDArray[np.float32]:
        """δ, float32 [d], not to be written to."""
        shift = np.asarray(self.weight * (self.mean - self.training_mean), dtype=np.float32)
        shift.flags.writeable = False
        return shift

    @property
    def digest(self) -> str:
        """sha256 of the space and of the shift's float32 values, little-endian."""
        return hashlib.sha256(self.space_id.encode() + b":" + self.shift.astype("<f4").tobytes()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What it says of itself, JSON-ready."""
        distance = float(np.linalg.norm(self.mean - self.training_mean))
        return {
            "name": self.name, "images": self.images, "kinds": round(self.kinds, 3),
            "weight": round(self.weight, 6), "shift": round(float(np.linalg.norm(self.shift)), 6),
            "distance": round(distance, 6),
            "standard_error": round(self.standard_error, 6) if self.images > 1 else None, "wanted": self.wanted,
            "space_id": self.space_id, "sha256": self.digest,
        }  # fmt: skip

    def adding(self, embeddings: NDArray[np.floating[Any]], bank: NDArray[np.floating[Any]]) -> Site:
        """The site with more images.

        Args:
            embeddings: [N, d], of unit length, of the site's space, without any site's shift.
            bank: [K, d], unit-length embeddings of the site's classes.

        Raises:
            SiteError: They are of another width, not finite or not of unit length.
        """
        require_unit(embeddings, self.width)
        exact = embeddings.astype(np.float64)
        if bank.shape != (len(self.taken_for), self.width):
            raise SiteError(f"the site has {len(self.taken_for)} classes of width {self.width}, not {list(bank.shape)}")
        return replace(
            self,
            images=self.images + len(exact),
            total=self.total + exact.sum(axis=0),
            taken_for=self.taken_for + taken_for(exact, bank).sum(axis=0),
        )

    def apply(self, embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Unit embeddings [N, d] of the site's images with the shift taken away, float32, of unit length again.

        Raises:
            SiteError: They are of another width.
        """
        if embeddings.shape[-1] != self.width:
            raise SiteError(f"the site is of width {self.width}, these embeddings have {embeddings.shape[-1]}")
        return self.exactly(np.asarray(embeddings, dtype=np.float32)).astype(np.float32)

    def exactly(self, embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """The same in float64: what every other way is held against."""
        moved = embeddings.astype(np.float64) - self.shift.astype(np.float64)
        return np.asarray(moved / _length(moved)[..., None])

    def require_space(self, space_id: str, owner: str) -> None:
        """Refuses a site of another space.

        Raises:
            SiteError: It was measured with another checkpoint, projection or preprocessing.
        """
        if self.space_id != space_id:
            raise SiteError(
                f"the site {self.name!r} was measured in space {self.space_id}, and {owner} answers in {space_id}: "
                "measure it again with `invariclip adapt`"
            )


def _sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis, from the first value to the last: `sum` adds in an order that NumPy's build decides."""
    return np.asarray(np.add.accumulate(values, axis=-1)[..., -1])


def _length(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Euclidean, over the last axis, in float64."""
    exact = values.astype(np.float64)
    with np.errstate(over="ignore"):  # infinite: longer than anything
        return np.asarray(np.sqrt(_sum(exact * exact)))


def new_site(
    name: str, space_id: str, training_mean: NDArray[np.float64], classes: int, provenance: dict[str, Any]
) -> Site:
    """A site without images, to add some to.

    Args:
        name: For people.
        space_id: The space of all that will be added.
        training_mean: float64 [d], m₀.
        classes: K, how many classes its images may be taken for.
        provenance: JSON-ready.
    """
    return Site(name, space_id, 0, np.zeros_like(training_mean), np.zeros(classes), training_mean, provenance)


def require_unit(embeddings: NDArray[np.floating[Any]], width: int) -> None:
    """Refuses what no site can be measured from.

    Raises:
        SiteError: They are not [N, width], not finite or not of unit length.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != width:
        raise SiteError(f"the site is of width {width}, these embeddings are {list(embeddings.shape)}")
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    if not np.all(np.abs(lengths - 1) < 1e-2):  # a NaN fails too
        raise SiteError("a site is measured from unit embeddings, and one of these is not")


def taken_for(embeddings: NDArray[np.floating[Any]], bank: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """What images are taken for: softmax_c(KIND_SCALE · cos), float64 [N, K].

    Args:
        embeddings: [N, d], unit length.
        bank: [K, d], unit length.
    """
    logits = KIND_SCALE * (embeddings.astype(np.float64) @ bank.astype(np.float64).T)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def write_site(path: str | os.PathLike[str], site: Site) -> None:
    """Writes `site_bytes` atomically."""
    write_atomically(Path(path), site_bytes(site))


def site_bytes(site: Site) -> bytes:
    """`site.safetensors`: the sums, and the rest as metadata."""
    facts = {"name": site.name, "space_id": site.space_id, "images": site.images, "provenance": site.provenance}
    tensors = {"total": site.total, "taken_for": site.taken_for, "training_mean": site.training_mean}
    exact = {name: np.ascontiguousarray(value, dtype=np.float64) for name, value in tensors.items()}
    return SITE_FILE.to_bytes(exact, facts)


def read_site(path: str | os.PathLike[str]) -> Site:
    """Reads what `write_site` wrote.

    Raises:
        SiteError: The file is missing, too large, damaged, or not a site of this schema.
    """
    sums, facts = SITE_FILE.read(path)
    try:
        if {value.dtype for value in sums.values()} != {np.dtype(np.float64)}:
            SITE_FILE.refuse(path, "its sums are not float64")
        arrays: dict[str, Any] = sums
        return Site(facts.name, facts.space_id, facts.images, **arrays, provenance=facts.provenance)
    except (TypeError, ValueError, OverflowError) as error:
        SITE_FILE.refuse(path, error)
