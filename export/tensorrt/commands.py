"""The command `engines`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from invariclip.backends.tensorrt.device import Device
from invariclip.backends.tensorrt.facts import engine_path
from invariclip.backends.tensorrt.library import NAMES, installed, open_library
from invariclip.cli.options import JSON, QUIET, artifact_argument
from invariclip.console import bar, emit_json, note, say, silent, table
from invariclip.errors import ArtifactError, DeviceError, MissingExtraError
from invariclip.export.tensorrt.engines import engine_of, key_of
from invariclip.export.tensorrt.plan import BATCHES, EnginePlan, plan_engine

if TYPE_CHECKING:
    from invariclip.backends.tensorrt.library import Library


@click.command()
@artifact_argument
@click.option("--variant", default="float32", show_default=True, help="Whose graphs: float16-islands, int8-symmetric …")
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(min=1),
    help=f"A batch size to tune for; repeatable [default: {', '.join(map(str, BATCHES))}].",
)  # fmt: skip
@click.option("--library", type=click.Choice(NAMES), help="[default: tensorrt where it is installed]")
@click.option(
    "--capability", "capabilities", multiple=True, metavar="X.Y",
    help="Compile for GPUs of this compute capability; repeatable, TensorRT-RTX only [default: any it knows].",
)  # fmt: skip
@click.option("--device", type=click.IntRange(min=0), default=0, show_default=True, help="The GPU to build on.")
@click.option("--refit", is_flag=True, help="Keep classes and an open projection exchangeable; needs a GPU.")
@click.option("--tf32", is_flag=True, help="Compute float32 products in TensorFloat-32 (11-bit mantissa).")
@click.option("--level", type=click.IntRange(0, 5), help="The builder's optimisation level [default: the library's].")
@click.option("--plan", "plan_only", is_flag=True, help="Say what would be built; no GPU or TensorRT is needed.")
@click.option("--accept-known-bad", is_flag=True, help="Build with a release that is known to answer wrongly.")
@JSON
@QUIET
def engines(
    artifact: Path, variant: str, batches: tuple[int, ...], library: str | None, capabilities: tuple[str, ...],
    device: int, refit: bool, tf32: bool, level: int | None, plan_only: bool, accept_known_bad: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Build TensorRT engines of ARTIFACT's graphs, in engines/ beside them."""
    plans = plans_of(artifact, variant, batches or BATCHES, refit=refit, tf32=tf32, level=level)
    if plan_only:
        _show_plans(plans, as_json=as_json)
        return
    opened = open_library(library)
    gpu = _device(opened, device)
    if gpu is None:
        note(f"no GPU here: {opened.title} builds for any that it knows, and kernels are compiled where it runs")
    built = [
        engine_of(
            artifact / plan.graph, plan, opened, gpu, capabilities=capabilities, accept_known_bad=accept_known_bad,
            progress=silent if quiet else bar,
        )
        for plan in plans
    ]  # fmt: skip
    rows = [
        [
            one.facts.graph, str(one.path.relative_to(artifact)), one.facts.key.precision, one.facts.key.gpu,
            f"{one.facts.size_bytes:,}", "found" if one.found else f"{one.facts.seconds:.1f} s",
        ]
        for one in built
    ]  # fmt: skip
    if as_json:
        emit_json(
            [dict(zip(("graph", "engine", "precision", "gpu", "bytes", "built"), row, strict=True)) for row in rows]
        )
        return
    say(table(["graph", "engine", "computes in", "for", "bytes", "built in"], rows))


def plans_of(
    artifact: Path, variant: str, batches: tuple[int, ...], *, refit: bool, tf32: bool, level: int | None
) -> list[EnginePlan]:
    """Plans of both towers of a variant; the tower without anything to exchange is planned without a refit.

    Raises:
        ArtifactError: Not an artifact, damaged, or without that variant.
        InputError: A batch size or the level is out of range, or neither tower has anything to exchange.
    """
    from invariclip.artifact.folder import checked_path, read_manifest

    manifest = read_manifest(artifact)
    if variant not in manifest.variants:
        raise ArtifactError(f"{artifact}: no variant {variant!r}; available: {', '.join(manifest.variants)}")
    chosen = manifest.variants[variant]
    image, text = checked_path(artifact, chosen.image), checked_path(artifact, chosen.text)
    longest = manifest.text.context_length
    options: dict[str, Any] = {"batches": batches, "longest": longest, "tf32": tf32, "level": level}
    open_text = refit and manifest.projection is not None and manifest.projection.text_fold == "input"
    return [plan_engine(image, refit=refit, **options), plan_engine(text, refit=open_text, **options)]


def _device(library: Library, index: int) -> Device | None:
    """The GPU; None where there is none and the library can do without."""
    try:
        return Device(index)
    except (DeviceError, MissingExtraError):
        if library.name == "tensorrt_rtx":
            return None
        raise


def _show_plans(plans: list[EnginePlan], *, as_json: bool) -> None:
    if as_json:
        emit_json([{**plan.to_json(), "engines": _names(plan)} for plan in plans])
        return
    rows = []
    for plan in plans:
        for profile in plan.profiles:
            shapes = "; ".join(
                f"{name} {list(low)} … {list(usual)} … {list(high)}"
                for name, (low, usual, high) in profile.shapes.items()
            )
            rows.append([plan.graph, plan.precision, shapes or "fixed", ", ".join(plan.refit) or "-"])
    say(table(["graph", "computes in", "smallest … usual … largest", "exchangeable"], rows))


def _names(plan: EnginePlan) -> dict[str, str]:
    """Where engines of the installed libraries would lie, as far as that can be told without a GPU."""
    names: dict[str, str] = {}
    for name in installed():
        try:
            names[name] = engine_path(Path(), plan.graph, key_of(plan, open_library(name), None)).name
        except (DeviceError, MissingExtraError) as error:
            names[name] = str(error)
    return names
