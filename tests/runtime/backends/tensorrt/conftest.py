"""A GPU's boundary, and nothing above it, played on the host: CUDA's calls, and a library that loads an engine."""

# ruff: noqa: N802, N815 - the calls have the names that CUDA gave them

import ctypes
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from invariclip.backends.tensorrt import device as device_module
from invariclip.backends.tensorrt.facts import (
    EngineFacts,
    EngineKey,
    ShapeProfile,
    engine_path,
    graph_digest,
    write_facts,
)
from invariclip.backends.tensorrt.library import Library

WIDTH = 4


class Error:
    cudaSuccess, cudaErrorNoDevice, cudaErrorInsufficientDriver, cudaErrorMemoryAllocation = 0, 100, 35, 2


class Cuda:
    """The calls of `cuda.bindings.runtime` that are used, over host memory."""

    cudaError_t = Error
    cudaHostAllocDefault, cudaStreamNonBlocking = 0, 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)

    def __init__(self, count=1, code=0, driver=13000):
        self.count, self.code, self.driver = count, code, driver
        self.memory, self.capturing, self.launched = {}, {}, 0
        self.ids = itertools.count(1)

    def cudaGetDeviceCount(self):
        return self.code, self.count

    def cudaDriverGetVersion(self):
        return 0, self.driver

    def cudaRuntimeGetVersion(self):
        return 0, 13050

    def cudaGetErrorName(self, code):
        return 0, f"error{code}".encode()

    def cudaGetErrorString(self, code):
        return 0, b"as the driver says it"

    def cudaSetDevice(self, index):
        return (0,)

    def cudaMemGetInfo(self):
        return 0, 6 << 30, 8 << 30

    def cudaGetDeviceProperties(self, index):
        return 0, SimpleNamespace(name=b"Paper GPU\0\0")

    def cudaDeviceGetAttribute(self, which, index):
        return 0, {75: 9, 76: 0}[which]

    def _allocate(self, size):
        buffer = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaMalloc(self, size):
        return self._allocate(size) if size < 1 << 40 else (Error.cudaErrorMemoryAllocation, 0)

    def cudaHostAlloc(self, size, flags):
        return self._allocate(size)

    def cudaFree(self, address):
        del self.memory[address]
        return (0,)

    cudaFreeHost = cudaFree

    def cudaStreamCreateWithFlags(self, flags):
        return 0, next(self.ids)

    def cudaStreamSynchronize(self, stream):
        assert stream not in self.capturing
        return (0,)

    def cudaStreamDestroy(self, stream):
        return (0,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert stream not in self.capturing
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing[stream] = []
        return (0,)

    def cudaStreamEndCapture(self, stream):
        return 0, self.capturing.pop(stream)

    def cudaGraphInstantiate(self, graph, flags):
        return 0, list(graph)

    def cudaGraphDestroy(self, graph):
        return (0,)

    def cudaGraphExecDestroy(self, graph):
        return (0,)

    def cudaGraphLaunch(self, graph, stream):
        self.launched += 1
        for step in graph:
            step()
        return (0,)

    def cudaEventCreate(self):
        return 0, next(self.ids)

    def cudaEventRecord(self, event, stream):
        return (0,)

    def cudaEventElapsedTime(self, start, end):
        return 0, 0.25


class Context:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.profile = engine, {}, {}, None

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        return self.shapes[name] if name in self.shapes else (self.shapes["pixels"][0], WIDTH)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        if self.engine.broken:
            return False
        rows = self.shapes["pixels"]
        places = dict(self.addresses)

        def work():
            given = np.ctypeslib.as_array((ctypes.c_uint8 * int(np.prod(rows))).from_address(places["pixels"])).reshape(
                rows
            )
            answer = given.reshape(rows[0], -1, WIDTH).astype(np.float32).sum(axis=1) * self.engine.scale
            ctypes.memmove(places["embedding"], answer.ctypes.data, answer.nbytes)

        capture = self.engine.cuda.capturing.get(stream)
        work() if capture is None else capture.append(work)
        return True


class Engine:
    def __init__(self, cuda):
        self.cuda, self.contexts, self.scale, self.broken = cuda, 0, 1.0, False

    def get_tensor_shape(self, name):
        return (-1, 2, WIDTH) if name == "pixels" else (-1, WIDTH)

    def create_runtime_config(self):
        engine = self

        class Cache:
            content = b""

            def serialize(self):
                compiled = self.content + b"k" * engine.contexts
                return memoryview(compiled)

            def deserialize(self, content):
                self.content = bytes(content)
                return self.content != b"of another driver"

        config = SimpleNamespace(create_runtime_cache=Cache)
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        self.config = config
        return config

    def create_execution_context(self, config=None):
        self.contexts += 1
        return Context(self)


def paper_library(cuda, name="tensorrt", version="11.4.0"):
    engines = []

    class Logger:
        ERROR, INTERNAL_ERROR, WARNING = 2, 3, 1

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, content):
            if content != b"an engine":
                self.logger.log(Logger.ERROR, "magic tag does not match")
                return None
            engines.append(Engine(cuda))
            return engines[-1]

    class Refitter:
        def __init__(self, engine, logger):
            self.engine, self.given = engine, {}

        def get_weights_prototype(self, name):
            return SimpleNamespace(dtype="float32", size=1)

        def set_named_weights(self, name, weights):
            self.given[name] = weights
            return True

        def get_missing_weights(self):
            return []

        def refit_cuda_engine(self):
            self.engine.scale = float(self.given["projection"].reshape(()))
            return True

    trt = SimpleNamespace(
        ILogger=Logger, Runtime=Runtime, Refitter=Refitter, Weights=lambda values: values, nptype=lambda kind: kind,
        __version__=version, CudaGraphStrategy=SimpleNamespace(DISABLED="disabled"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
    )  # fmt: skip
    library = Library(name, version, trt)
    return library, engines


@pytest.fixture
def cuda(monkeypatch):
    """A machine with one GPU; set its `code` or `count` to take it away."""
    paper = Cuda()
    monkeypatch.setattr(device_module, "runtime_bindings", lambda: paper)
    return paper


def key_for(graph, **but):
    profiles = tuple(
        ShapeProfile({"pixels": ((low, 2, WIDTH), (high, 2, WIDTH), (high, 2, WIDTH))})
        for low, high in ((1, 1), (2, 8))
    )
    key = EngineKey(graph_digest(graph), "tensorrt", "11.4.0", "Paper GPU", "9.0", "float32", profiles, ("projection",))
    return replace(key, **but)


def place_engine(graph, *, content=b"an engine", sha256=None, **but):
    """Writes an engine and its sidecar for a graph; `but` changes its key."""
    import hashlib

    key = key_for(graph, **but)
    path = engine_path(graph.parent, graph.name, key)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    facts = EngineFacts(
        key, graph.name, {"pixels": "uint8"}, {"embedding": "float32"},
        sha256 or hashlib.sha256(content).hexdigest(), len(content), 1.5,
    )  # fmt: skip
    write_facts(path, facts)
    return path


@pytest.fixture
def graph(tmp_path):
    """A file that stands for an ONNX graph."""
    path = tmp_path / "image.onnx"
    path.write_bytes(b"a graph")
    return path


@pytest.fixture
def loaded(monkeypatch, cuda, graph):
    """Opens the backend on the paper GPU; answers it, its engine and the CUDA calls."""
    from invariclip.backends.tensorrt import backend as tensorrt

    def of(*, library=("tensorrt", "11.4.0"), **options):
        library, engines = paper_library(cuda, *library)
        monkeypatch.setattr(tensorrt, "open_library", lambda name: library)
        backend = tensorrt.TensorRtBackend(graph, options={key: str(value) for key, value in options.items()})
        return backend, engines[-1]

    return of


@pytest.fixture
def tools():
    """What tests build with."""
    return SimpleNamespace(place=place_engine, key=key_for, library=paper_library, width=WIDTH)
