"""The files that a bench needs, made once and kept under a digest of what they are made from.

`reference-…/`  plain.onnx (the export without any rewrite), evidence.npy, altered.npy, calibration.npy, the
                reference's answers, weights.safetensors where the weights are random
`nncf-…/`       that export, quantised by NNCF
`artifact.icm`  our own float32 artifact, where none was named

`Reference` is what the original checkpoint answers, and `figures` how far a candidate's answers are from it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.folder import checked_path, read_manifest
from invariclip.artifact.projection import read_projection
from invariclip.backends import BACKENDS, is_installed
from invariclip.bench.latency import machine
from invariclip.bench.latency.quantise_peer import SUBSET, quantised_peer
from invariclip.console import silent
from invariclip.errors import ArtifactError, CheckpointError, InputError, MissingExtraError
from invariclip.export.checkpoints import check_texts
from invariclip.export.options import load
from invariclip.export.verification.answers import agreement, invariance_gap
from invariclip.files import new_directory, sha256_file, write_atomically
from invariclip.measure.worker import WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Manifest
    from invariclip.artifact.projection import Projection
    from invariclip.console import Progress
    from invariclip.export.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class Reference:
    """What the original checkpoint answers, float64 and of unit length.

    Attributes:
        plain: [N, d] for the evidence images.
        altered: [m, d] for those of `rows`, each under an intervention.
        rows: int64 [m].
        bank: [K, d], the texts that images are matched with.
    """

    plain: NDArray[np.float64]
    altered: NDArray[np.float64]
    rows: NDArray[np.int64]
    bank: NDArray[np.float64]

    def save(self, path: Path) -> None:
        """Writes an .npz."""
        np.savez(path, plain=self.plain, altered=self.altered, rows=self.rows, bank=self.bank)

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(stored["plain"], stored["altered"], stored["rows"], stored["bank"])


def figures(reference: Reference, plain: NDArray[Any], altered: NDArray[Any]) -> dict[str, Any]:
    """The figures of one candidate.

    Args:
        reference: See `Reference`.
        plain: [N, d], the candidate's embeddings of the evidence images.
        altered: [m, d], of the altered ones.

    Returns:
        `cosine_min`, `cosine_mean`, `top1_agreement` (share), `top1_ties`, `gap`, `gap_reference`, `gap_increase`,
        `images`, `texts`, `non_finite`; a figure that is no number is None.

    Raises:
        InputError: The embeddings are not of the reference's shape.
    """
    if plain.shape != reference.plain.shape or altered.shape != reference.altered.shape:
        raise InputError(
            f"embeddings of shape {list(plain.shape)} and {list(altered.shape)} cannot be held against "
            f"{list(reference.plain.shape)} and {list(reference.altered.shape)}; another model's or projection's"
        )
    got = plain.astype(np.float64)
    unit = got / np.maximum(np.linalg.norm(got, axis=1, keepdims=True), 1e-30)
    cosines = (unit * reference.plain).sum(axis=1)
    top1, ties = agreement(reference.plain @ reference.bank.T, unit @ reference.bank.T, 1)
    wanted = invariance_gap(reference.plain[reference.rows], reference.altered)
    gap = invariance_gap(got[reference.rows], altered)
    found = {
        "cosine_min": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "top1_agreement": top1,
        "gap": gap,
        "gap_reference": wanted,
        "gap_increase": gap - wanted,
    }
    return {
        **{name: value if np.isfinite(value) else None for name, value in found.items()},
        "top1_ties": ties,
        "images": len(plain),
        "texts": len(reference.bank),
        "non_finite": int((~np.isfinite(plain)).sum() + (~np.isfinite(altered)).sum()),
    }


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
    from invariclip.preprocessing.find import find_images
    from invariclip.preprocessing.pixels import stack

    seen = set(chosen.paths)
    others = [path for path in find_images([images_path()]) if path not in seen]
    return stack([str(path) for path in check_texts.spread(others, SUBSET)], chosen.spec) if others else shown[:SUBSET]


_FORMAT = 1
_PACKAGES = ("invariclip", "torch", "onnx", "open_clip_torch", "pillow")


@dataclass(frozen=True)
class Prepared:
    """Where everything is.

    Attributes:
        folder: The `reference-…` folder.
        weights: The checkpoint's file for PyTorch, or None where the model brings its own.
        artifact: Ours.
        manifest: Its manifest.
        quantised: NNCF's .xml, or None.
        missing: What could not be made, to the reason: `nncf`.
        key: What names the comparison: checkpoint, artifact, images, versions.
    """

    folder: Path
    weights: Path | None
    artifact: Path
    manifest: Manifest
    quantised: Path | None
    missing: dict[str, str]
    key: dict[str, str]

    def reference(self, projected: bool) -> Reference:
        """The reference's answers, through the artifact's projection or without."""
        return Reference.read(self.folder / ("projected.npz" if projected else "unprojected.npz"))


def prepare(
    wanted: ReferenceRequest,
    out: Path,
    *,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Makes what is missing; a second call finds everything done.

    Args:
        wanted: See `ReferenceRequest`.
        out: The bench's folder; everything goes below `out/prepared`, an own artifact to `out/artifact.icm`.
        progress: `console.bar` or `console.silent`.
        tell: Takes one line about every step.

    Raises:
        CheckpointError: The checkpoint cannot be loaded, or the artifact was exported from another one.
        ArtifactError: The artifact is damaged.
        InputError: No image can be read.
        ContractError: Our own export does not answer like the checkpoint.
    """
    given = None if wanted.artifact is None else read_manifest(wanted.artifact)
    root = out / "prepared"
    key = _key(wanted, given)
    folder = root / f"reference-{_digest(key)}"
    # loaded when something has to be made from it and not before
    loaded = cache(partial(load, wanted.model, wanted.checkpoint, wanted.seed, wanted.threads, wanted.tokenizer))
    if not (folder / FACTS).is_file():
        tell("prepare: the export without rewrites, the reference's answers")
        _require_same(wanted, given, loaded().sha256)
        write_reference(loaded(), wanted, given, folder, progress)
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    artifact, manifest = _artifact(loaded, wanted, given, facts["checkpoint_sha256"], out, progress, tell)
    missing: dict[str, str] = {}
    quantised = None
    try:
        key_of = {name: machine.versions().get(name) for name in ("nncf", "openvino")}
        target = root / f"nncf-{_digest([folder.name, key_of, SUBSET])}"
        quantised = quantised_peer(folder / PLAIN, folder / CALIBRATION, target, tell)
    except (WorkerError, MissingExtraError) as error:
        missing["nncf"] = error.reason if isinstance(error, WorkerError) else str(error)
    weights = folder / WEIGHTS if wanted.seed is not None else wanted.checkpoint
    variants = _digest({name: variant.image.sha256 for name, variant in manifest.variants.items()})
    # Digests and versions alone: what is written down names no folder of this machine
    named = {
        "checkpoint": facts["checkpoint_sha256"],
        "artifact": f"{manifest.space_id} {variants}",
        "evidence": folder.name,
    }
    key = {**named, **{package: key[package] for package in _PACKAGES}}
    return Prepared(folder, weights, artifact, manifest, quantised, missing, key)


def _key(wanted: ReferenceRequest, given: Manifest | None) -> dict[str, str]:
    """What the reference's folder is made from, without loading anything."""
    installed = machine.versions()
    weights = wanted.checkpoint
    own = given.model.checkpoint_sha256 if given is not None else ""
    return {
        "format": str(_FORMAT),
        "model": wanted.model,
        "weights": sha256_file(weights) if weights is not None and weights.is_file() else str(weights or wanted.seed),
        "tokenizer": str(wanted.tokenizer),
        "of_artifact": own,
        "projection": "" if given is None or given.projection is None else given.projection.sha256,
        "classes": "" if given is None else _digest([given.classes, given.templates]),
        "images": _digest([str(path) for path in wanted.images]),
        **{name: installed.get(name, "") for name in _PACKAGES},
    }


def _require_same(wanted: ReferenceRequest, given: Manifest | None, sha256: str) -> None:
    """Refuses an artifact of another checkpoint, before anything is made.

    Raises:
        CheckpointError: It is one.
    """
    if given is not None and given.model.checkpoint_sha256 != sha256:
        raise CheckpointError(
            f"{wanted.artifact}: was exported from another checkpoint (sha256 "
            f"{given.model.checkpoint_sha256[:12]}…, this one has {sha256[:12]}…); name its own with --model and "
            "--checkpoint or --random-weights"
        )


def _artifact(
    loaded: Callable[[], Checkpoint],
    wanted: ReferenceRequest,
    given: Manifest | None,
    sha256: str,
    out: Path,
    progress: Progress,
    tell: Callable[[str], None],
) -> tuple[Path, Manifest]:
    """The artifact that was named, or our own of the same checkpoint."""
    if given is not None and wanted.artifact is not None:
        return wanted.artifact, given
    own = out / "artifact.icm"
    try:
        found = read_manifest(own)
    except ArtifactError:
        found = None
    if found is None or found.model.checkpoint_sha256 != sha256:
        from invariclip.export.build import export_artifact
        from invariclip.export.config import ExportConfig

        tell(f"prepare: no artifact was named, so one is exported to {own}")
        config = ExportConfig(images=wanted.images or None, backends=installed(), threads=wanted.threads)
        found = export_artifact(loaded(), own, config, progress=progress)
    return own, found


def installed() -> tuple[str, ...]:
    """The backends that can be opened here."""
    return tuple(name for name in BACKENDS if is_installed(name))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
