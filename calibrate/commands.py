"""`calibrate` fits the projection; `build` goes on to a verified artifact and resumes after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from invariclip.artifact.fidelity import LEVELS
from invariclip.artifact.folder import require_replaceable
from invariclip.artifact.learned_prompts import read_semantics, write_semantics
from invariclip.artifact.projection import write_projection
from invariclip.backends import DEFAULT_BACKEND
from invariclip.calibrate.build import EXPORTED, run_build, served_projection
from invariclip.calibrate.data.embed import default_cache
from invariclip.calibrate.data.encoders import EncoderOpening
from invariclip.calibrate.fit import calibrate as fit_projection
from invariclip.calibrate.options import FITTING, TARGET_RISK, fit_options, images_from, prompt_options, with_options
from invariclip.calibrate.report.rendering import require_page_packages
from invariclip.calibrate.report.summary import projection_json, projection_text, prompts_json
from invariclip.cli.options import CLASS_OPTIONS, class_names
from invariclip.console import bar, emit_json, note, say, silent
from invariclip.errors import InputError
from invariclip.files import require_writable

if TYPE_CHECKING:
    from invariclip.artifact.fidelity import Fidelity
    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.fit import Calibration, FitOptions
    from invariclip.calibrate.prompts.learn import LearnedResult
    from invariclip.calibrate.prompts.options import PromptOptions
    from invariclip.console import Progress
    from invariclip.export.checkpoints.checkpoint import Checkpoint


@click.command()
@with_options(FITTING)
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
    **values: Any,
) -> None:
    """Fit the invariant projection from images of the same things in several environments.

    Estimator, rank and strength are chosen on environments, interventions and concepts that are left out in turn; where
    nothing beats no projection, the identity is written and said.

    With --sources, pairs of any kind and number are collected into moments first, resumably.
    """
    if report:
        require_page_packages("--report")
    for path in (out, report, moments, cdc):
        if path is not None:
            require_writable(path)
    learning = prompt_options(cdc is not None, target_risk, values)
    if learning and (artifact or sources or moments):
        raise InputError(
            "--cdc learns through a checkpoint in PyTorch, from --images; leave out --artifact, --sources and "
            "--moments, or run `invariclip cdc --projection` afterwards"
        )
    cache, progress = cache or default_cache(), silent if quiet else bar
    opening = EncoderOpening(values["model"], values["checkpoint"], values["tokenizer"], artifact)
    if sources or moments:
        from invariclip.calibrate.fit import Collecting, calibrate_sources

        if report:
            raise InputError("--report shows the images that were fitted on; it goes without --sources and --moments")
        state_file = moments or out.with_suffix(".moments.safetensors")
        sample, split_note = images_from(values) if values["images"] else ([], "")
        _note(split_note)
        collecting = Collecting(sources, state_file, engine, ray_address, workers)
        result = calibrate_sources(
            collecting, opening, fit_options(values), sample=sample, cache=cache, progress=progress
        )
        write_projection(out, result.projection)
        _answer(result, {"projection": str(out), "moments": str(state_file)}, as_json)
        return
    options = fit_options(values)
    images, split_note = images_from(values)
    encoder = opening.open()
    _note(split_note)
    result = fit_projection(encoder, images, options, cache=cache, progress=progress)
    write_projection(out, result.projection)
    facts = {"projection": str(out)}
    if report:
        facts |= _write_report(report, encoder, images, options, result, cache, progress)
    if cdc and learning:
        facts |= _write_templates(cdc, encoder, images, learning, result, cache, progress, report)
    _answer(result, facts, as_json)


@click.command()
@with_options(FITTING)
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
    **values: Any,
) -> None:
    """Calibrate, export and verify in one go; run it again to continue where it stopped."""
    names = class_names(classes, classes_file)
    if report:
        require_page_packages("--report")
        require_writable(report)
    require_replaceable(out)
    folder = work or out.with_name(out.name + ".work")
    require_writable(folder / EXPORTED)
    options = fit_options(values)
    learning = prompt_options(cdc, target_risk, values)
    images, split_note = images_from(values)
    # Torch is loaded only once it is known that there is something to do.
    from invariclip.export.checkpoints.checkpoint import load_checkpoint
    from invariclip.export.config import ExportConfig

    config = ExportConfig(
        classes=names, backends=backends or (DEFAULT_BACKEND,), variants=variants, fidelity=fidelity,
    )  # fmt: skip
    checkpoint = load_checkpoint(values["model"], values["checkpoint"], tokenizer=values["tokenizer"], progress=bar)
    _note(split_note)
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
            templates = Path(facts["templates"])
            facts |= _recall_and_write_page(report, templates, checkpoint, images, learning, result, cache, progress)
    _answer(result, facts, as_json)


def _note(split_note: str) -> None:
    """Printed only once the input is known to be usable, so that an error stands alone."""
    if split_note:
        note(split_note)


def _write_report(
    path: Path,
    encoder: Encoder,
    images: list[ImageRecord],
    options: FitOptions,
    result: Calibration,
    cache: Path,
    progress: Progress,
) -> dict[str, Any]:
    from invariclip.calibrate.report.calibration_page import write_page
    from invariclip.calibrate.report.evidence import gather

    evidence = gather(encoder, images, options, result, cache=cache, progress=progress)
    write_page(path, result, options, evidence)
    return {"report": str(path)}


def _write_templates(
    path: Path,
    encoder: Encoder,
    images: list[ImageRecord],
    options: PromptOptions,
    result: Calibration,
    cache: Path,
    progress: Progress,
    report: Path | None,
) -> dict[str, Any]:
    """Learns templates in the space of the projection that was just fitted; writes them, and a page beside `report`."""
    from invariclip.calibrate.prompts.learn import learn  # torch

    learned = learn(cast("Checkpoint", encoder), images, options, result.projection, cache=cache, progress=progress)
    write_semantics(path, learned.semantics)
    if learned.threshold is not None:
        note(learned.threshold.sentence())
    facts = {"cdc": str(path), "cdc_facts": prompts_json(learned)}
    return facts | _write_templates_page(report, learned, options, images) if report else facts


def _recall_and_write_page(
    report: Path,
    templates: Path,
    checkpoint: Checkpoint,
    images: list[ImageRecord],
    options: PromptOptions,
    result: Calibration,
    cache: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the page of the templates that `build` learned, in this run or an earlier one, beside `report`."""
    from invariclip.calibrate.prompts.learn import recall  # torch

    semantics, projection = read_semantics(templates), served_projection(result)
    learned = recall(checkpoint, images, options, semantics, projection, cache=cache, progress=progress)
    return _write_templates_page(report, learned, options, images)


def _write_templates_page(
    report: Path, learned: LearnedResult, options: PromptOptions, images: list[ImageRecord]
) -> dict[str, Any]:
    from invariclip.calibrate.report.prompts_page import page_beside, write_page

    path = page_beside(report)
    write_page(path, learned, options, images)
    return {"cdc_report": str(path)}


def _answer(result: Calibration, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json({**facts, **projection_json(result)})
        return
    say(projection_text(result))
    for name, value in facts.items():
        if name == "parity":
            for line in _parity_lines(value):
                say(f"{name:<10} {line}")
        elif name != "cdc_facts":
            say(f"{name:<10} {value}")
    if "artifact" in facts:
        say(f"next       invariclip inspect {facts['artifact']}; invariclip predict {facts['artifact']} IMAGES")


def _parity_lines(parity: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """A line for each variant and engine that was proved; `invariclip inspect` prints the tables."""
    return [
        f"{variant} on {engine}: max |Δ| {record['image']['max_abs_diff']:.1e} of images, "
        f"{record['text']['max_abs_diff']:.1e} of texts (≤ {record['thresholds']['max_abs_diff']:g}), passed"
        for variant, records in parity.items()
        for engine, record in records.items()
    ]
