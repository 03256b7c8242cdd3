"""How far a candidate's embeddings are from the reference's, on the contract's own evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import InputError
from invariclip.export.verification.answers import agreement, invariance_gap

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Reference:
    """What the original checkpoint answers, float64 and of unit length.

    Attributes:
        plain: [N, d] for the evidence images.
        altered: [m, d] for those of `rows`, each under an intervention.
        rows: int64 [m].
        bank: [K, d], the texts that images are matched with.
    """

    plain: NDArray[np.float64]
    altered: NDArray[np.float64]
    rows: NDArray[np.int64]
    bank: NDArray[np.float64]

    def save(self, path: Path) -> None:
        """Writes an .npz."""
        np.savez(path, plain=self.plain, altered=self.altered, rows=self.rows, bank=self.bank)

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(stored["plain"], stored["altered"], stored["rows"], stored["bank"])


def figures(reference: Reference, plain: NDArray[Any], altered: NDArray[Any]) -> dict[str, Any]:
    """The figures of one candidate.

    Args:
        reference: See `Reference`.
        plain: [N, d], the candidate's embeddings of the evidence images.
        altered: [m, d], of the altered ones.

    Returns:
        `cosine_min`, `cosine_mean`, `top1_agreement` (share), `top1_ties`, `gap`, `gap_reference`, `gap_increase`,
        `images`, `texts`, `non_finite`; a figure that is no number is None.

    Raises:
        InputError: The embeddings are not of the reference's shape.
    """
    if plain.shape != reference.plain.shape or altered.shape != reference.altered.shape:
        raise InputError(
            f"embeddings of shape {list(plain.shape)} and {list(altered.shape)} cannot be held against "
            f"{list(reference.plain.shape)} and {list(reference.altered.shape)}; another model's or projection's"
        )
    got = plain.astype(np.float64)
    unit = got / np.maximum(np.linalg.norm(got, axis=1, keepdims=True), 1e-30)
    cosines = (unit * reference.plain).sum(axis=1)
    top1, ties = agreement(reference.plain @ reference.bank.T, unit @ reference.bank.T, 1)
    wanted = invariance_gap(reference.plain[reference.rows], reference.altered)
    gap = invariance_gap(got[reference.rows], altered)
    found = {
        "cosine_min": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "top1_agreement": top1,
        "gap": gap,
        "gap_reference": wanted,
        "gap_increase": gap - wanted,
    }
    return {
        **{name: value if np.isfinite(value) else None for name, value in found.items()},
        "top1_ties": ties,
        "images": len(plain),
        "texts": len(reference.bank),
        "non_finite": int((~np.isfinite(plain)).sum() + (~np.isfinite(altered)).sum()),
    }
