"""Selections that studies wait for longest, kept under a digest of everything that goes into them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from invariclip.calibrate.data.pairs import ALL_SOURCES, EmbeddingTable, Sources
from invariclip.calibrate.projection.folds import CONCEPT_PARTS
from invariclip.calibrate.projection.selection import Selection, select
from invariclip.console import Progress, silent
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from invariclip.calibrate.projection.candidates import Objective, ProjectionCandidate

VERSION = 1
"""Changes when `select` would choose differently."""


def kept_selection(
    folder: Path | None,
    table: EmbeddingTable,
    candidates: Sequence[ProjectionCandidate],
    *,
    objective: Objective,
    bank: NDArray[np.float64] | None = None,
    sources: Sources = ALL_SOURCES,
    concept_parts: int = CONCEPT_PARTS,
    seed: int = 0,
    progress: Progress = silent,
) -> Selection:
    """`select.select`, or what it said the last time; rounded as `Selection.to_json` is either way.

    A bank counts only where it is looked at, so texts that change leave selections by images alone as they are.

    Args:
        folder: Where selections are kept; None keeps nothing.
        table: See `select.select`, as are the others.
        candidates: What to choose from.
        objective: What is scored.
        bank: Class embeddings by label code.
        sources: Which pairs are fitted on.
        concept_parts: See `folds.make_folds`.
        seed: Of the folds, the pairs and the bootstrap.
        progress: Progress display.
    """
    looked_at = objective in ("zero-shot", "both") or any(candidate.captions for candidate in candidates)
    bank = bank if looked_at else None
    digest = hashlib.sha256()
    plain = [VERSION, objective, asdict(sources), concept_parts, seed, [asdict(each) for each in candidates]]
    names = [table.concept_names, table.label_names, table.environment_names, table.kind_names]
    digest.update(json.dumps([plain, names]).encode())
    given = (table.vectors, table.concepts, table.labels, table.environments, table.kinds, table.origins)
    for array in (*given, *(() if bank is None else (bank,))):
        digest.update(str(array.shape).encode())
        digest.update(array.tobytes())
    file = folder / f"{digest.hexdigest()[:32]}.json" if folder else None
    if file is not None and file.is_file():
        return Selection.from_json(json.loads(file.read_text(encoding="utf-8")))
    found = select(
        table,
        candidates,
        objective=objective,
        bank=bank,
        sources=sources,
        concept_parts=concept_parts,
        seed=seed,
        screen=False,  # the tables show every estimator's best
        progress=progress,
    ).to_json()
    if file is not None:
        write_atomically(file, json.dumps(found, ensure_ascii=False) + "\n")
    return Selection.from_json(found)
