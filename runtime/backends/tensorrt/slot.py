"""Execution contexts with memory of their own, and how threads share them: each call has one to itself.

A fixed slot answers one set of shapes for good: after a first run its work is captured as a CUDA graph, and from then
on one launch stands for a hundred kernels. A free slot takes any shapes and captures nothing, because a captured graph
holds only for the shapes and addresses of its context. Shapes that come for the second time get a fixed slot; those
that came once do not, because texts come in many lengths and a context is not small.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from invariclip.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from invariclip.backends.tensorrt.device import Device
    from invariclip.backends.tensorrt.facts import EngineFacts


DEFAULT_SLOTS = 12
"""Contexts at most. Seven batch sizes of images fit with room for calls at the same time."""
_REMEMBERED = 1024


class Pool:
    """Idle slots by what they answer; those that were used last stay longest."""

    def __init__(self, make: Callable[[bool], Slot], limit: int = DEFAULT_SLOTS) -> None:
        """Makes nothing yet.

        Args:
            make: Makes a slot, fixed if True.
            limit: Slots at most, at least 1.
        """
        self._make, self._limit = make, max(1, limit)
        self._lock = threading.Condition()
        self._fixed: OrderedDict[Shapes, list[Slot]] = OrderedDict()
        self._free: list[Slot] = []
        self._seen: OrderedDict[Shapes, int] = OrderedDict()
        self._made = 0

    @contextmanager
    def slot(self, shapes: Shapes) -> Iterator[Slot]:
        """A slot for these shapes; waits where all are busy. One that failed is not used again.

        Args:
            shapes: See `slot.shapes_of`.
        """
        with self._lock:
            fixed = self._is_familiar(shapes)
            slot = self._take(shapes, fixed=fixed)
        if slot is None:
            try:
                slot = self._make(fixed)
            except BaseException:
                self._gone()
                raise
        try:
            yield slot
        except BaseException:
            self._gone()
            slot.close()
            raise
        with self._lock:
            if fixed:
                self._fixed.setdefault(shapes, []).append(slot)
                self._fixed.move_to_end(shapes)
            else:
                self._free.append(slot)
            self._lock.notify()

    def close(self) -> None:
        """Closes what is idle."""
        with self._lock:
            idle = [*self._free, *(slot for slots in self._fixed.values() for slot in slots)]
            self._free, self._fixed = [], OrderedDict()
            self._made -= len(idle)
            self._lock.notify_all()
        for slot in idle:
            slot.close()

    def _is_familiar(self, shapes: Shapes) -> bool:
        count = self._seen.pop(shapes, 0)
        self._seen[shapes] = count + 1
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return count > 0

    def _take(self, shapes: Shapes, *, fixed: bool) -> Slot | None:
        """An idle slot; None where a new one may be made, and then it is counted already."""
        while True:
            idle = self._fixed.get(shapes) if fixed else self._free
            if idle:
                return idle.pop()
            if self._made < self._limit or self._evict():
                self._made += 1
                return None
            self._lock.wait()

    def _evict(self) -> bool:
        """Closes the idle slot that was used longest ago; False where none is idle."""
        shapes = next((shapes for shapes, slots in self._fixed.items() if slots), None)
        victim = self._fixed[shapes].pop(0) if shapes is not None else self._free.pop() if self._free else None
        if victim is None:
            return False
        if shapes is not None and not self._fixed[shapes]:
            del self._fixed[shapes]
        victim.close()
        self._made -= 1
        return True

    def _gone(self) -> None:
        with self._lock:
            self._made -= 1
            self._lock.notify()


Shapes: TypeAlias = "tuple[tuple[str, tuple[int, ...]], ...]"
"""Every input's shape, by name, sorted."""


@dataclass
class _Memory:
    """A tensor's place on the GPU and in pinned host memory."""

    size: int
    device: int
    host: int
    view: NDArray[np.uint8]


class Slot:
    """A context, a stream and buffers; not to be used by two threads at once."""

    def __init__(self, device: Device, engine: Any, facts: EngineFacts, *, context: Any, captures: bool) -> None:
        """Takes a context that nobody else uses.

        Args:
            device: The GPU.
            engine: The loaded engine.
            facts: Its sidecar.
            context: An execution context of it.
            captures: Whether this slot is fixed: it is only ever asked for the same shapes, and captures their work.
        """
        self._device, self._engine, self._facts, self._context = device, engine, facts, context
        self._captures = captures
        self._stream = device.stream()
        self._memory: dict[str, _Memory] = {}
        self._shapes: Shapes | None = None
        self._profile = -1
        self._graph: Any = None
        self._runs = 0

    def run(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Copies in, answers, copies out; the stream alone is waited for, so other slots go on.

        Args:
            inputs: Of the shapes that a profile takes.
            outputs: What to copy back.

        Raises:
            DeviceError: CUDA or TensorRT reports a failure.
        """
        self._device.use()
        shapes = shapes_of(inputs)
        if shapes != self._shapes:
            self._prepare(dict(shapes))
            self._shapes = shapes
        for name, value in inputs.items():
            self._upload(name, value)
        self._execute()
        sizes = {name: self._size(name, tuple(self._context.get_tensor_shape(name))) for name in outputs}
        for name, size in sizes.items():
            memory = self._memory[name]
            self._device.download(memory.host, memory.device, size, self._stream)
        self._device.wait(self._stream)
        return {name: self._answer(name, size) for name, size in sizes.items()}

    def time(self, inputs: dict[str, NDArray[Any]], runs: int) -> list[float]:
        """Milliseconds on the GPU of one run each, by events around the work alone, without copies.

        Args:
            inputs: Copied in once.
            runs: How many.
        """
        self.run(inputs, ())
        start, end = self._device.event(), self._device.event()
        found = []
        for _ in range(runs):
            self._device.record(start, self._stream)
            self._execute()
            self._device.record(end, self._stream)
            self._device.wait(self._stream)
            found.append(self._device.milliseconds(start, end))
        return found

    def close(self) -> None:
        """Gives everything back."""
        self._device.use()
        if self._graph is not None:
            self._device.close_graph(self._graph)
        for memory in self._memory.values():
            self._device.free(memory.device)
            self._device.free_pinned(memory.host)
        self._memory.clear()
        self._device.close_stream(self._stream)
        self._context = None

    def _prepare(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Tells the context shapes and addresses; memory grows where it is too small."""
        profile = next((place for place, one in enumerate(self._facts.key.profiles) if one.takes(shapes)), None)
        if profile is None:
            raise DeviceError(f"no profile of the engine takes {shapes}")  # `TensorRtBackend` has refused them before
        if profile != self._profile:
            self._done(
                self._context.set_optimization_profile_async(profile, self._stream), f"choosing profile {profile}"
            )
            self._device.wait(self._stream)
            self._profile = profile
        for name, shape in shapes.items():
            self._done(self._context.set_input_shape(name, shape), f"shape {list(shape)} of {name}")
        for name in (*self._facts.inputs, *self._facts.outputs):
            size = self._size(name, shapes.get(name) or tuple(self._context.get_tensor_shape(name)))
            held = self._memory.get(name)
            if held is None or held.size < size:
                self._allocate(name, size)
            self._done(self._context.set_tensor_address(name, self._memory[name].device), f"address of {name}")

    def _allocate(self, name: str, size: int) -> None:
        old = self._memory.pop(name, None)
        if old is not None:
            self._device.free(old.device)
            self._device.free_pinned(old.host)
        device = self._device.allocate(size)
        host, view = self._device.pinned(size)
        self._memory[name] = _Memory(size, device, host, view)

    def _upload(self, name: str, value: NDArray[Any]) -> None:
        memory = self._memory[name]
        np.copyto(memory.view[: value.nbytes].view(value.dtype).reshape(value.shape), value)
        self._device.upload(memory.device, memory.host, value.nbytes, self._stream)

    def _execute(self) -> None:
        """Queues the work: as a captured graph from the second run of a fixed slot on.

        The first run is not captured, because a context sets itself up during it.
        """
        if self._graph is None and self._captures and self._runs:
            self._device.begin_capture(self._stream)
            try:
                self._done(self._context.execute_async_v3(self._stream), "capturing its work")
            finally:
                graph = self._device.end_capture(self._stream)
            self._graph = graph
        if self._graph is not None:
            self._device.launch(self._graph, self._stream)
        else:
            self._done(self._context.execute_async_v3(self._stream), "its work")
        self._runs += 1

    def _answer(self, name: str, size: int) -> NDArray[Any]:
        shape = tuple(self._context.get_tensor_shape(name))
        return self._memory[name].view[:size].view(self._dtype(name)).reshape(shape).copy()

    def _dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(self._facts.inputs.get(name) or self._facts.outputs[name])

    def _size(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor; at least one, because CUDA gives no memory of none."""
        return max(1, int(np.prod(shape, dtype=np.int64)) * self._dtype(name).itemsize)

    @staticmethod
    def _done(answer: bool, what: str) -> None:
        if not answer:
            raise DeviceError(f"TensorRT refused {what}; its log says more at verbosity INFO")


def shapes_of(inputs: dict[str, NDArray[Any]]) -> Shapes:
    """Every input's shape, so that equal ones compare equal."""
    return tuple(sorted((name, value.shape) for name, value in inputs.items()))
