"""Which products may be int8: all of them, or all but as few as the contract needs back in float32.

Greedy by sensitivity: every group of products that read one value is made int8 alone, and what that costs in cosine is
set against the work it saves. If int8 everywhere breaks the contract, groups go back in that order, and the fewest
that make it pass are found by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from invariclip.console import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from invariclip.console import Progress
    from invariclip.export.quantization.products import Product
    from invariclip.export.verification.figures import TowerFigures


@dataclass(frozen=True)
class SharedInput:
    """Products that read one value, and so share its eight bits.

    Attributes:
        value: Its name.
        products: Those products.
        work: Their multiplications for one row.
    """

    value: str
    products: tuple[Product, ...]
    work: int


@dataclass(frozen=True)
class Mix:
    """What was found.

    Attributes:
        chosen: The groups that are int8; empty if even one alone breaks the contract.
        back: Those that went back to float32, the most harmful first.
        figures: Of the chosen mix; None if none passes.
        costs: Value to the cosine that its group costs alone (1 - the mean cosine); empty where nothing had to go back.
        trials: Each mix that was tried: how many groups went back, and what it broke.
    """

    chosen: tuple[SharedInput, ...]
    back: tuple[SharedInput, ...]
    figures: TowerFigures | None
    costs: dict[str, float]
    trials: tuple[dict[str, Any], ...]

    @property
    def share(self) -> float:
        """Share of the products' work that is int8."""
        whole = sum(group.work for group in (*self.chosen, *self.back))
        return sum(group.work for group in self.chosen) / whole if whole else 0.0

    def to_json(self) -> dict[str, Any]:
        """The report: what went back, why, and what was tried."""
        return {
            "int8_share": self.share,
            "float32": [{"value": g.value, "products": [s.node for s in g.products]} for g in self.back],
            "cosine_cost_alone": self.costs,
            "trials": list(self.trials),
        }


def groups_of(products: Sequence[Product], work: Callable[[Product], int]) -> list[SharedInput]:
    """Products by the value that they read, in order."""
    by_value: dict[str, list[Product]] = {}
    for product in products:
        by_value.setdefault(product.value, []).append(product)
    return [SharedInput(value, tuple(found), sum(map(work, found))) for value, found in by_value.items()]


def mix(
    groups: Sequence[SharedInput],
    ask: Callable[[Sequence[SharedInput]], TowerFigures],
    broken: Callable[[TowerFigures], list[str]],
    *,
    cost_of: Callable[[Sequence[SharedInput]], float] | None = None,
    progress: Progress = silent,
) -> Mix:
    """Finds the mix.

    Args:
        groups: What could be int8.
        ask: The contract's figures of a graph in which these groups are int8.
        broken: What figures break, in words.
        cost_of: 1 - mean cosine of a graph in which these groups are int8; None takes it from `ask`.
        progress: `console.bar` or `console.silent`.
    """
    trials: list[dict[str, Any]] = []

    def tried(chosen: Sequence[SharedInput]) -> tuple[TowerFigures, bool]:
        figures = ask(chosen)
        lines = broken(figures)
        trials.append(
            {"float32_groups": len(groups) - len(chosen), "cosine_min": figures.cosine_min,
             "top1_agreement": figures.top1_agreement, "broken": lines}
        )  # fmt: skip
        return figures, not lines

    figures, passed = tried(groups)
    if passed or not groups:
        return Mix(tuple(groups), (), figures, {}, tuple(trials))
    loss = cost_of or (lambda chosen: 1 - ask(chosen).cosine_mean)
    costs = {group.value: loss([group]) for group in progress(list(groups), total=len(groups), desc="sensitivity")}
    order = sorted(groups, key=lambda group: -costs[group.value] / group.work)
    best: tuple[int, TowerFigures] | None = None
    low, high = 1, len(groups) - 1  # how many go back
    while low <= high:
        middle = (low + high) // 2
        figures, passed = tried(_without(groups, order[:middle]))
        if passed:
            best, high = (middle, figures), middle - 1
        else:
            low = middle + 1
    if best is None:
        return Mix((), tuple(order), None, costs, tuple(trials))
    back = order[: best[0]]
    return Mix(tuple(_without(groups, back)), tuple(back), best[1], costs, tuple(trials))


def _without(groups: Sequence[SharedInput], back: Sequence[SharedInput]) -> list[SharedInput]:
    gone = {group.value for group in back}
    return [group for group in groups if group.value not in gone]
