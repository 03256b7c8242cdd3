"""The class head of learned templates: every template's evidence, fused, and how unsure the whole is (CDC).

`invariclip.uncertainty` has the formula. Here it is in operators that every engine has, without a loop over templates:
one product of the embedding with all M + 1 banks, q_mk = a_m · τ · cos_mk, then with k* the best class of template m
and g_m = a_m · τ · r_m its background

    s_m = log Σ_{k ≠ k*} exp q_mk,    x_mk = q_mk - log(1 + exp(s_m - q_mk*)) - log(exp s_m + exp g_m) + c_m,
    r_k = Σ_m log(1 + exp x_mk),    e_k = exp(r_k) - 1,    b_k = e_k / (1 + Σ e),    u = 1 / (1 + Σ e).

What is asked of the arithmetic:
- What a template's logits have in common falls out of its softmax. So the mean class is taken from each bank
  beforehand: what is left is small, and half precision rounds it ten times less. One more column a template is that
  mean, for the background and for the hand-written logits.
- The rivals are summed without the best class: 1 - P itself would be nothing but rounding where P is nearly 1.
- Little evidence for each of a thousand classes adds up, so log(1 + y) must not be Log(1 + y), which is 0 where y is
  below the dtype's step. It is 2 · atanh(s) with s = y / (2 + y), which is 1/3 at most, by a polynomial in s². Likewise
  1 - exp(-r) is 2t / (1 + t) with t = tanh(r / 2).
- Much evidence must not overflow: the largest r is taken out before anything is exponentiated.
- The sum over templates is taken as it is. Taking each template's best class out first rounds small evidence to the
  step of the best: in float16 that was 4 to 60 times further off than the plain sum, wherever templates disagree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.polynomial import Chebyshev, Polynomial

from invariclip.artifact.manifest import LOGITS, PROBABILITIES, UNCERTAINTY
from invariclip.export.graphs.nodes import append, free_names, initializer
from invariclip.uncertainty import MOST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import LearnedPromptsFacts

BANK, HEIGHT, BACKGROUND = "evidence_bank", "evidence_height", "evidence_background"
_PREFIX = "evidence_"
DEGREE = 4
"""Of the polynomial in s² for atanh(s) / s on [0, 1/9]; its relative error is below 4e-8, which float32 cannot tell."""
_DTYPES: dict[ir.DataType, type[np.float32 | np.float16]] = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
}


def attach(
    graph: ir.Graph,
    embedding: ir.Value,
    bank: NDArray[np.float64],
    facts: LearnedPromptsFacts,
    logit_scale: float,
    logit_bias: float | None,
) -> None:
    """Puts the head behind `embedding`, where no other stands, and adds its three answers to the graph's outputs.

    logits [batch, K] are the hand-written template's τ · cos (+ bias); probabilities [batch, K] are b + u · p,
    p the hand-written template's softmax at its evidence's scale;
    uncertainty is [batch]. The whole head is in the embedding's dtype, float32 or float16.

    Args:
        graph: Changed in place.
        embedding: [batch, d].
        bank: Unit class embeddings by template, float64 [M + 1, K, d].
        facts: How a template's cosines become evidence.
        logit_scale: Temperature τ, already exponentiated.
        logit_bias: Added to the logits alone (SigLIP); evidence has `evidence_bias` instead. Or None.
    """
    templates, classes, width = bank.shape
    slope = np.array(facts.evidence_scale) * logit_scale
    mean = bank.mean(axis=1)
    pen = _Pen(graph, embedding)
    own = ((bank - mean[:, None]) * slope[:, None, None]).reshape(-1, width)
    flat = np.ascontiguousarray(np.concatenate([own, mean * slope[:, None]]).T)
    # One product with the scale in the bank: at batch 1 reading the bank is what a head costs
    cells = templates * classes
    product = pen.op("MatMul", [embedding, pen.value(BANK, flat)], "product", [cells + templates])
    logits = _logits(pen, product, cells, classes, facts.evidence_scale[0], logit_bias)
    q = pen.op("Reshape", [pen.cut(product, 0, cells, "opinions"), pen.shape("by_template", [-1, templates, classes])],
               "q", [templates, classes])  # fmt: skip
    means = pen.op("Reshape", [pen.cut(product, cells, cells + templates, "means"),
                               pen.shape("each_template", [-1, templates, 1])], "q_mean", [templates, 1])  # fmt: skip
    level = pen.value(BACKGROUND, (slope * np.array(facts.background))[:, None])
    behind = pen.op("Sub", [level, means], "behind_all", [templates, 1])
    x, base_rate = _evidence(pen, q, behind, np.array(facts.evidence_bias), templates, classes)
    strength = _softplus(pen, x, [templates, classes], float(np.finfo(pen.dtype).max) / (2 * templates))
    belief, unsure = _fused(pen, strength, classes)
    share = pen.op("Mul", [base_rate, unsure], "share_of_the_unsure", [classes])
    probabilities = pen.op("Add", [belief, share], PROBABILITIES, [classes])
    uncertainty = pen.op("Reshape", [unsure, pen.shape("one_each", [-1])], UNCERTAINTY, [])
    graph.outputs.extend([logits, probabilities, uncertainty])


def log1p_polynomial() -> NDArray[np.float64]:
    """Coefficients p of log(1 + y) = s · Σ p_i s^(2i), s = y / (2 + y), for y from 0 to 1; the lowest power first."""

    def twice_atanh_over(square: NDArray[np.float64]) -> NDArray[np.float64]:
        root = np.sqrt(square)
        return np.asarray(2 * np.arctanh(root) / root)

    # Interpolated at Chebyshev's nodes, none of which is 0
    return np.asarray(Chebyshev.interpolate(twice_atanh_over, DEGREE, domain=[0, 1 / 9]).convert(kind=Polynomial).coef)


def _logits(pen: _Pen, product: ir.Value, end: int, classes: int, scale: float, bias: float | None) -> ir.Value:
    """The hand-written template's own logits: what all classes have in common put back, and its scale taken out."""
    common = pen.cut(product, end, end + 1, "common")
    scaled = pen.op("Add", [pen.cut(product, 0, classes, "hand_written"), common], "scaled", [classes])
    if bias is None:
        return pen.op("Mul", [scaled, pen.value("logit_ratio", 1 / scale)], LOGITS, [classes])
    plain = pen.op("Mul", [scaled, pen.value("logit_ratio", 1 / scale)], "unbiased", [classes])
    return pen.op("Add", [plain, pen.value("logit_bias", bias)], LOGITS, [classes])


def _evidence(
    pen: _Pen, q: ir.Value, background: ir.Value, bias: NDArray[np.float64], templates: int, classes: int
) -> tuple[ir.Value, ir.Value]:
    """Log of a template's evidence for a class less log K, [batch, M + 1, K]; template 0's softmax, [batch, K]."""
    whole, each = [templates, classes], [templates, 1]
    last = pen.shape("class_axis", [-1])
    top = pen.op("ReduceMax", [q, last], "top", each, keepdims=1)
    place = pen.op("ArgMax", [q], "best_class", each, dtype=ir.DataType.INT64, axis=-1, keepdims=1)
    is_best = pen.op("Equal", [place, pen.shape("class_numbers", range(classes))], "is_best", whole,
                     dtype=ir.DataType.BOOL)  # fmt: skip
    # Far below any rival: a single class has the background alone
    lowest = pen.value("far_below", -float(np.finfo(pen.dtype).max) / 4)
    rivals = pen.op("Where", [is_best, lowest, q], "rivals", whole)
    second = pen.op("ReduceMax", [rivals, last], "second", each, keepdims=1)
    near = pen.op("Exp", [pen.op("Sub", [rivals, second], "behind_second", whole)], "near_second", whole)
    crowd = pen.op("Log", [pen.op("ReduceSum", [near, last], "rivals_sum", each, keepdims=1)], "rivals_log", each)
    against = pen.op("Add", [second, crowd], "against", each)
    chance = _softplus(pen, pen.op("Sub", [against, top], "odds_against", each), each, MOST, "odds_")
    beyond = _softplus(pen, pen.op("Sub", [against, background], "over_background", each), each, MOST, "all_")
    everything = pen.op("Add", [background, beyond], "against_all", each)
    lead = pen.op("Sub", [top, everything], "lead", each)
    held = pen.value(HEIGHT, np.clip(bias, -MOST, MOST)[:, None])
    height = pen.op("Add", [pen.op("Sub", [lead, chance], "lead_and_chance", each), held], "height_unbounded", each)
    bounded = pen.op("Clip", [height, pen.value("lowest_height", -MOST), pen.value("highest_height", MOST)],
                     "height_bounded", each)  # fmt: skip
    behind = pen.op("Sub", [q, top], "behind_top", whole)
    first = [pen.cut(rows, 0, 1, f"first_{name}", [1, width]) for rows, name, width in (
        (behind, "behind", classes), (chance, "chance", 1))]  # fmt: skip
    softmax = pen.op("Exp", [pen.op("Sub", first, "first_log", [1, classes])], "first_softmax", [1, classes])
    base_rate = pen.op("Reshape", [softmax, pen.shape("by_class", [-1, classes])], "base_rate", [classes])
    return pen.op("Add", [behind, bounded], "x", whole), base_rate


def _softplus(pen: _Pen, x: ir.Value, shape: list[int], highest: float, prefix: str = "") -> ir.Value:
    """log(1 + exp x), at most `highest` and log 2."""

    def name(plain: str) -> str:
        return prefix + plain

    y = pen.op("Exp", [pen.op("Neg", [pen.op("Abs", [x], name("far"), shape)], name("near"), shape)], name("y"), shape)
    s = pen.op("Div", [y, pen.op("Add", [y, pen.value(name("two"), 2.0)], name("y_plus_2"), shape)], name("s"), shape)
    square = pen.op("Mul", [s, s], name("s_squared"), shape)
    *lower, series = [pen.value(name(f"p{power}"), number) for power, number in enumerate(log1p_polynomial())]
    for power in reversed(range(len(lower))):
        series = pen.op("Mul", [series, square], name(f"times_{power}"), shape)
        series = pen.op("Add", [series, lower[power]], name(f"plus_{power}"), shape)
    rest = pen.op("Mul", [series, s], name("log1p"), shape)
    ends = [pen.value(name("nothing"), 0.0), pen.value(name("highest"), highest)]
    return pen.op("Add", [pen.op("Clip", [x, *ends], name("positive"), shape), rest], name("softplus"), shape)


def _fused(pen: _Pen, strength: ir.Value, classes: int) -> tuple[ir.Value, ir.Value]:
    """Belief [batch, K] and uncertainty [batch, 1], from log(1 + e / K) by template and class."""
    first, last = pen.shape("template_axis", [1]), pen.shape("last_axis", [-1])
    r = pen.op("ReduceSum", [strength, first], "together", [classes], keepdims=0)
    best = pen.op("ReduceMax", [r, last], "best", [1], keepdims=1)
    behind = pen.op("Exp", [pen.op("Sub", [r, best], "behind", [classes])], "behind_exp", [classes])
    half = pen.op("Tanh", [pen.op("Mul", [r, pen.value("half", 0.5)], "half_of_it", [classes])], "t", [classes])
    above = pen.op("Add", [half, pen.value("one", 1.0)], "t_plus_1", [classes])
    gained = pen.op("Mul", [pen.op("Div", [half, above], "half_gained", [classes]), pen.value("twice", 2.0)],
                    "gained", [classes])  # fmt: skip
    share = pen.op("Mul", [behind, gained], "share", [classes])
    nothing = pen.op("Exp", [pen.op("Neg", [best], "minus_best", [1])], "no_evidence", [1])
    total = pen.op("Add", [pen.op("ReduceSum", [share, last], "all_shares", [1], keepdims=1), nothing], "total", [1])
    return pen.op("Div", [share, total], "belief", [classes]), pen.op("Div", [nothing, total], "unsure", [1])


class _Pen:
    """Writes the head's nodes and constants, all in one dtype, under names that nothing else in the graph has."""

    def __init__(self, graph: ir.Graph, embedding: ir.Value) -> None:
        self._graph = graph
        self._batch = embedding.shape[0] if embedding.shape is not None else "batch"
        self._type = embedding.dtype or ir.DataType.FLOAT
        self.dtype = _DTYPES[self._type]

    def op(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: Sequence[Any],
        dtype: ir.DataType | None = None,
        **attributes: int,
    ) -> ir.Value:
        """A node whose one output is [batch, *shape], of the head's dtype if not another."""
        kind = dtype or self._type
        return append(self._graph, operator, inputs, self._free(name), [self._batch, *shape], kind, **attributes)

    def cut(self, rows: ir.Value, start: int, end: int, name: str, shape: Sequence[int] | None = None) -> ir.Value:
        """From `start` to `end` along the axis behind the batch; what is left is of `shape`, or all there is."""
        bounds = [self.shape(f"{name}_{what}", [at]) for what, at in (("from", start), ("to", end), ("axis", 1))]
        return self.op("Slice", [rows, *bounds], name, shape or [end - start])

    def value(self, name: str, numbers: float | NDArray[np.float64]) -> ir.Value:
        """A constant of the head's dtype."""
        return initializer(self._graph, self._free(name), np.asarray(numbers, dtype=self.dtype))

    def shape(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """An int64 constant."""
        return initializer(self._graph, self._free(name), np.asarray(numbers, dtype=np.int64))

    def _free(self, name: str) -> str:
        own = name if name in (LOGITS, PROBABILITIES, UNCERTAINTY) or name.startswith(_PREFIX) else f"{_PREFIX}{name}"
        free_names(self._graph, [own])
        return own
