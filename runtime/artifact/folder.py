"""The artifact: a folder `name.icm/` whose manifest says what every file is, and which is refused when it lies.

manifest.json           the manifest's dataclasses as JSON
image.onnx, text.onnx   the towers, projection folded in; their metadata_props repeat the facts
text.cdc.onnx           in place of text.onnx where there are learned templates: it reads their vectors too
cdc.safetensors         the learned templates, and how their logits become evidence
tokenizer.json          for texts
projection.safetensors  A_inv and what it came from, where there is one
site.safetensors        the place that the image graphs are adapted to, where there is one
signature.json          who vouches for all of this, where `invariclip sign` was run
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from invariclip.artifact.graph_file import read_facts
from invariclip.artifact.manifest import MANIFEST, SCHEMA_VERSION, FileFacts, Manifest
from invariclip.artifact.signature import REQUIRED, SIGNATURE, digests, require_signed, sign
from invariclip.errors import ArtifactError, InputError
from invariclip.files import new_directory, require_writable, sha256_file, write_atomically
from invariclip.records import from_sealed_json, read_bounded, sealed_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_MANIFEST_BYTES = 64 << 20
_ABSENT = object()
ENGINES = "engines"
"""Where TensorRT engines lie: beside the graphs, in a folder of their own that the manifest does not list."""


def describe_file(folder: Path, name: str) -> FileFacts:
    """Facts of a file that was just written into `folder`."""
    path, data = folder / name, folder / f"{name}.data"
    return FileFacts(name, sha256_file(path), path.stat().st_size, sha256_file(data) if data.is_file() else None)


def require_replaceable(target: Path, source: Path | None = None) -> None:
    """Refuses to write an artifact over a folder that holds something else, or over the artifact that it is made from.

    Raises:
        InputError: The folder has things in it and is not an artifact, it is `source`, or it cannot be written.
    """
    if source is not None and target.resolve() == source.resolve():
        raise InputError(f"{target}: is the artifact to start from, which stays as it is; name another output")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise InputError(f"{target}: is a folder with other things in it, not an artifact; name another output")
    require_writable(target)


@contextmanager
def new_artifact(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes the artifact `target` in one step; files in it that are not ours stay.

    Raises:
        InputError: It cannot be written, see `files.new_directory`.
    """
    with new_directory(target, owned=_owned) as folder:
        yield folder


def _owned(folder: Path) -> set[str]:
    """Names in an artifact's folder that an export may replace: what its manifest names, and what belongs to it."""
    try:
        return _names(folder, _parsed(folder)[0]) | {SIGNATURE}
    except ArtifactError:  # damaged, or of an earlier version: what every export writes
        patterns = ("image*.onnx*", "text*.onnx*", "tokenizer.json", "*.safetensors", "machine-*.json")
        return {MANIFEST, ENGINES, SIGNATURE, *(path.name for pattern in patterns for path in folder.glob(pattern))}


def _names(folder: Path, manifest: Manifest) -> set[str]:
    """Names of all that is read from an artifact's folder, but for its signature."""
    files = {name for entry in manifest.files for name in (entry.path, f"{entry.path}.data")}
    return {MANIFEST, ENGINES, *(path.name for path in folder.glob("machine-*.json")), *files}


def copy_artifact(folder: Path, target: Path) -> None:
    """Copies all that is read from an artifact's folder, and its signature, into a new folder.

    Raises:
        ArtifactError: It is no artifact, or a file is missing, changed, or was not copied as it is.
    """
    manifest, _ = _parsed(folder)
    for entry in manifest.files:
        _located(folder, entry)
    target.mkdir()
    for name in sorted(_names(folder, manifest) | {SIGNATURE}):
        path = folder / name
        if path.is_dir():
            shutil.copytree(path, target / name)
        elif path.is_file():
            shutil.copyfile(path, target / name)
    for entry in _parsed(target)[0].files:
        checked_path(target, entry)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json into `folder`."""
    write_atomically(folder / MANIFEST, sealed_json(manifest.to_json()))


def read_manifest(folder: str | os.PathLike[str], require_signature: str | os.PathLike[str] | None = None) -> Manifest:
    """Reads and checks manifest.json; the files it names are checked when they are opened.

    Args:
        folder: The artifact.
        require_signature: A PEM file of public keys, one of which must have signed the artifact; all its files are
            then checked now. None takes the file that the environment variable `signature.REQUIRED` names, if any.

    Raises:
        ArtifactError: Not an artifact, damaged, or of an unknown schema version.
        SignatureError: It is not signed as required, see `signature.require_signed`.
    """
    where = Path(folder)
    manifest, digest = _parsed(where)
    keys = require_signature or os.environ.get(REQUIRED)
    if keys:
        require_signed(where, {**digests(where, _names(where, manifest)), MANIFEST: digest}, keys)
    return manifest


def sign_artifact(folder: Path, key: Ed25519PrivateKey) -> int:
    """Signs an artifact's files as they are, machine profiles and engines too; returns how many.

    Raises:
        ArtifactError: It is no artifact, or a file is damaged.
        SignatureError: A link in it leads out of the folder.
    """
    manifest, digest = _parsed(folder)
    for entry in manifest.files:
        checked_path(folder, entry)
    files = {**digests(folder, _names(folder, manifest)), MANIFEST: digest}
    sign(folder, files, key)
    return len(files)


def _parsed(where: Path) -> tuple[Manifest, str]:
    """The manifest, and the digest of the very bytes that it was read from."""
    path = where / MANIFEST
    if not where.exists():
        raise ArtifactError(
            f"{where}: not an artifact, there is no such folder; `invariclip build` or `export` writes one"
        )
    if not path.is_file():
        raise ArtifactError(
            f"{where}: not an artifact, it holds no {MANIFEST}; `invariclip build` or `export` writes one"
            f"{'' if where.is_dir() else ', and it comes before the images'}"
        )
    content = read_bounded(path, "a manifest", MAX_MANIFEST_BYTES, ArtifactError)
    plain = from_sealed_json(content, path, "a manifest", SCHEMA_VERSION, "export again", ArtifactError)
    try:
        manifest = Manifest.from_json(plain)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if not manifest.variants:
        raise ArtifactError(f"{path}: lists no variant, so nothing in it was proved; export again")
    return manifest, hashlib.sha256(content).hexdigest()


def checked_path(folder: str | os.PathLike[str], entry: FileFacts) -> Path:
    """The path of an artifact's file, once it is known to be inside the folder and unchanged.

    Raises:
        ArtifactError: The path leaves the folder, or the file is missing, of another size, or of another digest.
    """
    path = _located(folder, entry)
    _require_unchanged(folder, entry, path)
    return path


@contextmanager
def checked_meanwhile(folder: str | os.PathLike[str], entry: FileFacts) -> Iterator[Path]:
    """`checked_path` for a file that is slow to load: its digest is taken while the block loads it.

    The digest of a large graph takes a quarter to a half of the processor time that an engine needs to load it. It is
    known before the block is left, so nothing answers from a file that was changed. It detects corruption, not
    tampering: who can write the graph can write the manifest too, so an engine that reads first risks nothing more.

    Raises:
        ArtifactError: As `checked_path`; also instead of what the block raises, where the file is not the exported one.
    """
    path = _located(folder, entry)
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        unchanged = pool.submit(_require_unchanged, folder, entry, path)
        try:
            yield path
        finally:
            unchanged.result()


@contextmanager
def checked_graph(folder: str | os.PathLike[str], entry: FileFacts, manifest: Manifest) -> Iterator[Path]:
    """`checked_meanwhile` for a graph, which must say of itself what the manifest says.

    So a manifest that was edited, and sealed again, does not answer with names or pixels that the graph is not of.

    Raises:
        ArtifactError: As `checked_meanwhile`, or a fact in the graph's `metadata_props` is another one.
    """
    with checked_meanwhile(folder, entry) as path:
        facts, own = read_facts(path) or {}, json.loads(json.dumps(manifest.facts(entry.path)))
        wrong = sorted(name for name in {*own, *facts} if facts.get(name, _ABSENT) != own.get(name, _ABSENT))
        if wrong:
            raise ArtifactError(f"{folder}: {entry.path} and {MANIFEST} differ in {', '.join(wrong)}; export again")
        yield path


def _located(folder: str | os.PathLike[str], entry: FileFacts) -> Path:
    root = Path(folder).resolve()
    path = (root / entry.path).resolve()
    if not path.is_relative_to(root) or path == root:
        raise ArtifactError(f"{folder}: the manifest names {entry.path!r}, which leaves the artifact's folder")
    if not path.is_file():
        raise ArtifactError(f"{folder}: {entry.path} is missing; export again")
    if path.stat().st_size != entry.size_bytes:
        raise ArtifactError(f"{folder}: {entry.path} is not the file that was exported (digest differs); export again")
    return path


def _require_unchanged(folder: str | os.PathLike[str], entry: FileFacts, path: Path) -> None:
    if sha256_file(path) != entry.sha256:
        raise ArtifactError(f"{folder}: {entry.path} is not the file that was exported (digest differs); export again")
    data = path.with_name(f"{path.name}.data")
    if entry.data_sha256 and (not data.is_file() or sha256_file(data) != entry.data_sha256):
        raise ArtifactError(f"{folder}: {entry.path}.data is missing or not what was exported; export again")
