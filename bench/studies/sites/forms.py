"""How a site's shift was chosen: `python -m invariclip.bench.studies.sites.forms` writes docs/site-forms.md.

Nothing here is part of the tables that say what adaptation gains. Concepts of stylebench's training styles are shown
under changes that stand for places; a projection is fitted on pairs of the styles alone, which has seen none of the
changes. A world is a few concepts: its classes are told by the plain images (prototypes) or by their names, and each
change is a site, measured on mixed and on skewed contents, in several forms.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from invariclip.bench.studies.blas import bound_blas
from invariclip.bench.studies.stylebench.encoders import Quick
from invariclip.bench.studies.stylebench.evaluate_page import table
from invariclip.bench.studies.stylebench.sources import TRAINING_STYLES
from invariclip.bench.studies.stylebench.world import TEMPLATES
from invariclip.calibrate.data.images import read_images
from invariclip.calibrate.data.pairs import Sources, fitted_moments
from invariclip.calibrate.fit import FitOptions, bank_of, tabulate
from invariclip.calibrate.projection.classifiers import prototype_bank, unit
from invariclip.calibrate.projection.estimators import fit
from invariclip.cli.main import run_command
from invariclip.console import bar, note, silent
from invariclip.files import write_atomically
from invariclip.preprocessing.pixels import pixels
from invariclip.sites.site import PER_KIND, PRIOR, new_site, taken_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.console import Progress

    Vectors = NDArray[np.float64]
    Rows = NDArray[np.int64]

CONCEPTS, CLASSES, WORLDS = 70, 7, 40
STRENGTH = 3.0
"""λ of the projection, `shrinkage`."""
TAKEN = "taken"
SAMPLES = ("1 mixed", "2 mixed", "5 mixed", "20 mixed", "70 mixed", "10 of one class", "20 of two", "30 of three")


def _tint(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image, dtype=np.float64) * [1.0, 0.75, 0.45]).astype(np.uint8))


def _noise(image: Image.Image) -> Image.Image:
    exact = np.asarray(image, dtype=np.float64)
    drawn = np.random.default_rng(int(exact.sum()) % 2**31).normal(0, 50, exact.shape)
    return Image.fromarray((exact + drawn).clip(0, 255).astype(np.uint8))


def _coarse(image: Image.Image) -> Image.Image:
    small = image.resize((40, 40), Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.NEAREST)


def _edges(image: Image.Image) -> Image.Image:
    return ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "dark": lambda image: ImageEnhance.Brightness(image).enhance(0.3),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(7)),
    "tinted": _tint,
    "noisy": _noise,
    "coarse": _coarse,
    "edges": _edges,
    "inverted": ImageOps.invert,
}
"""What stands for a place."""


def embedded(images: list[ImageRecord], encoder: Quick, progress: Progress) -> tuple[Vectors, Rows, Rows]:
    """Every image as it is and under each change, each also mirrored.

    Args:
        images: In the order of their concepts.
        encoder: Keeps what it was shown.
        progress: Progress display.

    Returns:
        Embeddings [N, D], and of each row its image and its change (0 is none).
    """
    parts, codes = [], []
    for number, image in enumerate(progress(images, total=len(images), desc="changed images")):
        plain = Image.fromarray(pixels(image.path, encoder.pixels))
        shown = [plain, *(change(plain) for change in CHANGES.values())]
        both = [np.asarray(turned) for image in shown for turned in (image, ImageOps.mirror(image))]
        parts.append(encoder.encode_images(np.stack(both)))
        codes += [(number, place // 2) for place in range(len(both))]
    rows = np.asarray(codes, dtype=np.int64)
    return unit(np.concatenate(parts)), rows[:, 0], rows[:, 1]


def drawn(sample: str, labels: Rows, rng: np.random.Generator) -> Rows:
    """Places of one of `SAMPLES` among the images of a site."""
    count, kind = sample.split(" ", 1)
    if kind == "mixed":
        return rng.choice(len(labels), int(count), replace=False)
    classes = rng.choice(CLASSES, {"of one class": 1, "of two": 2, "of three": 3}[kind], replace=False)
    return np.flatnonzero(np.isin(labels, classes))


def forms(shown: Vectors, training: Vectors, bank: Vectors) -> Iterator[tuple[str, Vectors]]:
    """Every form's shift, [d].

    Args:
        shown: The site's images, [n, d].
        training: m₀.
        bank: [K, d], of the classes' names.
    """
    count, whole = len(shown), shown.mean(axis=0) - training
    yield "whole shift", whole
    for prior in (5, 10, 20):
        yield f"n / (n + {prior})", whole * count / (count + prior)
    clear = [float(_clearness(unit(shown - step * whole), bank)) for step in _STEPS]
    yield (
        "n / (n + 10), as far as images are named most clearly",
        whole * count / (count + 10) * _STEPS[int(np.argmax(clear))],
    )
    for per_kind in (3, 5, 10):
        for prior in (5, 10):
            kinds = _kinds(shown, bank)
            counted = min(count, per_kind * (kinds - 1))
            yield f"e / (e + {prior}), {per_kind} a kind", whole * counted / (counted + prior)
    site = new_site("", "", training, len(bank), {}).adding(shown, bank)
    yield TAKEN, np.asarray(site.shift, dtype=np.float64)
    # the same with the sample's images shown a thousand times: what any number of images comes to
    many = PER_KIND * (site.kinds - 1)
    yield f"{TAKEN}, of any number of such images", whole * many / (many + PRIOR)


_STEPS = np.linspace(0, 1, 6)


def _kinds(shown: Vectors, bank: Vectors) -> float:
    shares = taken_for(shown, bank).mean(axis=0)
    some = shares[shares > 0]
    return float(np.exp(-(some * np.log(some)).sum()))


def _clearness(vectors: Vectors, bank: Vectors, scale: float = 30.0) -> float:
    logits = scale * vectors @ bank.T
    most = logits.max(axis=1, keepdims=True)
    return float((most[:, 0] + np.log(np.exp(logits - most).sum(axis=1))).mean())


def measured(vectors: Vectors, labels: Rows, styles: Rows, changes: Rows, names: Vectors) -> dict[str, Any]:
    """Points over no shift by protocol, form and sample, means over worlds and sites.

    Args:
        vectors: Projected, [N, d].
        labels: The concept of each row.
        styles: The style of each row.
        changes: The change of each row, 0 for none.
        names: [C, d], of the concepts' names.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {
        way: defaultdict(lambda: defaultdict(list)) for way in ("prototypes", "zero-shot")
    }
    rng = np.random.default_rng(7)
    for _ in range(WORLDS):
        chosen = np.sort(rng.choice(CONCEPTS, CLASSES, replace=False))
        known = np.isin(labels, chosen)
        own = np.searchsorted(chosen, labels)
        seen = known & (changes == 0)
        training = np.mean([vectors[seen & (styles == code)].mean(axis=0) for code in np.unique(styles)], axis=0)
        banks = {"prototypes": prototype_bank(vectors[seen], own[seen])[1], "zero-shot": names[chosen]}
        for change in range(1, len(CHANGES) + 1):
            here = known & (changes == change)
            site, answers = vectors[here], own[here]
            for sample in SAMPLES:
                shown = site[drawn(sample, answers, rng)]
                for form, shift in forms(shown, training, banks["zero-shot"]):
                    moved = unit(site - shift)
                    for way, bank in banks.items():
                        right = np.argmax(moved @ bank.T, axis=1) == answers
                        before = np.argmax(site @ bank.T, axis=1) == answers
                        found[way][form][sample].append(100 * float(right.mean() - before.mean()))
    return {
        way: {form: {s: round(float(np.mean(values)), 2) for s, values in by.items()} for form, by in rows.items()}
        for way, rows in found.items()
    }


def render(result: dict[str, Any]) -> str:
    """The page."""
    parts = [
        "# How a site's shift was chosen",
        f"Points over no shift, means over {result['worlds']} worlds of {CLASSES} of {CONCEPTS} concepts of "
        f"stylebench's training styles and over {len(CHANGES)} changes that stand for places ({', '.join(CHANGES)}). "
        f"The projection (`shrinkage`, λ = {STRENGTH:g}) is fitted on pairs of the styles alone, on no change; "
        "classes are told by their plain images or by their names. All images of a site are scored. Nothing of the "
        f"styles and sets that [sites.md](sites.md) reports is here. `{TAKEN}` is what `adapt` does: "
        f"e / (e + {PRIOR:g}) with e = min(n, {PER_KIND:g}·(k − 1)).",
    ]
    for way, rows in result["gains"].items():
        body = [[form, *(f"{by[sample]:+.1f}" for sample in SAMPLES)] for form, by in rows.items()]
        parts += [f"## {way.capitalize()}", table(["form", *SAMPLES], body)]
    parts.append(
        "Tried by a script that is not kept, and worse by 10 points and more: mixtures of the classes with a shift "
        "between, fitted by expectation maximisation. Made by `python -m invariclip.bench.studies.sites.forms`."
    )
    return "\n\n".join(parts) + "\n"


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("build/stylebench"), show_default=True,
              help="The built image set.")  # fmt: skip
@click.option("--model", default="reference", show_default=True, help="As `calibrate --model`.")
@click.option("--features", type=click.Path(path_type=Path), default=Path("build/features"), show_default=True,
              help="Keeps the trunk's features.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("docs/site-forms.md"), show_default=True,
              help="The page; .json too.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="No progress.")
def main(data: Path, model: str, features: Path, out: Path, quiet: bool) -> None:
    """Compares forms of a site's shift on training styles under changes, and writes the page."""
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    bound_blas()
    progress = silent if quiet else bar
    encoder = Quick(load_checkpoint(model), "bfloat16", features)
    known = [p for p in read_images(data / "manifest.jsonl") if p.environment in TRAINING_STYLES and p.split != "test"]
    seen, _ = tabulate(encoder, known, FitOptions(), cache=features, progress=progress)
    what = fit(fitted_moments(seen, Sources(interventions=False), seed=0), "shrinkage", None, STRENGTH)
    by_concept: dict[str, list[ImageRecord]] = defaultdict(list)
    for image in known:
        by_concept[image.concept].append(image)
    whole = sorted(concept for concept, those in by_concept.items() if len(those) == len(TRAINING_STYLES))
    concepts = [whole[index] for index in np.random.default_rng(1).choice(len(whole), CONCEPTS, replace=False)]
    images = [image for concept in concepts for image in by_concept[concept]]
    vectors, origins, changes = embedded(images, encoder, progress)
    labels = np.asarray([concepts.index(image.concept) for image in images])[origins]
    styles = np.asarray([TRAINING_STYLES.index(image.environment) for image in images])[origins]
    names = bank_of(encoder, [by_concept[concept][0].name for concept in concepts], TEMPLATES)
    gains = measured(what.apply(vectors), labels, styles, changes, what.apply(names))
    result = {"model": model, "sha256": encoder.sha256, "worlds": WORLDS, "gains": gains}
    write_atomically(out.with_suffix(".json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_atomically(out, render(result))
    note(f"wrote {out} and its .json")


if __name__ == "__main__":
    run_command(main)
