"""Scores on an environment that neither fitting nor selection has seen (DomainBed's protocol, arXiv 2007.01434)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from invariclip.calibrate.evaluation.baselines import for_texts
from invariclip.calibrate.projection.classifiers import PUBLISHED_C, choose_penalty, fit_probe, prototypes, zero_shot
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.data.pairs import EmbeddingTable
    from invariclip.calibrate.evaluation.baselines import Map

Way = Literal["probe", "probe, own C", "prototypes", "zero-shot"]
WAYS: tuple[Way, ...] = get_args(Way)
"""How classes are named: logistic regression with the published C, the same with C chosen on the training environments,
nearest class mean, nearest class name."""


def answers(
    what: Map, seen: EmbeddingTable, unseen: EmbeddingTable, way: Way, *, bank: NDArray[np.float64] | None = None
) -> NDArray[np.bool_]:
    """Which unchanged images of the unseen environment are named right.

    Args:
        what: Fitted on `seen` alone.
        seen: The training environments; their unchanged images are what probes and prototypes are made of.
        unseen: The test environment, whose labels are compared with the answers and used for nothing else.
        way: One of `WAYS`.
        bank: For `zero-shot`: [K, D], unit length, class embeddings by the label codes of `seen`.

    Returns:
        bool [N] over the unchanged rows of `unseen`; a class that `seen` lacks counts as wrong.

    Raises:
        InputError: `zero-shot` without a bank, or too few classes or environments for a probe.
        MissingExtraError: A probe is asked for and scikit-learn is not installed.
    """
    queries = what.apply(unseen.vectors[unseen.unchanged])
    labels = shared_labels(unseen, seen)[unseen.unchanged]
    if way == "zero-shot":
        if bank is None:
            raise InputError("zero-shot answers need class names and a checkpoint with a text tower")
        return zero_shot(queries, labels, for_texts(what).apply(bank))
    support, support_labels = what.apply(seen.vectors[seen.unchanged]), seen.labels[seen.unchanged]
    if way == "prototypes":
        return prototypes(support, support_labels, queries, labels)
    C = PUBLISHED_C if way == "probe" else choose_penalty(support, support_labels, seen.environments[seen.unchanged])
    return fit_probe(support, support_labels, C).correct(queries, labels)


def shared_labels(table: EmbeddingTable, like: EmbeddingTable) -> NDArray[np.int64]:
    """The rows' labels in another table's codes, int64 [N]; -1 where that has no such class."""
    codes = {name: code for code, name in enumerate(like.label_names)}
    return np.asarray([codes.get(name, -1) for name in table.label_names], dtype=np.int64)[table.labels]


def base_classes(names: Sequence[str], seed: int) -> frozenset[str]:
    """The half of the classes that is seen in training, the larger half of an odd number; drawn from names and seed.

    CLIP-ICM's in-the-wild protocol (arXiv 2405.15289, domain shift with open classes): the other half is new, and only
    met at test time, in an environment that is new as well.
    """
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest())
    return frozenset(ranked[: (len(ranked) + 1) // 2])
