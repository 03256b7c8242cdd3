"""What comes from the original checkpoint alone: the export without rewrites, the evidence, the reference's answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.folder import checked_path
from invariclip.artifact.projection import read_projection
from invariclip.bench.latency.accuracy import Reference
from invariclip.bench.latency.quantise_peer import SUBSET
from invariclip.export.checkpoints import check_texts
from invariclip.files import new_directory, write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Manifest
    from invariclip.artifact.projection import Projection
    from invariclip.console import Progress
    from invariclip.export.checkpoints.checkpoint import Checkpoint

PLAIN, WEIGHTS, FACTS = "plain.onnx", "weights.safetensors", "facts.json"
EVIDENCE, ALTERED, CALIBRATION = "evidence.npy", "altered.npy", "calibration.npy"


@dataclass(frozen=True)
class ReferenceRequest:
    """What is to be compared.

    Attributes:
        model: open_clip model.
        checkpoint: Its weights, or None.
        seed: Of random weights, or None.
        tokenizer: See `load_checkpoint`.
        artifact: Ours, or None to export one.
        images: Images and folders that answers are compared on; empty takes the bundled ones.
        threads: Of every candidate.
    """

    model: str
    checkpoint: Path | None
    seed: int | None
    tokenizer: str | None
    artifact: Path | None
    images: tuple[Path, ...]
    threads: int


def write_reference(
    checkpoint: Checkpoint, wanted: ReferenceRequest, given: Manifest | None, folder: Path, progress: Progress
) -> None:
    """Fills the folder, or leaves none.

    Args:
        checkpoint: The original model.
        wanted: See `ReferenceRequest`.
        given: The manifest of the artifact that was named, or None.
        folder: The folder; it appears when it is complete.
        progress: `console.bar` or `console.silent`.

    Raises:
        InputError: No image can be read.
        ArtifactError: The artifact's projection is damaged.
    """
    from safetensors.torch import save_file

    from invariclip.export.graphs.tower_graph import tower_graph
    from invariclip.export.graphs.writing import write_graph
    from invariclip.export.verification import evidence

    projection = _projection(wanted.artifact, given)
    images = evidence.images_of(wanted.images or None, checkpoint.pixels)
    chosen = evidence.ImageBatches(check_texts.spread(images.paths, evidence.BUNDLED_LIMIT), checkpoint.pixels)
    with new_directory(folder) as new:
        # Without the projection: no peer knows of it
        write_graph(tower_graph(checkpoint, "image", rewrites=()).model, new / PLAIN)
        shown = np.concatenate(list(chosen.batches(16)))
        rows = np.array(check_texts.spread(range(len(shown)), 64), dtype=np.int64)
        altered = evidence.altered(shown[rows])
        for name, array in ((EVIDENCE, shown), (ALTERED, altered)):
            np.save(new / name, array, allow_pickle=False)
        np.save(new / CALIBRATION, _calibration(chosen, shown), allow_pickle=False)
        parts = progress(range(0, len(shown), 16), total=-(-len(shown) // 16), desc="reference's answers")
        raw = np.concatenate([checkpoint.encode_images(shown[start : start + 16]) for start in parts])
        raws = raw, checkpoint.encode_images(altered)
        for name, matrix in (("unprojected.npz", None), ("projected.npz", projection)):
            _reference(checkpoint, raws, rows, given, matrix).save(new / name)
        if wanted.seed is not None:
            tensors = {name: value.contiguous().clone() for name, value in checkpoint.module.state_dict().items()}
            save_file(tensors, new / WEIGHTS)
        facts = {"checkpoint_sha256": checkpoint.sha256, "source": checkpoint.source, "images": len(shown)}
        write_atomically(new / FACTS, json.dumps(facts, indent=1))


def _reference(
    checkpoint: Checkpoint,
    raws: tuple[NDArray[np.float32], NDArray[np.float32]],
    rows: NDArray[np.int64],
    given: Manifest | None,
    projection: Projection | None,
) -> Reference:
    """The answers to images and altered images, and the texts: the baked classes, else the contract's prompts."""
    from invariclip.export.verification.answers import project
    from invariclip.export.verification.candidate import prepare as job_of

    classes, templates = (given.classes, given.templates) if given is not None else ((), ())
    bank = job_of(checkpoint, projection, classes, templates).bank
    if bank is None:
        prompts = check_texts.ids_of(check_texts.PROMPTS, checkpoint.tokenizer)
        bank = project(checkpoint.encode_texts(prompts), projection)
    return Reference(project(raws[0], projection), project(raws[1], projection), rows, bank)


def _projection(artifact: Path | None, given: Manifest | None) -> Projection | None:
    if artifact is None or given is None or given.projection_file is None:
        return None
    return read_projection(checked_path(artifact, given.projection_file))


def _calibration(chosen: Any, shown: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images for the peer to calibrate on: bundled ones that nothing is compared on, else the same."""
    from invariclip.export.reference import images_path
    from invariclip.preprocessing.pixels import find_images, stack

    seen = set(chosen.paths)
    others = [path for path in find_images([images_path()]) if path not in seen]
    return stack([str(path) for path in check_texts.spread(others, SUBSET)], chosen.spec) if others else shown[:SUBSET]
