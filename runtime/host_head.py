"""Classes that are not in the graph: embedded when they are first needed, and answered from embeddings on the host."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invariclip.artifact.learned_prompts import class_banks
from invariclip.artifact.manifest import Manifest
from invariclip.console import Progress, silent
from invariclip.errors import InputError
from invariclip.preprocessing.prompts import class_bank
from invariclip.results import Answers, host_answers

Embed = Callable[[list[str], tuple[int, ...]], NDArray[np.float32]]


class HostHead:
    """A class head outside the graph; safe to share between threads. Learned templates of the artifact stay in it."""

    def __init__(
        self,
        manifest: Manifest,
        classes: tuple[str, ...],
        templates: tuple[str, ...],
        embed: Embed,
        known: Callable[[], NDArray[np.float32] | None] = lambda: None,
    ) -> None:
        """Remembers what to embed.

        Args:
            manifest: The artifact's.
            classes: K names, which `prompts.check_prompts` took.
            templates: Hand-written prompts, likewise.
            embed: Texts, and ids before each, to unit-length embeddings [N, d].
            known: Class embeddings [K, d] that need not be embedded, or None; not asked where there are learned
                templates.

        Raises:
            InputError: The prompts are others than those that learned templates were trained beside.
        """
        if manifest.cdc is not None and templates != manifest.templates:
            raise InputError(
                "the artifact's learned templates were trained beside the prompts "
                f"{' | '.join(manifest.templates)}; leave other templates out, or train with them"
            )
        self.classes, self.templates = classes, templates
        self._manifest, self._embed, self._known = manifest, embed, known
        self._bank: NDArray[Any] | None = None
        self._lock = threading.Lock()

    def bank(self, progress: Progress = silent) -> NDArray[Any]:
        """Class embeddings: float32 [K, d], or float64 [M + 1, K, d] with learned templates; embedded once."""
        with self._lock:
            if self._bank is None:
                self._bank = self._embedded(progress)
            return self._bank

    def answers(self, embeddings: NDArray[np.float32]) -> Answers:
        """What unit-length embeddings [N, d] say of the classes."""
        model = self._manifest.model
        return host_answers(embeddings, self.bank(), model.logit_scale, model.logit_bias, self._manifest.cdc)

    def _embedded(self, progress: Progress) -> NDArray[Any]:
        learned = self._manifest.cdc
        if learned is not None:
            return class_banks(self._embed, self.classes, self.templates, learned, progress=progress)

        known = self._known()
        if known is not None:
            return known

        def embed(texts: list[str]) -> NDArray[np.float32]:
            return self._embed(texts, ())

        return class_bank(embed, self.classes, self.templates, progress=progress).astype(np.float32)
