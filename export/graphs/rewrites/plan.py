"""The rewrites in their order, and what became of each: the plan that the artifact keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from invariclip.artifact.manifest import Step
from invariclip.errors import ContractError, InputError
from invariclip.export.graphs.rewrites import Rewrite, RewriteNotApplicableError, encoder, stem, tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import onnx_ir as ir

    from invariclip.export.graphs.rewrites import Subject

EXACT = 1e-5
"""Largest difference of unit embeddings that a rewrite of the encoder may make on the probe: rounding, and no more."""


def _query_rows(model: ir.Model) -> str | None:
    """The last block's softmax has one row of queries."""
    last = next((node for node in reversed(model.graph) if node.op_type == "Softmax"), None)
    shape = None if last is None else last.outputs[0].shape
    return None if shape is not None and len(shape) >= 2 and shape[-2] == 1 else "the last softmax is not of one query"


def _length_is_free(model: ir.Model) -> str | None:
    shape = model.graph.inputs[0].shape
    return None if shape is not None and not isinstance(shape[1], int) else "the graph takes texts of one length only"


def _without(*kinds: str) -> Callable[[ir.Model], str | None]:
    def holds(model: ir.Model) -> str | None:
        left = sorted({node.op_type for node in model.graph if node.op_type in kinds})
        return f"the graph still has {', '.join(left)}" if left else None

    return holds


REWRITES: tuple[Rewrite, ...] = (
    Rewrite(
        "reparameterized",
        ("image",),
        "branches that a trunk has for training alone are folded into the convolutions that it serves with",
        module=encoder.fold_branches,
    ),
    Rewrite(
        "plain-attention",
        ("image", "text"),
        "three projections and two products instead of packed attention and its reshapes; the scale is in the weights",
        module=encoder.write_out_attention,
    ),
    Rewrite(
        "attention-biases",
        ("image", "text"),
        "value biases go through the softmax unchanged, so the output bias takes them; softmax does not see key biases",
        module=encoder.fold_attention_biases,
        needs=("plain-attention",),
    ),
    Rewrite(
        "pooled-last-block",
        ("image", "text"),
        "after the last block one token is kept, so query, output and MLP of the others are not computed",
        module=encoder.pool_last_block,
        holds=_query_rows,
        needs=("plain-attention",),
    ),
    Rewrite(
        "plain-mean",
        ("image",),
        "average pooling to one number is one ReduceMean; torch exports it with an index computation around it",
        module=encoder.average_plainly,
        holds=_without("Range"),
    ),
    Rewrite(
        "text-cut",
        ("text",),
        "nothing behind a text's end reaches its embedding where the tower is causal or masks its padding, so a batch "
        "is as long as its longest",
        module=encoder.cut_texts,
        holds=_length_is_free,
    ),
    Rewrite(
        "plain-pooling",
        ("text",),
        "the end-of-text token is picked by Gather instead of GatherND",
        module=encoder.pick_plainly,
        holds=_without("GatherND"),
    ),
    Rewrite(
        "normalisation",
        ("image",),
        "mean and standard deviation are in the weights of the first convolution",
        graph=stem.fold_normalisation,
        holds=stem.not_normalised,
    ),
    Rewrite(
        "patch-product",
        ("image",),
        "a convolution whose stride is its kernel is one product of patches and a matrix, and needs no planes",
        graph=stem.unfold_patches,
        holds=stem.unfolded,
        needs=("normalisation",),
    ),
    Rewrite(
        "tidy",
        ("image", "text"),
        "dead, duplicate and identity nodes are gone, known shapes are constants",
        graph=tidy.tidy,
        holds=tidy.duplicates,
    ),
)
NAMES = tuple(rewrite.name for rewrite in REWRITES)


def chosen(without: Collection[str]) -> tuple[str, ...]:
    """Names of all rewrites but those.

    Raises:
        InputError: One of them is no rewrite.
    """
    unknown = [name for name in without if name not in NAMES]
    if unknown:
        raise InputError(f"no rewrite is called {unknown[0]!r}; available: {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name not in without)


def rewrite_encoder(subject: Subject, probe: torch.Tensor, names: Collection[str]) -> list[Step]:
    """Applies the rewrites of the encoder, each checked on the probe.

    Args:
        subject: Its encoder is replaced.
        probe: float32 [N, 3, H, W] or int64 [N, L].
        names: Rewrites that are switched on.

    Raises:
        ContractError: A rewrite changed what the encoder answers.
    """
    steps: list[Step] = []
    answers = None
    for rewrite in REWRITES:
        if rewrite.module is None or subject.tower not in rewrite.towers:
            continue
        reason = _why_not(rewrite, subject, names)
        if reason:
            steps.append(Step(rewrite.name, False, reason))
            continue
        answers = _answers(subject, probe) if answers is None else answers
        before = subject.encoder
        try:
            detail = rewrite.module(subject)
        except RewriteNotApplicableError as error:
            subject.encoder = before
            steps.append(Step(rewrite.name, False, str(error)))
            continue
        difference = float((_answers(subject, probe) - answers).abs().max())
        if not difference <= EXACT:
            raise ContractError(
                f"rewrite {rewrite.name} changes the {subject.tower} tower's answers by {difference:.2g} (bound "
                f"{EXACT:g}); leave it out with --without {rewrite.name}"
            )
        subject.applied |= {rewrite.name}
        steps.append(Step(rewrite.name, True, detail))
    return steps


def rewrite_graph(model: ir.Model, subject: Subject, names: Collection[str]) -> list[Step]:
    """Applies the rewrites of the traced graph."""
    steps: list[Step] = []
    for rewrite in REWRITES:
        if rewrite.graph is None or subject.tower not in rewrite.towers:
            continue
        reason = _why_not(rewrite, subject, names)
        if reason:
            steps.append(Step(rewrite.name, False, reason))
            continue
        try:
            detail = rewrite.graph(model, subject)
        except RewriteNotApplicableError as error:
            steps.append(Step(rewrite.name, False, str(error)))
            continue
        subject.applied |= {rewrite.name}
        steps.append(Step(rewrite.name, True, detail))
    return steps


def require_held(model: ir.Model, subject: Subject) -> None:
    """Checks every applied rewrite's post-condition on the finished tower, before head and front are put on.

    Raises:
        ContractError: One does not hold.
    """
    for rewrite in REWRITES:
        wrong = rewrite.holds(model) if rewrite.name in subject.applied else None
        if wrong:
            raise ContractError(
                f"rewrite {rewrite.name} was applied to the {subject.tower} tower, but {wrong}; "
                f"leave it out with --without {rewrite.name}"
            )


def _why_not(rewrite: Rewrite, subject: Subject, names: Collection[str]) -> str | None:
    if rewrite.name not in names:
        return "switched off"
    missing = [name for name in rewrite.needs if name not in subject.applied]
    return f"needs {', '.join(missing)}" if missing else None


def _answers(subject: Subject, probe: torch.Tensor) -> torch.Tensor:
    encode = getattr(subject.encoder, f"encode_{subject.tower}")
    try:
        with torch.inference_mode():
            return nn.functional.normalize(encode(probe, normalize=False).double(), dim=-1)
    except (AssertionError, RuntimeError) as error:  # a timm trunk asserts that images have its own size
        reason = " ".join(str(error).split())
        raise ContractError(
            f"the {subject.tower} tower cannot encode an input of its config's size ({reason})"
        ) from error
