"""Where a variant's time goes inside OpenVINO: `python -m invariclip.bench.operations ARTIFACT --variant int8`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from invariclip.artifact import checked_path, read_manifest
from invariclip.cli import run_command
from invariclip.console import say
from invariclip.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from invariclip.manifest import Compute

RUNS, WARM_UP = 15, 5


@dataclass(frozen=True)
class Kind:
    """Layers of one type that run as one kind of primitive.

    Attributes:
        layer: OpenVINO's type, such as FullyConnected.
        primitive: What it runs as, such as brgemm_avx512_amx_I8; its end is the arithmetic.
        layers: How many.
        milliseconds: The sum of each one's median time.
    """

    layer: str
    primitive: str
    layers: int
    milliseconds: float


def kinds_of(runs: Iterable[Iterable[tuple[str, str, str, float]]]) -> list[Kind]:
    """Adds layers up by type and primitive, the costliest first.

    Args:
        runs: Of each run, every layer's name, type, primitive and milliseconds.
    """
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for run in runs:
        for name, layer, primitive, spent in run:
            times[name, layer, primitive].append(spent)
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (_, layer, primitive), spent_each in times.items():
        sums[layer, primitive].append(float(np.median(spent_each)))
    kinds = [Kind(layer, primitive, len(each), sum(each)) for (layer, primitive), each in sums.items()]
    return sorted(kinds, key=lambda kind: -kind.milliseconds)


def table(kinds: list[Kind]) -> str:
    """The kinds as a Markdown table, with each one's share."""
    whole = sum(kind.milliseconds for kind in kinds) or 1.0
    rows = [
        f"| {kind.layer} | {kind.primitive} | {kind.layers} | {kind.milliseconds:.2f} | "
        f"{kind.milliseconds / whole:.1%} |"
        for kind in kinds
    ]
    return "\n".join(["| layer | runs as | layers | ms | share |", "|---|---|---|---|---|", *rows])


def profile(image: Path, compute: Compute, batch: int, threads: int | None) -> list[Kind]:
    """Runs an image graph with OpenVINO's own clock on: times are a little longer than without it.

    Args:
        image: The graph; its pixels have a size of their own.
        compute: What its float32 parts are computed in.
        batch: Pictures (noise) per run.
        threads: OpenVINO's; None takes what this process may use.

    Raises:
        ArtifactError: OpenVINO cannot load it, or would run it in another arithmetic.
        InputError: The processor lacks the arithmetic.
    """
    from invariclip.backends.openvino import compile_graph

    _, compiled = compile_graph(image, threads=threads, compute=compute, profiled=True)
    shape = [side.get_length() if side.is_static else batch for side in compiled.inputs[0].get_partial_shape()]
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    request = compiled.create_infer_request()
    runs = []
    for turn in range(WARM_UP + RUNS):
        request.infer([pixels])
        if turn >= WARM_UP:
            runs.append(
                [
                    (one.node_name, one.node_type, one.exec_type, one.real_time.total_seconds() * 1e3)
                    for one in request.profiling_info
                    if one.real_time.total_seconds() > 0
                ]
            )
    return kinds_of(runs)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--variant", default="float32", show_default=True)
@click.option("--batch", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
def operations(artifact: Path, variant: str, batch: int, threads: int | None) -> int:
    """Time the layers of a variant's image graph in OpenVINO, by type."""
    manifest = read_manifest(artifact)
    facts = manifest.variants.get(variant)
    if facts is None:
        raise ArtifactError(f"{artifact}: no variant {variant!r}; available: {', '.join(manifest.variants)}")
    say(table(profile(checked_path(artifact, facts.image), facts.compute, batch, threads)))
    return 0


if __name__ == "__main__":
    run_command(operations)
