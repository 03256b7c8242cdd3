"""A text tower that reads learned vectors too: ids below 0 stand for a learned template's, all others stay as they are.

What CDC trains through and what `text.cdc.onnx` is traced from is this one module, so a class is embedded in serving as
it was in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from invariclip.errors import CheckpointError, SemanticsError
from invariclip.export.checkpoints.surgery import find, with_replaced

if TYPE_CHECKING:
    from invariclip.artifact.learned_prompts import LearnedPrompts


class ContextEmbedding(nn.Module):
    """Stands in for a tower's token embedding: id i < 0 is row -1 - i of the learned vectors, see `context_ids`.

    The two tables are looked up apart. Put together, the vocabulary would be copied at each training step, and once
    more by each engine.

    Attributes:
        context: [M, n, width], or any shape that ends in the width. Where it is a parameter, gradients reach it.
    """

    context: torch.Tensor

    def __init__(self, vocabulary: nn.Embedding, context: torch.Tensor) -> None:
        """Takes the original embedding, which is shared and not changed, and the vectors."""
        super().__init__()
        self.vocabulary = vocabulary
        if isinstance(context, nn.Parameter):
            self.context = context
        else:
            self.register_buffer("context", context, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The vocabulary's rows: libraries ask an embedding for their dtype."""
        return self.vocabulary.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Int64 ids [N, L] → rows [N, L, width]; an id below -M·n is out of range, as one beyond the vocabulary is."""
        words = self.vocabulary(ids.clamp_min(0))
        rows = self.context.reshape(-1, self.context.shape[-1])
        learned = nn.functional.embedding((-1 - ids).clamp_min(0), rows)
        return torch.where((ids < 0)[..., None], learned.to(words.dtype), words)


def token_embedding(module: nn.Module) -> tuple[str, nn.Embedding]:
    """Where an open_clip model looks its text's ids up: the path and the embedding there.

    Raises:
        CheckpointError: Its text tower has none that is known.
    """
    path, embedding = _looked_up_in(module)
    if not isinstance(embedding, nn.Embedding):
        raise CheckpointError(
            f"{type(module).__name__}: no token embedding was found in its text tower, so it cannot take learned "
            "templates; known are those of open_clip's own towers and of Hugging Face's"
        )
    return path, embedding


def _looked_up_in(module: nn.Module) -> tuple[str, Any]:
    for path in ("token_embedding", "text.token_embedding"):
        embedding = find(module, path)
        if embedding is not None:
            return path, embedding
    tower: Any = find(module, "text.transformer")  # of Hugging Face
    inner = tower.get_input_embeddings() if hasattr(tower, "get_input_embeddings") else None
    names = [] if inner is None else [name for name, part in tower.named_modules() if part is inner]
    return f"text.transformer.{names[0]}" if names else "", inner


def with_context_rows(module: nn.Module, context: torch.Tensor) -> nn.Module:
    """A shallow copy of an open_clip model whose text tower reads learned vectors as ids below 0.

    Args:
        module: The model; it stays unchanged, and all its weights are shared.
        context: float32 [M, n, width], or [rows, width]. A parameter stays one, and gradients reach it.

    Raises:
        CheckpointError: The text tower's token embedding was not found.
        SemanticsError: The vectors are of another width than it.
    """
    path, embedding = token_embedding(module)
    if context.ndim < 2 or context.shape[-1] != embedding.embedding_dim:
        raise SemanticsError(
            f"learned vectors of shape {list(context.shape)} do not fit the text tower, whose token embedding is "
            f"{embedding.embedding_dim} wide"
        )
    return with_replaced(module, path.split("."), ContextEmbedding(embedding, context))


def contexts_of(module: nn.Module) -> tuple[int, int] | None:
    """M and n of the learned vectors that a model's text tower reads, or None."""
    embedding = _looked_up_in(module)[1]
    if not isinstance(embedding, ContextEmbedding):
        return None
    templates, tokens, _ = embedding.context.shape
    return int(templates), int(tokens)


def with_semantics(module: nn.Module, semantics: LearnedPrompts) -> nn.Module:
    """`with_context_rows` of what a file of learned templates holds."""
    return with_context_rows(module, torch.from_numpy(semantics.context))
