"""`invariclip triton`."""

from __future__ import annotations

from pathlib import Path

import click

from invariclip.backends import BACKENDS, DEFAULT_BACKEND
from invariclip.cli.options import JSON, artifact_argument
from invariclip.console import emit_json, say
from invariclip.export.triton import TRITON_BACKENDS, TritonConfig, write_repository


@click.command()
@artifact_argument
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path),
              help="The model repository; other models in it stay.")  # fmt: skip
@click.option(
    "--models", multiple=True, type=click.Choice(TRITON_BACKENDS),
    help="python: encoded images and texts, by this package; onnxruntime: the graphs; repeatable [default: both].",
)  # fmt: skip
@click.option("--name", help="Of the models: NAME, NAME_image, NAME_text [default: the artifact's].")
@click.option("--variant", help="One that the artifact lists [default: float32].")
@click.option("--backend", type=click.Choice(BACKENDS), default=DEFAULT_BACKEND, show_default=True,
              help="The engine inside the Python model.")  # fmt: skip
@click.option(
    "--max-batch", type=click.IntRange(0, 1024), default=TritonConfig.max_batch, show_default=True,
    help="Items that Triton puts together; 0 leaves that off, and the Python model's shapes are those of `serve`.",
)  # fmt: skip
@click.option("--max-wait-ms", type=click.FloatRange(0, 100_000), default=0.0, show_default=True,
              help="How long an item may wait for others.")  # fmt: skip
@click.option("--instances", type=click.IntRange(min=1), default=TritonConfig.instances, show_default=True,
              help="Of each model.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Engine threads of each instance.")
@JSON
def triton(
    artifact: Path, out: Path, models: tuple[str, ...], name: str | None, variant: str | None, backend: str,
    max_batch: int, max_wait_ms: float, instances: int, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Write an artifact as models of NVIDIA's Triton Inference Server."""
    config = TritonConfig(
        models or TRITON_BACKENDS, name, variant, backend, max_batch, max_wait_ms / 1000, instances, threads
    )
    written = write_repository(artifact, out, config)
    if as_json:
        emit_json({"out": str(out), "models": written})
        return
    say(f"{out}: {', '.join(written)}")
