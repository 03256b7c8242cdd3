"""What an evaluation applies to embeddings before cosines count, and how it may differ between images and texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Map(Protocol):
    """A projection or a baseline: from the encoder's embeddings to the vectors whose cosines count."""

    def apply(self, embeddings: NDArray[np.floating[Any]], /) -> NDArray[np.float64]:
        """[N, D] to unit-length [N, d]."""


@dataclass(frozen=True)
class PerModality:
    """Two maps into one space: `apply` is that of images, so it stands wherever a `Map` of images does.

    Attributes:
        images: For image embeddings, and so for prototypes and probes.
        texts: For class embeddings that a text tower gave.
    """

    images: Map
    texts: Map

    def apply(self, embeddings: NDArray[np.floating[Any]], /) -> NDArray[np.float64]:
        """Image embeddings, [N, D] to unit-length [N, d]."""
        return self.images.apply(embeddings)


def for_texts(what: Map) -> Map:
    """The map for text embeddings: the map itself, unless it treats the modalities differently."""
    return what.texts if isinstance(what, PerModality) else what
