"""Variants that an artifact may have beside float32: what they are called, and how their files are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import onnx_ir as ir

from invariclip.errors import ContractError, InputError
from invariclip.export.graphs.token_merging import image_shape
from invariclip.export.graphs.writing import write_graph
from invariclip.export.quantization import other_quantizers
from invariclip.export.quantization.float16 import LADDER, halve, to_float16
from invariclip.export.quantization.mixed import groups_of, mix
from invariclip.export.quantization.products import flops, products_of
from invariclip.export.quantization.qdq import (
    QuantizationRecipe,
    quantise,
    ranges_of,
    rounded,
    smoothable,
    to_symmetric,
)
from invariclip.export.quantization.ranges import flows_of
from invariclip.export.quantization.token_search import fewest_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Compute
    from invariclip.console import Progress
    from invariclip.export.quantization.float16 import Islands
    from invariclip.export.quantization.mixed import Mix, SharedInput
    from invariclip.export.quantization.qdq import Rounded
    from invariclip.export.verification.figures import TowerFigures
    from invariclip.export.verification.verify import GraphTrials

SMOOTHING = (None, 0.5)
"""SmoothQuant's α in the recipes that are tried, each with clipped ranges and without: which is best differs."""
Method = Literal["none", "float16", "islands", "mixed", "symmetric", "dynamic", "static", "nncf"]


Finish: TypeAlias = "Callable[[ir.Model], None]"
"""What is done to a graph after its groups are in int8."""
Write: TypeAlias = "Callable[[Sequence[SharedInput]], None]"
"""Writes the graph with these groups in int8."""


@dataclass(frozen=True)
class VariantKind:
    """How a variant comes about.

    Attributes:
        method: What is done to the image graph: `float16` stores weights so and `islands` computes so (see
            `float16`); `mixed` is our own int8 (see `qdq`, `mixed`) and `symmetric` the same as TensorRT takes it;
            `dynamic` and `static` are ONNX Runtime's, `nncf` is NNCF's.
        precision: What the manifest says that they are in then.
        compute: What the engine may compute the rest in.
        fewer_tokens: Whether similar patch tokens are merged on the way.
        text_islands: Whether the text graph computes in float16 too, with islands.
    """

    method: Method
    precision: str
    compute: Compute = "float32"
    fewer_tokens: bool = False
    text_islands: bool = False


KINDS: dict[str, VariantKind] = {
    "bfloat16": VariantKind("none", "float32", "bfloat16"),
    "float16": VariantKind("float16", "float16"),
    "float16-islands": VariantKind("islands", "float16", text_islands=True),
    "int8": VariantKind("mixed", "int8"),
    "int8-bfloat16": VariantKind("mixed", "int8", "bfloat16"),
    "int8-symmetric": VariantKind("symmetric", "int8", text_islands=True),
    "int8-dynamic": VariantKind("dynamic", "int8"),
    "int8-static": VariantKind("static", "int8"),
    "int8-nncf": VariantKind("nncf", "int8"),
    "tokens": VariantKind("none", "float32", fewer_tokens=True),
    "tokens-bfloat16": VariantKind("none", "float32", "bfloat16", fewer_tokens=True),
    "tokens-int8": VariantKind("mixed", "int8", fewer_tokens=True),
    "tokens-int8-bfloat16": VariantKind("mixed", "int8", "bfloat16", fewer_tokens=True),
}
"""What `--variant` knows."""


def require_kinds(names: Iterable[str]) -> None:
    """Makes sure that every variant is known, before minutes of work.

    Raises:
        InputError: One is not.
    """
    for name in names:
        if name not in KINDS:
            raise InputError(f"no variant is called {name!r}; available: {', '.join(KINDS)}")


@dataclass(frozen=True)
class VariantInputs:
    """What making a variant needs.

    Attributes:
        calibration: Gives the calibration images anew at every call: uint8 [n, H, W, 3], batch by batch.
        trials: The contract to ask while looking for a mix.
        backend: The engine that is asked.
        threads: Its threads.
        progress: `console.bar` or `console.silent`.
    """

    calibration: Callable[[], Iterable[NDArray[np.uint8]]]
    trials: GraphTrials
    backend: str
    threads: int | None
    progress: Progress

    def make(self, method: Method, source: Path, target: Path) -> dict[str, Any]:
        """Writes one image graph in another precision.

        Args:
            method: See `VariantKind`; not `none`.
            source: The float32 graph.
            target: The file to write.

        Returns:
            A report for the manifest.

        Raises:
            ContractError: Nothing could be quantised, or no mix keeps the contract.
            MissingExtraError: The library that the method needs is not installed.
        """
        if method == "float16":
            model = ir.load(source)
            count = halve(model)
            write_graph(model, target)
            return {"method": method, "weights": count}
        if method == "islands":
            return {"method": method, **self._islands(source, target)}
        if method in ("mixed", "symmetric"):
            return {"method": method, **self._mixed(source, target, _for_tensorrt if method == "symmetric" else None)}
        if method == "dynamic":
            other_quantizers.dynamic(source, target)
        elif method == "static":
            other_quantizers.static(source, target, self.calibration())
        else:
            other_quantizers.nncf(source, target, self.calibration())
        return {"method": method}

    def thin(self, target: Path, trace: Callable[[Sequence[int], Path], None]) -> list[str]:
        """Writes the float32 image graph with the fewest tokens that keep the contract on the calibration images.

        Args:
            target: The file to write.
            trace: Writes the image graph with so many tokens after each block.

        Returns:
            What was tried, for the manifest.

        Raises:
            InputError: The tower's tokens cannot be merged.
            ContractError: No schedule keeps the contract.
        """

        def ask(schedule: Sequence[int]) -> TowerFigures:
            trace(schedule, target)
            return self._figures(target)

        search = fewest_tokens(image_shape(self.trials.job.checkpoint), ask, self.trials.bounds)
        if search.best is None:
            raise ContractError(search.lines()[1] if search.nearest else "no schedule of tokens saves anything")
        trace(search.best.schedule, target)
        return search.lines()

    def _islands(self, source: Path, target: Path) -> dict[str, Any]:
        """float16 with as few islands as the contract allows."""
        broken: list[str] = []
        for name, keep in LADDER:
            islands = write_islands(source, target, keep)
            broken = list(self.trials.broken(self._figures(target)))
            if not broken:
                return {"islands": name, **asdict(islands)}
        raise ContractError(f"float16 keeps the contract with no islands; {name}: {'; '.join(broken)}")

    def _mixed(self, source: Path, target: Path, finish: Finish | None = None) -> dict[str, Any]:
        model = ir.load(source)
        products = products_of(model)
        if not products:
            raise ContractError("it has no product with constant weights that int8 could take over")
        flows = flows_of(model, products, self.calibration(), threads=self.threads, progress=self.progress)
        groups = groups_of(products, lambda product: flops(model, product))
        tried: list[tuple[float, QuantizationRecipe, Write]] = []
        for smoothing in SMOOTHING if smoothable(model, products) else (None,):
            weights = rounded(model, products, flows, QuantizationRecipe(smoothing), progress=self.progress)
            for clip in (False, True):
                ranges = ranges_of(model, products, flows, weights, clip=clip)
                write: Write = partial(_write, source, target, ranges, weights, finish=finish)
                write(groups)
                tried.append((self._cost(target), QuantizationRecipe(smoothing, clip=clip), write))
        tried.sort(key=lambda one: one[0])
        recipe, mixture = self._fitting(tried, groups, target)
        return {
            "recipe": asdict(recipe),
            "recipes": [{**asdict(one), "cosine_cost": cost} for cost, one, _ in tried],
            **mixture.to_json(),
        }

    def _fitting(
        self, tried: Sequence[tuple[float, QuantizationRecipe, Write]], groups: list[SharedInput], target: Path
    ) -> tuple[QuantizationRecipe, Mix]:
        """The first recipe that keeps the contract with int8 everywhere; else the nearest one, with groups put back."""
        everywhere: list[TowerFigures] = []
        for _, recipe, write in tried:
            write(groups)
            everywhere.append(self._figures(target))
            if not self.trials.broken(everywhere[-1]):
                return recipe, mix(groups, lambda _: everywhere[-1], self.trials.broken)
        _, recipe, write = tried[0]

        def ask(chosen: Sequence[SharedInput]) -> TowerFigures:
            if len(chosen) == len(groups):
                return everywhere[0]
            write(chosen)
            return self._figures(target)

        def cost_of(chosen: Sequence[SharedInput]) -> float:
            write(chosen)
            return self._cost(target)

        mixture = mix(groups, ask, self.trials.broken, cost_of=cost_of, progress=self.progress)
        if mixture.figures is None:
            lines = mixture.trials[0]["broken"]
            raise ContractError(f"no mix of int8 and float32 keeps the contract; int8 everywhere: {'; '.join(lines)}")
        write(mixture.chosen)
        return recipe, mixture

    def _figures(self, target: Path) -> TowerFigures:
        return self.trials.figures(target, backend=self.backend, threads=self.threads)

    def _cost(self, target: Path) -> float:
        return self.trials.cost(target, backend=self.backend, threads=self.threads)


def _write(
    source: Path,
    target: Path,
    ranges: Mapping[str, tuple[float, float]],
    weights: Mapping[str, Rounded],
    chosen: Sequence[SharedInput],
    finish: Finish | None = None,
) -> None:
    """A float32 graph's file again, with these groups in int8."""
    graph = ir.load(source)
    quantise(graph, [product for group in chosen for product in group.products], ranges, weights)
    if finish is not None:
        finish(graph)
    write_graph(graph, target)


def _for_tensorrt(graph: ir.Model) -> None:
    """int8 as TensorRT takes it, and float16 for what stays of floats."""
    to_symmetric(graph)
    to_float16(graph)


def write_islands(source: Path, target: Path, keep: Iterable[str]) -> Islands:
    """A float32 graph's file again, in float16 outside of islands.

    Args:
        source: The float32 graph.
        target: The file to write.
        keep: Operators that stay float32, see `float16.LADDER`.

    Raises:
        ContractError: Nothing in it can compute in float16, or the graph is not valid ONNX then.
    """
    graph = ir.load(source)
    islands = to_float16(graph, keep)
    write_graph(graph, target)
    return islands
