"""A graph as text that people can read and diff.

`python -m invariclip.bench.studies.parity.dump` keeps one for each family's towers in tests/export/golden.

What is in it: inputs and outputs, then one line per node with its inputs, its settings and the shape that it gives.
What is not: weights, names that the exporter made up, paths, versions. Values are called by their operator and counted,
so a node that comes or goes moves the names of its own kind alone.

Families are loaded short, the first and last block of every stack: the blocks between repeat (see `shorten`).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx_ir as ir

from invariclip.cli.main import run_command
from invariclip.console import bar, note
from invariclip.errors import InputError
from invariclip.export.checkpoints.families import FAMILIES, load_family
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Collection

    from invariclip.export.graphs.rewrites import Tower

GOLDEN = Path("tests/export/golden")
"""Where the committed dumps are, from the root of the repository."""
AGAIN = "python -m invariclip.bench.studies.parity.dump"
TOWERS: tuple[Tower, ...] = ("image", "text")
MOST_INTEGERS, MOST_FLOATS = 16, 4
"""Constants up to this many elements are written out: axes and shapes, an epsilon, a mean of three colours."""
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def dump(model: ir.Model) -> str:
    """A graph as text, the same whatever the exporter called its values.

    Args:
        model: The graph; shapes are written where they are known. It stays as it is.

    Returns:
        Lines `name: type [shape] = Operator(inputs, setting=value)`. A weight is written as its type and shape, with a
        name only if several nodes share it; a small constant as its value; a free dimension by its name where an input
        has one of that name, else as `?`.
    """
    return "\n".join([*_Writer(model).lines(model.graph, ""), ""])


def family_dump(name: str, towers: Collection[Tower] = TOWERS) -> dict[Tower, str]:
    """Dumps of a family's towers with all rewrites, without projection and classes.

    Args:
        name: One of `families.FAMILIES`.
        towers: Which.

    Raises:
        CheckpointError: The family is not known, or a package that it needs is missing.
        ContractError: torch cannot export a tower, or a rewrite does not keep its word.
    """
    checkpoint = load_family(name, short=True)
    texts: dict[Tower, str] = {}
    for tower in towers:
        graph = tower_graph(checkpoint, tower)
        if graph.model is None:
            raise InputError(f"{name}: the {tower} tower's graph has been written already; build it again")
        done, left = ([step.name for step in graph.plan if step.applied is which] for which in (True, False))
        head = [
            f"# {name}, {tower} tower: first and last block of every stack, no projection",
            f"# applied: {', '.join(done) or 'nothing'}",
            f"# not applied: {', '.join(left) or 'nothing'}",
        ]
        texts[tower] = "\n".join([*head, dump(graph.model)])
    return texts


def golden_path(name: str, tower: Tower, folder: Path = GOLDEN) -> Path:
    """The file that holds a tower's dump."""
    return folder / f"{name}.{tower}.txt"


def difference(path: Path, text: str) -> str:
    """What a dump changes against its file, as a unified diff; empty if nothing."""
    kept = path.read_text(encoding="utf-8") if path.is_file() else ""
    if kept == text:
        return ""
    lines = difflib.unified_diff(
        kept.splitlines(), text.splitlines(), f"{path.name}, committed", f"{path.name}, now", lineterm="", n=2
    )
    return "\n".join(lines) + f"\nif this is meant: {AGAIN}"


class _Writer:
    """Gives values their names, in the order in which nodes stand."""

    def __init__(self, model: ir.Model) -> None:
        self.names: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        inputs = [*model.graph.inputs]
        dimensions = [size for value in inputs for size in value.shape or () if not isinstance(size, int)]
        self.symbols = {str(size.value) for size in dimensions}

    def lines(self, graph: ir.Graph, indent: str) -> list[str]:
        """A graph's lines, those of subgraphs indented below their node."""
        written = []
        for value in graph.inputs:
            self.names[id(value)] = str(value.name)
            default = " = given or its default" if value.is_initializer() else ""
            written.append(f"{indent}input {value.name}: {self._type(value)}{default}")
        for node in graph:
            written += self._node(node, indent)
        written += [f"{indent}output {value.name}: {self.names[id(value)]}" for value in graph.outputs]
        return written

    def _node(self, node: ir.Node, indent: str) -> list[str]:
        operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        inner: list[str] = []
        settings = []
        for name, attribute in sorted(node.attributes.items()):
            if attribute.type == ir.AttributeType.GRAPH:
                inner += [f"{indent}  {name}:", *self.lines(attribute.value, f"{indent}    ")]
            else:
                settings.append(f"{name}={_setting(attribute)}")
        given = [self._given(value) for value in node.inputs]
        outputs = []
        for value in node.outputs:
            kind = node.op_type.lower()
            self.names[id(value)] = f"{kind}_{self.counts[kind]}"
            self.counts[kind] += 1
            outputs.append(f"{self.names[id(value)]}: {self._type(value)}")
        return [f"{indent}{', '.join(outputs)} = {operator}({', '.join([*given, *settings])})", *inner]

    def _given(self, value: ir.Value | None) -> str:
        if value is None:
            return "–"
        if id(value) in self.names:
            return self.names[id(value)]
        if value.const_value is None:
            return f"unknown {self._type(value)}"
        written = _small(value.const_value)
        if written is None:
            written = f"{_dtype(value.const_value.dtype)} {list(value.const_value.shape.numpy())}"
        if len(value.uses()) < 2 or value.const_value.size <= MOST_FLOATS:
            return written
        self.names[id(value)] = f"shared_{self.counts['shared']}"
        self.counts["shared"] += 1
        return f"{self.names[id(value)]}: {written}"

    def _type(self, value: ir.Value) -> str:
        kind = "?" if value.dtype is None else _dtype(value.dtype)
        if value.shape is None:
            return f"{kind} ?"
        return f"{kind} [{', '.join(self._size(size) for size in value.shape)}]"

    def _size(self, size: int | ir.SymbolicDim) -> str:
        if isinstance(size, int):
            return str(size)
        # what torch calls a dimension that it found itself (s77) changes from run to run, as does the order of factors
        factors = sorted(str(size.value).split("*"))
        return "*".join(factors) if set(_SYMBOL.findall(" ".join(factors))) <= self.symbols else "?"


def _setting(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return _small(tensor) or f"{_dtype(tensor.dtype)} {list(tensor.shape.numpy())}"
    value: Any = attribute.value
    if attribute.type == ir.AttributeType.INT and attribute.name == "to":
        return _dtype(ir.DataType(value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(list(value)) if isinstance(value, tuple | list) else str(value)


def _small(tensor: ir.TensorProtocol) -> str | None:
    """A constant of few elements by value, or None."""
    whole = tensor.dtype.is_integer() or tensor.dtype == ir.DataType.BOOL
    if tensor.size > (MOST_INTEGERS if whole else MOST_FLOATS):
        return None
    numbers = tensor.numpy()
    flat = [str(int(one)) if whole else f"{float(one):.6g}" for one in np.ravel(numbers)]
    return flat[0] if numbers.ndim == 0 else f"[{', '.join(flat)}]"


def _dtype(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


@click.command()
@click.option("--family", "names", multiple=True, help="Repeatable [default: all of them].")
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 if a graph is not as its file says.")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=GOLDEN, show_default=True)
def dumps(names: tuple[str, ...], check: bool, out: Path) -> int:
    """Write each family's graphs as text, or hold them against what is written."""
    known = [one.name for one in FAMILIES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is no family; available: {', '.join(known)}")
    chosen = list(names or known)
    changed = []
    for name in bar(chosen, total=len(chosen), desc="families"):
        for tower, text in family_dump(name).items():
            path = golden_path(name, tower, out)
            found = difference(path, text)
            if found:
                changed.append(path.name)
                note(found if check else f"{path}: {'changed' if path.is_file() else 'new'}")
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, text)
    note(f"{len(chosen)} families, {len(changed)} of {2 * len(chosen)} graphs differ from {out}")
    return 1 if check and changed else 0


if __name__ == "__main__":
    run_command(dumps)
