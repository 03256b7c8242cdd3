"""The files that a bench needs, made once and kept under a digest of what they are made from.

`reference-…/`  plain.onnx (the export without any rewrite), evidence.npy, altered.npy, calibration.npy, the
                reference's answers, weights.safetensors where the weights are random
`nncf-…/`       that export, quantised by NNCF
`artifact.icm`  our own float32 artifact, where none was named
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from invariclip.artifact.folder import read_manifest
from invariclip.backends import BACKENDS, is_installed
from invariclip.bench.latency import machine
from invariclip.bench.latency.accuracy import Reference
from invariclip.bench.latency.process import CandidateError
from invariclip.bench.latency.quantise_peer import SUBSET, quantised_peer
from invariclip.bench.latency.reference_files import (
    CALIBRATION,
    FACTS,
    PLAIN,
    WEIGHTS,
    ReferenceRequest,
    write_reference,
)
from invariclip.console import silent
from invariclip.errors import ArtifactError, CheckpointError, MissingExtraError
from invariclip.export.options import load
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from invariclip.artifact.manifest import Manifest
    from invariclip.console import Progress
    from invariclip.export.checkpoints.checkpoint import Checkpoint

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
    loader = _Loader(wanted)
    if not (folder / FACTS).is_file():
        tell("prepare: the export without rewrites, the reference's answers")
        _require_same(wanted, given, loader.checkpoint.sha256)
        write_reference(loader.checkpoint, wanted, given, folder, progress)
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    artifact, manifest = _artifact(loader, wanted, given, facts["checkpoint_sha256"], out, progress, tell)
    missing: dict[str, str] = {}
    quantised = None
    try:
        key_of = {name: machine.versions().get(name) for name in ("nncf", "openvino")}
        target = root / f"nncf-{_digest([folder.name, key_of, SUBSET])}"
        quantised = quantised_peer(folder / PLAIN, folder / CALIBRATION, target, tell)
    except (CandidateError, MissingExtraError) as error:
        missing["nncf"] = error.reason if isinstance(error, CandidateError) else str(error)
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


class _Loader:
    """The checkpoint, loaded when something has to be made from it and not before."""

    def __init__(self, wanted: ReferenceRequest) -> None:
        self._wanted = wanted
        self._loaded: Checkpoint | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        if self._loaded is None:
            wanted = self._wanted
            self._loaded = load(wanted.model, wanted.checkpoint, wanted.seed, wanted.threads, wanted.tokenizer)
        return self._loaded


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
    loader: _Loader,
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
        found = export_artifact(loader.checkpoint, own, config, progress=progress)
    return own, found


def installed() -> tuple[str, ...]:
    """The backends that can be opened here."""
    return tuple(name for name in BACKENDS if is_installed(name))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
