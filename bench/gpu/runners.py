"""Candidates, opened, from checkpoints and graphs that are made once each.

Each answers from host memory, and those that can tell say how long the GPU itself took. Weights are random and seeded,
because none can be fetched where the bench runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir

from invariclip.artifact.manifest import EMBEDDING, IMAGE_INPUT, TEXT_INPUT
from invariclip.errors import DeviceError
from invariclip.export.checkpoints import check_texts
from invariclip.export.checkpoints.checkpoint import Checkpoint, load_checkpoint
from invariclip.export.graphs.rewrites.plan import NAMES
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import write_graph
from invariclip.export.quantization.float16 import to_float16

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.bench.gpu.cases import Case, GpuCandidate


PARITY_ROWS = 32
"""Images or texts that answers are compared on."""


@dataclass(frozen=True)
class GraphFiles:
    """Where graphs are made, once each.

    Attributes:
        folder: Where they are written.
        short: Take only the first and last blocks of each model: for trying the bench itself.
    """

    folder: Path
    short: bool = False

    def checkpoint(self, model: str) -> Checkpoint:
        """A model with seeded random weights."""
        return _checkpoint(model, self.short)

    def graph(self, case: Case, candidate: GpuCandidate) -> Path:
        """The ONNX file that a candidate runs.

        Raises:
            ContractError: It cannot be exported.
        """
        kind = f"{candidate.graph}-{candidate.precision}"
        path = self.folder / f"{case.model}{'-short' if self.short else ''}" / f"{case.tower}.{kind}.onnx"
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        rewrites = NAMES if candidate.graph == "ours" else ()
        whole = path.with_name(f"{case.tower}.{candidate.graph}-float32.onnx")
        if not whole.is_file():
            write_graph(tower_graph(self.checkpoint(case.model), case.tower, rewrites=rewrites).model, whole)
        if candidate.precision == "float16":
            model = ir.load(whole)
            to_float16(model)
            write_graph(model, path)
        return path

    def inputs(self, case: Case, rows: int) -> NDArray[np.uint8] | NDArray[np.int64]:
        """What the case's tower reads: bundled images and prompts, over again where more are asked for."""
        return rows_of(self.checkpoint(case.model), case.tower, rows)


@cache
def _checkpoint(model: str, short: bool) -> Checkpoint:
    return load_checkpoint(model, allow_random=True, short=short)


def rows_of(checkpoint: Checkpoint, tower: str, rows: int) -> NDArray[np.uint8] | NDArray[np.int64]:
    """uint8 [rows, side, side, 3] of bundled images, or int64 [rows, context] of prompts about what they show."""
    from invariclip.export.checkpoints.check_texts import spread
    from invariclip.export.reference import images_path
    from invariclip.export.verification.evidence import ImageBatches
    from invariclip.preprocessing.find import find_images

    if tower == "text":
        texts: Sequence[str] = check_texts.PROMPTS
        return np.asarray(checkpoint.tokenizer([texts[place % len(texts)] for place in range(rows)]))
    found = spread(find_images([images_path()]), min(rows, PARITY_ROWS))
    images = np.concatenate(list(ImageBatches(found, checkpoint.pixels).batches(len(found))))
    return np.ascontiguousarray(images[np.arange(rows) % len(images)])


WARM = 10
"""Runs that are not counted: kernels are loaded, chosen and captured in them."""


class Runner(Protocol):
    """A candidate that is ready."""

    def answer(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Unit embeddings [n, d] of rows in host memory, in host memory: all of the way."""

    def device_times(self, rows: NDArray[Any], runs: int) -> list[float]:
        """Milliseconds of single runs by the GPU's own events, without copies; empty where they cannot be had."""

    def close(self) -> None:
        """Gives the GPU's memory back."""


def open_runner(candidate: GpuCandidate, case: Case, workshop: GraphFiles) -> Runner:
    """Loads, compiles or builds a candidate for a case.

    Raises:
        DeviceError: There is no GPU for it.
        ContractError: Its graph cannot be exported or built.
    """
    if candidate.engine in ("torch", "compile", "cudagraph"):
        return TorchRunner(candidate, case, workshop)
    return GraphRunner(candidate, case, workshop)


class TorchRunner:
    """PyTorch: eager, compiled, or eager captured as a CUDA graph."""

    def __init__(self, candidate: GpuCandidate, case: Case, workshop: GraphFiles) -> None:
        import torch as module

        torch: Any = module  # its stubs leave events and graphs untyped
        require_cuda(torch)
        self._torch, self._candidate = torch, candidate
        exact_float32(torch)
        dtype = getattr(torch, candidate.precision)
        loaded = workshop.checkpoint(case.model)
        self._tower = tower_module(torch, loaded, case.tower, dtype).cuda().eval()
        self._graph: Any = None
        self._place: Any = None
        self._captured: Any = None
        self._run: Any = self._tower
        if candidate.engine == "compile":
            # fixed shapes, CUDA graphs within: the strongest that PyTorch offers
            self._run = torch.compile(self._tower, mode="max-autotune", dynamic=False)

    def answer(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Copies in, runs, copies out."""
        given = self._torch.from_numpy(np.ascontiguousarray(rows)).pin_memory().cuda(non_blocking=True)
        return np.asarray(self._forward(given).float().cpu().numpy())

    def device_times(self, rows: NDArray[Any], runs: int) -> list[float]:
        """By torch's events, input on the GPU already."""
        torch = self._torch
        given = torch.from_numpy(np.ascontiguousarray(rows)).cuda()
        for _ in range(WARM):
            self._forward(given)
        found = []
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(runs):
            start.record()
            self._launch(given)
            end.record()
            end.synchronize()
            found.append(float(start.elapsed_time(end)))
        return found

    def close(self) -> None:
        """Forgets the module and what was compiled."""
        self._run = self._tower = self._graph = self._captured = self._place = None
        self._torch.compiler.reset()
        self._torch.cuda.empty_cache()

    def _forward(self, given: Any) -> Any:
        answer = self._launch(given)
        self._torch.cuda.synchronize()
        return answer

    def _launch(self, given: Any) -> Any:
        with self._torch.inference_mode():
            if self._candidate.engine != "cudagraph":
                return self._run(given)
            if self._place is None or self._place.shape != given.shape:
                self._capture(given)
            if given is not self._place:
                self._place.copy_(given)
            self._graph.replay()
            return self._captured

    def _capture(self, given: Any) -> None:
        torch = self._torch
        self._place = given.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run(self._place)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._captured = self._run(self._place)


class GraphRunner:
    """An exported graph in an engine of ours: ONNX Runtime on a GPU, or TensorRT."""

    def __init__(self, candidate: GpuCandidate, case: Case, workshop: GraphFiles) -> None:
        from invariclip.backends import open_backend

        graph = workshop.graph(case, candidate)
        self._input = IMAGE_INPUT if case.tower == "image" else TEXT_INPUT
        if candidate.engine == "tensorrt":
            _built(graph, case.batch)
        self._backend = open_backend(candidate.engine, graph)

    def answer(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Copies in, runs, copies out."""
        return np.asarray(self._backend.run({self._input: rows}, (EMBEDDING,))[EMBEDDING])

    def device_times(self, rows: NDArray[Any], runs: int) -> list[float]:
        """TensorRT by events around its work; ONNX Runtime does not say which stream its work is on."""
        for _ in range(WARM):
            self.answer(rows)
        time = getattr(self._backend, "time", None)
        return [] if time is None else list(time({self._input: rows}, runs))

    def close(self) -> None:
        """Forgets the engine."""
        del self._backend


def _built(graph: Any, batch: int) -> None:
    """The engine of a graph, tuned for one batch size: found, or built now."""
    from invariclip.backends.tensorrt.device import Device
    from invariclip.backends.tensorrt.library import open_library
    from invariclip.export.tensorrt.engines import engine_of
    from invariclip.export.tensorrt.plan import plan_engine

    engine_of(graph, plan_engine(graph, batches=(batch,)), open_library(), Device())


def require_cuda(torch: Any) -> None:
    """Makes sure that PyTorch sees a GPU.

    Raises:
        DeviceError: It was built without CUDA, or sees none.
    """
    if torch.version.cuda is None:
        raise DeviceError(f"PyTorch {torch.__version__} was built without CUDA; bring one that was")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"PyTorch {torch.__version__} sees no GPU; its driver is missing or too old for CUDA {torch.version.cuda}"
        )


def exact_float32(torch: Any) -> None:
    """float32 means float32: no TensorFloat-32 in the reference."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def tower_module(torch: Any, checkpoint: Any, tower: str, dtype: Any) -> Any:
    """A tower as PyTorch's users run it: uint8 or ids in, normalised on the GPU, unit float32 embeddings out."""
    import copy

    from invariclip.export.graphs.trace import part_of

    encoder: Any = copy.deepcopy(part_of(checkpoint.module, tower)).to(dtype)
    mean = torch.tensor(checkpoint.pixels.image_mean)[:, None, None] * 255
    std = torch.tensor(checkpoint.pixels.image_std)[:, None, None] * 255

    class Tower(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder: Any = encoder
            self.register_buffer("mean", mean)
            self.register_buffer("std", std)

        def forward(self, rows: Any) -> Any:
            if tower == "image":
                pixels = ((rows.permute(0, 3, 1, 2).float() - self.mean) / self.std).to(dtype)
                raw = self.encoder.encode_image(pixels, normalize=False)
            else:
                raw = self.encoder.encode_text(rows, normalize=False)
            return torch.nn.functional.normalize(raw.float(), dim=-1)

    return Tower()
