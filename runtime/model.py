"""An artifact that answers: classify, embed, swap classes and projection, with numpy and an inference engine alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from invariclip.artifact.folder import checked_graph, read_manifest
from invariclip.artifact.manifest import PROJECTION_INPUT, Manifest, space_id
from invariclip.artifact.projection import Projection
from invariclip.backends import DEFAULT_BACKEND, open_backend
from invariclip.backends.batching import plan
from invariclip.console import Progress, silent
from invariclip.errors import InputError
from invariclip.host_head import HostHead
from invariclip.preprocessing.pixels import ImageInput, PixelMode, pixels
from invariclip.preprocessing.prompts import check_prompts, text_list
from invariclip.preprocessing.streams import DEFAULT_BATCH, LOOK_AHEAD, Batch, ImageInputs, ImageReader, Unreadable
from invariclip.results import (
    ENERGY,
    UNCERTAINTY_KINDS,
    AbstainAbove,
    Answer,
    Answers,
    Prediction,
    UncertaintyKind,
    ranked,
    threshold,
    uncertainty_kind,
)
from invariclip.selection import require_exchangeable, require_openable
from invariclip.sites.live_site import LiveSite
from invariclip.sites.site import Site
from invariclip.text_tower import DEFAULT_TEXT_CACHE, TextCache, TextTower
from invariclip.threads import available_threads
from invariclip.view import TEXTS_AT_ONCE, Opened, View

T = TypeVar("T")
_Answering: TypeAlias = Callable[[NDArray[np.uint8]], Answers]

LARGEST_WARM_UP = 1024


class Model:
    """A loaded artifact; safe to share between threads. Use `load`.

    It can be given to another process: it is pickled as its folder and how it was opened, and loaded there once.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        variant: str,
        backend: str = DEFAULT_BACKEND,
        threads: int | None,
        chosen_by: str = "caller",
        pixel_mode: PixelMode = "exact",
        text_cache: int = DEFAULT_TEXT_CACHE,
        engine_options: Mapping[str, str] | None = None,
        require_signature: str | os.PathLike[str] | None = None,
    ) -> None:
        """Opens the image tower now and the text tower when a text first needs it.

        Raises:
            ArtifactError: The variant does not exist, or a file is missing or changed.
            InputError: No engine is called `backend`, no pixel mode `pixel_mode`, or `text_cache` is out of range.
            MissingExtraError: Its package is not installed.
            DeviceError: It needs a GPU, driver or library that is missing, too old or known to be wrong.
        """
        chosen = require_openable(folder, manifest, variant, backend, pixel_mode)
        with checked_graph(folder, chosen.image, manifest) as graph:
            image = open_backend(backend, graph, threads=threads, compute=chosen.compute, options=engine_options)
        text = TextTower(folder, manifest, variant, backend=backend, threads=threads, options=engine_options)
        reader = ImageReader(manifest.pixels, pixel_mode, workers=available_threads())
        opened = Opened(
            folder, manifest, variant, backend, threads, chosen_by, engine_options,
            None if require_signature is None else str(Path(require_signature).absolute()),
            chosen.image, image, text, reader,
        )  # fmt: skip
        self._view = View(opened, manifest.classes, opened.templates, manifest.space_id, TextCache(text_cache))

    def __reduce__(self) -> tuple[Any, ...]:
        """As its folder and how it was opened; a worker process loads it once.

        Raises:
            InputError: It measures a site from its own images, which another process would not see.
        """
        view = self._view
        opened = view.opened
        if view.live is not None:
            raise InputError("a model that measures a live site stays in its process; open a site in the other one")
        options = None if opened.engine_options is None else tuple(sorted(opened.engine_options.items()))
        how = (
            str(opened.folder.absolute()), opened.variant, opened.backend, opened.threads, opened.chosen_by,
            opened.reader.mode, view.cache.limit, options, opened.require_signature,
        )  # fmt: skip
        own = (view.classes, view.templates) == (opened.manifest.classes, opened.templates)
        return _reopened, (how, view.projection, None if own else (view.classes, view.templates), view.site)

    def __deepcopy__(self, _memo: Any = None) -> Model:
        """The same model; it never changes."""
        return self

    __copy__ = __deepcopy__

    @property
    def manifest(self) -> Manifest:
        """What the artifact says of itself."""
        return self._view.opened.manifest

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that it answers with; empty for none."""
        return self._view.classes

    @property
    def templates(self) -> tuple[str, ...]:
        """The hand-written prompts of its classes."""
        return self._view.templates

    @property
    def variant(self) -> str:
        """The variant that runs."""
        return self._view.opened.variant

    @property
    def backend(self) -> str:
        """The engine that runs it."""
        return self._view.opened.backend

    @property
    def chosen_by(self) -> str:
        """Who chose variant and engine: `caller`, `profile` or `default`."""
        return self._view.opened.chosen_by

    @property
    def folder(self) -> Path:
        """Where the artifact lies."""
        return self._view.opened.folder

    @property
    def width(self) -> int:
        """d, the length of every embedding."""
        return self.manifest.width

    @property
    def space_id(self) -> str:
        """Names the embedding space; compare vectors only where it is equal."""
        return self._view.space_id

    @property
    def site(self) -> Site | None:
        """The site that it is adapted to now, see `with_site` and `adapting`."""
        view = self._view
        return view.site if view.live is None else view.live.site

    @property
    def site_sha256(self) -> str:
        """Digest of the site that images' embeddings are adapted to, here or in the graph; "" for none."""
        if self.site is not None:
            return self.site.digest
        return self.manifest.site.sha256 if self.manifest.site is not None else ""

    @property
    def head(self) -> HostHead | None:
        """What answers with the classes from embeddings; None where the graph itself does, or there are none."""
        return self._view.head

    def prepare(self, image: ImageInput) -> NDArray[np.uint8]:
        """One image as the tower sees it, uint8 [H, W, 3]; several, stacked, are what every method takes too.

        Raises:
            InputError: It cannot be read.
        """
        return pixels(image, self.manifest.pixels, self._view.opened.reader.mode)

    def embed_images(self, images: ImageInputs, *, batch_size: int = DEFAULT_BATCH) -> NDArray[np.float32]:
        """Unit-length embeddings of images, float32 [N, d].

        Raises:
            InputError: An image cannot be read, or `batch_size` is below 1.
        """
        blocks = self._over(images, batch_size, self._view.embed)
        return np.concatenate(blocks) if blocks else np.empty((0, self.width), dtype=np.float32)

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = TEXTS_AT_ONCE) -> NDArray[np.float32]:
        """Unit-length embeddings of texts, float32 [N, d]; a text longer than the context is cut with a warning.

        Raises:
            InputError: Something is not a string, or `batch_size` is below 1.
        """
        return self._view.embed_texts([texts] if isinstance(texts, str) else list(texts), batch_size=batch_size)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens the text tower reads of each text, special ones included, after it was cut to the context."""
        return self._view.opened.text.lengths(texts)

    def answer(self, images: ImageInputs, *, batch_size: int = DEFAULT_BATCH) -> Answers:
        """Embeddings, class probabilities and uncertainties, in one pass.

        Raises:
            InputError: There are no classes, an image cannot be read, or `batch_size` is below 1.
        """
        if not self.classes:
            raise InputError("the artifact has no classes; give some with with_classes([...])")
        blocks = self._over(images, batch_size, self._view.answer)
        if not blocks:
            none = np.empty(0, dtype=np.float32)
            rows = none.reshape(0, self.width), none.reshape(0, len(self.classes))
            kinds = UNCERTAINTY_KINDS if self.manifest.cdc else (ENERGY,)
            return Answers(*rows, dict.fromkeys(kinds, none), rows[1])
        return Answers(
            np.concatenate([block.embeddings for block in blocks]),
            np.concatenate([block.probabilities for block in blocks]),
            {kind: np.concatenate([block.uncertainties[kind] for block in blocks]) for kind in blocks[0].uncertainties},
            np.concatenate([block.logits for block in blocks]),
        )

    def probabilities(self, images: ImageInputs, *, batch_size: int = DEFAULT_BATCH) -> NDArray[np.float32]:
        """Class probabilities, float32 [N, K], in the order of `classes`.

        Raises:
            InputError: There are no classes, an image cannot be read, or `batch_size` is below 1.
        """
        return self.answer(images, batch_size=batch_size).probabilities

    def classify(
        self,
        images: ImageInputs,
        *,
        top_k: int = 5,
        batch_size: int = DEFAULT_BATCH,
        abstain_above: AbstainAbove = None,
        uncertainty: UncertaintyKind | None = None,
    ) -> list[Prediction]:
        """The best classes of each image, in order.

        Args:
            images: What to classify.
            top_k: How many classes are ranked.
            batch_size: Images to a run.
            abstain_above: The uncertainty above which no label is given: a number, `CALIBRATED`, or None, which
                always gives one.
            uncertainty: Which one to tell and to abstain by: `evidence` of learned templates, or `energy`, see
                `uncertainty`; None takes evidence where there are learned templates, else energy.

        Raises:
            InputError: There are no classes, an image cannot be read, a number is out of range, or the artifact has no
                learned templates for the evidence asked for.
        """
        if top_k < 1:
            raise InputError(f"top_k must be at least 1, not {top_k}")
        kind = uncertainty_kind(self.manifest.cdc, uncertainty)
        limit = threshold(self.manifest.cdc, abstain_above, kind)
        answers = self.answer(images, batch_size=batch_size)
        rows = zip(answers.probabilities, answers.uncertainties[kind].tolist(), answers.logits, strict=True)
        return [
            ranked(row, self.classes, top_k, {kind: one}, abstain_above=limit, logits=logits)
            for row, one, logits in rows
        ]

    def stream(
        self,
        images: ImageInputs,
        *,
        batch_size: int = DEFAULT_BATCH,
        look_ahead: int = LOOK_AHEAD,
        unreadable: Unreadable | None = None,
        classes: bool = True,
    ) -> Iterator[Answer]:
        """Answers one by one, in order, from any number of images, also without end, in bounded memory.

        The next images are decoded while the model runs. An image is answered when its batch is full, or there are
        no more; for a camera take `batch_size=1, look_ahead=0`.

        Args:
            images: Whatever gives images.
            batch_size: Images to a run.
            look_ahead: Batches to read ahead, see `streams.ImageReader.batches`.
            unreadable: Is told of an image that cannot be read, which is then left out; None raises the error, after
                all answers before it.
            classes: Whether to answer with the classes, where there are some.

        Raises:
            InputError: A number is too small, or `images` is a single one; later, an image cannot be read.
        """
        batches = self._view.opened.reader.batches(images, batch_size, look_ahead=look_ahead, unreadable=unreadable)
        return self._streamed(batches, self._view.answer if classes and self.classes else None)

    def with_classes(
        self, classes: Sequence[str], templates: Sequence[str] | None = None, *, progress: Progress = silent
    ) -> Model:
        """The same model answering with other classes; nothing is loaded again.

        Args:
            classes: Class names.
            templates: Prompts with one `{}`, see `prompts.template_set`; None takes the artifact's own, or the default.
            progress: `console.bar` or `console.silent`.

        Learned templates stay: the classes are embedded in all of them, and the evidence is fused here.

        Raises:
            InputError: No class, an empty or repeated one, a template without `{}`, or other prompts than those that
                learned templates were trained beside.
        """
        prompts = self._view.opened.templates if templates is None else text_list(templates, "templates")
        names = text_list(classes, "classes")
        check_prompts(names, prompts)
        head = HostHead(self.manifest, names, prompts, self._view.embed_texts)
        head.bank(progress)
        return self._but(classes=head.classes, templates=prompts, head=head)

    def with_projection(self, projection: Projection) -> Model:
        """The same model with another projection of the same shape; nothing is loaded or exported again.

        Images and texts are then embedded in the projection's own space, whose id `space_id` gives. The classes are
        embedded anew, through the text tower, when they are first asked for.

        Args:
            projection: A_inv of the checkpoint's width D and the artifact's width d.

        Raises:
            ArtifactError: The artifact was exported with its projection folded in, or without one.
            InputError: The engine cannot exchange it, learned templates were trained in the artifact's own space, or
                the model is adapted to a site.
            ProjectionError: It is of another shape.
        """
        if self.site is not None:
            raise InputError("a site belongs to one projection: exchange the projection first, then name a site of it")
        require_exchangeable(self.folder, self.manifest, self.backend, projection)
        model = self.manifest.model
        matrix = np.ascontiguousarray(projection.A_inv, dtype=np.float32)
        other = self._but(
            feeds={PROJECTION_INPUT: matrix},
            projection=projection,
            space_id=space_id(model.checkpoint_sha256, projection.digest, self.manifest.pixels, self.manifest.text),
            cache=TextCache(self._view.cache.limit),  # another space: nothing that is kept belongs to it
            head=None,
        )
        if not self.classes:
            return other
        return other._but(head=HostHead(self.manifest, self.classes, self.templates, other._view.embed_texts))

    def with_site(self, site: Site) -> Model:
        """The same model for images of one site, whose shift is removed from each of their embeddings (see `site`).

        Texts, class embeddings and prototypes stay as they are, and so does the space that they are compared in. The
        graph's own classes are then answered outside it, from the embeddings that it holds.

        Args:
            site: What `invariclip adapt` measured with this artifact.

        Raises:
            SiteError: It was measured in another space.
            InputError: The artifact has learned templates, whose evidence was fitted on images that were not adapted,
                or a site in its graph already.
        """
        self.require_adaptable(site)
        return self._hosting(site=site, live=None)

    def adapting(self, live: LiveSite) -> Model:
        """The same model for images of a site that is measured from them, see `live_site`.

        Every image that it is shown loses the shift that was known before, and then counts; show it no others.

        Args:
            live: See `measuring.open_live_site`; its owner inspects, freezes and exports it meanwhile.

        Raises:
            SiteError: It is of another space.
            InputError: As `with_site`.
        """
        self.require_adaptable(live.site)
        return self._hosting(site=None, live=live)

    def hosting(self) -> Model:
        """The same model whose classes are answered outside the graph, from embeddings; see `head`."""
        return self._hosting()

    def require_adaptable(self, site: Site) -> None:
        """Refuses a site that this model cannot take.

        Raises:
            SiteError, InputError: See `with_site`.
        """
        if self.manifest.cdc is not None:
            raise InputError(
                "the artifact's learned templates and their uncertainty were fitted on images that were not adapted; "
                "adapt an artifact without --cdc"
            )
        if self.manifest.site is not None:
            name = self.manifest.site.name
            raise InputError(f"the artifact is adapted to {name!r} already; take the one that it was made from")
        site.require_space(self.space_id, "the artifact")

    def class_bank(self, progress: Progress = silent) -> NDArray[np.float32]:
        """Unit-length class embeddings, float32 [K, d]: the graph's own, or embedded through the text tower.

        Raises:
            InputError: There are no classes, or each has several embeddings, one for every learned template.
        """
        if not self.classes:
            raise InputError("the artifact has no classes; give some with with_classes([...])")
        if self.manifest.cdc is not None:
            raise InputError("the artifact has learned templates, and its classes several embeddings each")
        head = self.head or self._view.own_head()
        return np.asarray(head.bank(progress), dtype=np.float32)

    def warm_up(self, batch_sizes: Sequence[int] = (1,), *, texts: bool = False) -> None:
        """Answers blank images, so that the first real ones of these batch sizes need not wait for an engine.

        Args:
            batch_sizes: How many images will be given at once.
            texts: Whether to open the text tower too and embed a text.

        Raises:
            InputError: A batch size is not from 1 to `LARGEST_WARM_UP`.
        """
        if not all(1 <= size <= LARGEST_WARM_UP for size in batch_sizes):
            raise InputError(f"batch sizes must be from 1 to {LARGEST_WARM_UP}, not {list(batch_sizes)}")
        still = replace(self._view, live=None)  # blank images are not of a site
        answer: Callable[[NDArray[np.uint8]], Any] = still.answer if self.classes else still.embed
        for rows in sorted({bucket for size in batch_sizes for _, bucket in plan(size)}):
            answer(np.zeros((rows, *self.manifest.pixels.image_size, 3), dtype=np.uint8))
        if texts:
            self.embed_texts([""])

    def describe(self) -> dict[str, Any]:
        """What really runs: engine, threads, variant, precision, who chose them, pixel mode; and the text cache."""
        opened, cache = self._view.opened, self._view.cache
        precision = self.manifest.variants[self.variant].precision
        return {
            **opened.image.describe(), "variant": self.variant, "precision": precision, "chosen_by": self.chosen_by,
            "batch_sizes": "powers of two", "pixel_mode": opened.reader.mode, "text_cache": cache.describe(),
            **({"site": self.site.name} if self.site else {}),
        }  # fmt: skip

    def _over(self, images: ImageInputs, batch_size: int, answer: Callable[[NDArray[np.uint8]], T]) -> list[T]:
        with closing(self._view.opened.reader.batches(images, batch_size)) as batches:
            return [answer(batch.pixels) for batch in batches]

    def _streamed(self, batches: Generator[Batch, None, None], answer: _Answering | None) -> Iterator[Answer]:
        with closing(batches):
            for batch in batches:
                said = answer(batch.pixels) if answer else None
                embeddings = self._view.embed(batch.pixels) if said is None else said.embeddings
                for number, (place, image) in enumerate(zip(batch.places, batch.images, strict=True)):
                    if said is None:
                        yield Answer(place, image, embeddings[number], None, ())
                        continue
                    unsure = {kind: float(each[number]) for kind, each in said.uncertainties.items()}
                    yield Answer(
                        place, image, embeddings[number], said.probabilities[number], self.classes, unsure,
                        said.logits[number],
                    )  # fmt: skip

    def _hosting(self, **changes: Any) -> Model:
        """As `_but`, with classes answered from embeddings that are not the graph's own."""
        other = self._but(**changes)
        return other._but(head=self._view.own_head()) if self.classes and self.head is None else other

    def _but(self, **changes: Any) -> Model:
        """Another view of what is loaded; see `View`."""
        other = object.__new__(Model)
        other._view = replace(self._view, **changes)
        return other


@lru_cache(maxsize=2)
def _loaded(how: tuple[Any, ...]) -> Model:
    folder, variant, backend, threads, chosen_by, pixel_mode, text_cache, options, keys = how
    return Model(
        Path(folder), read_manifest(folder, keys), variant=variant, backend=backend, threads=threads,
        chosen_by=chosen_by, pixel_mode=pixel_mode, text_cache=text_cache,
        engine_options=None if options is None else dict(options), require_signature=keys,
    )  # fmt: skip


def _reopened(
    how: tuple[Any, ...], projection: Projection | None, zero_shot: tuple[tuple[str, ...], ...] | None,
    site: Site | None,
) -> Model:  # fmt: skip
    """What another process makes of a pickled model; see `Model.__reduce__`."""
    model = _loaded(how)
    if projection is not None:
        model = model.with_projection(projection)
    if zero_shot is not None:
        names, prompts = zero_shot
        model = model.with_classes(names, prompts) if names else model._but(classes=(), templates=prompts)
    return model if site is None else model.with_site(site)
