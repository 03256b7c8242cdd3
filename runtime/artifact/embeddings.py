"""Embeddings on disk: a safetensors or parquet file that knows its space, and refuses to be compared across spaces."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from invariclip.artifact.embeddings_table import is_table, read_table
from invariclip.errors import InputError
from invariclip.files import write_atomically
from invariclip.records import Record


@dataclass(frozen=True)
class EmbeddingsFacts:
    """What a file of embeddings says beside the vectors: the fields of `Embeddings`, and what was warned of."""

    space_id: str
    site_sha256: str
    warnings: tuple[str, ...]
    items: tuple[str, ...]


EMBEDDINGS_FILE = Record(
    "invariclip.embeddings", "embeddings", "`invariclip embed`", 1, 1 << 40, InputError, EmbeddingsFacts
)


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
        require_one_space(self.space_id, other.space_id)
        return self.vectors @ other.vectors.T


def require_one_space(one: str, other: str) -> None:
    """Refuses to compare embeddings of two spaces.

    Raises:
        InputError: The ids differ.
    """
    if one != other:
        raise InputError(
            f"embeddings of space {one} cannot be compared with space {other}: they come from another checkpoint or "
            "projection; embed both with one artifact"
        )


def embeddings_bytes(embeddings: Embeddings, warnings: Sequence[str] = ()) -> bytes:
    """One safetensors file: `embeddings`, and items and space as metadata, with what was warned of, if anything."""
    facts = {
        "space_id": embeddings.space_id,
        "site_sha256": embeddings.site_sha256,
        "warnings": list(warnings),
        "items": list(embeddings.items),
    }
    return EMBEDDINGS_FILE.to_bytes({"embeddings": np.ascontiguousarray(embeddings.vectors)}, facts)


def write_embeddings(path: str | os.PathLike[str], embeddings: Embeddings) -> None:
    """Writes `embeddings_bytes` atomically.

    Raises:
        InputError: The file cannot be written, or is named as a parquet file.
    """
    if Path(path).suffix == ".parquet":
        raise InputError(f"{path}: this writes safetensors; `invariclip embed -o` and `embed_files` write parquet")
    write_atomically(Path(path), embeddings_bytes(embeddings))


def read_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Reads what `write_embeddings` or `invariclip embed` wrote, safetensors or parquet.

    Raises:
        InputError: The file is missing, damaged, not such a file, or holds int8 or binary codes.
        MissingExtraError: A parquet file needs pyarrow.
    """
    if is_table(Path(path)):
        rows = read_table(path)
        if rows.facts.dtype != "float32":
            raise InputError(f"{path}: holds {rows.facts.dtype} codes, no vectors; read it with read_quantized")
        return Embeddings(rows.vectors, rows.items, rows.facts.space_id, rows.facts.site_sha256)
    tensors, facts = EMBEDDINGS_FILE.read(path)
    try:
        vectors = tensors["embeddings"]
    except KeyError as error:
        EMBEDDINGS_FILE.refuse(path, f"{error} is missing")
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(facts.items) != len(vectors) or len(tensors) != 1:
        EMBEDDINGS_FILE.refuse(
            path, f"{len(facts.items)} items for {vectors.dtype} vectors of shape {list(vectors.shape)}"
        )
    return Embeddings(vectors, facts.items, facts.space_id, facts.site_sha256)
