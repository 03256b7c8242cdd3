"""Class names → class embeddings: by the hand-written prompts, and by learned vectors through the frozen text tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invariclip.artifact.learned_prompts import LEARNED_TEXT, context_ids
from invariclip.calibrate.data.encode import embed_texts
from invariclip.export.checkpoints.learned_contexts import token_embedding, with_context_rows
from invariclip.export.graphs.rewrites import RewriteNotApplicableError, Subject
from invariclip.export.graphs.rewrites.encoder import cut_texts
from invariclip.export.graphs.trace import NORM_FLOOR, part_of
from invariclip.preprocessing.prompts import class_bank
from invariclip.text_tower import cut_to_longest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.encoders import TextEncoder
    from invariclip.calibrate.prompts.options import PromptOptions
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.preprocessing.tokenizer import TextSpec, Tokenizer

_CHUNK = 64
"""Texts at a time where no gradient is needed."""


class LearnedTexts:
    """A checkpoint's text tower, frozen, that reads learned vectors; gradients reach them and nothing else.

    Attributes:
        context: float32 [M, n, width].
        cut: Whether texts are cut to the longest of a batch, which is exact for towers that are causal, or that mask
            their padding.
    """

    def __init__(self, checkpoint: Checkpoint, context: torch.Tensor, projection: Projection | None = None) -> None:
        """Puts the vectors behind the vocabulary.

        Args:
            checkpoint: The model; it stays unchanged.
            context: float32 [M, n, width]; a parameter if it is to be learned.
            projection: A_inv, or None.

        Raises:
            CheckpointError: The text tower's token embedding is not found.
        """
        self.context = context
        self._tokenizer: Tokenizer = checkpoint.tokenizer
        twin = part_of(with_context_rows(checkpoint.module, context), "text")
        subject = Subject("text", twin, checkpoint.pixels)
        try:
            cut_texts(subject)
            self.cut = True
        except RewriteNotApplicableError:  # its padding takes part: every text at full length
            self.cut = False
        self._encoder: Any = subject.encoder
        self._matrix = None if projection is None else torch.from_numpy(projection.A_inv.astype(np.float32))

    def ids(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Ids of "NAME." behind each template's vectors, [M, K, l].

        Raises:
            InputError: The vectors leave a name no room.
        """
        learned, tokens = self.context.shape[:2]
        texts = [LEARNED_TEXT.replace("{}", name) for name in names]
        rows = [self._tokenizer(texts, prefix=context_ids(m, tokens)) for m in range(1, learned + 1)]
        return self._shortened(np.concatenate(rows)).reshape(learned, len(texts), -1)

    def embed(self, ids: NDArray[np.int64]) -> torch.Tensor:
        """Unit embeddings [..., d] of ids [..., l], projected, differentiable in the vectors."""
        rows = self._shortened(ids.reshape(-1, ids.shape[-1]))
        raw = self._encoder.encode_text(torch.from_numpy(rows), normalize=False)
        if self._matrix is not None:
            raw = raw @ self._matrix
        unit = raw / torch.linalg.vector_norm(raw, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
        return torch.as_tensor(unit).reshape(*ids.shape[:-1], -1)

    def bank(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """The same without gradients, in pieces: float64 [M, K, d] of ids [M, K, l]."""
        rows = ids.reshape(-1, ids.shape[-1])
        with torch.inference_mode():
            parts = [self.embed(rows[start : start + _CHUNK]).double() for start in range(0, len(rows), _CHUNK)]
        vectors = torch.cat(parts).numpy()
        return np.asarray((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).reshape(*ids.shape[:-1], -1))

    def _shortened(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return cut_to_longest(rows, self._tokenizer.spec) if self.cut else np.ascontiguousarray(rows)


def hand_written_bank(
    checkpoint: TextEncoder, names: Sequence[str], templates: Sequence[str], projection: Projection | None
) -> NDArray[np.float64]:
    """Template 0's class embeddings as serving has them: float64 [K, d], the mean taken after the projection.

    Raises:
        InputError: Names or templates cannot be prompts, see `prompts.class_bank`.
    """

    def embedded(prompts: list[str]) -> NDArray[np.float64]:
        rows = embed_texts(checkpoint, prompts)
        return rows if projection is None else projection.apply(rows)

    return class_bank(embedded, list(names), list(templates))


def starting_context(checkpoint: Checkpoint, options: PromptOptions) -> tuple[NDArray[np.float32], float]:
    """The vectors that learning starts from, [M, n, width], and the vocabulary's spread, the unit of `rate`.

    A template starts at the words that stand before the class in a hand-written prompt (the prompts in turn, if there
    are several): at the last n of them, behind the vocabulary's mean where there are fewer. Seeded noise on top tells
    templates apart.
    """
    table = token_embedding(checkpoint.module)[1].weight.detach().float().numpy()
    spread = float(table.std())
    rng = np.random.default_rng([options.seed, 29])
    count = options.context_tokens
    rows = []
    for number in range(options.learned):
        words = options.templates[number % len(options.templates)].split("{}")[0]
        known = table[_own_ids(checkpoint.tokenizer, words)[-count:]]
        missing = np.repeat(table.mean(axis=0, keepdims=True), count - len(known), axis=0)
        rows.append(np.concatenate([missing, known]))
    noise = options.noise * spread * rng.standard_normal((options.learned, count, table.shape[1]))
    return (np.stack(rows) + noise).astype(np.float32), spread


def _own_ids(tokenizer: Tokenizer, words: str) -> list[int]:
    """A text's ids without what stands around it."""
    if not words.strip():
        return []
    spec: TextSpec = tokenizer.spec
    around = {*spec.start_token_ids, *spec.end_token_ids, spec.pad_token_id, spec.last_token_id}
    return [int(token) for token in tokenizer(words)[0] if int(token) not in around]
