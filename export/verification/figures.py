"""What is measured of a graph against its reference, and the bounds that it must keep, per level of fidelity."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.artifact.fidelity import Fidelity

SIZES = (1, 2, 5, 17)
"""Batch sizes that are tried by name: odd ones show kernels that round up to a block."""


@dataclass(frozen=True)
class Thresholds:
    """Bounds of one level of fidelity; the defaults are those of `exact`.

    Attributes:
        max_abs_diff: Largest difference of any component of two unit embeddings.
        min_cosine: Smallest cosine between an embedding and its reference.
        min_top1: Share of inputs whose best match is the reference's.
        min_top5: Share of inputs whose five best matches are the reference's.
        max_invariance_gap: Largest growth of the invariance gap over the reference's.
        max_batch_diff: Largest difference of a row's embedding alone and in a batch.
        max_rerun_diff: Largest difference between runs on the same input.
        max_probability_diff: Largest difference of a class probability.
        max_uncertainty_diff: Largest difference of the uncertainty, where learned templates give one.
        max_order_gap: Largest cosine by which a class may be ranked below one that is less like the image.
        max_pixel_levels: Largest difference of the runtime's pixels from open_clip's transform, in levels of 255.
        max_front_levels: Largest difference of the graph's own resize from the runtime's pixels, in levels of 255. The
            form `matmul` stays within 1 and `resize` within 2 (see `front.BOUNDS`); a resize of floats is 14 off.
        min_front_cosine: Smallest cosine between an image through the graph's own resize and its reference.
    """

    max_abs_diff: float = 1e-5
    min_cosine: float = 0.999999
    min_top1: float = 1.0
    min_top5: float = 1.0
    max_invariance_gap: float = 1e-5
    max_batch_diff: float = 1e-5
    max_rerun_diff: float = 0.0
    max_probability_diff: float = 1e-4
    max_uncertainty_diff: float = 1e-4
    max_order_gap: float = 1e-5
    max_pixel_levels: float = 0.0
    max_front_levels: float = 2.0
    min_front_cosine: float = 0.9999


EXACT = Thresholds()
# fmt: off
THRESHOLDS: dict[Fidelity, Thresholds] = {
    # Rounding of float32 alone: the bundled checkpoint measures 1.3e-6 at most, cosine 1 to eight digits.
    "exact": EXACT,
    # Unit vectors of cosine 0.9999 are 0.0141 apart, which bounds each component too.
    "near": Thresholds(
        max_abs_diff=1.5e-2, min_cosine=0.9999, min_top1=0.98, min_top5=0.85, max_invariance_gap=1e-3,
        max_batch_diff=5e-3, max_probability_diff=0.05, max_uncertainty_diff=0.05, max_order_gap=1e-2,
        min_front_cosine=0.9998,
    ),
    # The best match is what serving answers with; the cosine keeps searching in old embeddings sane. An uncalibrated
    # int8 reaches 0.971 with top-1 88 %, which must fail.
    "fast": Thresholds(
        max_abs_diff=1e-1, min_cosine=0.985, min_top1=0.995, min_top5=0.75, max_invariance_gap=1e-2,
        max_batch_diff=3e-2, max_probability_diff=0.2, max_uncertainty_diff=0.2, max_order_gap=3e-2,
        min_front_cosine=0.985,
    ),
}
# fmt: on
"""The bounds that a level has unless the user sets others."""


@dataclass(frozen=True)
class TowerFigures:
    """What was measured of one tower.

    Attributes:
        items: Images or texts.
        max_abs_diff: See `Thresholds`.
        cosine_min: Smallest cosine to the reference.
        cosine_mean: Mean cosine to the reference.
        top1_agreement: Share of inputs whose best match in the bank is the same, ties counted as the same.
        top1_ties: Inputs whose best match differs, but lies within `answers.TIE` of the reference's best.
        top1_of: Rows of the bank that the best matches were sought in.
        non_finite: Values of any float output that are NaN or infinite.
        batch_diff: See `Thresholds`.
        rerun_diff: See `Thresholds`.
        batch_1: Largest difference of any component from the reference, at most 17 first inputs, one at a time.
        batch_2: The same in batches of 2.
        batch_5: The same in batches of 5.
        batch_17: The same in one batch of 17.
        top5_agreement: As top1_agreement, of the set of five best; None where the bank has fewer than six rows.
        top5_ties: Inputs whose five best differ by ties alone.
        probability_diff: See `Thresholds`; None where no classes are baked in.
        uncertainty_diff: See `Thresholds`; None without learned templates.
        order_gap: The largest difference of two cosines of the graph's own embedding with classes that its logits rank
            in the wrong order: weak classes that collapse to one number show here alone. None without classes.
        gap_reference: Mean of 1 - cos between an image and the same under a photometric intervention, by the
            reference; None for texts.
        gap: The same by the candidate.
        gap_increase: gap - gap_reference.
        gap_items: Images that the gap is the mean of.
        pixel_levels: Largest difference of the runtime's pixels from open_clip's transform, in levels of 255; None for
            texts.
        front_levels: Largest difference of the graph's own resize from the runtime's pixels, in levels of 255; None
            where the graph takes prepared images.
        front_cosine: Smallest cosine between an image through the graph's own resize and the reference; None likewise.
    """

    items: int
    max_abs_diff: float
    cosine_min: float
    cosine_mean: float
    top1_agreement: float
    top1_ties: int
    top1_of: int
    non_finite: int
    batch_diff: float
    rerun_diff: float
    batch_1: float = 0.0
    batch_2: float = 0.0
    batch_5: float = 0.0
    batch_17: float = 0.0
    top5_agreement: float | None = None
    top5_ties: int | None = None
    probability_diff: float | None = None
    uncertainty_diff: float | None = None
    order_gap: float | None = None
    gap_reference: float | None = None
    gap: float | None = None
    gap_increase: float | None = None
    gap_items: int | None = None
    pixel_levels: float | None = None
    front_levels: float | None = None
    front_cosine: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures as the manifest stores them; NaN, which JSON lacks, becomes None."""
        nan = [name for name, value in asdict(self).items() if isinstance(value, float) and not np.isfinite(value)]
        return {**asdict(self), **dict.fromkeys(nan)}


# figure: (in words, its bound)
_UPPER = {
    "max_abs_diff": ("max |Δ|", "max_abs_diff"),
    "batch_1": ("max |Δ| in batches of 1", "max_abs_diff"),
    "batch_2": ("max |Δ| in batches of 2", "max_abs_diff"),
    "batch_5": ("max |Δ| in batches of 5", "max_abs_diff"),
    "batch_17": ("max |Δ| in batches of 17", "max_abs_diff"),
    "batch_diff": ("batch consistency, max |Δ|", "max_batch_diff"),
    "rerun_diff": ("run-to-run, max |Δ|", "max_rerun_diff"),
    "probability_diff": ("probability, max |Δ|", "max_probability_diff"),
    "uncertainty_diff": ("uncertainty, max |Δ|", "max_uncertainty_diff"),
    "order_gap": ("ranking of all classes, cosine out of order,", "max_order_gap"),
    "gap_increase": ("invariance gap's increase", "max_invariance_gap"),
    "pixel_levels": ("pixels, max levels from open_clip's transform,", "max_pixel_levels"),
    "front_levels": ("resize in the graph, max levels from the host's pixels,", "max_front_levels"),
}
_LOWER = {
    "cosine_min": ("cosine, min", "min_cosine"),
    "top1_agreement": ("top-1 agreement", "min_top1"),
    "top5_agreement": ("top-5 agreement", "min_top5"),
    "front_cosine": ("resize in the graph, cosine, min,", "min_front_cosine"),
}


def searched(bounds: Thresholds) -> Thresholds:
    """What a search asks of its own images, so that what it finds keeps `bounds` on others: half of the misses.

    A search stops at the fastest that passes, so at the bound itself, and that fails on other images half the time.
    """
    return replace(bounds, min_top1=(1 + bounds.min_top1) / 2)


def failures(tower: str, figures: TowerFigures, bounds: Thresholds) -> dict[str, str]:
    """Every bound that a tower's figures break.

    Args:
        tower: `image` or `text`, for the words.
        figures: What was measured.
        bounds: What must be kept. A figure that is NaN breaks its bound; one that is None has none to break.

    Returns:
        The broken figure's name to a line that says its value, its bound and by how much it is off.
    """
    broken: dict[str, str] = {}
    if figures.non_finite:
        broken["non_finite"] = f"{tower} answers {figures.non_finite} values that are NaN or infinite"
    # `not value <= bound` and not `value > bound`: a NaN must fail
    for key, (words, name) in _UPPER.items():
        value, bound = getattr(figures, key), getattr(bounds, name)
        if value is not None and not value <= bound:
            off = "" if np.isnan(value) else f", by {value - bound:.3g}"
            broken[key] = f"{tower} {words} {value:.3g} is above {bound:.3g}{off}"
    for key, (words, name) in _LOWER.items():
        value, bound = getattr(figures, key), getattr(bounds, name)
        if value is not None and not value >= bound:
            off = "" if np.isnan(value) else f", by {bound - value:.3g}"
            broken[key] = f"{tower} {words} {value:.7g} is below {bound:.7g}{off}"
    if "max_abs_diff" in broken:  # the same fault again, at every batch size
        broken = {key: line for key, line in broken.items() if key not in {f"batch_{size}" for size in SIZES}}
    return broken


def probabilities(cosines: NDArray[np.float64], logit_scale: float, logit_bias: float | None) -> NDArray[np.float64]:
    """Cosines [N, K] to class probabilities [N, K] in float64: softmax, or a sigmoid per class where there is a bias.

    p(c|x) = softmax_c(τ · cos) is CLIP-ICM's predictor; SigLIP's is sigmoid(τ · cos + b).
    """
    scores = cosines * logit_scale
    if logit_bias is not None:
        return np.asarray(1 / (1 + np.exp(-(scores + logit_bias))))
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def max_diff(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Largest |difference|; NaN if either side has one."""
    with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, and that is the answer
        return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())
