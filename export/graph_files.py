"""The two float32 graphs of an artifact, written: traced, with the classes behind them and pixels before them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invariclip.export.graphs.front import add_front
from invariclip.export.graphs.head import attach_head
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import write_graph

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from invariclip.export.config import ExportConfig
    from invariclip.export.graphs.tower_graph import TowerFacts
    from invariclip.export.verification.candidate import ExportJob


def write_image_graph(
    job: ExportJob, config: ExportConfig, path: Path, *, tokens: Sequence[int] | None = None
) -> TowerFacts:
    """Writes the image graph and says how it came to be.

    Args:
        job: The checkpoint, its projection and classes.
        config: Rewrites, pixels and what stays exchangeable.
        path: File to write.
        tokens: Tokens left after each block but the last, see `tower_graph`; None merges none.

    Raises:
        InputError: The tower's tokens cannot be merged so, or its pixels cannot be in the graph.
        ContractError: The tower cannot be exported.
    """
    checkpoint, head = job.checkpoint, job.head
    graph = tower_graph(
        checkpoint, "image", job.projection, rewrites=config.rewrites, projection_as_input=config.projection_as_input,
        tokens=tokens,
    )  # fmt: skip
    attach_head(graph.model, head.bank if head else None, checkpoint.logit_scale, checkpoint.logit_bias, job.learned)
    if config.pixels_in_graph is not None:
        add_front(graph.model, checkpoint.pixels, config.pixels_in_graph)
    write_graph(graph.model, path)
    return graph.facts


def write_text_graph(job: ExportJob, config: ExportConfig, path: Path) -> TowerFacts:
    """Writes the text graph and says how it came to be; arguments and errors as of `write_image_graph`."""
    graph = tower_graph(
        job.checkpoint, "text", job.projection, rewrites=config.rewrites, projection_as_input=config.projection_as_input
    )
    write_graph(graph.model, path)
    return graph.facts
