"""Casts where float32 and float16 meet in a graph: one for each value and direction, constants rounded once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class Writer:
    """Puts casts where float32 and float16 meet, one for each value however many read it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._halves: dict[ir.Value, ir.Value] = {}
        self._turned: set[ir.Value] = set()
        self.casts = 0

    def half(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """The value in float16: itself where its node computes so already, a constant again, or a cast."""
        if value in self._turned:
            return value
        if value not in self._halves:
            self._halves[value] = (
                self._constant(value) if constant_of(value) is not None else self._cast_down(value, reader)
            )
        return self._halves[value]

    def turn(self, value: ir.Value) -> None:
        """A node's output is float16; its type is written in the end, so that its readers are asked as float32 ones."""
        self._turned.add(value)

    def restore(self) -> None:
        """Casts back for every reader that stayed float32, and for the graph's outputs."""
        for value in sorted(self._turned, key=lambda value: value.name or ""):
            value.dtype = ir.DataType.FLOAT16
            readers = [use for use in value.uses() if not self._reads_half(use.node)]
            output = value.is_graph_output()
            if not readers and not output:
                continue
            node = value.producer()
            if node is None:
                continue
            cast = self._cast(value, ir.DataType.FLOAT, f"{value.name}_float32")
            self._graph.insert_after(node, [cast])
            for use in readers:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            if output:
                self._take_over(value, cast.outputs[0])

    def _reads_half(self, node: ir.Node) -> bool:
        """Whether a reader computes in float16 itself, or does not care."""
        if node.op_type in ("Cast", "Shape", "Size"):
            return True
        if node.op_type == "QuantizeLinear":
            scale = node.inputs[1]
            return scale is not None and scale.dtype == ir.DataType.FLOAT16
        return any(output in self._turned for output in node.outputs)

    def _take_over(self, value: ir.Value, whole: ir.Value) -> None:
        """The float32 copy becomes the graph's output, under its name."""
        name = value.name
        value.name, whole.name = f"{name}_float16", name
        for place, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[place] = whole

    def _constant(self, value: ir.Value) -> ir.Value:
        numbers = constant_of(value)
        assert numbers is not None  # noqa: S101 - asked right before
        name = f"{value.name}_float16"
        tensor = ir.tensor(numbers.astype(np.float16), name=name)
        held = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(numbers.shape), const_value=tensor)
        self._graph.register_initializer(held)
        return held

    def _cast_down(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        cast = self._cast(value, ir.DataType.FLOAT16, f"{value.name}_float16")
        producer = value.producer()
        if producer is None or producer.graph is not self._graph:
            self._graph.insert_before(self._graph[0] if value.is_graph_input() else reader, [cast])
        else:
            self._graph.insert_after(producer, [cast])
        return cast.outputs[0]

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
        self.casts += 1
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}_cast")
        output = cast.outputs[0]
        output.name, output.dtype, output.shape = name, dtype, value.shape
        return cast


def constant_of(value: ir.Value) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None:
    """An initializer's numbers; None for anything that is computed or may be fed."""
    if value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return np.asarray(value.const_value.numpy(), dtype=np.float32)
