"""A GPU through cuda-python: memory, streams, events, captured graphs. Every call's error code is looked at.

No call falls back to anything: what is missing is said, with its version.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import DeviceError, InputError, MissingExtraError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Gpu:
    """What a measured or built thing is good for.

    Attributes:
        name: As the driver says it.
        capability: Its compute capability.
        driver: The CUDA version that the driver supports, as `13.0`.
        memory: Bytes that it has.
    """

    name: str
    capability: tuple[int, int]
    driver: str
    memory: int


class Device:
    """One GPU. Handles are plain integers or cuda-python's own objects; whoever makes one frees it."""

    def __init__(self, index: int = 0) -> None:
        """Takes the GPU of this index.

        Raises:
            MissingExtraError: cuda-python is not installed.
            DeviceError: There is no driver, one that is too old, or no GPU.
            InputError: No GPU has the index.
        """
        self._cuda = runtime_bindings()
        count = gpu_count(self._cuda)
        if not 0 <= index < count:
            raise InputError(f"there is no GPU {index}; available: {', '.join(map(str, range(count)))}")
        self.index = index
        self.use()
        self.gpu = self._describe()

    def use(self) -> None:
        """Makes this GPU the calling thread's; each thread that works with it must."""
        self._ask("cudaSetDevice", self.index)

    def free_memory(self) -> int:
        """Bytes that are free now."""
        return int(self._ask("cudaMemGetInfo")[0])

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes; its address."""
        return int(self._ask("cudaMalloc", size))

    def free(self, address: int) -> None:
        """Gives device memory back."""
        self._ask("cudaFree", address)

    def pinned(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        """Host memory that copies need not stage: its address, and a view of it, uint8 [size]."""
        address = int(self._ask("cudaHostAlloc", size, int(self._cuda.cudaHostAllocDefault)))
        return address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, address: int) -> None:
        """Gives pinned memory back; views of it must not be touched after."""
        self._ask("cudaFreeHost", address)

    def stream(self) -> int:
        """A stream that waits for no other one."""
        return int(self._ask("cudaStreamCreateWithFlags", int(self._cuda.cudaStreamNonBlocking)))

    def wait(self, stream: int) -> None:
        """Blocks until a stream is done; other Python threads run meanwhile."""
        self._ask("cudaStreamSynchronize", stream)

    def close_stream(self, stream: int) -> None:
        """Gives a stream back."""
        self._ask("cudaStreamDestroy", stream)

    def upload(self, device: int, host: int, size: int, stream: int) -> None:
        """Queues a copy from pinned host memory to the GPU."""
        self._ask("cudaMemcpyAsync", device, host, size, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def download(self, host: int, device: int, size: int, stream: int) -> None:
        """Queues a copy from the GPU to pinned host memory."""
        self._ask("cudaMemcpyAsync", host, device, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def begin_capture(self, stream: int) -> None:
        """From here on a stream's work is recorded, not done; calls of other threads are not disturbed."""
        self._ask("cudaStreamBeginCapture", stream, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)

    def end_capture(self, stream: int) -> Any:
        """What was recorded, ready to be launched."""
        graph = self._ask("cudaStreamEndCapture", stream)
        try:
            return self._ask("cudaGraphInstantiate", graph, 0)
        finally:
            self._ask("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        """Queues recorded work."""
        self._ask("cudaGraphLaunch", graph, stream)

    def close_graph(self, graph: Any) -> None:
        """Gives recorded work back."""
        self._ask("cudaGraphExecDestroy", graph)

    def event(self) -> Any:
        """A point in a stream's work that knows when it was reached."""
        return self._ask("cudaEventCreate")

    def record(self, event: Any, stream: int) -> None:
        """Queues an event."""
        self._ask("cudaEventRecord", event, stream)

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two events that were reached."""
        return float(self._ask("cudaEventElapsedTime", start, end))

    def _describe(self) -> Gpu:
        attributes = self._cuda.cudaDeviceAttr
        facts = self._ask("cudaGetDeviceProperties", self.index)
        major, minor = (
            int(self._ask("cudaDeviceGetAttribute", which, self.index))
            for which in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        driver = spelled(int(self._ask("cudaDriverGetVersion")))
        return Gpu(name.rstrip("\0"), (major, minor), driver, int(self._ask("cudaMemGetInfo")[1]))

    def _ask(self, call: str, *arguments: Any) -> Any:
        return ask(self._cuda, call, *arguments)


def runtime_bindings() -> Any:
    """cuda-python's module of the CUDA runtime.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingExtraError(
            'a GPU is reached through the package cuda-bindings: pip install "invariclip[tensorrt]"'
        ) from error


def gpu_count(cuda: Any) -> int:
    """How many GPUs this process sees, at least 1.

    Args:
        cuda: cuda-python's module of the CUDA runtime.

    Raises:
        DeviceError: There is no driver, one that is too old, or no GPU.
    """
    code, count = cuda.cudaGetDeviceCount()
    error = cuda.cudaError_t
    if code == error.cudaErrorInsufficientDriver:
        driver, runtime = int(cuda.cudaDriverGetVersion()[1]), int(cuda.cudaRuntimeGetVersion()[1])
        if driver == 0:
            raise DeviceError(
                "no NVIDIA driver is loaded on this machine, so there is no GPU to run on; install the driver "
                f"(CUDA {spelled(runtime)} or later), or name a backend of the CPU"
            )
        raise DeviceError(
            f"the NVIDIA driver supports CUDA {spelled(driver)}, and cuda-bindings needs {spelled(runtime)}; update "
            f"the driver, or pip install 'cuda-bindings=={driver // 1000}.*'"
        )
    if code == error.cudaErrorNoDevice or (code == error.cudaSuccess and count < 1):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        raise DeviceError(f"the NVIDIA driver is there and shows this process no GPU{hidden}; give it one")
    if code != error.cudaSuccess:
        raise DeviceError(f"the GPUs cannot be counted: {_reason(cuda, code)}")
    return int(count)


def ask(cuda: Any, call: str, *arguments: Any) -> Any:
    """One call of the CUDA runtime: its value, or its values, without the error code.

    Raises:
        DeviceError: The code is not success.
    """
    code, *values = getattr(cuda, call)(*arguments)
    if code != cuda.cudaError_t.cudaSuccess:
        raise DeviceError(f"{call} failed: {_reason(cuda, code)}")
    return values[0] if len(values) == 1 else tuple(values)


def spelled(version: int) -> str:
    """A CUDA version as people write it: 13050 → 13.5."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _reason(cuda: Any, code: Any) -> str:
    name, text = (cuda.cudaGetErrorName(code)[1], cuda.cudaGetErrorString(code)[1])
    return ": ".join(part.decode() if isinstance(part, bytes) else str(part) for part in (name, text))
