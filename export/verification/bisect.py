"""Where a graph first goes wrong: each operator alone, on what a right graph gives it.

The right graph is a fresh float32 export of the checkpoint. Values of the same name in both graphs are cut: every part
of the candidate between them runs on the right graph's values, so an error shows where it is made and nowhere after it.
What a part costs is told by the right graph, with that part's answer in the place of its own. Where every part is right
and the whole is not, the engine changes something when it compiles: the shortest beginning of the graph that is wrong
is then sought by halving.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from invariclip.artifact.manifest import EMBEDDING
from invariclip.backends import DEFAULT_BACKEND, open_backend
from invariclip.errors import ContractError
from invariclip.export.graphs.writing import save_graph, weight_bytes
from invariclip.files import new_directory, scratch_directory

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Compute

BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2, "int8": 0.1, "fewer tokens": float("inf")}
"""|got - wanted| / |wanted| of a part's output, all rows together, by the coarsest arithmetic in the part.

What a graph with fewer tokens loses by design cannot be told from a fault, so it has no bound.
"""
WHOLE = {name: 10 * bound for name, bound in BOUNDS.items()}
"""The same of a whole graph's embedding: what many right parts may add up to."""
ROWS = 8
"""Inputs that are looked at."""
COSTLIEST = 10
"""Parts whose cost is measured."""
MAX_VALUE_BYTES = 1 << 30
"""Of all values that are held of the right graph, about; more rows than one are not taken above it."""
GRAPH_FILE, VALUES_FILE = "part.onnx", "values.npz"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_GIVEN = "__given"
_EXTERNAL = 1_000_000_000
_TINY = 1e-30
_LISTED = 4
_NO_COST = 1e-9
"""Of a cosine: rounding."""


@dataclass(frozen=True)
class PartError:
    """A part of a graph: what leads from values that both graphs have to one of them.

    Attributes:
        value: The name of its output.
        nodes: Its nodes as `name (operator)`, the last one writes the value.
        wanted: The operators of the same part of the right graph.
        arithmetic: The coarsest in it, a key of `BOUNDS`.
        error: |got - wanted| / |wanted|; infinite where something is not finite that should be.
        bound: What it may be.
        cost: 1 - the smallest cosine at the embedding when this part alone is the candidate's; None if not measured.
    """

    value: str
    nodes: tuple[str, ...]
    wanted: tuple[str, ...]
    arithmetic: str
    error: float
    bound: float
    cost: float | None = None

    @property
    def wrong(self) -> bool:
        """Whether it leaves its bound."""
        return not self.error <= self.bound

    def __str__(self) -> str:
        """One line: the operators, where they end, and how far off they are."""
        nodes = " → ".join(self.nodes if len(self.nodes) <= _LISTED else ("…", *self.nodes[-_LISTED:]))
        other = ", ".join(self.wanted[-_LISTED:])
        same = tuple(node.rpartition("(")[2].rstrip(")") for node in self.nodes) == self.wanted
        return (
            f"{nodes}, which writes {self.value}: off by {self.error:.3g} of its length, bound {self.bound:g} "
            f"({self.arithmetic}){'' if same else f'; in the right graph: {other}'}"
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; an infinite error is null."""
        plain = {**vars(self), "wrong": self.wrong}
        return {name: None if value == float("inf") else value for name, value in plain.items()}


@dataclass(frozen=True)
class Bisection:
    """What was found of one tower.

    Attributes:
        rows: Inputs that were run.
        parts: How many parts were compared.
        nodes: How many nodes of the candidate are in them.
        uncompared: Nodes that lie in no part: those of the class head.
        reshaped: Values that both graphs have in other shapes: the candidate has fewer tokens there.
        wrong: Parts that leave their bound, in the order of the graph.
        costliest: The parts that cost most, first the worst.
        whole: Error of the whole graph's embedding.
        prefix: Where the parts are right and the whole is not: the output of the shortest beginning that is wrong.
    """

    rows: int
    parts: int
    nodes: int
    uncompared: int
    reshaped: int
    wrong: tuple[PartError, ...]
    costliest: tuple[PartError, ...]
    whole: float
    prefix: str | None = None

    def lines(self, name: str) -> str:
        """What was found, for people.

        Args:
            name: What to call the graph.
        """
        judged = f"{self.parts} parts ({self.nodes} operators), each on what a right graph gives it"
        said = [f"{name}: {judged}: {len(self.wrong) or 'none'} out of bounds"]
        if self.wrong:
            said.append(f"  first wrong: {self.wrong[0]}")
            said += [f"  also: {part}" for part in self.wrong[1:COSTLIEST]]
            more = len(self.wrong) - COSTLIEST
            said += [f"  and {more} more"] if more > 0 else []
        elif self.prefix is not None:
            said.append(
                f"  the whole graph is off by {self.whole:.3g} of an embedding's length all the same: the engine "
                f"changes it when it compiles it; the shortest beginning that is wrong ends at {self.prefix}"
            )
        if self.reshaped:
            said.append(f"  {self.reshaped} values have fewer tokens than in the right graph and are not compared")
        said += [f"  costs {part.cost:.2e}: {part}" for part in self.costliest[:5] if (part.cost or 0) > _NO_COST]
        return "\n".join(said)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **vars(self), "whole": self.whole if np.isfinite(self.whole) else None,
            "wrong": [part.to_json() for part in self.wrong], "costliest": [part.to_json() for part in self.costliest],
        }  # fmt: skip


def bisect(
    candidate: Path,
    right: Path,
    feed: Mapping[str, NDArray[Any]],
    *,
    backend: str = DEFAULT_BACKEND,
    compute: Compute = "float32",
    threads: int | None = None,
    out: Path | None = None,
) -> Bisection:
    """Compares a graph part by part with a right one.

    Args:
        candidate: The graph that is looked at, an ONNX file.
        right: A float32 graph of the same tower, run in ONNX Runtime.
        feed: The tower's input, rows first; fewer rows are taken where all values of them would be too large.
        backend: The candidate's engine, see `backends.ALL_BACKENDS`.
        compute: What it may compute in where the candidate is float32.
        threads: The engines'; None takes what this process may use.
        out: A folder that gets the first wrong part as a graph of its own, with its inputs and the wanted output.

    Raises:
        ArtifactError: An engine cannot load a graph.
        ContractError: The graphs have no value in common.
    """
    with scratch_directory() as folder:
        model, reference = _typed(candidate), _typed(right)
        names = _common(model, reference)
        asked = {value.name for value in model.graph.inputs} - set(model.graph.initializers)
        if EMBEDDING not in names or asked != set(feed):
            raise ContractError(
                f"{candidate.name}: is no graph of this tower: it has another input, or no value called as there"
            )
        given = _right_values(reference, names, feed, folder, threads)
        rows = len(given[EMBEDDING])
        reshaped = _reshaped(
            candidate, names, {name: value[:1] for name, value in feed.items()}, given, folder, threads
        )
        names = [name for name in names if name not in reshaped | _moved(model)]
        feed = {name: value[:rows] for name, value in feed.items()}
        parts = {name: _part(model, name, names) for name in names}
        names = [name for name in names if parts[name]]
        cut = _cut(_typed(candidate), names, names)
        given_here = {
            f"{name}{_GIVEN}": _as_type(given[name], model_type)
            for name, model_type in _types(model, names).items()
            if f"{name}{_GIVEN}" in {one.name for one in cut.graph.inputs}
        }
        save_graph(cut, folder / "cut.onnx", external_data=_beside(cut, "cut.onnx"))
        opened = open_backend(backend, folder / "cut.onnx", threads=threads, compute=compute)
        answers = opened.run({**feed, **given_here}, tuple(names))
        del opened
        errors = [
            _compared(
                name,
                parts[name],
                _part(reference, name, names),
                answers[name],
                given[name],
                _arithmetic(parts[name], compute, reshaped),
            )
            for name in names
        ]
        errors = _with_costs(errors, reference, given, answers, feed, folder, threads)
        whole = open_backend(backend, candidate, threads=threads, compute=compute)
        error = relative_error(whole.run(dict(feed), (EMBEDDING,))[EMBEDDING], given[EMBEDDING])
        del whole
        wrong = tuple(part for part in errors if part.wrong)
        coarsest = max((part.arithmetic for part in errors), key=lambda name: BOUNDS[name])
        prefix = None
        if not wrong and not error <= WHOLE[coarsest]:
            prefix = _shortest_wrong(candidate, names, given, feed, WHOLE[coarsest], folder, backend, compute, threads)
        if out is not None and wrong:
            _write_part(cut, wrong[0].value, {**feed, **given_here}, given, out)
    inside = {node for name in names for node in parts[name]}
    costed = sorted((part for part in errors if part.cost is not None), key=lambda part: -(part.cost or 0))
    return Bisection(
        rows,
        len(names),
        len(inside),
        len(list(model.graph)) - len(inside),
        len(reshaped),
        wrong,
        tuple(costed),
        error,
        prefix,
    )


def relative_error(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """|got - wanted| / |wanted| in float64, over what is finite in `wanted`; infinite where `got` is not finite there.

    What is infinite in both (a mask) is no difference.
    """
    if got.shape != wanted.shape:
        return float("inf")
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    same = a == b
    finite = np.isfinite(b)
    if not (same | (np.isfinite(a) & finite)).all():
        return float("inf")
    off = np.where(same, 0.0, a) - np.where(same, 0.0, b)
    return float(np.linalg.norm(off)) / max(float(np.linalg.norm(np.where(finite, b, 0.0))), _TINY)


def _typed(path: Path) -> ir.Model:
    model = ir.load(path)
    if any(value.dtype is None for node in model.graph for value in node.outputs):
        ShapeInferencePass()(model)
    return model


def _common(model: ir.Model, reference: ir.Model) -> list[str]:
    """Names of float values that nodes of both graphs write, in the candidate's order."""
    theirs = {value.name for node in reference.graph for value in node.outputs if value.dtype in _FLOATS}
    return [
        value.name
        for node in model.graph
        for value in node.outputs
        if value.name and value.name in theirs and value.dtype in _FLOATS
    ]


def _types(model: ir.Model, names: Iterable[str]) -> dict[str, ir.DataType]:
    wanted = set(names)
    return {
        value.name: value.dtype
        for node in model.graph
        for value in node.outputs
        if value.name in wanted and value.dtype is not None
    }


def _as_type(array: NDArray[Any], dtype: ir.DataType) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array.astype(dtype.numpy()))


def _right_values(
    reference: ir.Model, names: Sequence[str], feed: Mapping[str, NDArray[Any]], folder: Path, threads: int | None
) -> dict[str, NDArray[Any]]:
    """What the right graph computes under each name, for as many rows as may be held."""
    path = folder / "right.onnx"
    _save_with_outputs(reference, names, path)
    opened = open_backend(DEFAULT_BACKEND, path, threads=threads)
    one = opened.run({name: value[:1] for name, value in feed.items()}, tuple(names))
    held = sum(value.nbytes for value in one.values())
    rows = max(1, min(len(next(iter(feed.values()))), MAX_VALUE_BYTES // (2 * held)))
    return opened.run({name: value[:rows] for name, value in feed.items()}, tuple(names))


def _reshaped(
    candidate: Path, names: Sequence[str], feed: Mapping[str, NDArray[Any]], given: Mapping[str, NDArray[Any]],
    folder: Path, threads: int | None,
) -> set[str]:  # fmt: skip
    """Values that the candidate has in another shape than the right graph, rows aside."""
    path = folder / "shapes.onnx"
    _save_with_outputs(_typed(candidate), names, path)
    got = open_backend(DEFAULT_BACKEND, path, threads=threads).run(dict(feed), tuple(names))
    rows = len(given[EMBEDDING])
    return {
        name for name in names
        if got[name].shape[1:] != given[name].shape[1:] and got[name].size * rows != given[name].size
    }  # fmt: skip


def _save_with_outputs(model: ir.Model, names: Iterable[str], path: Path) -> None:
    """A graph with further outputs; the model in memory is left as it was."""
    graph, before = model.graph, list(model.graph.outputs)
    have = {value.name for value in before}
    wanted = set(names) - have
    graph.outputs.extend(value for node in graph for value in node.outputs if value.name in wanted)
    try:
        save_graph(model, path, external_data=_beside(model, path.name))
    finally:
        del graph.outputs[len(before) :]


def _beside(model: ir.Model, name: str) -> str | None:
    return f"{name}.data" if weight_bytes(model) > _EXTERNAL else None


def _moved(model: ir.Model) -> set[str]:
    """Values that quantisation may change on purpose, and make good at once.

    SmoothQuant divides what a norm writes for int8 products alone, and multiplies their weights; and the bias after an
    int8 product also corrects the mean of its rounding.
    """
    return {
        value.name
        for node in model.graph
        for value in node.outputs[:1]
        if value.name and (readers := {use.node.op_type for use in value.uses()})
        if (node.op_type == "LayerNormalization" and readers == {"QuantizeLinear"})
        or (readers == {"Add"} and any(_is_dequantized(one) for one in node.inputs))
    }


def _is_dequantized(value: ir.Value | None) -> bool:
    writer = None if value is None else value.producer()
    return writer is not None and writer.op_type == "DequantizeLinear"


def _part(model: ir.Model, name: str, names: Iterable[str]) -> list[ir.Node]:
    """The nodes that lead to a value from other values of these names, in the graph's order; empty without any."""
    ends = set(names) - {name}
    start = next((v for node in model.graph for v in node.outputs if v.name == name), None)
    found: set[ir.Node] = set()
    waiting = [start]
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if value is None or node is None or value.name in ends or node in found:
            continue
        found.add(node)
        waiting += list(node.inputs)
    return [node for node in model.graph if node in found]


def _cut(model: ir.Model, names: Iterable[str], outputs: Iterable[str]) -> ir.Model:
    """The graph with an input in the place of each value of these names wherever it is read, and with other outputs."""
    graph, wanted = model.graph, set(names)
    values = {value.name: value for node in graph for value in node.outputs}
    for name in wanted:
        value = values[name]
        rank = None if value.shape is None else ir.Shape([None] * len(value.shape))
        given = ir.Value(name=f"{name}{_GIVEN}", type=ir.TensorType(value.dtype or ir.DataType.FLOAT), shape=rank)
        graph.inputs.append(given)
        for use in tuple(value.uses()):
            use.node.replace_input_with(use.idx, given)
    _keep_outputs(graph, outputs)
    return model


def _keep_outputs(graph: ir.Graph, names: Iterable[str]) -> None:
    """Lets a graph answer these values alone, without what does not lead to them."""
    values = {value.name: value for node in graph for value in node.outputs}
    graph.outputs.clear()
    graph.outputs.extend(values[name] for name in names)
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses() and value not in graph.inputs]:
        del graph.initializers[name]
    for value in [value for value in graph.inputs if not value.uses() and (value.name or "").endswith(_GIVEN)]:
        graph.inputs.remove(value)


def _compared(
    name: str, nodes: Sequence[ir.Node], wanted: Sequence[ir.Node], got: NDArray[Any], right: NDArray[Any],
    arithmetic: str,
) -> PartError:  # fmt: skip
    return PartError(
        name, tuple(f"{node.name or '?'} ({node.op_type})" for node in nodes), tuple(node.op_type for node in wanted),
        arithmetic, relative_error(got, right), BOUNDS[arithmetic],
    )  # fmt: skip


def _arithmetic(nodes: Iterable[ir.Node], compute: Compute, reshaped: Collection[str]) -> str:
    found: set[str] = {"float32", compute}
    for node in nodes:
        if any(value.name in reshaped for value in node.outputs):
            found.add("fewer tokens")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear") or "Integer" in node.op_type:
            found.add("int8")
        if any(value is not None and value.dtype == ir.DataType.FLOAT16 for value in (*node.inputs, *node.outputs)):
            found.add("float16")
    return max(found, key=lambda one: BOUNDS[one])


def _with_costs(
    errors: Sequence[PartError], reference: ir.Model, given: Mapping[str, NDArray[Any]],
    answers: Mapping[str, NDArray[Any]], feed: Mapping[str, NDArray[Any]], folder: Path, threads: int | None,
) -> list[PartError]:  # fmt: skip
    """The same, with what the parts of the largest errors cost, each alone."""
    most = sorted(errors, key=lambda part: -part.error)[:COSTLIEST]
    chosen = [part.value for part in most if part.value != EMBEDDING]
    costs = {EMBEDDING: _lost(answers[EMBEDDING], given[EMBEDDING])} if EMBEDDING in {p.value for p in most} else {}
    if chosen:
        cut = _cut(reference, chosen, (EMBEDDING,))
        path = folder / "cost.onnx"
        save_graph(cut, path, external_data=_beside(cut, path.name))
        opened = open_backend(DEFAULT_BACKEND, path, threads=threads)
        taken = [name for name in chosen if f"{name}{_GIVEN}" in opened.input_names]
        for name in taken:
            values = {
                f"{one}{_GIVEN}": np.ascontiguousarray((answers if one == name else given)[one].astype(np.float32))
                for one in taken
            }
            costs[name] = _lost(opened.run({**feed, **values}, (EMBEDDING,))[EMBEDDING], given[EMBEDDING])
    return [replace(part, cost=costs[part.value]) if part.value in costs else part for part in errors]


def _lost(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """1 - the smallest cosine of rows; 2 where something is not finite."""
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    if not np.isfinite(a).all():
        return 2.0
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(1 - ((a * b).sum(axis=1) / np.maximum(lengths, _TINY)).min())


def _shortest_wrong(
    candidate: Path, names: Sequence[str], given: Mapping[str, NDArray[Any]], feed: Mapping[str, NDArray[Any]],
    bound: float, folder: Path, backend: str, compute: Compute, threads: int | None,
) -> str:  # fmt: skip
    """The first value at which the beginning of the graph, compiled alone, is further off than `bound`."""
    low, high = 0, len(names) - 1
    while low < high:
        middle = (low + high) // 2
        model = _typed(candidate)
        _keep_outputs(model.graph, (names[middle],))
        path = folder / f"prefix-{middle}.onnx"
        save_graph(model, path, external_data=_beside(model, path.name))
        opened = open_backend(backend, path, threads=threads, compute=compute)
        got = opened.run(dict(feed), (names[middle],))[names[middle]]
        low, high = (low, middle) if not relative_error(got, given[names[middle]]) <= bound else (middle + 1, high)
        path.unlink()
    return names[low]


def _write_part(
    cut: ir.Model, name: str, feed: Mapping[str, NDArray[Any]], given: Mapping[str, NDArray[Any]], out: Path
) -> None:
    """The part that writes a value as a graph of its own, with what it is fed and what it should answer."""
    graph = cut.graph
    _keep_outputs(graph, (name,))
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    read = {value.name for value in graph.inputs}
    values = {f"input:{key}": value for key, value in feed.items() if key in read}
    with new_directory(out, owned=lambda _: (GRAPH_FILE, f"{GRAPH_FILE}.data", VALUES_FILE)) as folder:
        save_graph(cut, folder / GRAPH_FILE, external_data=_beside(cut, GRAPH_FILE))
        np.savez(folder / VALUES_FILE, allow_pickle=False, **values, **{f"wanted:{name}": given[name]})
