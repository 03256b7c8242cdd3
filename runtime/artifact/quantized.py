"""Embeddings in fewer bytes, for search: int8 codes with one scale, and binary codes of one bit a dimension.

int8: code = round(v / s) with s = max |v| / 127 over all vectors of the set. There is one scale and not one for each
dimension, because then the inner product of codes orders vectors as the cosine does, within the rounding: any engine's
int8 inner product can be used, and a query may have a scale of its own, which changes no order. |v - s · code| ≤ s / 2.

binary: a bit is 1 where v > 0, the first dimension in the highest bit of the first byte; bits that fill the last byte
are 0. The distance is Hamming's: h of d bits that differ stand for the cosine 1 - 2h/d of the vectors' signs.

What a search with such codes finds is measured on the set itself (`RecallMeter`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from invariclip.artifact.embeddings import Embeddings, require_one_space
from invariclip.artifact.embeddings_table import EmbeddingDtype, SearchRecall, read_table, stored_type, stored_width
from invariclip.errors import InputError

QuantizedDtype: TypeAlias = Literal["int8", "binary"]
LEVELS = 127
"""The largest int8 code; -128 is not used, so that the codes of -v are those of v with the other sign."""
NEIGHBOURS = 10
WIDER = 40
"""Neighbours by codes among which the exact ones are looked for, as where a search is scored again."""
RECALL_FROM = 100
"""Vectors from which on the recall is measured: with fewer, ten neighbours are a large share of all."""
RECALL_QUERIES = 256
BLOCK_ROWS = 1 << 14


@dataclass(frozen=True)
class Quantizer:
    """How vectors become codes.

    Attributes:
        dtype: What they become.
        dimensions: d.
        scale: s of int8; None for binary.
    """

    dtype: QuantizedDtype
    dimensions: int
    scale: float | None = None

    def encode(self, vectors: NDArray[np.float32]) -> NDArray[Any]:
        """Codes of vectors float32 [N, d]: int8 [N, d], or uint8 [N, ⌈d/8⌉].

        Raises:
            InputError: The vectors are of another width, or not finite.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions:
            raise InputError(f"vectors of shape {list(vectors.shape)} are not [N, {self.dimensions}]")
        if not np.isfinite(vectors).all():
            raise InputError("a vector has values that are not finite; it has no code")
        if self.scale is None:
            return np.packbits(vectors > 0, axis=1)
        codes = np.rint(vectors.astype(np.float64) / self.scale)
        return codes.clip(-LEVELS, LEVELS).astype(np.int8)

    def similarity(self, queries: NDArray[np.float32], codes: NDArray[Any]) -> NDArray[np.float32]:
        """Approximate cosines [M, N] of queries float32 [M, d] with coded vectors; of binary codes, 1 - 2h/d."""
        if self.scale is not None:
            return np.asarray(queries @ codes.astype(np.float32).T * np.float32(self.scale))
        # the inner product of signs is d - 2h: whole numbers, so equal distances are equal
        return np.asarray(self._signs(self.encode(queries)) @ self._signs(codes).T / np.float32(self.dimensions))

    def _signs(self, codes: NDArray[Any]) -> NDArray[np.float32]:
        bits = np.unpackbits(codes, axis=1, count=self.dimensions)
        return bits.astype(np.float32) * 2 - 1


@dataclass(frozen=True)
class QuantizedEmbeddings:
    """Codes of embeddings, with what they are of.

    Attributes:
        codes: int8 [N, d], or uint8 [N, ⌈d/8⌉].
        quantizer: What made them.
        items: N paths or texts.
        space_id: The embedding space that they live in.
        site_sha256: As of `Embeddings`.
    """

    codes: NDArray[Any]
    quantizer: Quantizer
    items: tuple[str, ...]
    space_id: str
    site_sha256: str = ""

    def __post_init__(self) -> None:
        """Refuses codes that are not the quantizer's.

        Raises:
            InputError: Their shape or dtype is another, or there are not as many items.
        """
        how = self.quantizer
        shape = (len(self.items), stored_width(how.dtype, how.dimensions))
        if self.codes.shape != shape or self.codes.dtype != stored_type(how.dtype):
            raise InputError(
                f"codes of {self.codes.dtype} {list(self.codes.shape)} are not {how.dtype} of {how.dimensions} "
                f"dimensions for {len(self.items)} items"
            )

    def similarity(self, queries: Embeddings) -> NDArray[np.float32]:
        """Approximate cosines [M, N] of M queries with the coded vectors; of binary codes, 1 - 2h/d.

        Raises:
            InputError: They live in different spaces.
        """
        require_one_space(self.space_id, queries.space_id)
        return self.quantizer.similarity(queries.vectors, self.codes)

    def search(self, queries: Embeddings, count: int = NEIGHBOURS) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The most similar coded vectors of each query, all of them compared, in bounded memory.

        Args:
            queries: M float32 embeddings of the same space.
            count: How many to find; no more than there are.

        Returns:
            float32 [M, count] similarities in descending order, and int64 [M, count] places of the vectors; of equally
            similar ones the first.

        Raises:
            InputError: They live in different spaces, or `count` is below 1.
        """
        require_one_space(self.space_id, queries.space_id)
        if count < 1:
            raise InputError(f"count must be at least 1, not {count}")
        best = _Nearest(len(queries.vectors), count, np.int64)
        for start in range(0, len(self.codes), BLOCK_ROWS):
            similarities = self.quantizer.similarity(queries.vectors, self.codes[start : start + BLOCK_ROWS])
            places = np.arange(start, start + similarities.shape[1])
            best.add(similarities, np.broadcast_to(places, similarities.shape))
        return best.similarities, best.kept


class _Nearest:
    """The most similar of vectors that come in blocks, of equally similar ones the first; something of each is kept.

    Attributes:
        similarities: float32 [Q, k], in descending order.
        kept: [Q, k], what came with them.
    """

    def __init__(self, queries: int, count: int, kept: type[np.generic]) -> None:
        self._count = count
        self.similarities = np.empty((queries, 0), dtype=np.float32)
        self.kept = np.empty((queries, 0), dtype=kept)

    def add(self, similarities: NDArray[np.float32], kept: NDArray[Any]) -> None:
        """A block: similarities [Q, B], and what to keep of each, [Q, B]."""
        order = np.argsort(-similarities, axis=1, kind="stable")[:, : self._count]
        all_similar = np.concatenate([self.similarities, np.take_along_axis(similarities, order, 1)], axis=1)
        all_kept = np.concatenate([self.kept, np.take_along_axis(kept, order, 1)], axis=1)
        order = np.argsort(-all_similar, axis=1, kind="stable")[:, : self._count]
        self.similarities = np.take_along_axis(all_similar, order, 1)
        self.kept = np.take_along_axis(all_kept, order, 1)


class RecallMeter:
    """How many of the exact nearest neighbours a search with codes finds, on the vectors themselves.

    Each query is one of the vectors and is looked for among all others. A vector that is found counts where its exact
    cosine is not below that of the tenth exact neighbour, so equal vectors may stand for each other.
    """

    def __init__(self, quantizer: Quantizer, queries: NDArray[np.float32], places: NDArray[np.int64]) -> None:
        """Begins.

        Args:
            quantizer: What makes the codes.
            queries: float32 [Q, d], some of the vectors, see `recall_places`.
            places: int64 [Q], where they stand among the vectors.
        """
        self._how, self._queries, self._own = quantizer, queries, places
        self._exact = _Nearest(len(queries), NEIGHBOURS, np.float32)
        self._found = _Nearest(len(queries), WIDER, np.float32)

    def add(self, vectors: NDArray[np.float32], codes: NDArray[Any], start: int) -> None:
        """The next vectors float32 [B, d] and their codes; `start` of them came before."""
        exact = self._queries @ vectors.T
        by_codes = self._how.similarity(self._queries, codes)
        own = np.flatnonzero((self._own >= start) & (self._own < start + len(vectors)))
        for similarities in (exact, by_codes):
            similarities[own, self._own[own] - start] = -np.inf
        self._exact.add(exact, exact)
        self._found.add(by_codes, exact)

    def result(self) -> SearchRecall:
        """The mean over the queries."""
        hits = self._found.kept >= self._exact.similarities[:, -1:]
        return SearchRecall(
            NEIGHBOURS,
            len(self._queries),
            float(hits[:, :NEIGHBOURS].sum(axis=1).mean() / NEIGHBOURS),
            WIDER,
            float(np.minimum(hits.sum(axis=1), NEIGHBOURS).mean() / NEIGHBOURS),
        )


def recall_places(count: int) -> NDArray[np.int64]:
    """Which of `count` vectors are asked for; none where they are too few."""
    if count < RECALL_FROM:
        return np.empty(0, dtype=np.int64)
    return np.unique(np.linspace(0, count - 1, min(count, RECALL_QUERIES)).astype(np.int64))


def quantizer_for(dtype: QuantizedDtype, dimensions: int, largest: float) -> Quantizer:
    """How vectors of a set become codes.

    Args:
        dtype: `int8` or `binary`.
        dimensions: d.
        largest: max |v| over all values of the set.

    Raises:
        InputError: The dtype is none of these, or the values are not finite.
    """
    if dtype not in ("int8", "binary"):
        raise InputError(f"no codes are called {dtype!r:.40}; available: int8, binary")
    if not np.isfinite(largest):
        raise InputError("a vector has values that are not finite; it has no code")
    return Quantizer(dtype, dimensions, None if dtype == "binary" else float(largest) / LEVELS or 1.0)


def quantize(embeddings: Embeddings, dtype: QuantizedDtype) -> QuantizedEmbeddings:
    """Codes of embeddings; see the module for what they are.

    Args:
        embeddings: float32 [N, d].
        dtype: `int8`: a quarter of the bytes. `binary`: a thirty-second.

    Raises:
        InputError: The dtype is none of these, or a value is not finite.
    """
    vectors = embeddings.vectors
    how = quantizer_for(dtype, vectors.shape[1], float(np.abs(vectors).max(initial=0)))
    return QuantizedEmbeddings(how.encode(vectors), how, embeddings.items, embeddings.space_id, embeddings.site_sha256)


def search_recall(embeddings: Embeddings, dtype: QuantizedDtype) -> SearchRecall | None:
    """What a search with codes of these embeddings finds, see `RecallMeter`; None for fewer than `RECALL_FROM`.

    Raises:
        InputError: As `quantize`.
    """
    codes = quantize(embeddings, dtype)
    places = recall_places(len(codes.codes))
    if not len(places):
        return None
    meter = RecallMeter(codes.quantizer, embeddings.vectors[places], places)
    for start in range(0, len(codes.codes), BLOCK_ROWS):
        stop = start + BLOCK_ROWS
        meter.add(embeddings.vectors[start:stop], codes.codes[start:stop], start)
    return meter.result()


def read_quantized(path: str | os.PathLike[str]) -> QuantizedEmbeddings:
    """Reads what `invariclip embed --dtype int8|binary` wrote.

    Raises:
        InputError: The file is missing, damaged, or holds float32.
        MissingExtraError: pyarrow is not installed.
    """
    rows = read_table(path)
    facts = rows.facts
    dtype: EmbeddingDtype = facts.dtype
    if dtype == "float32":
        raise InputError(f"{os.fspath(path)}: holds float32; read it with read_embeddings, and quantize it")
    how = Quantizer(dtype, facts.dimensions, facts.scale)
    return QuantizedEmbeddings(rows.vectors, how, rows.items, facts.space_id, facts.site_sha256)
