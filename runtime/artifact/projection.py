"""The invariant projection A_inv: what calibration writes, export folds, and the runtime names spaces by."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invariclip.errors import ProjectionError
from invariclip.files import write_atomically
from invariclip.records import Record


@dataclass(frozen=True)
class ProjectionFileFacts:
    """What a projection's file says beside its arrays; the fields of `Projection`."""

    estimator: str
    strength: float | None
    provenance: dict[str, Any]


PROJECTION_FILE = Record(
    "invariclip.projection", "a projection", "`invariclip calibrate`", 3, 1 << 30, ProjectionError, ProjectionFileFacts
)


@dataclass(frozen=True)
class Projection:
    """A linear map from the encoder's embedding to its invariant part: z ↦ normalise(A_invᵀ z).

    Attributes:
        A_inv: float64 [D, d].
        estimator: `icm`, `generalised`, `shrinkage` or `identity` (calibration found nothing better).
        strength: λ of the estimator, or None where it has none.
        eigenvalues: float64 [D], the estimator's spectrum in descending order of invariance; empty if none.
        provenance: What it came from: checkpoint digest, pairs, seeds, selection curve, versions. JSON-ready.
        training_mean: float64 [d], the mean of the calibrated images' projected unit embeddings, every environment
            counting the same: what a site is measured against (see `site`); empty where no image was embedded.
    """

    A_inv: NDArray[np.float64]
    estimator: str
    strength: float | None = None
    eigenvalues: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    provenance: dict[str, Any] = field(default_factory=dict)
    training_mean: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        """Refuses a matrix that cannot serve as a projection.

        Raises:
            ProjectionError: Not two-dimensional, wider than tall, not finite, or of deficient rank; the eigenvalues are
                no finite vector; or the training mean is of another width, or no mean of unit embeddings.
        """
        if self.A_inv.ndim != 2 or not 1 <= self.A_inv.shape[1] <= self.A_inv.shape[0]:
            raise ProjectionError(f"A_inv has shape {list(self.A_inv.shape)}; it must be [D, d] with 1 ≤ d ≤ D")
        if not np.isfinite(self.A_inv).all():
            raise ProjectionError("A_inv has values that are not finite; calibrate again")
        if np.linalg.matrix_rank(self.A_inv) < self.A_inv.shape[1]:
            raise ProjectionError("A_inv does not have full column rank; calibrate again with a smaller rank")
        if self.eigenvalues.ndim != 1 or not np.isfinite(self.eigenvalues).all():
            raise ProjectionError("the eigenvalues are no vector of finite numbers; calibrate again")
        if self.training_mean.shape not in ((0,), (self.rank,)):
            raise ProjectionError(
                f"the training mean has shape {list(self.training_mean.shape)}, not [{self.rank}]; calibrate again"
            )
        if not np.linalg.norm(self.training_mean) <= 1 + 1e-6:  # a NaN fails too
            raise ProjectionError("the training mean is not one of unit embeddings; calibrate again")

    @property
    def embed_dim(self) -> int:
        """D, the width of the encoder it belongs to."""
        return int(self.A_inv.shape[0])

    @property
    def rank(self) -> int:
        """d, the width that is kept."""
        return int(self.A_inv.shape[1])

    @property
    def digest(self) -> str:
        """sha256 of the shape and the float64 values, little-endian, row by row."""
        head = f"{self.embed_dim}x{self.rank}:".encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.A_inv, dtype="<f8").tobytes()).hexdigest()

    def apply(self, embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Projects [N, D] and scales every row to unit length, in float64 (CLIP-ICM, the predictor).

        Raises:
            ProjectionError: The embeddings have another width.
        """
        if embeddings.shape[-1] != self.embed_dim:
            raise ProjectionError(
                f"the projection is for embeddings of width {self.embed_dim}, these have {embeddings.shape[-1]}"
            )
        projected = embeddings.astype(np.float64) @ self.A_inv
        return np.asarray(projected / np.linalg.norm(projected, axis=-1, keepdims=True))

    def require_width(self, embed_dim: int, owner: str) -> None:
        """Refuses a projection of another width.

        Raises:
            ProjectionError: Its D is not `embed_dim`.
        """
        if self.embed_dim != embed_dim:
            raise ProjectionError(
                f"the projection is for embeddings of width {self.embed_dim}, but {owner} gives {embed_dim}; "
                "calibrate one with this checkpoint"
            )


def identity(embed_dim: int, provenance: dict[str, Any] | None = None) -> Projection:
    """The projection that changes nothing, which calibration writes when nothing beats it."""
    return Projection(np.eye(embed_dim), "identity", provenance=provenance or {})


def write_projection(path: str | os.PathLike[str], projection: Projection) -> None:
    """Writes `projection.safetensors` atomically: A_inv and the spectrum, and the rest as metadata."""
    facts = {
        "estimator": projection.estimator,
        "strength": projection.strength,
        "provenance": projection.provenance,
    }
    tensors = {
        "A_inv": np.ascontiguousarray(projection.A_inv, dtype=np.float64),
        "eigenvalues": np.ascontiguousarray(projection.eigenvalues, dtype=np.float64),
        "training_mean": np.ascontiguousarray(projection.training_mean, dtype=np.float64),
    }
    write_atomically(Path(path), PROJECTION_FILE.to_bytes(tensors, facts))


def read_projection(path: str | os.PathLike[str]) -> Projection:
    """Reads what `write_projection` wrote.

    Raises:
        ProjectionError: The file is missing, too large, damaged, or not a projection of this schema.
    """
    tensors, facts = PROJECTION_FILE.read(path)
    try:
        A_inv, eigenvalues, training_mean = (tensors[name] for name in ("A_inv", "eigenvalues", "training_mean"))
    except KeyError as error:
        PROJECTION_FILE.refuse(path, f"{error} is missing")
    if {A_inv.dtype, training_mean.dtype, eigenvalues.dtype} != {np.dtype(np.float64)} or len(tensors) != 3:
        PROJECTION_FILE.refuse(path, "its arrays are not three of float64")
    return Projection(A_inv, facts.estimator, facts.strength, eigenvalues, facts.provenance, training_mean)
