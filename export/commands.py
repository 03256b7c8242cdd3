"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from invariclip.artifact.fidelity import LEVELS, reached
from invariclip.artifact.folder import require_replaceable
from invariclip.artifact.learned_prompts import read_semantics
from invariclip.artifact.parity import parity_table
from invariclip.artifact.projection import read_projection
from invariclip.backends import DEFAULT_BACKEND
from invariclip.cli.options import class_names, prompt_templates, zero_shot_options
from invariclip.console import bar, emit_json, say, silent
from invariclip.errors import InputError
from invariclip.export.options import bounds_of, load, shared

if TYPE_CHECKING:
    from invariclip.artifact.fidelity import Fidelity
    from invariclip.artifact.manifest import Manifest
    from invariclip.export.options import Limits

_OF_CLASSES = {
    "classes_only", "classes", "classes_file", "templates", "templates_file", "template_name", "out", "images",
    "threads", "as_json", "quiet",
}  # fmt: skip
"""What may stand beside `--classes-only`; the rest is settled in the artifact."""


@click.command()
@click.option("--model", default="reference", show_default=True, help="reference, open_clip name, folder, or hf-hub:…")
@click.option("--projection", type=click.Path(path_type=Path), help="What `invariclip calibrate` wrote.")
@click.option(
    "--cdc", type=click.Path(path_type=Path),
    help="Learned templates, what `invariclip cdc` wrote: answers then say how unsure they are.",
)  # fmt: skip
@click.option(
    "--projection-as-input-initializer",
    "projection_as_input",
    is_flag=True,
    help="Do not fold the projection, so that another one can be given at run time.",
)
@click.option(
    "--pixels-in-graph",
    type=click.Choice(["resize", "matmul"]),
    help="Let the image graph take images of any size: by ONNX's Resize, or by products (TensorRT, OpenVINO).",
)
@click.option("--without", multiple=True, metavar="REWRITE", help="Leave an exact rewrite out; repeatable.")
@click.option("--backend", "backends", multiple=True, help="Engine to verify on; repeatable [default: onnxruntime].")
@click.option(
    "--variant", "variants", multiple=True, metavar="NAME",
    help="A further variant: bfloat16, float16, float16-islands, int8, int8-bfloat16, int8-symmetric, int8-dynamic, "
    "int8-static, int8-nncf, tokens, tokens-bfloat16, tokens-int8, tokens-int8-bfloat16; repeatable.",
)  # fmt: skip
@click.option(
    "--fidelity", type=click.Choice(LEVELS), default="fast", show_default=True, help="What variants must keep."
)
@click.option(
    "--calibration", multiple=True, type=click.Path(path_type=Path),
    help="Images and folders that int8 is calibrated on [default: bundled ones].",
)  # fmt: skip
@click.option(
    "--fast-pixels",
    is_flag=True,
    help="Prove the fast pixel mode on JPEGs of three sizes, so that it may be asked for.",
)
@zero_shot_options
@click.option(
    "--classes-only",
    type=click.Path(path_type=Path),
    metavar="ARTIFACT",
    help="Write this artifact with other classes; needs no checkpoint.",
)
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="The artifact to write: NAME.icm.")
@shared
@click.pass_context
def export(
    ctx: click.Context, model: str, projection: Path | None, cdc: Path | None, projection_as_input: bool,
    pixels_in_graph: Literal["resize", "matmul"] | None, without: tuple[str, ...], backends: tuple[str, ...],
    variants: tuple[str, ...], fidelity: Fidelity, calibration: tuple[Path, ...], fast_pixels: bool,
    classes: str | None, classes_file: Path | None, templates: tuple[str, ...], templates_file: Path | None,
    template_name: str | None, classes_only: Path | None, out: Path, checkpoint: Path | None,
    random_weights: int | None, tokenizer: str | None, images: tuple[Path, ...], limits: Limits, threads: int | None,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write a verified ONNX artifact of a checkpoint, or an artifact again with other classes."""
    names = class_names(classes, classes_file)
    prompts = prompt_templates(templates, templates_file, template_name)
    progress = silent if quiet else bar
    if classes_only is not None:
        _refuse_others(ctx)
        from invariclip.export.swap import swap_classes

        manifest = swap_classes(
            classes_only, out, names, prompts or None, images=images or None, threads=threads, progress=progress
        )
        _show(manifest, out, as_json)
        return
    if projection_as_input and projection is None:
        raise InputError("--projection-as-input-initializer needs the projection to start with: give --projection FILE")
    require_replaceable(out)  # before minutes of work
    matrix = None if projection is None else read_projection(projection)
    learned_prompts = None if cdc is None else read_semantics(cdc)
    from invariclip.export.build import export_artifact
    from invariclip.export.config import ExportConfig

    config = ExportConfig(
        classes=names,
        templates=prompts or None,
        images=images or None,
        thresholds=bounds_of(limits),
        backends=backends or (DEFAULT_BACKEND,),
        without_rewrites=without,
        pixels_in_graph=pixels_in_graph,
        projection_as_input=projection_as_input,
        fast_pixels=fast_pixels,
        variants=variants,
        fidelity=fidelity,
        variant_thresholds=bounds_of(limits, fidelity),
        calibration_images=calibration or None,
        threads=threads,
    )
    loaded = load(model, checkpoint, random_weights, threads, tokenizer)
    manifest = export_artifact(
        loaded, out, config, projection=matrix, learned_prompts=learned_prompts, progress=progress
    )
    _show(manifest, out, as_json)


def _refuse_others(ctx: click.Context) -> None:
    """Refuses options that `--classes-only` would ignore."""
    typed = [name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    other = [param for param in ctx.command.params if param.name in typed and param.name not in _OF_CLASSES]
    if other:
        raise InputError(
            f"--classes-only takes the artifact as it is: leave {other[0].opts[0]} out, or export from the checkpoint"
        )


def _show(manifest: Manifest, out: Path, as_json: bool) -> None:
    if as_json:
        emit_json({"out": str(out), **manifest.to_json()})
        return
    say(f"{out}: {_summary(manifest)}")
    for name, why in manifest.left_out.items():
        say(f"left out: {name}: {why}")
    if manifest.fast_pixels:
        say(_fast_pixels(manifest.fast_pixels))
    for name, variant in manifest.variants.items():
        for backend, record in variant.parity.items():
            say(f"\n{name} on {backend}, fidelity {reached(record) or 'none'}")
            say(parity_table(record))
            if "head" in record:
                head = record["head"]
                unsure = head.get("uncertainty_diff")
                also = "" if unsure is None else f" and the uncertainty within {unsure:.1e}"
                say(
                    "the figures are those of the export, the graph before the classes being the same; with the new "
                    f"classes probabilities are within {head['probability_diff']:.1e} of float64{also} "
                    f"on {head['images']} images"
                )


def _fast_pixels(record: dict[str, Any]) -> str:
    words = "passed" if record["passed"] else f"left out: {'; '.join(record['broken'])}"
    return (
        f"fast pixels on {record['items']} JPEGs: {words}; cosine to the exact mode at least "
        f"{record['cosine_min']:.6f}, bytes off by {record['mean_levels']:.2f} in the mean and "
        f"{record['max_levels']:g} at most"
    )


def _summary(manifest: Manifest) -> str:
    projection = manifest.projection
    folded = "no projection"
    if projection is not None:
        how = f"image {projection.image_fold}, text {projection.text_fold}"
        folded = f"{projection.estimator} {manifest.model.embed_dim} → {projection.rank} ({how})"
    learned = "" if manifest.cdc is None else f", {manifest.cdc.learned} learned templates"
    return f"{manifest.model.name}, {folded}{learned}, {len(manifest.classes)} classes, space {manifest.space_id}"
