"""`calibrate` fits the projection; `build` goes on to a verified artifact and resumes where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from invariclip.artifact.fidelity import LEVELS
from invariclip.artifact.projection import write_projection
from invariclip.backends import DEFAULT_BACKEND
from invariclip.calibrate.asked import fitting_options, images_of, options_of
from invariclip.calibrate.data.encoders import EncoderOpening
from invariclip.calibrate.fit import calibrate as fit_projection
from invariclip.calibrate.prompts.beside import TARGET_RISK, learning_of, write_page_of, write_templates
from invariclip.calibrate.report import require_page_packages, summary_json, summary_text
from invariclip.calibrate.stages import default_cache, run_build
from invariclip.cli.predict_command import CLASS_OPTIONS, class_names
from invariclip.console import bar, emit_json, note, say, silent
from invariclip.errors import InputError

if TYPE_CHECKING:
    from invariclip.artifact.fidelity import Fidelity
    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.fit import Calibration, FitOptions
    from invariclip.console import Progress


@click.command()
@fitting_options
@click.option(
    "--artifact",
    type=click.Path(path_type=Path),
    help="Embed with this artifact (exported without a projection) instead of PyTorch.",
)
@click.option(
    "--sources",
    type=click.Path(path_type=Path),
    help="YAML or JSON list of sources of pairs, of any size; --images are then what is selected on.",
)
@click.option(
    "--moments",
    type=click.Path(path_type=Path),
    help="File that keeps what was collected; without --sources, what to fit on. [default: OUT.moments.safetensors]",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Execution engine used with --sources.",
)
@click.option("--ray-address", help="An existing Ray cluster; a local one is started by default.")
@click.option("--workers", type=int, help="Ray workers at most; one for every CPU of the cluster by default.")
@click.option("--cdc", type=click.Path(path_type=Path), help="Also learn templates as `cdc` does; its file.")
@TARGET_RISK
@click.option("-o", "--out", default=Path("projection.safetensors"), show_default=True, type=click.Path(path_type=Path))
def calibrate(
    out: Path,
    cdc: Path | None,
    target_risk: float | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    cache: Path | None,
    artifact: Path | None,
    sources: Path | None,
    moments: Path | None,
    engine: str,
    ray_address: str | None,
    workers: int | None,
    **given: Any,
) -> None:
    """Fit the invariant projection from images of the same things in several environments.

    Estimator, rank and strength are chosen on environments, interventions and concepts that are left out in turn; where
    nothing beats no projection, the identity is written and said.

    With --sources, pairs of any kind and number are collected into moments first, resumably.
    """
    if report:
        require_page_packages("--report")
    learning = learning_of(cdc is not None, target_risk, given)
    if learning and (artifact or sources or moments):
        raise InputError(
            "--cdc learns through a checkpoint in PyTorch, from --images; leave out --artifact, --sources and "
            "--moments, or run `invariclip cdc --projection` afterwards"
        )
    cache, progress = cache or default_cache(), silent if quiet else bar
    opening = EncoderOpening(given["model"], given["checkpoint"], given["tokenizer"], artifact)
    if sources or moments:
        from invariclip.calibrate.at_scale import Collecting, calibrate_sources

        if report:
            raise InputError("--report shows the images that were fitted on; it goes without --sources and --moments")
        kept = moments or out.with_suffix(".moments.safetensors")
        sample, told = images_of(given) if given["images"] else ([], "")
        _note(told)
        collecting = Collecting(sources, kept, engine, ray_address, workers)
        result = calibrate_sources(
            collecting, opening, options_of(given), sample=sample, cache=cache, progress=progress
        )
        write_projection(out, result.projection)
        _answer(result, {"projection": str(out), "moments": str(kept)}, as_json)
        return
    options = options_of(given)
    images, told = images_of(given)
    encoder = opening.open()
    _note(told)
    result = fit_projection(encoder, images, options, cache=cache, progress=progress)
    write_projection(out, result.projection)
    facts = {"projection": str(out)}
    if report:
        facts |= _write_report(report, encoder, images, options, result, cache, progress)
    if cdc and learning:
        facts |= write_templates(cdc, encoder, images, learning, result, cache, progress, report=report)
    _answer(result, facts, as_json)


@click.command()
@fitting_options
@CLASS_OPTIONS[0]
@CLASS_OPTIONS[1]
@click.option("--work", type=click.Path(path_type=Path), help="Folder of finished stages; OUT.work by default.")
@click.option("--backend", "backends", multiple=True, help="As for `export`; repeatable [default: onnxruntime].")
@click.option("--variant", "variants", multiple=True, help="As for `export`; repeatable.")
@click.option(
    "--fidelity", type=click.Choice(LEVELS), default="fast", show_default=True, help="What variants must keep."
)
@click.option("--cdc", is_flag=True, help="Also learn templates as `cdc` does: answers then say how unsure they are.")
@TARGET_RISK
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The artifact, NAME.icm.")
def build(
    out: Path,
    cdc: bool,
    target_risk: float | None,
    backends: tuple[str, ...],
    variants: tuple[str, ...],
    fidelity: Fidelity,
    work: Path | None,
    classes: str | None,
    classes_file: Path | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    cache: Path | None,
    **given: Any,
) -> None:
    """Calibrate, export and verify in one go; run it again to continue where it stopped."""
    names = class_names(classes, classes_file)
    if report:
        require_page_packages("--report")
    options = options_of(given)
    learning = learning_of(cdc, target_risk, given)
    images, told = images_of(given)
    # Torch is loaded only once it is known that there is something to do.
    from invariclip.export.checkpoints.checkpoint import load_checkpoint
    from invariclip.export.config import ExportConfig

    config = ExportConfig(
        classes=names, backends=backends or (DEFAULT_BACKEND,), variants=variants, fidelity=fidelity,
    )  # fmt: skip
    checkpoint = load_checkpoint(given["model"], given["checkpoint"], tokenizer=given["tokenizer"], progress=bar)
    _note(told)
    folder = work or out.with_name(out.name + ".work")
    cache, progress = cache or folder / "embeddings", silent if quiet else bar
    result, facts = run_build(
        checkpoint,
        images,
        options,
        config,
        out=out,
        work=folder,
        cache=cache,
        learning=learning,
        progress=progress,
        tell=note,
    )
    if report:
        facts |= _write_report(report, checkpoint, images, options, result, cache, progress)
        if learning:
            file = Path(facts["templates"])
            facts |= write_page_of(file, checkpoint, images, learning, result, cache, progress, report=report)
    _answer(result, facts, as_json)


def _note(told: str) -> None:
    """Said only now that nothing can be wrong with the input any more: a mistake gets its own line alone."""
    if told:
        note(told)


def _write_report(
    path: Path,
    encoder: Encoder,
    images: list[ImageRecord],
    options: FitOptions,
    result: Calibration,
    cache: Path,
    progress: Progress,
) -> dict[str, Any]:
    from invariclip.calibrate.report.evidence import gather
    from invariclip.calibrate.report.page import write_page

    evidence = gather(encoder, images, options, result, cache=cache, progress=progress)
    write_page(path, result, options, evidence)
    return {"report": str(path)}


def _answer(result: Calibration, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json({**facts, **summary_json(result)})
        return
    say(summary_text(result))
    for name, value in facts.items():
        if name != "cdc_facts":
            say(f"{name:<10} {value}")
