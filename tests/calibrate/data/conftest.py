"""An encoder whose rows do not depend on the batch, and the moments of all that a source gives."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from invariclip.calibrate.data.encode import usable
from invariclip.calibrate.data.moments import empty, of_pairs, of_points
from invariclip.calibrate.data.pairs import SAME_DISTANCE
from invariclip.calibrate.data.problems import ProblemCounts
from invariclip.preprocessing.pixels import PixelSpec, pixels

SIZE = 16
SPEC = PixelSpec((SIZE, SIZE), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass
class Rowwise:
    """A fixed random linear map of the pixels, one image at a time: a BLAS rounds by the shape of the batch."""

    width: int = 24
    sha256: str = "0" * 64
    pixels: PixelSpec = SPEC
    refuse: object = None

    def __post_init__(self):
        self.matrix = np.random.default_rng(0).normal(size=(self.width, SIZE * SIZE * 3))
        self.letters = np.random.default_rng(1).normal(size=(256, 32, self.width))
        self.batches = []

    @property
    def embed_dim(self):
        return self.width

    def encode_images(self, batch):
        self.batches.append(len(batch))
        return np.stack([self._row(image) for image in batch])

    def _row(self, image):
        """NaN for the one image that is refused."""
        if np.array_equal(image, self.refuse):
            return np.full(self.width, np.nan, dtype=np.float32)
        return (self.matrix @ (image.ravel() / 255)).astype(np.float32)

    def tokenizer(self, texts):
        return np.asarray([list(text.lower().encode()[:32].ljust(32)) for text in texts], dtype=np.int64)

    def encode_texts(self, ids):
        return self.letters[ids, np.arange(32)].sum(axis=1).astype(np.float32)


@dataclass
class Read:
    """All that a source gives: its points, the moments of every part, how many blocks, and what was left out."""

    points: object
    parts: dict
    blocks: list
    tally: ProblemCounts

    @property
    def moments(self):
        """Every part scaled to a weight of one, as `fitted_moments` does."""
        total = self.points
        for part in self.parts.values():
            total = total + part.scaled(1.0 / part.pair_weight)
        return total


def read_all(source, encoder):
    """Reads every shard, and leaves out what is not finite, zero or twice the same, as the engine does."""
    tally = ProblemCounts()
    points, parts, blocks = empty(encoder.embed_dim), {}, []
    for shard in source.shards():
        for block in source.read(shard, encoder, tally):
            blocks.append(block)
            if block.points is not None:
                assert len(block.points) == len(block.point_names)
                points = points + of_points(block.points[usable(block.points)])
            if block.first is not None:
                assert len(block.first) == len(block.pair_names)
                good = usable(block.first) & usable(block.second)
                good &= np.linalg.norm(block.first - block.second, axis=1) > SAME_DISTANCE
                weights = np.ones(len(good)) if block.weights is None else block.weights
                moments = of_pairs(block.first[good], block.second[good], weights[good])
                parts[block.part] = parts.get(block.part, empty(encoder.embed_dim)) + moments
    return Read(points, parts, blocks, tally)


def assert_same(one, other, bound=1e-12):
    """Counts equal, sums equal to `bound` of their largest value."""
    assert (one.points, one.pairs) == (other.points, other.pairs)
    for name in ("point_weight", "point_sum", "point_outer", "pair_weight", "pair_outer"):
        a, b = np.asarray(getattr(one, name)), np.asarray(getattr(other, name))
        assert np.abs(a - b).max() <= bound * max(1.0, np.abs(b).max()), name


@pytest.fixture(scope="session")
def reading():
    """The helpers of this file, by name."""
    return SimpleNamespace(
        Rowwise=Rowwise, read_all=read_all, assert_same=assert_same, pixels_of=lambda image: pixels(image, SPEC)
    )
