"""A candidate of the bench: the process that runs it, as PyTorch, as an engine alone or as us, and the side that asks.

Peers run as their own documentation has it (ONNX Runtime's threads spin, OpenVINO pins as it likes): only the number of
threads and the arithmetic are said. The process imports nothing that its engine does not need: its start is timed.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from invariclip.bench.latency.machine import peak_bytes
from invariclip.errors import InputError
from invariclip.measure.worker import Served, Worker, module, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

Batch: TypeAlias = "Callable[[int], NDArray[Any]]"
"""Rows to a batch of that many."""
PEAK_SIDES = {"float32": 1536, "bfloat16": 2048, "int8": 2048}
"""Sides of the square matrices: large enough to keep every unit busy, tens of milliseconds a product."""


@dataclass(frozen=True)
class LatencyCandidate:
    """One way to run a tower, or to multiply matrices.

    Attributes:
        name: How the table calls it.
        kind: One of `KINDS`: `pytorch` (the original checkpoint's image tower), `artifact` (an artifact's, as
            `load` serves it), `graph` (an ONNX file of either tower in one of our backends),
            `whole` (the same of an image tower, asked for its classes too), `onnxruntime`, `openvino`
            (a file in an engine as its documentation says, without us) or `peak` (large matrix products).
        model: open_clip model for `pytorch`, artifact folder for `artifact`, file for the others, empty for `peak`.
        checkpoint: Weights file for `pytorch`, or None.
        backend: Engine of `graph` and `artifact`.
        ids: Ids per text that a text `graph` is fed; None feeds images.
        compute: What the arithmetic is: `float32`, `bfloat16`, for `peak` also `int8`. Artifacts know it themselves.
        variant: The variant of `artifact`.
        compiled: `pytorch` through torch.compile.
        tokenizer: Of `pytorch`, where its model needs one that is not its own.
    """

    name: str
    kind: str
    model: str
    checkpoint: str | None = None
    backend: str = "onnxruntime"
    ids: int | None = None
    compute: str = "float32"
    variant: str = "float32"
    compiled: bool = False
    tokenizer: str | None = None


class LatencyWorker(Worker):
    """A running candidate, loaded and past its first answer; its turns are asked for with `batch`.

    Its first line says `engine`, `load_s` and `first_s`; `start_s` is from nothing to the first answer: interpreter,
    imports, loading, one batch of one.
    """

    def __init__(self, candidate: LatencyCandidate, threads: int, environment: Mapping[str, str] | None = None) -> None:
        """Starts it and waits for the first answer.

        Args:
            candidate: What to run.
            threads: How many threads it may use.
            environment: Variables beside this process's own.

        Raises:
            WorkerError: It stopped before it answered.
        """
        own = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = module("invariclip.bench.latency.worker", json.dumps(asdict(candidate)), str(threads))
        super().__init__(candidate.name, command, environment={**own, **(environment or {})})


@dataclass(frozen=True)
class OpenedCandidate:
    """A candidate that answers.

    Attributes:
        run: A batch to embeddings float32 [N, d], or, for a `peak`, to nothing of interest.
        make: Rows to a batch that `run` takes.
        engine: What really runs, in words.
    """

    run: Callable[[NDArray[Any]], Any]
    make: Batch
    engine: dict[str, Any] = field(default_factory=dict)


def open_candidate(candidate: LatencyCandidate, threads: int) -> OpenedCandidate:
    """Loads what a candidate is.

    Args:
        candidate: What to open.
        threads: How many threads it may use.

    Raises:
        InputError: No candidate is of this kind, or the engine would compute in another precision than was asked for.
        InvariclipError: What opening an artifact, a graph or a checkpoint raises.
    """
    if candidate.kind not in KINDS:
        raise InputError(f"no candidate is of kind {candidate.kind!r}; available: {', '.join(KINDS)}")
    return KINDS[candidate.kind](candidate, threads)


def _artifact(candidate: LatencyCandidate, threads: int) -> OpenedCandidate:
    from invariclip import load

    model = load(candidate.model, variant=candidate.variant, backend=candidate.backend, threads=threads)
    return OpenedCandidate(
        lambda batch: model.embed_images(batch, batch_size=len(batch)),
        _images(model.manifest.pixels.image_size),
        model.describe(),
    )


def _graph(candidate: LatencyCandidate, threads: int) -> OpenedCandidate:
    from invariclip.artifact.manifest import EMBEDDING
    from invariclip.backends import open_backend

    backend = open_backend(candidate.backend, Path(candidate.model), threads=threads)
    name = backend.input_names[0]
    shape = backend.input_shapes[name]
    make = _images(_sides(shape)) if candidate.ids is None else _texts(candidate.ids)
    return OpenedCandidate(lambda batch: backend.run({name: batch}, (EMBEDDING,))[EMBEDDING], make, backend.describe())


def _whole(candidate: LatencyCandidate, threads: int) -> OpenedCandidate:
    """A graph of ours that is asked for all that it answers, not for the embedding alone."""
    from invariclip.backends import open_backend

    backend = open_backend(candidate.backend, Path(candidate.model), threads=threads)
    name = backend.input_names[0]
    return OpenedCandidate(
        lambda batch: backend.run({name: batch}), _images(_sides(backend.input_shapes[name])), backend.describe()
    )


def _onnxruntime(candidate: LatencyCandidate, threads: int) -> OpenedCandidate:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(candidate.model, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    return OpenedCandidate(
        lambda batch: session.run(None, {given.name: batch})[0],
        _images(_sides(given.shape)),
        {"engine": "onnxruntime", "version": onnxruntime.__version__, "computes_in": "float32", "threads": threads},
    )


def _openvino(candidate: LatencyCandidate, threads: int) -> OpenedCandidate:
    from invariclip.backends.openvino import VERSION  # first: it keeps the next from reporting itself over the network

    core = import_module("openvino").Core()
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[candidate.compute.split("+")[-1]],
    }
    model = core.read_model(candidate.model)
    compiled = core.compile_model(model, "CPU", config)
    kind = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if kind != config["INFERENCE_PRECISION_HINT"]:
        raise InputError(f"OpenVINO {VERSION} computes in {kind} here, not in {candidate.compute}")
    request = compiled.create_infer_request()
    shape = [side.get_length() if side.is_static else None for side in model.inputs[0].get_partial_shape()]
    return OpenedCandidate(
        lambda batch: np.array(request.infer([batch])[0]),
        _images(_sides(shape)),
        {"engine": "openvino", "version": VERSION, "computes_in": kind, "threads": threads},
    )


def _pytorch(candidate: LatencyCandidate, threads: int) -> OpenedCandidate:
    import torch

    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(candidate.model, candidate.checkpoint, tokenizer=candidate.tokenizer)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[candidate.compute]
    module = checkpoint.module.to(dtype)
    encode = cast("Callable[..., torch.Tensor]", module.encode_image)
    mean = torch.tensor(checkpoint.pixels.image_mean)[:, None, None]
    std = torch.tensor(checkpoint.pixels.image_std)[:, None, None]

    def embed(batch: torch.Tensor) -> torch.Tensor:
        pixels = (batch.permute(0, 3, 1, 2).float() / 255 - mean) / std
        return encode(pixels.to(dtype), normalize=True).float()

    chosen: Callable[[torch.Tensor], torch.Tensor] = (
        torch.compile(embed, dynamic=False) if candidate.compiled else embed
    )

    def run(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        # What a user of open_clip runs: normalise, encode, unit length; no gradients.
        with torch.inference_mode():
            return cast("NDArray[np.float32]", chosen(torch.from_numpy(batch)).numpy())

    engine = {"engine": "torch", "version": torch.__version__, "compiled": candidate.compiled}
    return OpenedCandidate(
        run,
        _images(checkpoint.pixels.image_size),
        {**engine, "computes_in": candidate.compute, "threads": torch.get_num_threads()},
    )


def _peak(candidate: LatencyCandidate, threads: int) -> OpenedCandidate:
    """One product of square matrices, whatever the batch."""
    import torch

    torch.set_num_threads(threads)
    side = PEAK_SIDES[candidate.compute]
    one, other = torch.rand(side, side), torch.rand(side, side)
    product: Callable[[], Any]
    if candidate.compute == "int8":
        if "onednn" not in torch.backends.quantized.supported_engines:
            raise InputError(f"torch {torch.__version__} has no int8 matrix product on this processor")
        torch.backends.quantized.engine = "onednn"
        left = torch.quantize_per_tensor(one, 1 / 255, 0, torch.quint8)
        packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(other, 1 / 127, 0, torch.qint8), None)
        product = lambda: torch.ops.quantized.linear(left, packed, 1.0, 0)  # noqa: E731
    else:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[candidate.compute]
        first, second = one.to(dtype), other.to(dtype)
        product = lambda: first @ second  # noqa: E731

    def run(batch: NDArray[Any]) -> None:
        del batch
        with torch.inference_mode():
            product()

    engine = {"engine": "torch", "version": torch.__version__, "computes_in": candidate.compute, "threads": threads}
    return OpenedCandidate(run, lambda rows: np.empty(rows, dtype=np.uint8), {**engine, "flop": 2.0 * side**3})


def _sides(shape: Any) -> tuple[int, int]:
    """Height and width of the images that a graph [N, H, W, 3] takes.

    Raises:
        InputError: It takes any, or its input is no image.
    """
    if len(shape) != 4 or not all(isinstance(side, int) for side in shape[1:3]):
        raise InputError(f"an input of shape {list(shape)} is no batch of prepared images [N, H, W, 3]")
    return int(shape[1]), int(shape[2])


def _images(size: tuple[int, int]) -> Batch:
    rng = np.random.default_rng(0)
    return lambda rows: rng.integers(0, 256, (rows, *size, 3), dtype=np.uint8)


def _texts(length: int) -> Batch:
    """Random words and an end; what they are does not change how long a tower takes."""
    rng = np.random.default_rng(0)

    def make(rows: int) -> NDArray[np.int64]:
        ids = rng.integers(1, 40000, (rows, length), dtype=np.int64)
        ids[:, -1] = 49407
        return ids

    return make


KINDS: dict[str, Callable[[LatencyCandidate, int], OpenedCandidate]] = {
    "artifact": _artifact,
    "graph": _graph,
    "whole": _whole,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "peak": _peak,
    "pytorch": _pytorch,
}


def answer_memory() -> dict[str, Any]:
    """The most memory that this process ever had resident, in bytes."""
    return {"peak_bytes": peak_bytes()}


def answer_embed(opened: OpenedCandidate, images: str, batch: int, out: str) -> dict[str, Any]:
    """Embeds a file of images; the last batch is filled up, so that a compiled tower sees no other size.

    Args:
        opened: The candidate.
        images: A .npy of uint8 [N, H, W, 3].
        batch: Rows of a batch.
        out: The .npy to write: float32 [N, d].
    """
    given, parts = np.load(images, mmap_mode="r", allow_pickle=False), []
    for start in range(0, len(given), batch):
        rows = np.minimum(np.arange(start, start + batch), len(given) - 1)
        parts.append(np.array(opened.run(np.ascontiguousarray(given[rows]))))
    np.save(out, np.concatenate(parts)[: len(given)], allow_pickle=False)
    return {"rows": len(given)}


def answer_stages(**question: Any) -> dict[str, Any]:
    """See `stages.time_stages`."""
    from invariclip.bench.latency.stages import time_stages

    return time_stages(**question)


def answer_head(**question: Any) -> dict[str, Any]:
    """See `stages.time_head`."""
    from invariclip.bench.latency.stages import time_head

    return time_head(**question)


def served() -> Served:
    """Opens the candidate that the command line names and lets it answer once."""
    candidate, threads = LatencyCandidate(**json.loads(sys.argv[1])), int(sys.argv[2])
    start = time.perf_counter()
    opened = open_candidate(candidate, threads)
    loaded = time.perf_counter()
    opened.run(opened.make(1))
    facts = {"engine": opened.engine, "load_s": loaded - start, "first_s": time.perf_counter() - loaded}
    return Served(
        facts,
        lambda batch: partial(opened.run, opened.make(batch)),
        {
            "memory": answer_memory,
            "embed": partial(answer_embed, opened),
            "stages": answer_stages,
            "head": answer_head,
        },
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # libraries' remarks on their future; ours were heard when the files were prepared
    serve(served)
