"""What answers: an artifact that is loaded once, and what each view of it answers with, from prepared batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from invariclip.artifact.folder import checked_meanwhile
from invariclip.artifact.graph_file import read_class_bank
from invariclip.artifact.manifest import (
    EMBEDDING,
    IMAGE_INPUT,
    LOGITS,
    PROBABILITIES,
    UNCERTAINTY,
    FileFacts,
    Manifest,
)
from invariclip.artifact.projection import Projection
from invariclip.backends import Backend
from invariclip.backends.batching import run_in_buckets
from invariclip.host_head import HostHead
from invariclip.preprocessing.prompts import DEFAULT_TEMPLATES
from invariclip.preprocessing.streams import ImageReader
from invariclip.results import ENERGY, EVIDENCE, Answers, UncertaintyKind
from invariclip.sites.live_site import LiveSite
from invariclip.sites.site import Site
from invariclip.text_tower import TextCache, TextTower
from invariclip.uncertainty import energy_uncertainty

TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Opened:
    """What is loaded once and shared by every view of an artifact."""

    folder: Path
    manifest: Manifest
    variant: str
    backend: str
    threads: int | None
    chosen_by: str
    engine_options: Mapping[str, str] | None
    require_signature: str | None
    graph: FileFacts
    image: Backend
    text: TextTower
    reader: ImageReader

    @property
    def templates(self) -> tuple[str, ...]:
        """The artifact's own prompts, or the default."""
        return self.manifest.templates or DEFAULT_TEMPLATES


@dataclass(frozen=True)
class View:
    """What a model answers with; another one shares what is loaded.

    Attributes:
        opened: What is loaded.
        classes: Class names; empty for none.
        templates: Their hand-written prompts.
        space_id: The embedding space.
        cache: Embeddings of texts, of this space.
        head: Answers in place of the graph's own classes, where there is one.
        site: Whose shift every image's embedding loses.
        live: The same, of a site that these images move.
        projection: What stands in place of the artifact's own.
        feeds: What every run is fed beside images or ids.
    """

    opened: Opened
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    space_id: str
    cache: TextCache
    head: HostHead | None = None
    site: Site | None = None
    live: LiveSite | None = None
    projection: Projection | None = None
    feeds: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def embed(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Prepared images uint8 [N, H, W, 3] to unit-length embeddings [N, d], the site's shift removed."""
        outputs = run_in_buckets(self.opened.image, IMAGE_INPUT, batch, (EMBEDDING,), feeds=self.feeds)
        embeddings: NDArray[np.float32] = np.asarray(outputs[EMBEDDING])
        if self.live is not None:
            return self.live.take(embeddings)[0]
        return embeddings if self.site is None else self.site.apply(embeddings)

    def embed_texts(
        self, texts: list[str], before: tuple[int, ...] = (), *, batch_size: int = TEXTS_AT_ONCE
    ) -> NDArray[np.float32]:
        """Texts to unit-length embeddings [N, d]; `before` are ids that stand before each.

        Raises:
            InputError: See `TextTower.embed`.
        """
        return self.opened.text.embed(texts, batch_size, self.feeds, self.cache, before)

    def answer(self, batch: NDArray[np.uint8]) -> Answers:
        """What prepared images are answered with, by the graph's own classes or by `head`."""
        if self.head is not None:
            return self.head.answers(self.embed(batch))
        learned, model = self.opened.manifest.cdc, self.opened.manifest.model
        wanted = (EMBEDDING, LOGITS, PROBABILITIES, *([UNCERTAINTY] if learned else []))
        outputs = run_in_buckets(self.opened.image, IMAGE_INPUT, batch, wanted)
        energy = energy_uncertainty(outputs[LOGITS], model.logit_scale, sigmoid=model.logit_bias is not None)
        evidence: dict[UncertaintyKind, NDArray[np.float32]] = {EVIDENCE: outputs[UNCERTAINTY]} if learned else {}
        return Answers(outputs[EMBEDDING], outputs[PROBABILITIES], {**evidence, ENERGY: energy}, outputs[LOGITS])

    def own_head(self) -> HostHead:
        """The graph's own classes, answered from embeddings; their bank is read from the graph."""
        manifest = self.opened.manifest
        return HostHead(manifest, self.classes, self.templates, self.embed_texts, self._bank_in_graph)

    def _bank_in_graph(self) -> NDArray[np.float32] | None:
        opened = self.opened
        with checked_meanwhile(opened.folder, opened.graph) as path:
            return read_class_bank(path, opened.manifest.width, len(opened.manifest.classes))
