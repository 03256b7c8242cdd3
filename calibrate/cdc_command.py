"""`invariclip cdc`: learns templates and how sure each is; writes `cdc.safetensors`, which `export --cdc` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from invariclip.artifact.learned_prompts import write_semantics
from invariclip.artifact.projection import read_projection
from invariclip.calibrate.data.embed import default_cache
from invariclip.calibrate.options import MODEL_AND_IMAGES, OUTPUT, images_from, templates_from, with_options
from invariclip.calibrate.prompts.learn import LearnedResult, learn
from invariclip.calibrate.prompts.options import DEFAULT_LOSSES, MAX_SHOTS, PLAIN, Augmentation, PromptOptions
from invariclip.calibrate.report.rendering import require_page_packages
from invariclip.calibrate.report.summary import prompts_json, prompts_text
from invariclip.cli.options import TEMPLATE_OPTIONS
from invariclip.console import bar, emit_json, note, say, silent
from invariclip.errors import InputError
from invariclip.files import require_writable
from invariclip.preprocessing.interventions import parse_kinds


@click.command("cdc")
@with_options(MODEL_AND_IMAGES)
@click.option("--projection", type=click.Path(path_type=Path), help="Learn in the space of this projection.")
@click.option(
    "--templates-learned",
    "learned",
    default=4,
    show_default=True,
    type=int,
    help="Learned templates beside the hand-written one.",
)
@click.option("--context-tokens", default=4, show_default=True, type=int, help="Vectors per template.")
@click.option("--augmentations", help=f"One a learned template, with commas: names of interventions, or {PLAIN}.")
@click.option("--shots", type=click.IntRange(1, MAX_SHOTS), help="Training images per class; all by default.")
@click.option("--steps", default=100, show_default=True, type=click.IntRange(1), help="Training steps at most.")
@click.option(
    "--rate", default=0.05, show_default=True, type=float, help="Learning rate, in units of the vocabulary's spread."
)
@click.option("--without", multiple=True, type=click.Choice(DEFAULT_LOSSES), help="Leave this loss out; repeatable.")
@click.option(
    "--target-risk",
    type=float,
    help="Also find the uncertainty to abstain above, so that this share of answers at most is wrong.",
)
@click.option(
    "--confidence", default=0.95, show_default=True, type=float, help="Confidence with which that share is kept."
)
@with_options(TEMPLATE_OPTIONS)
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--cache", type=click.Path(path_type=Path), help="Keeps embeddings and trainings across runs.")
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page about it, FILE.html."
)
@with_options(OUTPUT)
@click.option("-o", "--out", default=Path("cdc.safetensors"), show_default=True, type=click.Path(path_type=Path))
def cdc(
    out: Path,
    projection: Path | None,
    cache: Path | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Learn several templates beside the hand-written one, and how sure an answer is.

    Encoders stay frozen: images are embedded once, under each template's augmentation, and kept. An interrupted run
    resumes where it stopped. Export the result with `export --cdc`.
    """
    if report:
        require_page_packages("--report")
        require_writable(report)
    require_writable(out)
    options = _options(values)
    images, split_note = images_from(values)
    space = read_projection(projection) if projection else None
    # Torch's models are loaded only once it is known that there is something to do
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(values["model"], values["checkpoint"], tokenizer=values["tokenizer"], progress=bar)
    if split_note:
        note(split_note)
    result = learn(
        checkpoint, images, options, space, cache=cache or default_cache(), progress=silent if quiet else bar
    )
    write_semantics(out, result.semantics)
    if report:
        from invariclip.calibrate.report.prompts_page import write_page

        write_page(report, result, options, images)
    answer(result, out, report, as_json=as_json)


def answer(result: LearnedResult, out: Path, report: Path | None, *, as_json: bool) -> None:
    """Prints what was learned, where it lies, and where its page does."""
    if as_json:
        emit_json({"cdc": str(out), **({"report": str(report)} if report else {}), **prompts_json(result)})
        return
    say(prompts_text(result))
    say(f"templates  {out}")
    if report:
        say(f"report     {report}")


def _options(values: dict[str, Any]) -> PromptOptions:
    options = PromptOptions(
        learned=values["learned"],
        context_tokens=values["context_tokens"],
        templates=templates_from(values),
        augmentations=_augmentations(values["augmentations"]),
        shots=values["shots"],
        steps=values["steps"],
        rate=values["rate"],
        target_risk=values["target_risk"],
        confidence=values["confidence"],
        augmentation_seed=values["seed"],
        seed=values["seed"],
    )
    return options.without(values["without"])


def _augmentations(text: str | None) -> tuple[Augmentation, ...]:
    if text is None:
        return ()
    augmentations: list[Augmentation] = []
    for name in (part.strip() for part in text.split(",")):
        kinds = () if name == PLAIN else parse_kinds(name)
        if len(kinds) != 1 and name != PLAIN:
            raise InputError(f"--augmentations takes one intervention a template; {name!r} stands for {len(kinds)}")
        augmentations.append(kinds[0] if kinds else None)
    return tuple(augmentations)
