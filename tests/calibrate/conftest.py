"""Small worlds with a known answer: a linear encoder over pixels, images drawn by code, and linear SCMs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from invariclip.calibrate.data.pairs import UNCHANGED, EmbeddingTable
from invariclip.preprocessing.pixels import PixelSpec

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 16
SPEC = PixelSpec((SIZE, SIZE), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass
class LinearEncoder:
    """A real, if tiny, encoder: a fixed random linear map of the pixels; texts by their bytes."""

    width: int = 24
    seed: int = 0
    sha256: str = "0" * 64
    pixels: PixelSpec = SPEC
    batches: list[int] = field(default_factory=list)

    @property
    def embed_dim(self) -> int:
        return self.width

    def encode_images(self, batch):
        self.batches.append(len(batch))
        matrix = np.random.default_rng(self.seed).normal(size=(SIZE * SIZE * 3, self.width))
        return (batch.reshape(len(batch), -1) / 255 @ matrix).astype(np.float32)

    def tokenizer(self, texts):
        return np.asarray([[len(text), *text.encode()[:7].ljust(7)] for text in texts], dtype=np.int64)

    def encode_texts(self, ids):
        matrix = np.random.default_rng(self.seed + 1).normal(size=(8, self.width))
        return (ids @ matrix).astype(np.float32)


def draw_images(root: Path, *, concepts: int = 10, environments: tuple[str, ...] = ("red", "green", "blue")) -> Path:
    """One image per concept and environment: a pattern that is the concept's, in the environment's colour."""
    colours = {"red": (255, 80, 80), "green": (80, 255, 80), "blue": (80, 80, 255)}
    lines = []
    for environment in environments:
        for concept in range(concepts):
            pattern = np.random.default_rng(concept).random((4, 4, 1)).repeat(4, 0).repeat(4, 1)
            noise = np.random.default_rng([concept, len(environment)]).normal(0, 6, (SIZE, SIZE, 3))
            array = np.clip(pattern * np.asarray(colours[environment]) + noise, 0, 255).astype(np.uint8)
            file = root / environment / f"{concept}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)
            split = "test" if concept == 0 else "train"
            row = {"file": f"{environment}/{concept}.png", "concept": f"c{concept}", "name": f"thing {concept}"}
            lines.append(json.dumps({**row, "style": environment, "split": split}))
    manifest = root / "manifest.jsonl"
    manifest.write_text("\n".join(lines), encoding="utf-8")
    return manifest


@dataclass
class Scm:
    """A linear structural causal model: z = M [z_inv; z_var], z_inv from the class, z_var from the environment.

    The unseen environment shifts z_var by far more than the training ones do, and along other directions.
    """

    seed: int
    width: int = 128
    invariant: int = 24
    classes: int = 10

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.mix = np.linalg.qr(rng.normal(size=(self.width, self.width)))[0] * rng.uniform(0.7, 1.4, self.width)
        self.centres = rng.normal(size=(self.classes, self.invariant))
        # In training z_var leans on the class, by another rule in every environment: the shortcut that ICM removes.
        free = self.width - self.invariant
        self.shortcuts = rng.normal(size=(4, self.classes, free)) * 0.6
        self.rng = rng

    def sample(self, environment, count=700):
        """Embeddings and labels of one environment; environment 3 is the unseen one."""
        labels = self.rng.integers(0, self.classes, count)
        return self._embed(self._inv(labels), labels, environment), labels

    def pairs(self, environment, count=700):
        """The same z_inv twice, with the z_var of another class and environment the second time."""
        labels, others = self.rng.integers(0, self.classes, (2, count))
        inv = self._inv(labels)
        return self._embed(inv, labels, environment), self._embed(inv, others, (environment + 1) % 3)

    def table(self, objects=300):
        """Things with a z_inv of their own, each seen once in every training environment, at unit length."""
        labels = self.rng.integers(0, self.classes, objects)
        inv = self._inv(labels)
        rows = [self._embed(inv, labels, environment) for environment in range(3)]
        vectors = np.concatenate(rows)
        count = 3 * objects
        return EmbeddingTable(
            vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
            concepts=np.tile(np.arange(objects), 3),
            labels=np.tile(labels, 3),
            environments=np.repeat(np.arange(3), objects),
            kinds=np.full(count, UNCHANGED),
            origins=np.arange(count),
            concept_names=tuple(f"c{i}" for i in range(objects)),
            label_names=tuple(f"l{i}" for i in range(self.classes)),
            environment_names=("a", "b", "c"),
        )

    def _inv(self, labels):
        return self.centres[labels] + 0.35 * self.rng.normal(size=(len(labels), self.invariant))

    def _embed(self, inv, labels, environment):
        noise = 0.5 * self.rng.normal(size=(len(labels), self.width - self.invariant))
        var = (3.0 if environment == 3 else 1.0) * (self.shortcuts[environment][labels] + noise)
        return np.concatenate([inv, var], axis=1) @ self.mix.T

    def oracle(self):
        """The columns that read z_inv alone: the part of the inverse of the mixing that belongs to it."""
        return np.linalg.inv(self.mix).T[:, : self.invariant]


def random_table(*, concepts=12, environments=3, width=6, kinds=0, seed=0) -> EmbeddingTable:
    """A table of noise around concept centres, with one changed row per image and kind."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(concepts, width))
    concept, environment = (grid.ravel() for grid in np.meshgrid(range(concepts), range(environments), indexing="ij"))
    vectors = centres[concept] + 0.3 * rng.normal(size=(len(concept), width))
    count = len(concept)
    origins = np.concatenate([np.arange(count)] * (kinds + 1))
    codes = np.repeat(np.arange(UNCHANGED, kinds), count)
    vectors = np.concatenate([vectors] + [vectors + 0.2 * rng.normal(size=vectors.shape) for _ in range(kinds)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return EmbeddingTable(
        vectors=vectors,
        concepts=concept[origins],
        labels=concept[origins],
        environments=environment[origins],
        kinds=codes,
        origins=origins,
        concept_names=tuple(f"c{i}" for i in range(concepts)),
        label_names=tuple(f"c{i}" for i in range(concepts)),
        environment_names=tuple(f"e{i}" for i in range(environments)),
        kind_names=tuple(f"k{i}" for i in range(kinds)),
    )


@pytest.fixture(scope="session")
def world():
    """The helpers of this file, by name: pytest imports test modules without a package to import them from."""
    return SimpleNamespace(
        LinearEncoder=LinearEncoder, Scm=Scm, draw_images=draw_images, random_table=random_table, SPEC=SPEC
    )


@pytest.fixture
def manifest(tmp_path):
    """Ten concepts in three environments; concept 0 is split `test`."""
    return draw_images(tmp_path / "set")
