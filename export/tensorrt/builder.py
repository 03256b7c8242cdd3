"""Parsing and building with TensorRT or TensorRT-RTX, with progress shown and a way to stop.

Precision is the graph's: networks are strongly typed.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from invariclip.backends.tensorrt.library import Messages, logger
from invariclip.console import silent
from invariclip.errors import ContractError, DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from invariclip.backends.tensorrt.library import Library
    from invariclip.console import Progress
    from invariclip.export.tensorrt.plan import EnginePlan

WORKSPACE_SHARE = 0.8
"""Of the free device memory, what a builder's tactics may take; the rest is for what they are tried on."""
T = TypeVar("T")
_DONE = ""


@dataclass(frozen=True)
class Built:
    """An engine in memory.

    Attributes:
        engine: Its bytes.
        seconds: What parsing and building took.
        timings: The timing cache after it, to be used by the next build; None where the library has none.
        phases: What the builder said that it did, in order.
        warnings: What it warned of.
    """

    engine: bytes
    seconds: float
    timings: bytes | None
    phases: tuple[str, ...]
    warnings: tuple[str, ...]


def build(
    graph: Path,
    plan: EnginePlan,
    library: Library,
    *,
    capabilities: Sequence[str] = (),
    has_gpu: bool = False,
    free_memory: int | None = None,
    timings: bytes | None = None,
    progress: Progress = silent,
) -> Built:
    """Builds a planned engine.

    Args:
        graph: The ONNX file that was planned.
        plan: What to build.
        library: What builds it.
        capabilities: Compute capabilities to compile for, as `8.9`; TensorRT-RTX alone can choose. Empty means this
            machine's GPU, or with TensorRT-RTX any that it knows.
        has_gpu: Whether there is a GPU to tune and compile on.
        free_memory: Bytes free on it, for the builder's workspace; None leaves the library's own limit.
        timings: A timing cache of an earlier build on the same GPU.
        progress: `console.bar` or `console.silent`.

    Raises:
        ContractError: The graph does not parse or cannot be built; the message is the library's own.
        DeviceError: It takes a GPU and there is none, or the library does not know a capability or precision.
    """
    began = time.monotonic()
    _require_buildable(plan, library, has_gpu=has_gpu)
    trt, messages, steps = library.trt, Messages(), Steps()
    said = logger(trt, messages)
    builder = trt.Builder(said)
    network, parser = parsed(graph, library, builder, said)
    config = builder.create_builder_config()
    watcher = monitor(trt, steps)
    config.progress_monitor = watcher
    _configure(config, plan, library, free_memory)
    _target(config, library, capabilities)
    _refittable(network, config, plan, library)
    _profiles(builder, config, plan)
    cache = _timing_cache(config, library, timings)
    engine = watched(
        lambda: builder.build_serialized_network(network, config), steps, progress, f"building {graph.name}"
    )
    if engine is None:
        raise ContractError(f"{graph.name}: {library.title} cannot build it: {messages.line()}")
    after = None if cache is None else bytes(config.get_timing_cache().serialize())
    del parser  # it holds the weights that the network points at, so it must outlive the build
    return Built(
        bytes(engine), time.monotonic() - began, after, tuple(dict.fromkeys(steps.phases)), tuple(messages.warnings)
    )


def parsed(graph: Path, library: Library, builder: Any, said: Any) -> tuple[Any, Any]:
    """The graph as a strongly typed network, and the parser that must outlive it.

    Raises:
        ContractError: It does not parse.
    """
    trt = library.trt
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, said)
    if not parser.parse_from_file(str(graph)):
        reasons = " ".join(" ".join(str(parser.get_error(place)) for place in range(parser.num_errors)).split())
        raise ContractError(f"{graph.name}: {library.title} does not parse it: {reasons[:500] or 'no reason given'}")
    return network, parser


def _require_buildable(plan: EnginePlan, library: Library, *, has_gpu: bool) -> None:
    if library.name == "tensorrt" and not has_gpu:
        raise DeviceError(
            f"{library.title} times kernels on the GPU that they will run on, and there is none here; build on that "
            "machine, or with TensorRT-RTX, which needs no GPU to build"
        )
    if plan.refit and not has_gpu:
        raise DeviceError(f"{library.title} builds an engine that can be refitted on a GPU alone; leave --refit out")
    if plan.precision == "fp8" and not hasattr(library.trt.DataType, "FP8"):
        raise DeviceError(f"{library.title} has no fp8; install a later release, or build another variant")


def _configure(config: Any, plan: EnginePlan, library: Library, free_memory: int | None) -> None:
    trt = library.trt
    if plan.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:  # it is on by default, and would leave 11 bits of a float32 product
        config.clear_flag(trt.BuilderFlag.TF32)
    if plan.level is not None:
        config.builder_optimization_level = plan.level
    if free_memory is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(free_memory * WORKSPACE_SHARE))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def _target(config: Any, library: Library, capabilities: Sequence[str]) -> None:
    if not capabilities:
        return
    known = getattr(library.trt, "ComputeCapability", None)
    if known is None or library.name != "tensorrt_rtx":
        raise DeviceError(f"{library.title} builds for the GPU of this machine; leave the compute capabilities out")
    names = {f"{name[2:-1]}.{name[-1]}": value for name, value in known.__members__.items() if name.startswith("SM")}
    unknown = [name for name in capabilities if name not in names]
    if unknown:
        raise DeviceError(
            f"{library.title} does not know compute capability {', '.join(unknown)}; available: {', '.join(names)}"
        )
    config.num_compute_capabilities = len(capabilities)
    for place, name in enumerate(capabilities):
        config.set_compute_capability(names[name], place)


def _refittable(network: Any, config: Any, plan: EnginePlan, library: Library) -> None:
    """Marks single initializers: an engine that may be refitted everywhere is a slower one."""
    if not plan.refit:
        return
    config.set_flag(library.trt.BuilderFlag.REFIT_INDIVIDUAL)
    for name in plan.refit:
        if not network.mark_weights_refittable(name):
            raise ContractError(f"{plan.graph}: {library.title} knows no weights called {name} in it")


def _profiles(builder: Any, config: Any, plan: EnginePlan) -> None:
    for profile in plan.profiles:
        prepared = builder.create_optimization_profile()
        for name, three in profile.shapes.items():
            prepared.set_shape(name, *three)
        config.add_optimization_profile(prepared)


def _timing_cache(config: Any, library: Library, timings: bytes | None) -> Any:
    """The cache of kernel timings; TensorRT-RTX times nothing, and its calls do nothing since 1.2."""
    if library.name == "tensorrt_rtx":
        return None
    cache = config.create_timing_cache(timings or b"")
    if not config.set_timing_cache(cache, False):
        # made on another GPU or by another release: of no use, and the file is written anew
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


class Steps:
    """What a build reports, as an iterable; and the way to stop it."""

    def __init__(self) -> None:
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self.phases: list[str] = []

    def started(self, phase: str) -> None:
        """A phase has begun."""
        self.phases.append(phase)

    def stepped(self, phase: str) -> bool:
        """A step of a phase is done; False tells the builder to stop."""
        self._said.put(phase)
        return not self._stopped.is_set()

    def finish(self) -> None:
        """Nothing more will come."""
        self._said.put(_DONE)

    def stop(self) -> None:
        """The builder ends at its next step."""
        self._stopped.set()

    def __iter__(self) -> Iterator[str]:
        """Every finished step, until the end."""
        while (phase := self._said.get()) != _DONE:
            yield phase


def monitor(trt: Any, steps: Steps) -> Any:
    """A progress monitor of a library that reports to `steps`; it must live as long as the builder's config.

    Args:
        trt: The library's module.
        steps: Where it reports.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase, num_steps
            steps.started(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            del step
            return steps.stepped(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            del phase_name

    return Monitor()


def watched(work: Callable[[], T], steps: Steps, progress: Progress, desc: str) -> T:
    """Does the work in a thread while its steps are shown; an interruption stops it at its next step.

    Args:
        work: Blocks, and reports to `steps` meanwhile.
        steps: What it reports.
        progress: `console.bar` or `console.silent`.
        desc: What the bar says.
    """
    answer: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(work())
        except BaseException as error:
            failure.append(error)
        finally:
            steps.finish()

    thread = threading.Thread(target=run, name="tensorrt-build")
    thread.start()
    try:
        for _ in progress(steps, desc=desc):
            pass
    except BaseException:
        steps.stop()
        thread.join()
        raise
    thread.join()
    if failure:
        raise failure[0]
    return answer[0]
