"""What variants keep on images that no export saw: `python -m invariclip.bench.studies.unseen`.

The contract judges a variant on the images it is given, and a search that stops at the bound is at the bound on these
images. Here its answers are held against float32's on further sets, each with an interval. That says how alike the
answers are, not how right: no labels are read.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from invariclip.artifact.folder import read_manifest
from invariclip.artifact.manifest import EMBEDDING, PROBABILITIES
from invariclip.backends import open_backend
from invariclip.bench.latency.machine import facts, versions
from invariclip.bench.studies.pages import write_result
from invariclip.cli.main import run_command
from invariclip.console import bar, note, silent
from invariclip.errors import InputError
from invariclip.export.checkpoints.check_texts import spread
from invariclip.export.verification.evidence import ImageBatches, altered
from invariclip.files import sha256_file, write_atomically
from invariclip.preprocessing.find import find_images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Compute, Manifest
    from invariclip.console import Progress

FLOAT32 = "float32"
JUDGED = "judged by the export"
PEER = "NNCF int8, our float32 graph"
_BATCH = 8
_AGAIN = "float32 again: "
_Z = 1.959963984540054
_DRAWN = {"calibration": 96, "judged": 240, "drawings": 300}
"""Images of each folder that `images` writes."""


@dataclass(frozen=True)
class StudiedGraph:
    """One image graph and how it is asked.

    Attributes:
        name: The variant's, or `PEER`.
        path: The graph.
        compute: What OpenVINO may compute in.
        made: How its graph came to be, from the manifest.
    """

    name: str
    path: Path
    compute: Compute = "float32"
    made: tuple[str, ...] = ()


@dataclass(frozen=True)
class UnseenAgreement:
    """One candidate's answers on one set beside float32's.

    Attributes:
        name: The candidate's.
        images: The set's name.
        items: How many images.
        same: How many have the same best class.
        low: Lower end of the share's 95 % interval (Wilson's).
        high: Upper end.
        cosine_min: Of embeddings.
        cosine_mean: Of embeddings.
    """

    name: str
    images: str
    items: int
    same: int
    low: float
    high: float
    cosine_min: float
    cosine_mean: float


def wilson(right: int, items: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    Args:
        right: Successes, 0 to `items`.
        items: Trials, 1 or more.
    """
    share, squared = right / items, _Z * _Z / items
    middle = (share + squared / 2) / (1 + squared)
    half = _Z * math.sqrt(share * (1 - share) / items + squared / (4 * items)) / (1 + squared)
    return max(0.0, middle - half), min(1.0, middle + half)


def compare(
    name: str, images: str, wanted: tuple[NDArray[Any], NDArray[Any]], got: tuple[NDArray[Any], NDArray[Any]]
) -> UnseenAgreement:
    """Holds one candidate's embeddings [N, d] and best classes [N] on a set against float32's."""
    reference, other = (_unit(side[0]) for side in (wanted, got))
    cosines = (reference * other).sum(axis=1)
    same = int((wanted[1] == got[1]).sum())
    low, high = wilson(same, len(cosines))
    return UnseenAgreement(name, images, len(cosines), same, low, high, float(cosines.min()), float(cosines.mean()))


def _unit(rows: NDArray[Any]) -> NDArray[np.float64]:
    exact = rows.astype(np.float64)
    return np.asarray(exact / np.linalg.norm(exact, axis=1, keepdims=True))


def answers(candidate: StudiedGraph, images: ImageBatches, kept: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Embeddings and best classes, by OpenVINO; read back where they were answered before.

    Args:
        candidate: The graph.
        images: The set.
        kept: Folder of kept answers.
    """
    listed = json.dumps([str(path) for path in images.paths])
    key = f"{sha256_file(candidate.path)}:{candidate.compute}:{listed}"
    path = kept / f"{_digest(key)}.npz"
    if not path.is_file():
        backend = open_backend("openvino", candidate.path, compute=candidate.compute)
        (name,) = backend.input_names
        embeddings, best = [], []
        for batch in images.batches(_BATCH):
            answered = backend.run({name: batch}, (EMBEDDING, PROBABILITIES))
            embeddings.append(answered[EMBEDDING])
            best.append(answered[PROBABILITIES].argmax(axis=1))
        beside = path.with_suffix(".part.npz")
        np.savez(beside, embeddings=np.concatenate(embeddings), best=np.concatenate(best))
        beside.replace(path)
    with np.load(path, allow_pickle=False) as stored:
        return stored["embeddings"], stored["best"]


def judged(name: str, manifest: Manifest) -> UnseenAgreement | None:
    """What the contract itself measured when it judged a variant; None for what is no variant."""
    if name not in manifest.variants:
        return None
    found = manifest.variants[name].parity["openvino"]["image"]
    items = int(found["items"])
    same = round(found["top1_agreement"] * items)
    low, high = wilson(same, items)
    return UnseenAgreement(name, JUDGED, items, same, low, high, found["cosine_min"], found["cosine_mean"])


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:24]


def candidates(artifact: Path, manifest: Manifest) -> list[StudiedGraph]:
    """Float32 first, then the other variants that OpenVINO may open."""
    found = []
    for name, variant in manifest.variants.items():
        if "openvino" in variant.parity:
            found.append(
                StudiedGraph(name, artifact / variant.image.path, variant.compute, tuple(_story(variant.made)))
            )
    found.sort(key=lambda candidate: candidate.name != FLOAT32)
    if not found or found[0].name != FLOAT32:
        raise InputError(f"{artifact} was not verified with OpenVINO: export it with --backend openvino")
    return found


def _story(made: dict[str, Any]) -> Iterator[str]:
    """What the manifest says of how a graph was made, in a line each."""
    if made.get("tokens"):
        yield f"tokens, {made['tokens'][0]}"
    if "recipe" in made:
        recipe, back = made["recipe"], made.get("float32", [])
        smooth = "no SmoothQuant" if recipe["smoothing"] is None else f"SmoothQuant's α {recipe['smoothing']}"
        ranges = "clipped ranges" if recipe["clip"] else "whole ranges"
        yield f"int8, {smooth}, {ranges}, {100 * made['int8_share']:.0f} % of the work in int8"
        for group in back:
            yield f"{_AGAIN}{', '.join(group['products'])}"


def peer(
    artifact: Path, work: Path, calibration: Path, manifest: Manifest, tell: Callable[[str], None]
) -> StudiedGraph:
    """NNCF's int8 of our float32 graph, by its defaults for transformers, on the same calibration images."""
    from invariclip.export.quantization.other_quantizers import nncf

    target = work / "nncf.onnx"
    if not target.is_file():
        tell("NNCF quantises (minutes)")
        images = ImageBatches(find_images([calibration]), manifest.pixels)

        def batches() -> Iterator[NDArray[np.uint8]]:
            for batch in images.batches(_BATCH):
                yield batch
                yield altered(batch, 0)

        beside = target.with_suffix(".part.onnx")
        nncf(artifact / manifest.variants[FLOAT32].image.path, beside, batches())
        beside.replace(target)
    return StudiedGraph(PEER, target)


@click.group()
def main() -> None:
    """Variants beside float32 on images that no export saw."""


@main.command("images")
@click.option("--data", type=click.Path(path_type=Path), default=Path("build/stylebench"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/unseen/images"), show_default=True)
def images_command(data: Path, out: Path) -> None:
    """Sorts stylebench's images into what a variant is made on, judged on, and never shown."""
    from invariclip.bench.studies.stylebench.images import MANIFEST
    from invariclip.bench.studies.stylebench.images import read_manifest as read_images
    from invariclip.bench.studies.stylebench.sources import STYLES

    every = read_images(data / MANIFEST)
    drawn = {
        "calibration": [p for p in every if p.split == "train"],
        "judged": [p for p in every if not STYLES[p.style].held_out],
        "drawings": [p for p in every if STYLES[p.style].held_out and p.style != "photograph"],
        "photographs": [p for p in every if p.style == "photograph"],
    }
    taken: set[str] = set()
    for name, those in drawn.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        free = sorted((p for p in those if p.file not in taken), key=lambda p: (p.style, p.concept))
        chosen = spread(free, _DRAWN.get(name, len(free)))
        taken |= {image.file for image in chosen}
        for image in chosen:
            file = Path(image.file)
            shutil.copyfile(data / file, out / name / f"{image.style}-{file.name}")
        note(f"{len(chosen)} images in {out / name}")
    names = sorted({image.name for image in every})
    write_atomically(out / "classes.txt", "\n".join(names) + "\n")
    note(f"{len(names)} names in {out / 'classes.txt'}")


@main.command("measure")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--unseen", "unseen", multiple=True, metavar="NAME=PATH", help="Images that no export saw.")
@click.option(
    "--graph", "graphs", multiple=True, metavar="NAME[:bfloat16]=PATH",
    help="A further image graph of the same model, such as one that the contract left out; repeatable.",
)  # fmt: skip
@click.option("--calibration", type=click.Path(path_type=Path), help="What int8 was calibrated on: adds NNCF as peer.")
@click.option("--limit", default=300, show_default=True, type=click.IntRange(1), help="Of a set, evenly spread.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/unseen/work"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="PAGE.md; PAGE.json is written beside it.")
@click.option("--quiet", is_flag=True)
def measure_command(
    artifact: Path, unseen: tuple[str, ...], graphs: tuple[str, ...], calibration: Path | None, limit: int, work: Path,
    out: Path, quiet: bool,
) -> None:  # fmt: skip
    """Asks every variant, and writes the page."""
    record = measure(artifact, unseen, calibration, limit, work, silent if quiet else bar, graphs=graphs)
    write_result(out, record, page(record))


@main.command("page")
@click.argument("record", type=click.Path(path_type=Path))
def page_command(record: Path) -> None:
    """Writes the page again from its record."""
    write_atomically(record.with_suffix(".md"), page(json.loads(record.read_text(encoding="utf-8"))))


@main.command("timings")
@click.argument("record", type=click.Path(path_type=Path))
@click.argument("bench", type=click.Path(path_type=Path))
def timings_command(record: Path, bench: Path) -> None:
    """Puts the times of `invariclip bench` (its bench.json) into the record and the page."""
    kept, timed = (json.loads(path.read_text(encoding="utf-8")) for path in (record, bench))
    kept["timings"] = {
        "yardstick": timed["summary"]["yardstick"],
        "rows": {
            name: {"p50_ms": row["p50_ms"], "ratio": row["ratio"]}
            for name, row in timed["summary"]["batches"]["1"].items()
        },
    }
    write_result(record.with_suffix(".md"), kept, page(kept))


def measure(
    artifact: Path, unseen: Sequence[str], calibration: Path | None, limit: int, work: Path,
    progress: Progress = silent, graphs: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Every variant's answers beside float32's, set by set; kept on the way.

    Args:
        artifact: It must have classes.
        unseen: `NAME=PATH` of images that no export saw.
        calibration: See `peer`; None leaves the peer out.
        limit: Images of a set at most, evenly spread.
        work: Folder of what is kept.
        progress: Progress display.
        graphs: `NAME[:bfloat16]=PATH` of further image graphs of the same model.

    Returns:
        The record behind the page.

    Raises:
        InputError: A set is not NAME=PATH, or empty, or the artifact has no classes or was not verified in OpenVINO.
    """
    manifest = read_manifest(artifact)
    if not manifest.classes:
        raise InputError(f"{artifact} has no classes to agree on: export it with --classes-file")
    work.mkdir(parents=True, exist_ok=True)
    asked = [*candidates(artifact, manifest), *map(_loose, graphs)]
    if calibration is not None:
        asked.append(peer(artifact, work, calibration, manifest, note))
    sets = [_named(one) for one in unseen]
    shown = {name: ImageBatches(spread(find_images([path]), limit), manifest.pixels) for name, path in sets}
    rows = [row for candidate in asked[1:] if (row := judged(candidate.name, manifest)) is not None]
    steps = [(candidate, name) for candidate in asked for name in shown]
    reference: dict[str, Any] = {}
    for candidate, name in progress(steps, total=len(steps), desc="answers"):
        got = answers(candidate, shown[name], work)
        if candidate.name == FLOAT32:
            reference[name] = got
        else:
            rows.append(compare(candidate.name, name, reference[name], got))
    machine = facts()
    return {
        "model": manifest.model.name,
        "artifact": artifact.name,
        "limit": limit,
        "min_top1": next(
            (v.parity["openvino"]["thresholds"]["min_top1"] for n, v in manifest.variants.items() if n != FLOAT32), None
        ),
        "schedules": next((list(v.made["tokens"]) for v in manifest.variants.values() if v.made.get("tokens")), []),
        "classes": len(manifest.classes),
        "sets": [
            {
                "name": JUDGED,
                "kind": "seen",
                "images": manifest.variants[FLOAT32].parity["openvino"]["image"]["items"],
            },
            *({"name": name, "kind": "unseen", "images": len(reference[name][1])} for name, _ in sets),
        ],
        "candidates": [
            {"name": one.name, "megabytes": round(one.path.stat().st_size / 1e6, 1), "made": list(one.made)}
            for one in asked
        ],
        "left_out": manifest.left_out,
        "rows": [asdict(row) for row in rows],
        "processor": machine.get("processor", ""),
        "versions": {name: versions().get(name, "") for name in ("openvino", "nncf")},
    }


def _loose(given: str) -> StudiedGraph:
    name, path = _named(given)
    plain = name.removesuffix(":bfloat16")
    return StudiedGraph(plain, path, "float32" if plain == name else "bfloat16", ("not in the artifact",))


def _named(given: str) -> tuple[str, Path]:
    name, _, path = given.partition("=")
    if not name or not path:
        raise InputError(f"{given!r} is not NAME=PATH")
    return name, Path(path)


_HEAD = """# A trained ViT: what its variants keep

`reference-vit` is a ViT-S/14 with **trained** weights (257 tokens at 224 px, layer scale; its card is in
`export/reference/reference_vit/card.md`). Each variant's answers, in OpenVINO, beside those of float32, which is the
checkpoint's to rounding: top-1 is the share of images whose best of {classes} names is the same, with Wilson's 95 %
interval; cosines are of embeddings. That is agreement, not accuracy: no labels were read. The names lie close
together and the head is weak, so best matches are decided by little: a hard bank.

*Seen* are the images that the export judged its variants on, with the contract's own figures; calibrated and searched
was on others. *Unseen* are images that no export was shown{sets}.
"""
_TAIL = """
## Made by
```sh
python -m invariclip.bench.studies.stylebench build
python -m invariclip.bench.studies.unseen images
invariclip export --model reference-vit --backend openvino --classes-file build/unseen/images/classes.txt \\
  --images build/unseen/images/judged --calibration build/unseen/images/calibration --min-top1 {min_top1} \\
  --variant bfloat16 --variant int8 --variant int8-bfloat16 --variant tokens-bfloat16 --variant tokens-int8 \\
  -o build/unseen/{artifact}
python -m invariclip.bench.studies.unseen measure build/unseen/{artifact} \\
  --calibration build/unseen/images/calibration {arguments} --out docs/bench/{page}
```
{processor}; OpenVINO {versions[openvino]}, NNCF {versions[nncf]}.
"""


def page(record: dict[str, Any], name: str = "reference-vit.md") -> str:
    """The page of a record."""
    sets = record["sets"]
    rows = {(row["name"], row["images"]): row for row in record["rows"]}
    parts = [f"{one['name']}, {one['images']}" for one in sets if one["kind"] == "unseen"]
    lines = [_HEAD.format(classes=record["classes"], sets=f": {'; '.join(parts)}" if parts else "")]
    heads = [f"{one['name']} ({one['kind']}, {one['images']})" for one in sets]
    others = [one for one in record["candidates"] if one["name"] != FLOAT32]
    for title, cell in (("Top-1 agreement, % [95 %]", _share), ("Cosine, min (mean)", _cosine)):
        lines += [f"## {title}", f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
        for one in others:
            found = (rows.get((one["name"], a_set["name"])) for a_set in sets)
            cells = ("–" if row is None else cell(row) for row in found)
            lines.append(f"| {_code(one['name'])} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## How each came about", "| | MB | |", "|---|---|---|"]
    lines += [f"| {_code(o['name'])} | {o['megabytes']} | {_made(o['made'])} |" for o in record["candidates"]]
    if record["left_out"]:
        lines += ["", "Left out of the artifact, with what each missed:", ""]
        lines += [f"- `{one}`: {why}" for one, why in record["left_out"].items()]
    lines += _times(record)
    if record["schedules"]:
        lines += ["", "## Schedules of tokens that were tried, on the calibration images", ""]
        lines += [f"- {line}" for line in record["schedules"]]
    options = " ".join(f'--unseen "{one["name"]}=…"' for one in sets if one["kind"] == "unseen")
    options = f"{options} --limit {record['limit']}"
    lines.append(_TAIL.format(page=name, arguments=options, **record))
    return "\n".join(lines)


def _made(steps: Sequence[str]) -> str:
    """How a graph came about; the products that stay in float32 are counted, for they are many."""
    again = [step for step in steps if step.startswith(_AGAIN)]
    told = [step for step in steps if step not in again]
    return "; ".join([*told, *([f"{len(again)} products in {FLOAT32} again"] if again else [])])


def _times(record: dict[str, Any]) -> list[str]:
    timed = record.get("timings")
    if timed is None:
        return []
    rows = sorted(timed["rows"].items(), key=lambda row: -row[1]["p50_ms"])
    return [
        "",
        "## Time",
        "",
        f"One image at a time, two threads, a process each, in turns; × {timed['yardstick']} "
        "with the interval over rounds. Made by `invariclip bench ARTIFACT --batch 1 --rounds 7 --cold 0 -o OUT` and "
        "`python -m invariclip.bench.studies.unseen timings RECORD.json OUT/bench.json`.",
        "",
        "| | ms | × |",
        "|---|---|---|",
        *(
            f"| {name} | {row['p50_ms']:.1f} | {row['ratio']['value']:.2f} "
            f"[{row['ratio']['low']:.2f}, {row['ratio']['high']:.2f}] |"
            for name, row in rows
        ),
    ]


def _code(name: str) -> str:
    return name if " " in name else f"`{name}`"


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['same'] / row['items']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _cosine(row: dict[str, Any]) -> str:
    return f"{row['cosine_min']:.5f} ({row['cosine_mean']:.6f})"


if __name__ == "__main__":
    run_command(main)
