"""Other classes in an artifact that exists: no checkpoint, no tracing, no reading of weights that lie beside a graph.

The class embeddings come from the artifact's own text graph, which was held against its checkpoint at export. The image
graph gets another head; that everything up to `embedding` stayed as it was is shown by a digest over nodes and weights,
so what was proved of the embeddings still is. The head is checked by itself: probabilities against float64.
"""

from __future__ import annotations

import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx_ir as ir

from invariclip.artifact.fidelity import require_level
from invariclip.artifact.folder import (
    checked_path,
    describe_file,
    new_artifact,
    read_manifest,
    require_replaceable,
    write_manifest,
)
from invariclip.artifact.learned_prompts import class_banks
from invariclip.artifact.manifest import (
    EMBEDDING,
    IMAGE_INPUT,
    LOGITS,
    METADATA_KEY,
    PROBABILITIES,
    UNCERTAINTY,
    FileFacts,
)
from invariclip.backends import DEFAULT_BACKEND, open_backend
from invariclip.console import silent
from invariclip.errors import ContractError, InputError
from invariclip.export.graphs.head import attach_head, body_digest
from invariclip.export.graphs.writing import facts_text, require_valid, save_graph
from invariclip.export.verification import evidence
from invariclip.export.verification.answers import order_gap
from invariclip.export.verification.class_head import ClassHead
from invariclip.export.verification.figures import EXACT, THRESHOLDS, max_diff
from invariclip.files import write_atomically
from invariclip.preprocessing.prompts import DEFAULT_TEMPLATES, check_prompts, class_bank
from invariclip.text_tower import TextTower

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Compute, Manifest
    from invariclip.console import Progress
    from invariclip.export.verification.evidence import ImageBatches

_BEST = "float32"
"""The variant whose text graph embeds the classes of all of them, where it is there."""
A_PROBABILITY, AN_UNCERTAINTY, AN_ORDER = "a probability", "an uncertainty", "the ranking, as a cosine,"
_BATCH = 16
_TEXTS = 64
MAX_GRAPH_BYTES = 2_000_000_000
"""Protobuf ends at 2 GiB; the bank is kept inside the graph."""


def swap_classes(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    classes: Sequence[str],
    templates: Sequence[str] | None = None,
    *,
    images: Sequence[str | Path] | None = None,
    max_probability_diff: float = EXACT.max_probability_diff,
    threads: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Writes an artifact with other classes, or nothing.

    Args:
        artifact: The artifact to start from; it stays as it is.
        out: The artifact to write. One that stands there is replaced, be it the same.
        classes: Class names to bake in.
        templates: Their prompt templates; None takes the artifact's own, or the default.
        images: Files and folders to check the head on; None takes the bundled ones.
        max_probability_diff: Largest difference of a probability from float64.
        threads: ONNX Runtime's threads; None takes what this process may use.
        progress: `console.bar` or `console.silent`.

    Returns:
        The manifest that was written.

    Raises:
        ArtifactError: `artifact` is not one, or a file of it is missing or changed.
        InputError: No classes, bad ones, too many for the graph, or a folder that cannot be written.
        ContractError: The new head does not answer what it should.
        MissingExtraError: An engine that the artifact was proved on is not installed here.
    """
    source, target = Path(artifact), Path(out)
    old = read_manifest(source)
    if not classes:
        raise InputError("new classes are needed: name them with --classes or --classes-file")
    prompts = tuple(templates or old.templates or DEFAULT_TEMPLATES)
    check_prompts(classes, prompts)
    if old.cdc is not None and prompts != old.templates:
        raise InputError(
            f"{source}: its learned templates were trained beside the prompts {' | '.join(old.templates)}; leave other "
            "templates out, or train with them and export again"
        )
    require_replaceable(target)
    entries = {entry.path: entry for entry in old.files}
    paths = {name: checked_path(source, entry) for name, entry in entries.items()}
    looked_at = evidence.images_of(images, old.pixels)
    looked_at.require_readable()
    teacher = _BEST if _BEST in old.variants else next(iter(old.variants))
    manifest = replace(old, classes=tuple(classes), templates=prompts)
    tower = TextTower(source, old, teacher, backend=DEFAULT_BACKEND, threads=threads)
    bank = _embedded(tower, manifest, progress)
    wanted = ClassHead(bank, manifest.model.logit_scale, manifest.model.logit_bias, manifest.cdc)
    with new_artifact(target) as folder:
        new_files, bodies = _write_files(manifest, paths, folder, bank)
        require_copied(entries, new_files)
        manifest = cast("Manifest", with_files(manifest, new_files))
        variants = dict(manifest.variants)
        runs = [(name, backend) for name, variant in variants.items() for backend in variant.parity]
        for name, backend in progress(runs, total=len(runs), desc="check heads"):
            image = folder / variants[name].image.path
            differences = head_differences(
                image, looked_at, wanted, backend=backend, threads=threads, compute=variants[name].compute
            )
            # rounding of float32 bounds a float32 head; any other arithmetic is held to the level it was listed with
            level = require_level(variants[name].parity[backend]["level"])
            own = max_probability_diff
            if variants[name].compute != "float32":
                own = max(own, THRESHOLDS[level].max_probability_diff)
            for what, difference in differences.items():
                bound = THRESHOLDS[level].max_order_gap if what == AN_ORDER else own
                if not difference <= bound:  # a NaN must fail
                    raise ContractError(
                        f"{image.name} on {backend}: {what} of the new classes is off by {difference:.3g}, "
                        f"above {bound:g}"
                    )
            head = {
                "bank": f"text graph of {teacher}",
                "body_sha256": bodies[image.name],
                "images": len(looked_at.readable),
                "probability_diff": differences[A_PROBABILITY],
                "max_probability_diff": own,
                "order_gap": differences[AN_ORDER],
                **({"uncertainty_diff": differences[AN_UNCERTAINTY]} if manifest.cdc else {}),
            }
            parity = variants[name].parity
            parity = {**parity, backend: still_proved(parity[backend], head, had_classes=bool(old.classes))}
            variants[name] = replace(variants[name], parity=parity)
        manifest = replace(manifest, variants=variants)
        write_manifest(folder, manifest)
    return manifest


def head_differences(
    path: Path,
    images: ImageBatches,
    head: ClassHead,
    *,
    backend: str = DEFAULT_BACKEND,
    threads: int | None = None,
    compute: Compute = "float32",
) -> dict[str, float]:
    """Largest difference of what an image graph says of its classes from float64, computed from its own embeddings.

    Args:
        path: An image graph with classes.
        images: What to look at.
        head: What it must answer.
        backend: The engine that runs it.
        threads: Its threads; None takes what this process may use.
        compute: What it may compute in.

    Returns:
        `A_PROBABILITY`, `AN_ORDER` and, of learned templates, `AN_UNCERTAINTY` to the difference; NaN where an answer
        is one.

    Raises:
        ArtifactError: The graph cannot be loaded.
        InputError: No image can be read.
        MissingExtraError: The engine is not installed.
    """
    engine = open_backend(backend, path, threads=threads, compute=compute)
    differences: dict[str, list[float]] = {}
    for batch in images.batches(_BATCH):
        answers = engine.run({IMAGE_INPUT: batch})
        probabilities, uncertainty = head.answers(answers[EMBEDDING].astype(np.float64))
        differences.setdefault(A_PROBABILITY, []).append(max_diff(answers[PROBABILITIES], probabilities))
        bank = head.bank if head.learned is None else head.bank[0]
        own = order_gap(answers[LOGITS], answers[EMBEDDING].astype(np.float64) @ bank.T)
        differences.setdefault(AN_ORDER, []).append(own)
        if uncertainty is not None:
            differences.setdefault(AN_UNCERTAINTY, []).append(max_diff(answers[UNCERTAINTY], uncertainty))
    return {what: float(np.max(seen)) for what, seen in differences.items()}


def _embedded(tower: TextTower, manifest: Manifest, progress: Progress) -> NDArray[np.float64]:
    """The bank or the banks of a manifest's classes, from the text graph of another one's artifact."""

    def embed(prompts: list[str], before: tuple[int, ...] = ()) -> NDArray[np.float32]:
        return tower.embed(prompts, _TEXTS, {}, before=before)

    if manifest.cdc is not None:
        return class_banks(embed, manifest.classes, manifest.templates, manifest.cdc, progress=progress)
    return class_bank(embed, manifest.classes, manifest.templates, progress=progress)


def with_files(value: Any, new: dict[str, FileFacts]) -> Any:
    """The same dataclass with every file's facts taken from `new`."""
    if isinstance(value, FileFacts):
        return new[value.path]
    if isinstance(value, dict):
        return {key: with_files(item, new) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: with_files(getattr(value, field.name), new) for field in fields(value)}
        return replace(value, **changes)
    return value


def _write_files(
    manifest: Manifest, paths: dict[str, Path], folder: Path, bank: NDArray[np.float64]
) -> tuple[dict[str, FileFacts], dict[str, str]]:
    """Writes or copies every file; answers their facts, and the digest of each image graph's body."""
    bodies: dict[str, str] = {}
    for name, path in paths.items():
        copy_weights(path, folder / name)
        if path.suffix != ".onnx":
            shutil.copyfile(path, folder / name)
        elif takes_images(path):
            bodies[name] = _with_head(path, folder / name, manifest, bank)
        else:
            with_facts(path, folder / name, manifest)
    return {name: describe_file(folder, name) for name in paths}, bodies


def copy_weights(path: Path, target: Path) -> None:
    """Copies the file of weights that lies beside a graph, if one does, beside another graph."""
    beside = path.with_name(f"{path.name}.data")
    if beside.is_file():
        # No hard link: onnx refuses to read weights from a file that has two names, in either artifact
        shutil.copyfile(beside, target.with_name(f"{target.name}.data"))


def require_copied(old: dict[str, FileFacts], new: dict[str, FileFacts]) -> None:
    """Holds copied weights against those of the artifact that they are from.

    Raises:
        ContractError: A file is another one.
    """
    spoilt = [name for name, entry in old.items() if new[name].data_sha256 != entry.data_sha256]
    if spoilt:
        raise ContractError(f"{spoilt[0]}.data: was not copied as it is; is the disk full?")


def takes_images(path: Path) -> bool:
    """Whether a graph is an image graph."""
    return any(item.name == IMAGE_INPUT for item in onnx.load(str(path), load_external_data=False).graph.input)


def with_facts(path: Path, target: Path, manifest: Manifest) -> None:
    """Writes a graph again that says of itself what the manifest says."""
    model = onnx.load(str(path), load_external_data=False)
    kept = [item for item in model.metadata_props if item.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=METADATA_KEY, value=facts_text(manifest.facts(path.name)))
    write_atomically(target, model.SerializeToString(deterministic=True))


def _with_head(path: Path, target: Path, manifest: Manifest, bank: NDArray[np.float64]) -> str:
    """Writes an image graph with another head; answers the digest of the body, which both have."""
    if path.stat().st_size + bank.size * 4 > MAX_GRAPH_BYTES:
        raise InputError(f"{path.name}: {bank.shape[-2]:,} classes would make the graph larger than protobuf allows")
    model = ir.load(path)
    attach_head(model, bank, manifest.model.logit_scale, manifest.model.logit_bias, manifest.cdc)
    model.metadata_props[METADATA_KEY] = facts_text(manifest.facts(path.name))
    save_graph(model, target)
    before, after = body_digest(path), body_digest(target)
    if before != after:
        raise ContractError(f"{path.name}: writing the new classes changed the graph before them; export it again")
    require_valid(target, "the graph with the new classes")
    return after


def still_proved(record: dict[str, Any], head: dict[str, Any], *, had_classes: bool) -> dict[str, Any]:
    """A backend's parity record with other classes: every figure of the embeddings stays.

    Args:
        record: What was proved with the old classes (see `invariclip.artifact.parity`).
        head: What was measured of the new ones.
        had_classes: Whether best matches were sought among old classes; then those figures are gone too.
    """
    gone = ("probability_diff", "uncertainty_diff", "order_gap", *(("top",) if had_classes else ()))
    image = {name: None if name.startswith(gone) else value for name, value in record["image"].items()}
    return {**record, "image": image, "head": head}
