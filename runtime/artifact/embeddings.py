"""Embeddings on disk: a safetensors file that knows its space, and refuses to be compared across spaces."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from invariclip.errors import InputError
from invariclip.files import write_atomically


@dataclass(frozen=True)
class Embeddings:
    """Unit-length vectors with what they are of.

    Attributes:
        vectors: float32 [N, d].
        items: N paths or texts.
        space_id: The embedding space that they live in.
        site_sha256: Digest of the site whose shift was taken away, or "" for none. It does not part spaces: vectors of
            one site are there to be compared with those of another, and with what was never adapted.
    """

    vectors: NDArray[np.float32]
    items: tuple[str, ...]
    space_id: str
    site_sha256: str = ""

    def similarity(self, other: Embeddings) -> NDArray[np.float32]:
        """Cosines [N, M] between two sets.

        Raises:
            InputError: They live in different spaces.
        """
        if self.space_id != other.space_id:
            raise InputError(
                f"embeddings of space {self.space_id} cannot be compared with space {other.space_id}: they come from "
                "another checkpoint or projection; embed both with one artifact"
            )
        return self.vectors @ other.vectors.T


def embeddings_bytes(embeddings: Embeddings, warnings: Sequence[str] = ()) -> bytes:
    """One safetensors file: `embeddings`, and items and space as metadata, with what was warned of, if anything."""
    metadata = {
        "invariclip.space_id": embeddings.space_id,
        "invariclip.items": json.dumps(embeddings.items, ensure_ascii=False),
    }
    if embeddings.site_sha256:
        metadata["invariclip.site_sha256"] = embeddings.site_sha256
    if warnings:
        metadata["invariclip.warnings"] = json.dumps(warnings, ensure_ascii=False)
    content: bytes = save({"embeddings": np.ascontiguousarray(embeddings.vectors)}, metadata)
    return content


def write_embeddings(path: str | os.PathLike[str], embeddings: Embeddings) -> None:
    """Writes `embeddings_bytes` atomically."""
    write_atomically(Path(path), embeddings_bytes(embeddings))


def read_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Reads what `write_embeddings` wrote.

    Raises:
        InputError: The file is missing or not such a file.
    """
    where = Path(path)
    if not where.is_file():
        raise InputError(f"{where}: no such embeddings file; `invariclip embed` writes one")
    try:
        with safe_open(where, framework="numpy") as tensors:
            metadata = tensors.metadata() or {}
            vectors = tensors.get_tensor("embeddings")
            items = tuple(json.loads(metadata["invariclip.items"]))
            space, site = metadata["invariclip.space_id"], metadata.get("invariclip.site_sha256", "")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise InputError(f"{where}: not embeddings written by `invariclip embed` ({error})") from error
    if vectors.ndim != 2 or len(items) != len(vectors):
        raise InputError(f"{where}: {len(items)} items for vectors of shape {list(vectors.shape)}")
    return Embeddings(vectors, items, space, site)
