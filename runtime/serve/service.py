"""What is asked of an artifact, answered in batches: images and texts to rows, class sets beside them."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from invariclip.artifact.manifest import MANIFEST
from invariclip.backends.batching import buckets
from invariclip.errors import ImageSizeError, InputError
from invariclip.preprocessing.decode import image_facts, image_name
from invariclip.preprocessing.pixels import resized_pixels
from invariclip.preprocessing.tokenizer import hearing_cuts
from invariclip.results import ranked, threshold, uncertainty_kind
from invariclip.serve.batcher import Batcher, quiet
from invariclip.serve.classes import ClassSets
from invariclip.serve.limits import Limits, RefusedError
from invariclip.serve.sites import SiteRegistry
from invariclip.serve.turns import Line, Turns
from invariclip.text_tower import taking_turns
from invariclip.threads import available_threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from invariclip.model import Model
    from invariclip.results import AbstainAbove, Prediction, UncertaintyKind
    from invariclip.serve.batcher import Watcher

PENDING_SETS = 16
TEXTS_TO_A_BATCH = 64
TEXT_QUEUE = 4
"""Largest requests of texts that may wait; they are refused earlier where there is no time for them."""


class EncodedImage(NamedTuple):
    """An image as it came: name, encoded bytes or uint8 [H, W, 3]; what is wrong if these could not be had."""

    name: str
    data: bytes | NDArray[np.uint8]
    problem: str = ""


class DecodedImage(NamedTuple):
    """A decoded image; `classes`: whether the artifact's own classes are to be answered with."""

    pixels: NDArray[np.uint8]
    classes: bool


class ImageScores(NamedTuple):
    """What the image tower says of an image: float32 [d]; float32 [K] twice and its uncertainties, where asked for."""

    embedding: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None = None
    logits: NDArray[np.float32] | None = None
    uncertainties: Mapping[UncertaintyKind, float] = {}


class TextRow(NamedTuple):
    """What the text tower says of a text: float32 [d]; the warning where it was cut."""

    embedding: NDArray[np.float32]
    warning: str | None


@dataclass(frozen=True)
class Batching:
    """How requests are put together, and on how many threads.

    Attributes:
        max_batch: Images to a run of the engine.
        max_wait: Seconds that an image may wait for a batch to fill while the engine is free.
        decoders: Threads that decode; None takes what affinity and cgroup allow.
    """

    max_batch: int = 16
    max_wait: float = 0.0
    decoders: int | None = None


class Processors:
    """What the models of one process share, so that several of them take no more of it than one.

    Attributes:
        decoding: Is held by each thread that decodes.
        images: Runs of the image towers, one at a time.
        texts: Likewise of the text towers.
    """

    def __init__(self, decoders: int | None = None) -> None:
        """Nobody uses anything yet.

        Args:
            decoders: Threads that decode at a time; None takes what affinity and cgroup allow.
        """
        self.decoding = threading.BoundedSemaphore(decoders or available_threads())
        self.images, self.texts = Line(), Line()


class Service:
    """A model that many callers share; `close` ends its threads.

    Attributes:
        name: What requests call it.
        created: When the artifact was written, in seconds since 1970.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits | None = None,
        batching: Batching | None = None,
        *,
        abstain_above: AbstainAbove = None,
        uncertainty: UncertaintyKind | None = None,
        sites: SiteRegistry | None = None,
        keys: int = 1,
        images: Watcher = quiet,
        texts: Watcher = quiet,
        name: str = "",
        processors: Processors | None = None,
    ) -> None:
        """Starts the threads; nothing is warm yet.

        Args:
            model: Answers with its own classes, where it has some, if a request brings none.
            limits: What a request may bring.
            batching: How requests are put together.
            abstain_above: The uncertainty above which no label is given, unless a request says otherwise.
            uncertainty: Which one answers tell, likewise; None takes the artifact's own.
            sites: Sites that requests may name; None for none.
            keys: How many API keys there are; of several none fills a queue alone.
            images: Is told of images and their batches.
            texts: Likewise of texts.
            name: What requests call it; "" for `name_of` its folder.
            processors: What it shares with other services of the process; None shares nothing.

        Raises:
            InputError: `abstain_above` or `uncertainty` cannot be had of the artifact, `max_batch` is below 1, or the
                model is adapted to a site, which belongs to `sites`.
        """
        if model.site is not None:
            raise InputError("a server's model is without a site; pass the site as the registry's default")
        self.sites = sites or SiteRegistry(model)
        self._hosted: Model | None = None
        self.model, self.limits = model, limits or Limits()
        self.name, self.created = name or name_of(model.folder), int((model.folder / MANIFEST).stat().st_mtime)
        self.uncertainty = uncertainty_kind(model.manifest.cdc, uncertainty)
        self.abstain_above = threshold(model.manifest.cdc, abstain_above, self.uncertainty)
        batching = batching or Batching()
        processors = processors or Processors(batching.decoders)
        self._decoding, self._runs = processors.decoding, Turns(processors.images)
        self.images: Batcher[tuple[EncodedImage, bool], DecodedImage, ImageScores] = Batcher(
            self._decode, self._see, max_batch=batching.max_batch, queue=self.limits.queue, watcher=images,
            max_wait=batching.max_wait, workers=batching.decoders or available_threads(), owners=keys,
            name="images",
        )  # fmt: skip
        self.texts: Batcher[str, str, TextRow] = Batcher(
            None, self._read, max_batch=TEXTS_TO_A_BATCH, queue=TEXT_QUEUE * max(self.limits.texts, self.limits.queue),
            watcher=texts, owners=keys, name="texts",
        )  # fmt: skip
        self._turns = Turns(processors.texts)
        self.class_sets = ClassSets(model, self._turns, limit=self.limits.class_sets, pending=PENDING_SETS, owners=keys)

    def warm_up(self) -> None:
        """Meets every batch size once, and opens the text tower."""
        self.model.warm_up(buckets(self.images.max_batch), texts=True)
        batch = np.zeros((self.images.max_batch, *self.model.manifest.pixels.image_size, 3), np.uint8)
        began = monotonic()
        self.model.embed_images(batch, batch_size=len(batch))
        self.images.expect((monotonic() - began) / len(batch))
        if self.sites and self.model.classes:
            hosted = self.model.hosting()
            hosted.class_bank()
            self.sites.prepare(hosted)
            self._hosted = hosted

    @property
    def hosted(self) -> Model:
        """Answers with the server's own classes from embeddings, which is what sites change.

        Raises:
            InputError: There are no classes.
            RefusedError: They are not embedded yet.
        """
        if not self.model.classes:
            raise InputError("the artifact has no classes; give some in the field classes")
        if self._hosted is None:
            raise RefusedError(503, "warming up; ask again", {"retry-after": "1"}, reason="warming_up")
        return self._hosted

    def class_key(
        self, classes: Sequence[str] | None, templates: Sequence[str] | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """The set that is meant, for `class_sets`; None where the model answers with its own classes.

        Raises:
            InputError: There are no classes.
        """
        names = tuple(classes or self.model.classes)
        prompts = tuple(templates or self.model.templates)
        if not names:
            raise InputError("the artifact has no classes; give some in the field classes")
        same = names == self.model.classes and prompts == self.model.templates
        return None if same else (names, prompts)

    def abstaining(
        self, kind: UncertaintyKind | None, abstain_above: AbstainAbove, *, said: bool
    ) -> tuple[UncertaintyKind, float | None]:
        """What a request's answers tell, and above what of it they give no label.

        Args:
            kind: The uncertainty that it asks for; None takes the service's.
            abstain_above: What it says of it.
            said: Whether it says anything; otherwise the service's threshold holds, if it is of the same uncertainty.

        Raises:
            InputError: The artifact cannot be asked so.
        """
        learned = self.model.manifest.cdc
        chosen = self.uncertainty if kind is None else uncertainty_kind(learned, kind)
        if said:
            return chosen, threshold(learned, abstain_above, chosen)
        return chosen, self.abstain_above if chosen == self.uncertainty else None

    def predictions(
        self, rows: Sequence[ImageScores], model: Model, top: int, kind: UncertaintyKind, abstain_above: float | None
    ) -> Iterator[Prediction]:
        """The best classes of each image, ranked one by one.

        Args:
            rows: Of the images.
            model: With the classes that were asked for; the service's own answers from the rows' probabilities.
            top: How many classes are ranked.
            kind: Which uncertainty is told.
            abstain_above: Above what of it no label is given.

        Raises:
            InputError: A number is out of range.
        """
        if model is not self.model and model.head is not None:
            answers = model.head.answers(np.stack([row.embedding for row in rows]))
            every = list(zip(answers.probabilities, answers.logits, answers.uncertainties[kind].tolist(), strict=True))
        else:
            every = [
                (row.probabilities, row.logits, row.uncertainties[kind])
                for row in rows
                if row.probabilities is not None and row.logits is not None
            ]
        return (
            ranked(probabilities, model.classes, top, {kind: one}, abstain_above=abstain_above, logits=logits)
            for probabilities, logits, one in every
        )

    def require_bearable(self, images: Sequence[EncodedImage], *, skip: bool = False) -> None:
        """Reads the heads of a request's images, and refuses those that are too many pixels together.

        Args:
            images: All of them.
            skip: Whether those that cannot be read, or are too large, are passed over: decoding them fails.

        Raises:
            InputError: One is not an image.
            RefusedError: One has too many pixels, or all together have.
        """
        total = 0
        for image in images:
            try:
                total += self._weight(image)
            except (InputError, RefusedError):
                if not skip:
                    raise
        if total > self.limits.request_pixels:
            raise RefusedError(
                413, f"the images of the request have {total:,} pixels, decoded and resized; up to "
                f"{self.limits.request_pixels:,} are taken at once: send fewer or smaller ones", reason="pixels",
            )  # fmt: skip

    def close(self, seconds: float = 0.0) -> bool:
        """Answers what waits for so long, then ends; whether everything was answered."""
        self.class_sets.close()
        done = self.images.close(seconds)
        self.sites.close()
        return self.texts.close(seconds) and done

    def _decode(self, asked: tuple[EncodedImage, bool]) -> DecodedImage:
        image, classes = asked
        self.require_bearable([image])
        try:
            with self._decoding:
                return DecodedImage(self.model.prepare(image.data), classes)
        except InputError as error:
            raise _of(image, error) from error

    def _weight(self, image: EncodedImage) -> int:
        """Pixels of an image, decoded and after the resize, by its head.

        Raises:
            InputError: It is not an image.
            RefusedError: There are too many.
        """
        if image.problem:
            raise InputError(f"image {image.name}: {image.problem}")
        try:
            _, (width, height) = image_facts(image.data)
            if width * height > self.limits.pixels:
                raise RefusedError(
                    413,
                    f"image {image.name}: {width}x{height} pixels are too many; up to {self.limits.pixels:,} are taken",
                    reason="pixels",
                )
            return width * height + resized_pixels((width, height), self.model.manifest.pixels)
        except InputError as error:
            raise _of(image, error) from error

    def _see(self, seen: list[DecodedImage]) -> list[ImageScores]:
        batch = np.stack([one.pixels for one in seen])
        try:
            with self._runs.take(len(seen)):
                return self._rows(batch, seen)
        except InputError as error:  # the images were found good: what fails now is not their senders' fault
            raise RuntimeError(str(error)) from error

    def _rows(self, batch: NDArray[np.uint8], seen: list[DecodedImage]) -> list[ImageScores]:
        if not any(one.classes for one in seen):
            return [ImageScores(row) for row in self.model.embed_images(batch, batch_size=len(batch))]
        said = self.model.answer(batch, batch_size=len(batch))
        return [
            ImageScores(
                said.embeddings[place], said.probabilities[place], said.logits[place],
                {kind: float(each[place]) for kind, each in said.uncertainties.items()},
            )
            for place in range(len(seen))
        ]  # fmt: skip

    def _read(self, texts: list[str]) -> list[TextRow]:
        with hearing_cuts() as heard, taking_turns(self._turns.take):
            rows = self.model.embed_texts(texts)
        return [TextRow(row, heard.get(text)) for row, text in zip(rows, texts, strict=True)]


def name_of(folder: Path) -> str:
    """What an artifact is called after its path: `mine` for `mine.icm`, also where that is a link to another folder."""
    return Path(os.path.abspath(folder)).stem  # unlike absolute(), it resolves `..`


def _of(image: EncodedImage, error: InputError) -> InputError | RefusedError:
    """An error that names a request's image; one of its size is an answer of 413, like the server's own limits."""
    line = f"image {image.name}: {str(error).removeprefix(f'{image_name(image.data)}: ')}"
    return RefusedError(413, line, reason="pixels") if isinstance(error, ImageSizeError) else InputError(line)
