"""A checkpoint's tower as a finished graph: projection folded, encoder rewritten, traced, graph rewritten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from invariclip.artifact.manifest import EMBEDDING, IMAGE_INPUT, TEXT_INPUT, Step
from invariclip.export.checkpoints import check_texts
from invariclip.export.checkpoints.learned_contexts import contexts_of
from invariclip.export.graphs.fold import Folded, fold_images, fold_texts, left_open, probe_images
from invariclip.export.graphs.head import expose_projection
from invariclip.export.graphs.rewrites import RewriteNotApplicableError, Subject
from invariclip.export.graphs.rewrites.plan import NAMES, require_held, rewrite_encoder, rewrite_graph
from invariclip.export.graphs.token_merging import name_merges, refusal, thin_tokens
from invariclip.export.graphs.trace import ImageTower, TracedTextTower, part_of, traced

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import onnx_ir as ir

    from invariclip.artifact.projection import Projection
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.graphs.rewrites import Tower


@dataclass(frozen=True)
class TowerFacts:
    """How a tower's graph came to be.

    Attributes:
        fold: How the projection is in it, see `fold.Folded`; empty without one.
        plan: What became of each rewrite.
    """

    fold: str
    plan: tuple[Step, ...]

    def applied(self, name: str) -> bool:
        """Whether a rewrite was applied."""
        return any(step.applied for step in self.plan if step.name == name)


@dataclass(frozen=True)
class TowerGraph(TowerFacts):
    """The same with the graph itself, in memory: from the tower's input to `embedding`."""

    model: ir.Model

    @property
    def facts(self) -> TowerFacts:
        """Without the graph, so that its memory can go."""
        return TowerFacts(self.fold, self.plan)


def tower_graph(
    checkpoint: Checkpoint,
    tower: Tower,
    projection: Projection | None = None,
    *,
    rewrites: Collection[str] = NAMES,
    projection_as_input: bool = False,
    tokens: Sequence[int] | None = None,
) -> TowerGraph:
    """Builds one tower's graph.

    Args:
        checkpoint: The original model; it stays unchanged. A text tower that reads learned vectors (`learned_contexts`)
            gives a graph that reads them too.
        tower: `image` or `text`.
        projection: A_inv to put in, or None.
        rewrites: Names of the rewrites that are switched on.
        projection_as_input: Leave the projection as a matrix that may be exchanged at any run.
        tokens: Merge patches that look alike: tokens left after each block but the last, see
            `token_schedules.Schedule`. Not exact, so the contract has to say how close it is. None merges nothing.

    Raises:
        InputError: The tower's tokens cannot be merged, or not by this schedule.
        ContractError: torch cannot export the tower, or a rewrite does not keep its word.
    """
    probe = _probe(checkpoint, tower)
    contexts = contexts_of(checkpoint.module) if tower == "text" else None
    folded = _folded(checkpoint, tower, projection, probe, as_input=projection_as_input)
    subject = Subject(tower, part_of(folded.module, tower), checkpoint.pixels)
    steps = [] if contexts is None else [_learned(contexts)]
    steps += rewrite_encoder(subject, probe, rewrites)
    if tokens is not None:
        steps.append(_thinned(subject, tokens))
    if tower == "image":
        height, width = checkpoint.pixels.image_size
        example = torch.zeros((2, height, width, 3), dtype=torch.uint8)
        model = traced(
            ImageTower(subject.encoder, checkpoint.pixels, folded.matrix),
            example,
            input_name=IMAGE_INPUT,
            output_name=EMBEDDING,
        )
    else:
        longest = checkpoint.tokenizer.spec.context_length if "text-cut" in subject.applied else None
        model = traced(
            TracedTextTower(subject.encoder, folded.matrix), probe, input_name=TEXT_INPUT, output_name=EMBEDDING,
            longest=longest,
        )  # fmt: skip
    if folded.how == "input":
        expose_projection(model)
    steps += rewrite_graph(model, subject, rewrites)
    require_held(model, subject)
    if tokens is not None:
        name_merges(model)
    return TowerGraph(folded.how if projection else "", tuple(steps), model)


def _probe(checkpoint: Checkpoint, tower: Tower) -> torch.Tensor:
    if tower == "image":
        return probe_images(*checkpoint.pixels.image_size)
    ids, contexts = check_texts.ids_of(check_texts.PROMPTS[:3], checkpoint.tokenizer), contexts_of(checkpoint.module)
    if contexts is not None:
        ids = np.concatenate([ids, check_texts.ids_behind(contexts, checkpoint.tokenizer)])
    return torch.from_numpy(ids)


def _learned(contexts: tuple[int, int]) -> Step:
    learned, tokens = contexts
    return Step("learned-templates", True, f"{learned} templates of {tokens} vectors are read as ids below 0")


def _thinned(subject: Subject, tokens: Sequence[int]) -> Step:
    try:
        return Step("tokens", True, thin_tokens(subject, tokens))
    except RewriteNotApplicableError as error:
        raise refusal(subject.tower, error) from None


def _folded(
    checkpoint: Checkpoint, tower: Tower, projection: Projection | None, probe: torch.Tensor, *, as_input: bool
) -> Folded:
    if projection is None:
        return Folded(checkpoint.module, "folded", None, "")
    if as_input:
        return left_open(checkpoint.module, projection.A_inv)
    fold = fold_images if tower == "image" else fold_texts
    return fold(checkpoint.module, projection.A_inv, probe)
