"""What an artifact says of itself: the manifest's dataclasses, their JSON, and the embedding space's id."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from invariclip.errors import ArtifactError
from invariclip.preprocessing.pixels import PixelSpec
from invariclip.preprocessing.tokenizer import TextSpec
from invariclip.records import to_record

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
TextLength = Literal["fixed", "dynamic"]
Front = Literal["host", "resize", "matmul"]
Compute = Literal["float32", "bfloat16", "float16"]
"""What an engine's arithmetic may be in the parts of a graph that are float32 in the file."""

IMAGE_INPUT, TEXT_INPUT = "pixels", "input_ids"
EMBEDDING, LOGITS, PROBABILITIES, UNCERTAINTY = "embedding", "logits", "probabilities", "uncertainty"
PROJECTION_INPUT = "projection"
"""Names inside the graphs. The last one is an initializer that may be overridden, in towers exported that way."""
METADATA_KEY = "invariclip"
"""Under this key the `metadata_props` of every ONNX file hold `Manifest.facts` as JSON."""


@dataclass(frozen=True)
class ModelFacts:
    """The checkpoint that was exported.

    Attributes:
        name: open_clip architecture name, or `reference`.
        checkpoint_sha256: Digest of the weights (see export.models.weights).
        embed_dim: D, the width before the projection.
        logit_scale: The temperature that multiplies cosines, already exponentiated.
        logit_bias: Added to logits (SigLIP), or None.
    """

    name: str
    checkpoint_sha256: str
    embed_dim: int
    logit_scale: float
    logit_bias: float | None = None

    def __post_init__(self) -> None:
        """Refuses what could not be computed with.

        Raises:
            ArtifactError: A field is out of range.
        """
        numbers = [self.logit_scale, *([] if self.logit_bias is None else [self.logit_bias])]
        if self.embed_dim < 1 or not all(map(math.isfinite, numbers)):
            raise ArtifactError(
                f"embed_dim {self.embed_dim!r}, logit_scale {self.logit_scale!r} and logit_bias {self.logit_bias!r} "
                "must be a whole number from 1 on and finite numbers"
            )


@dataclass(frozen=True)
class ProjectionFacts:
    """The projection that a tower holds, and how.

    `folded` into the last linear layer; one `matmul` after it; or `input`: a matmul whose matrix may be exchanged at
    any run (see `predictor.Model.with_projection`).
    """

    sha256: str
    estimator: str
    strength: float | None
    rank: int
    image_fold: str
    text_fold: str


@dataclass(frozen=True)
class LearnedPromptsFacts:
    """The learned templates that a text graph reads and an image graph's classes are in; see `learned_prompts`.

    `learned` and `context_tokens` are M and n; `evidence_scale`, `evidence_bias` and `background` have M + 1 values,
    the first of the hand-written template. `abstain_above` is the uncertainty that was calibrated for a target risk, or
    None.
    """

    sha256: str
    learned: int
    context_tokens: int
    evidence_scale: tuple[float, ...]
    evidence_bias: tuple[float, ...]
    background: tuple[float, ...]
    abstain_above: float | None = None

    def __post_init__(self) -> None:
        """Refuses what no export writes.

        Raises:
            ArtifactError: A field is out of range.
        """
        numbers = [*self.evidence_scale, *self.evidence_bias, *self.background]
        sizes = {len(self.evidence_scale), len(self.evidence_bias), len(self.background)}
        limit, scales = self.abstain_above, self.evidence_scale
        whole = min(self.learned, self.context_tokens) >= 1 and all(map(math.isfinite, numbers)) and min(scales) > 0
        if not whole or sizes != {self.learned + 1} or not (limit is None or 0 <= limit <= 1):
            raise ArtifactError(f"the learned templates are not understood: {self}")


@dataclass(frozen=True)
class FileFacts:
    """One file of the artifact, by its name inside the folder.

    Attributes:
        path: Its name.
        sha256: Its digest.
        size_bytes: Its size.
        data_sha256: Digest of `path.data` beside it, where an ONNX file above 1 GB keeps its weights; else None.
    """

    path: str
    sha256: str
    size_bytes: int
    data_sha256: str | None = None

    def __post_init__(self) -> None:
        """Refuses a name that is not the bare name of a file: nothing an artifact names lies outside its folder.

        Raises:
            ArtifactError: It is not one.
        """
        bare = self.path == Path(self.path).name and "\0" not in self.path
        if not bare or "\\" in self.path or self.path in ("", ".", "..", MANIFEST):
            raise ArtifactError(f"{self.path!r} is not the name of a file in the artifact's folder")


@dataclass(frozen=True)
class SiteFacts:
    """The site whose shift the image graphs remove, see `site`.

    Attributes:
        name: For people.
        sha256: Its digest.
        images: How many it was measured on.
        kinds: How many kinds of things they show.
        weight: How much of the shift is taken away, from 0 to 1.
    """

    name: str
    sha256: str
    images: int
    kinds: float
    weight: float

    def __post_init__(self) -> None:
        """Refuses what no `adapt` writes.

        Raises:
            ArtifactError: A field is out of range.
        """
        if self.images < 0 or not (math.isfinite(self.kinds) and 0 <= self.weight <= 1):
            raise ArtifactError(f"the site is not understood: {self}")


@dataclass(frozen=True)
class Step:
    """What became of one rewrite of one tower.

    Attributes:
        name: The rewrite's, see `export.graphs.rewrites`.
        applied: Whether it was.
        detail: What it did, or why it did not apply.
    """

    name: str
    applied: bool
    detail: str


@dataclass(frozen=True)
class Variant:
    """One way to answer, listed only if it passed the contract. Several may share a file.

    Attributes:
        precision: What the image graph's weights are in: `float32`, `float16`, `int8`.
        image: The image graph.
        text: The text graph.
        parity: The figures it passed with, by backend; `parity` (the module) says what a record holds.
        text_length: `fixed`: the text graph takes ids [N, context_length] only. `dynamic`: it takes any shorter length
            too, as long as every text's end is inside.
        front: `host`: the image graph takes prepared images only. `resize`, `matmul`: it takes images of any size
            and resizes and crops them itself, by ONNX's Resize or by two products (see `export.graphs.front`).
        compute: What the engine may compute the image graph in; anything but float32 is asked of it, never assumed.
        text_compute: The same of the text graph.
        made: A report of how its image graph came to be, for people; empty for the float32 graph as exported.
    """

    precision: str
    image: FileFacts
    text: FileFacts
    parity: dict[str, dict[str, Any]]
    text_length: TextLength = "fixed"
    front: Front = "host"
    compute: Compute = "float32"
    text_compute: Compute = "float32"
    made: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime needs to know of an artifact.

    `left_out`: what failed the contract, and why: a variant, or where it passed elsewhere `variant on engine`.
    `fast_pixels`: how far the fast pixel mode is from the exact one and whether that passed, as
    `export.contract.fast_pixels` says it; empty where nobody asked. `cdc`, `cdc_file`: learned templates, where there
    are some; the classes' hand-written prompts are then the ones of that file. `site`, `site_file`: the place that the
    image graphs are adapted to, if any.
    """

    model: ModelFacts
    pixels: PixelSpec
    text: TextSpec
    tokenizer: FileFacts
    projection: ProjectionFacts | None
    projection_file: FileFacts | None
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    plan: dict[str, tuple[Step, ...]]
    variants: dict[str, Variant]
    space_id: str
    opset: int
    producer: dict[str, str]
    left_out: dict[str, str] = field(default_factory=dict)
    fast_pixels: dict[str, Any] = field(default_factory=dict)
    cdc: LearnedPromptsFacts | None = None
    cdc_file: FileFacts | None = None
    site: SiteFacts | None = None
    site_file: FileFacts | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def files(self) -> tuple[FileFacts, ...]:
        """Every file that it names, each once."""
        beside = [entry for entry in (self.projection_file, self.cdc_file, self.site_file) if entry is not None]
        graphs = [entry for variant in self.variants.values() for entry in (variant.image, variant.text)]
        return tuple(dict.fromkeys([self.tokenizer, *beside, *graphs]))

    @property
    def width(self) -> int:
        """d, the width of the embeddings that the artifact answers with."""
        return self.projection.rank if self.projection else self.model.embed_dim

    def to_json(self) -> dict[str, Any]:
        """The manifest as it stands in manifest.json."""
        plain = asdict(self)
        plain["pixels"] = self.pixels.to_json()
        plain["classes"] = list(self.classes)
        plain["templates"] = list(self.templates)
        plain["plan"] = {tower: [asdict(step) for step in steps] for tower, steps in self.plan.items()}
        return plain

    def facts(self, tower: str) -> dict[str, Any]:
        """What the ONNX file `tower` says of itself: the manifest without the variants."""
        return {
            **{
                key: value
                for key, value in self.to_json().items()
                if key not in ("variants", "left_out", "fast_pixels")
            },
            "tower": tower,
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
            ArtifactError: A field that is missing, unknown or out of range, or an embedding
                space that is not what its parts come to.
        """
        manifest = to_record(cls, plain, "the manifest", error=ArtifactError)
        projection_sha256 = manifest.projection.sha256 if manifest.projection else None
        if manifest.space_id != space_id(
            manifest.model.checkpoint_sha256, projection_sha256, manifest.pixels, manifest.text
        ):
            raise ArtifactError("space_id is not that of its checkpoint, projection, pixels and text; export again")
        return manifest


def space_id(checkpoint_sha256: str, projection_sha256: str | None, pixels: PixelSpec, text: TextSpec) -> str:
    """Names an embedding space: vectors are comparable only when this is equal.

    A digest of the checkpoint, the projection, the normalisation (of pixels, and of embeddings to unit length) and of
    how texts become ids; the precision and the backend do not enter, because the contract bounds what they change.
    """
    prepared = [json.dumps(spec.to_json(), sort_keys=True) for spec in (pixels, text)]
    parts = ["invariclip-space-2", checkpoint_sha256, projection_sha256 or "none", *prepared, "unit-length"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
