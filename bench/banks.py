"""Whether the class embeddings of many templates can be read in less time: `python -m invariclip.bench.banks`.

At batch 1 what M = 8 costs over M = 1 is reading nine banks instead of two (see `evidence`). Each form here answers the
same product of one embedding; they take turns, and before each the caches are emptied, as a tower empties them.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from invariclip.backends.threads import available_threads
from invariclip.cli import run_command
from invariclip.console import bar, note
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Run = Callable[[], NDArray[np.float32]]

WIDTH, CLASSES = 512, 1000
FEW, MANY = 2, 9
"""Banks read with M = 1 and with M = 8."""
BOUND = 1e-5
"""Of the float32 contract, a component."""
_EMPTIES = 96 << 20
"""Bytes written before each run: three times the last cache of the machines that this was run on."""
_WARM = 5
_SEED = 0


@dataclass(frozen=True)
class Form:
    """One way to keep the bank and to multiply with it.

    Attributes:
        name: Engine and form.
        few_ms: Median with two banks.
        many_ms: Median with nine.
        error: Largest difference of a cosine from float64's.
    """

    name: str
    few_ms: float
    many_ms: float
    error: float


def ort_forms(bank: NDArray[np.float32], x: NDArray[np.float32], threads: int) -> dict[str, Run]:
    """ONNX Runtime's: float32 in several graphs, and int8 with a scale for each 128 weights.

    Args:
        bank: float32 [K, d].
        x: float32 [1, d].
        threads: The engine's.
    """
    count, width = bank.shape
    across = np.ascontiguousarray(bank.T)
    split = [np.ascontiguousarray(across[:, start : start + CLASSES]) for start in range(0, count, CLASSES)]
    blocks = bank.reshape(count, width // 128, 128)
    scale = np.abs(blocks).max(axis=2) / 127
    levels = np.clip(np.round(blocks / scale[..., None]) + 128, 0, 255).astype(np.uint8)
    quantised = {"q": levels, "s": scale.reshape(-1).astype(np.float32)}
    nbits = {"domain": "com.microsoft", "K": width, "N": count, "bits": 8, "block_size": 128}

    def one(operator: str, weights: dict[str, NDArray[Any]], *, packed: bool = True, **attributes: Any) -> Run:
        node = helper.make_node(operator, ["x", *weights], ["y"], **attributes)
        return _session([node], weights, ["y"], x, threads, packed=packed)

    parts = {f"w{place}": part for place, part in enumerate(split)}
    products = [helper.make_node("MatMul", ["x", name], [f"y{place}"]) for place, name in enumerate(parts)]
    return {
        "onnxruntime, float32": one("MatMul", {"w": across}),
        "onnxruntime, float32, weights not repacked": one("MatMul", {"w": across}, packed=False),
        "onnxruntime, float32, transposed in Gemm": one("Gemm", {"w": bank}, transB=1),
        "onnxruntime, float32, a product for each template": _session(
            products, parts, [f"y{place}" for place in range(len(parts))], x, threads
        ),
        "onnxruntime, int8, computed in float32": one("MatMulNBits", quantised, accuracy_level=1, **nbits),
        "onnxruntime, int8, computed in int8": one("MatMulNBits", quantised, accuracy_level=4, **nbits),
    }


def _session(
    nodes: list[Any], weights: dict[str, NDArray[Any]], outputs: Sequence[str], x: NDArray[np.float32], threads: int,
    *, packed: bool = True,
) -> Run:  # fmt: skip
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "product", [helper.make_tensor_value_info("x", kind, ["n", x.shape[1]])],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # as our backend sets it; threads that spin would also stand in the way of the next form
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    return lambda: np.concatenate(session.run(list(outputs), {"x": x}), axis=1)


def openvino_forms(bank: NDArray[np.float32], x: NDArray[np.float32], threads: int) -> dict[str, Run]:
    """OpenVINO's: float32, float16 and int8 weights under float32 arithmetic.

    Args:
        bank: float32 [K, d].
        x: float32 [1, d].
        threads: The engine's.
    """
    import openvino as ov
    from openvino import opset13 as ops

    scale = np.abs(bank).max(axis=1, keepdims=True) / 127
    levels = np.clip(np.round(bank / scale), -127, 127).astype(np.int8)
    half = ops.convert(ops.constant(bank.astype(np.float16)), "f32")
    eight = ops.multiply(ops.convert(ops.constant(levels), "f32"), ops.constant(scale))
    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}

    def compiled(weights: Any) -> Run:
        given = ops.parameter([-1, bank.shape[1]], np.float32, name="x")
        model = ov.Model([ops.matmul(given, weights, False, True)], [given])
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda: np.asarray(request.infer({0: x})[0])

    return {
        "openvino, float32": compiled(ops.constant(bank)),
        "openvino, float16": compiled(half),
        "openvino, int8": compiled(eight),
    }


def time_forms(threads: int, repetitions: int) -> list[Form]:
    """Times all forms in turns, with two banks and with nine.

    Args:
        threads: The engines'.
        repetitions: Of each.
    """
    rng = np.random.default_rng(_SEED)
    bank, x = (rng.normal(size=(rows, WIDTH)) for rows in (MANY * CLASSES, 1))
    bank, x = ((v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32) for v in (bank, x))
    right = x.astype(np.float64) @ bank.T.astype(np.float64)
    found: list[Form] = []
    for forms in (ort_forms, openvino_forms):  # one engine after the other: two would share threads and memory
        runs = {
            (name, count): run
            for count in (FEW, MANY)
            for name, run in forms(np.ascontiguousarray(bank[: count * CLASSES]), x, threads).items()
        }
        taken = _in_turns(runs, repetitions)
        found += [
            Form(name, taken[name, FEW], taken[name, MANY], float(np.abs(runs[name, MANY]() - right).max()))
            for name, count in runs
            if count == MANY
        ]
    return found


def _in_turns(runs: dict[tuple[str, int], Run], repetitions: int) -> dict[tuple[str, int], float]:
    """Median milliseconds of each run, with empty caches."""
    junk = np.ones(_EMPTIES // 4, dtype=np.float32)
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    order = list(runs)
    for repetition in bar(range(repetitions + _WARM), total=repetitions + _WARM, desc="turns"):
        first = repetition % len(order)
        for key in order[first:] + order[:first]:
            junk += 1
            start = time.perf_counter()
            runs[key]()
            if repetition >= _WARM:
                taken[key].append(time.perf_counter() - start)
    return {key: 1e3 * float(np.median(times)) for key, times in taken.items()}


@click.command()
@click.option("--repetitions", default=120, show_default=True, type=click.IntRange(min=10))
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/banks.md"), show_default=True)
def banks(repetitions: int, threads: int | None, out: Path) -> int:
    """Time forms of the class bank's product at batch 1."""
    count = threads or available_threads()
    forms = time_forms(count, repetitions)
    engines = {name: version(name) for name in ("onnxruntime", "openvino")}
    found = {"threads": count, "repetitions": repetitions, "engines": engines, "forms": [asdict(one) for one in forms]}
    write_atomically(out.with_suffix(".json"), json.dumps(found, indent=1))
    write_atomically(out, page(found))
    note(f"wrote {out}")
    return 0


def page(found: dict[str, Any]) -> str:
    """The table as Markdown, of the JSON's figures alone."""
    engines = ", ".join(f"{name} {number}" for name, number in found["engines"].items())
    exact = [form["many_ms"] - form["few_ms"] for form in found["forms"] if form["error"] <= BOUND]
    lines = [
        "# Class embeddings of nine templates, in fewer bytes or read faster",
        "",
        f"Made by `python -m invariclip.bench.banks`: the product of one embedding ({WIDTH} wide) with the class "
        f"embeddings of {FEW} and of {MANY} templates, {CLASSES:,} classes; {found['threads']} threads, {engines}. An "
        f"engine's forms take turns, {found['repetitions']} times, each after the caches were emptied; medians. What "
        "M = 8 costs over M = 1 at batch 1 ([evidence.md](evidence.md)) is the difference; *error* is the largest of a "
        f"cosine, where float32's contract allows 1e-5. Among forms whose error is within that, M = 8 costs "
        f"{min(exact):.2f} to {max(exact):.2f} ms more.",
        "",
        "| form | two, ms | nine, ms | difference, ms | as float32, GB/s | error |",
        "|---|---|---|---|---|---|",
    ]
    more = (MANY - FEW) * CLASSES * WIDTH * 4
    for form in found["forms"]:
        apart = form["many_ms"] - form["few_ms"]
        times = f"{form['few_ms']:.2f} | {form['many_ms']:.2f} | {apart:.2f} | {more / apart / 1e6:.0f}"
        lines.append(f"| {form['name']} | {times} | {form['error']:.1e} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(banks)
