"""The artifact: a folder `name.icm/` whose manifest says what every file is, and which is refused when it lies.

manifest.json           the manifest's dataclasses as JSON
image.onnx, text.onnx   the towers, projection folded in; their metadata_props repeat the facts
text.cdc.onnx           in place of text.onnx where there are learned templates: it reads their vectors too
cdc.safetensors         the learned templates, and how their logits become evidence
tokenizer.json          for texts
projection.safetensors  A_inv and what it came from, where there is one
site.safetensors        the place that the image graphs are adapted to, where there is one
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from invariclip.artifact.manifest import MANIFEST, SCHEMA_VERSION, FileFacts, Manifest
from invariclip.errors import ArtifactError, InputError
from invariclip.files import new_directory, require_writable, sha256_file, write_atomically
from invariclip.records import read_sealed_json, sealed_json

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

MAX_MANIFEST_BYTES = 64 << 20
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
    named = {MANIFEST, ENGINES, *(path.name for path in folder.glob("machine-*.json"))}
    try:
        files = read_manifest(folder).files
    except ArtifactError:  # damaged, or of an earlier version: what every export writes
        patterns = ("image*.onnx*", "text*.onnx*", "tokenizer.json", "*.safetensors")
        return named | {path.name for pattern in patterns for path in folder.glob(pattern)}
    return named | {name for entry in files for name in (entry.path, f"{entry.path}.data")}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json into `folder`."""
    write_atomically(folder / MANIFEST, sealed_json(manifest.to_json()))


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads and checks manifest.json; the files it names are checked when they are opened.

    Raises:
        ArtifactError: Not an artifact, damaged, or of an unknown schema version.
    """
    where = Path(folder)
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
    plain = read_sealed_json(
        path, "a manifest", schema=SCHEMA_VERSION, remedy="export again", max_bytes=MAX_MANIFEST_BYTES,
        error=ArtifactError,
    )  # fmt: skip
    try:
        manifest = Manifest.from_json(plain)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if not manifest.variants:
        raise ArtifactError(f"{path}: lists no variant, so nothing in it was proved; export again")
    return manifest


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
