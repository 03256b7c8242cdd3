"""The class head of learned templates: every template's evidence, fused, and how unsure the whole is (CDC).

`runtime.evidence` has the formula. Here it is in operators that every engine has, without a loop over templates: one
product of the embedding with all M + 1 banks, then

    x_mk = a_m · τ · cos_mk + c_m - log K,    r_k = Σ_m log(1 + exp x_mk),
    e_k = exp(r_k) - 1,    b_k = e_k / (1 + Σ e),    u = 1 / (1 + Σ e).

What is asked of the arithmetic:
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

from invariclip.export.graphs.ends import append, constant, free_names
from invariclip.manifest import LOGITS, PROBABILITIES, UNCERTAINTY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.manifest import SemanticsFacts

BANK, HEIGHT = "evidence_bank", "evidence_height"
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
    facts: SemanticsFacts,
    logit_scale: float,
    logit_bias: float | None,
) -> None:
    """Puts the head behind `embedding`, where no other stands, and adds its three answers to the graph's outputs.

    logits [batch, K] are the hand-written template's τ · cos (+ bias); probabilities [batch, K] are b_k + u / K;
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
    height = np.array(facts.evidence_bias) - np.log(classes)
    pen = _Pen(graph, embedding)
    flat = np.ascontiguousarray((bank * slope[:, None, None]).reshape(-1, width).T)
    # One product with the scale in the bank and the rest as its bias: at batch 1 reading the bank is what a head costs
    x = pen.op(
        "Gemm", [embedding, pen.value(BANK, flat), pen.value(HEIGHT, np.repeat(height, classes))], "opinions",
        [templates * classes],
    )  # fmt: skip
    logits = _logits(pen, x, classes, float(1 / facts.evidence_scale[0]), float(height[0]), logit_bias or 0.0)
    strength = pen.op("Reshape", [_softplus(pen, x, templates), pen.shape("by_template", [-1, templates, classes])],
                      "by_template_and_class", [templates, classes])  # fmt: skip
    belief, unsure = _fused(pen, strength, classes)
    share = pen.op("Mul", [unsure, pen.value("one_class", 1 / classes)], "share_of_the_unsure", [1])
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


def _logits(pen: _Pen, x: ir.Value, classes: int, ratio: float, height: float, bias: float) -> ir.Value:
    """The hand-written template's own logits: its opinion's height and scale taken out again."""
    first = pen.op(
        "Slice", [x, pen.shape("first_class", [0]), pen.shape("classes", [classes]), pen.shape("class_axis", [1])],
        "hand_written", [classes],
    )  # fmt: skip
    scaled = pen.op("Mul", [first, pen.value("logit_ratio", ratio)], "scaled", [classes])
    return pen.op("Add", [scaled, pen.value("logit_offset", bias - height * ratio)], LOGITS, [classes])


def _softplus(pen: _Pen, x: ir.Value, templates: int) -> ir.Value:
    """log(1 + exp x), by template and class, bounded so that the sum over templates stays in the dtype."""
    width = [x.shape[-1]] if x.shape is not None else []
    highest = float(np.finfo(pen.dtype).max) / (2 * templates)
    y = pen.op("Exp", [pen.op("Neg", [pen.op("Abs", [x], "far", width)], "near", width)], "y", width)
    s = pen.op("Div", [y, pen.op("Add", [y, pen.value("two", 2.0)], "y_plus_2", width)], "s", width)
    square = pen.op("Mul", [s, s], "s_squared", width)
    *lower, series = [pen.value(f"p{power}", number) for power, number in enumerate(log1p_polynomial())]
    for power in reversed(range(len(lower))):
        series = pen.op("Mul", [series, square], f"times_{power}", width)
        series = pen.op("Add", [series, lower[power]], f"plus_{power}", width)
    rest = pen.op("Mul", [series, s], "log1p", width)
    ends = [pen.value("nothing", 0.0), pen.value("highest", highest)]
    return pen.op("Add", [pen.op("Clip", [x, *ends], "positive", width), rest], "softplus", width)


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
        self, operator: str, inputs: Sequence[ir.Value], name: str, shape: Sequence[Any], **attributes: int
    ) -> ir.Value:
        """A node whose one output is [batch, *shape]."""
        return append(self._graph, operator, inputs, self._free(name), [self._batch, *shape], attributes, self._type)

    def value(self, name: str, numbers: float | NDArray[np.float64]) -> ir.Value:
        """A constant of the head's dtype."""
        return constant(self._graph, self._free(name), np.asarray(numbers, dtype=self.dtype))

    def shape(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """An int64 constant."""
        return constant(self._graph, self._free(name), np.asarray(numbers, dtype=np.int64))

    def _free(self, name: str) -> str:
        own = name if name in (LOGITS, PROBABILITIES, UNCERTAINTY) or name.startswith(_PREFIX) else f"{_PREFIX}{name}"
        free_names(self._graph, [own])
        return own
