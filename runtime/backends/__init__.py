"""One file per inference engine, each with a class that is a `Backend`; `open_backend` picks one by its name.

An engine's package is imported when a graph is first opened with it, so that the runtime needs only the one in use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from invariclip.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Compute


class Backend(Protocol):
    """A loaded graph that answers.

    Attributes:
        input_names: The graph's inputs.
        output_names: The graph's outputs.
        input_shapes: Input to its shape; None where a dimension is free.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    input_shapes: dict[str, tuple[int | None, ...]]

    def run(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...] | None = None) -> dict[str, NDArray[Any]]:
        """Answers the named outputs (all, if None), in arrays that no later run changes; inputs are never written.

        Safe to call from several threads at once: two answers for each of its threads are under way at most, and
        further calls wait.
        """

    def describe(self) -> dict[str, Any]:
        """What really runs: engine, version, execution provider, threads."""


DEFAULT_BACKEND = "onnxruntime"
# name: (class in the module of that name, what to install)
_ENGINES = {
    "onnxruntime": ("OnnxRuntimeBackend", "invariclip"),
    "openvino": ("OpenVinoBackend", "invariclip[openvino]"),
}
BACKENDS = tuple(_ENGINES)
"""The engines of the CPU; each is also the name of the package that it needs."""
# name: (module, class in it, packages of which one is needed, what to install)
_GPU_ENGINES = {
    "tensorrt": ("tensorrt.backend", "TensorRtBackend", ("tensorrt", "tensorrt_rtx"), "tensorrt"),
    "onnxruntime-cuda": ("onnxruntime_gpu", "CudaBackend", ("onnxruntime",), "gpu"),
    "onnxruntime-tensorrt": ("onnxruntime_gpu", "TensorRtProviderBackend", ("onnxruntime",), "gpu"),
    "onnxruntime-tensorrt-rtx": ("onnxruntime_gpu", "TensorRtRtxProviderBackend", ("onnxruntime",), "gpu"),
}
GPU_BACKENDS = tuple(_GPU_ENGINES)
"""The engines of a GPU. They are opened where they are named and nowhere else: no default leads to one."""
# An engine may come from packages of several names; the first that is installed says the version.
_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
}
ALL_BACKENDS = (*BACKENDS, *GPU_BACKENDS)
"""The names that `open_backend` knows."""


def require_backend(name: str) -> None:
    """Makes sure that an engine can be opened, so that a mistake shows before minutes of work and not after.

    Raises:
        InputError: No engine has this name.
        MissingExtraError: Its package is not installed.
    """
    if name not in ALL_BACKENDS:
        raise InputError(f"no backend is called {name!r}; available: {', '.join(ALL_BACKENDS)}")
    if name in _GPU_ENGINES:
        _, _, packages, extra = _GPU_ENGINES[name]
        if not any(map(_is_there, packages)):
            raise MissingExtraError(
                f'backend {name!r} needs the package {" or ".join(packages)}: pip install "invariclip[{extra}]"'
            )
    elif not _is_there(name):
        raise MissingExtraError(f'backend {name!r} needs the package {name}: pip install "{_ENGINES[name][1]}"')


def is_installed(backend: str) -> bool:
    """Whether an engine's package can be imported.

    Raises:
        InputError: No engine has this name.
    """
    try:
        require_backend(backend)
    except MissingExtraError:
        return False
    return True


def engine_versions() -> dict[str, str]:
    """Engines that are installed and their versions, read from the packages' own records: nothing is imported."""
    return {name: _version(name) for name in BACKENDS if is_installed(name)}


def _version(backend: str) -> str:
    for package in _DISTRIBUTIONS.get(backend, (backend,)):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"  # built from source, without a record


def open_backend(
    name: str,
    path: Path,
    *,
    threads: int | None = None,
    compute: Compute = "float32",
    options: Mapping[str, str] | None = None,
) -> Backend:
    """Loads an ONNX file into an engine.

    Args:
        name: One of `ALL_BACKENDS`.
        path: The ONNX file; external data, where it has some, lies beside it.
        threads: Threads of the engine; None takes what affinity and cgroup allow.
        compute: What its arithmetic may be where the graph is float32.
        options: Of a GPU's engine: see `backends.tensorrt.OPTIONS`, or the provider's own names.

    Raises:
        InputError: No engine has this name, it has no such options, `threads` is below 1, or it cannot compute like
            that on this processor.
        MissingExtraError: The engine's package is not installed.
        DeviceError: It needs a GPU, driver or library that is missing, too old or known to be wrong.
        ArtifactError: The engine cannot load the file.
    """
    require_backend(name)
    if name in _GPU_ENGINES:
        module, of, _, _ = _GPU_ENGINES[name]
        on_gpu: Backend = getattr(import_module(f"invariclip.backends.{module}"), of)(
            path, threads=threads, compute=compute, options=options
        )
        return on_gpu
    if options:
        raise InputError(f"backend {name!r} has no options; a GPU's have: {', '.join(GPU_BACKENDS)}")
    engine = getattr(import_module(f"invariclip.backends.{name}"), _ENGINES[name][0])
    backend: Backend = engine(path, threads=threads, compute=compute)
    return backend


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # an interpreter that was told that the package is not there
        return False
