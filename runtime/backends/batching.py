"""Rows in a few fixed batch sizes: an engine that prepares itself for every new shape then meets only a handful.

OpenVINO keeps what it compiled for each shape that it has seen, and the first answer of a shape is slower than the
next. So n rows go in runs of 1, 2, 4, 8, ... rows, the last one filled up where that is little waste.

How much is little was measured on ViT-B/32: a run of 8 takes 1.07 times as long as one of 7, and runs of 4, 2 and 1
take 1.11 to 1.21 times as long; but a run of 8 takes 1.3 to 1.4 times as long as one of 6, and runs of 4 and 2 only
1.06 to 1.25 times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from invariclip.backends import Backend


def largest_bucket(largest: int) -> int:
    """The greatest power of two that is at most `largest`: the most rows that a run takes.

    Raises:
        InputError: `largest` is below 1.
    """
    if largest < 1:
        raise InputError(f"batch_size must be at least 1, not {largest}")
    return 1 << (int(largest).bit_length() - 1)


def buckets(largest: int) -> tuple[int, ...]:
    """Every batch size that `plan` runs where a run may take `largest` rows: 1, 2, 4, ...

    Raises:
        InputError: `largest` is below 1.
    """
    return tuple(1 << power for power in range(largest_bucket(largest).bit_length()))


def plan(rows: int, largest: int | None = None) -> list[tuple[int, int]]:
    """How rows are shared out among runs.

    A rest is filled up to the next bucket where the filling is one row, or an eighth of the bucket; otherwise the
    bucket below is split off first.

    Args:
        rows: How many there are.
        largest: The most that one run may take; only its `largest_bucket` is used. None sets no bound.

    Returns:
        (rows, bucket) of each run, in order; 0.75 * bucket <= rows <= bucket.

    Raises:
        InputError: `rows` is below 0 or `largest` below 1.
    """
    if rows < 0:
        raise InputError(f"rows must be at least 0, not {rows}")
    top = 1 << max(rows - 1, 0).bit_length() if largest is None else largest_bucket(largest)
    parts = [(top, top)] * (rows // top)
    rest = rows % top
    while rest:
        bucket = 1 << (rest - 1).bit_length()
        if bucket - rest > max(1, bucket // 8):
            bucket //= 2
        parts.append((min(rest, bucket), bucket))
        rest -= parts[-1][0]
    return parts


def run_in_buckets(
    backend: Backend,
    name: str,
    rows: NDArray[Any],
    outputs: tuple[str, ...],
    *,
    largest: int | None = None,
    feeds: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Answers rows in runs of the sizes that `plan` gives, and puts the answers together.

    Args:
        backend: The loaded graph; every one of `outputs` has a row for each row of `name`.
        name: The input that holds the rows.
        rows: [N, ...], N at least 1. A run that is filled up repeats its last row; those answers are cut away.
        outputs: What to answer.
        largest: The most rows that a run may take; None sets no bound.
        feeds: Further inputs, the same in every run.

    Returns:
        Each output, [N, ...].

    Raises:
        InputError: There is no row, `largest` is below 1, the engine refuses the input, or it answers other rows.
    """
    if not len(rows):
        raise InputError(f"input {name} has no rows; give at least one")
    blocks: list[dict[str, NDArray[Any]]] = []
    start = 0
    for count, bucket in plan(len(rows), largest):
        part = rows[start : start + count]
        if count < bucket:
            part = np.concatenate([part, np.repeat(part[-1:], bucket - count, axis=0)])
        answers = backend.run({name: part, **(feeds or {})}, outputs)
        if any(len(answers[output]) != bucket for output in outputs):
            raise InputError(f"the graph does not answer row by row: {bucket} rows of {name} gave another number")
        blocks.append({output: answers[output][:count] for output in outputs})
        start += count
    if len(blocks) == 1:
        return blocks[0]
    return {output: np.concatenate([block[output] for block in blocks]) for output in outputs}
