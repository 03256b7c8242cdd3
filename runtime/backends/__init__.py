"""One file per inference engine, each with a class that is a `Backend`; `open_backend` picks one by its name.

An engine's package is imported when a graph is first opened with it, so that the runtime needs only the one in use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from invariclip.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.manifest import Compute


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
"""The names that `open_backend` knows; each is also the name of the package that it needs."""


def require_backend(name: str) -> None:
    """Makes sure that an engine can be opened, so that a mistake shows before minutes of work and not after.

    Raises:
        InputError: No engine has this name.
        MissingExtraError: Its package is not installed.
    """
    if name not in _ENGINES:
        raise InputError(f"no backend is called {name!r}; available: {', '.join(BACKENDS)}")
    try:
        found = find_spec(name) is not None
    except ValueError:  # an interpreter that was told that the package is not there
        found = False
    if not found:
        raise MissingExtraError(f'backend {name!r} needs the package {name}: pip install "{_ENGINES[name][1]}"')


def open_backend(name: str, path: Path, *, threads: int | None = None, compute: Compute = "float32") -> Backend:
    """Loads an ONNX file into an engine.

    Args:
        name: One of `BACKENDS`.
        path: The ONNX file; external data, where it has some, lies beside it.
        threads: Threads of the engine; None takes what affinity and cgroup allow.
        compute: What its arithmetic may be where the graph is float32.

    Raises:
        InputError: No engine has this name, `threads` is below 1, or it cannot compute like that on this processor.
        MissingExtraError: The engine's package is not installed.
        ArtifactError: The engine cannot load the file.
    """
    require_backend(name)
    engine = getattr(import_module(f"invariclip.backends.{name}"), _ENGINES[name][0])
    backend: Backend = engine(path, threads=threads, compute=compute)
    return backend
