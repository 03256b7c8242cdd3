"""Where an image's time goes in one of our variants: read, decode, resize, copy, encode, head; and all at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from invariclip.errors import InputError
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import open_image, pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.artifact.manifest import Compute

STAGES = ("read", "decode", "resize", "copy", "encode")
"""Read the file; decode its bytes; resize, crop and convert; copy into the batch; pixels → embedding."""
SIZE = (640, 480)
TILES = (4, 3)
QUALITY = 90
CLASSES = 1000
"""Of the head whose cost is measured."""


def write_jpegs(paths: Sequence[Path], folder: Path, count: int = 16) -> int:
    """Writes JPEGs of 640×480, each a sheet of 4×3 of the images: about as many details as a photograph has.

    Args:
        paths: Images to draw on the sheets; they come round again where there are too few.
        folder: Where `000.jpg` and so on go.
        count: How many.

    Returns:
        Their mean size in bytes.

    Raises:
        InputError: There is no image, or one cannot be read.
    """
    if not paths:
        raise InputError("there is no image to make a sheet of; name some")
    side = SIZE[0] // TILES[0], SIZE[1] // TILES[1]
    total = 0
    for index in range(count):
        sheet = Image.new("RGB", SIZE, "white")
        for tile in range(TILES[0] * TILES[1]):
            image = open_image(paths[(index * TILES[0] * TILES[1] + tile) % len(paths)]).convert("RGBA")
            fitted = ImageOps.fit(image, side)
            row, column = divmod(tile, TILES[0])
            sheet.paste(fitted, (column * side[0], row * side[1]), fitted)
        path = folder / f"{index:03}.jpg"
        sheet.save(path, quality=QUALITY)
        total += path.stat().st_size
    return total // count


def time_stages(artifact: str, variant: str, backend: str, threads: int, images: str, rounds: int) -> dict[str, Any]:
    """Times every stage image by image, and the same images end to end through `Model.embed_images`.

    Args:
        artifact: As `load` takes it.
        variant: As `load` takes it.
        backend: As `load` takes it.
        threads: As `load` takes them.
        images: A folder of files.
        rounds: How often each is read.

    Returns:
        `stages` (stage to seconds, one per image and round) and `end_to_end` (likewise, from bytes to embedding).
    """
    from invariclip import load

    model = load(artifact, variant=variant, backend=backend, threads=threads)
    spec = model.manifest.pixels
    paths = find_images([images])
    batch = np.empty((1, *spec.image_size, 3), dtype=np.uint8)
    taken: dict[str, list[float]] = {stage: [] for stage in STAGES}
    whole: list[float] = []
    model.embed_images([paths[0]])
    for _ in range(rounds):
        for path in paths:
            marks = [time.perf_counter()]
            data = path.read_bytes()
            marks.append(time.perf_counter())
            image = open_image(data)
            marks.append(time.perf_counter())
            fitted = pixels(image, spec)
            marks.append(time.perf_counter())
            batch[0] = fitted
            marks.append(time.perf_counter())
            model.embed_images(batch)
            marks.append(time.perf_counter())
            for stage, took in zip(STAGES, np.diff(marks), strict=True):
                taken[stage].append(float(took))
            start = time.perf_counter()
            model.embed_images([data])
            whole.append(time.perf_counter() - start)
    return {"stages": taken, "end_to_end": whole}


def write_heads(image: Path, folder: Path, *, width: int, logit_scale: float, logit_bias: float | None) -> None:
    """Writes the image graph without classes (`bare.onnx`) and with a thousand (`head.onnx`).

    Args:
        image: An artifact's image graph; the classes in it are left out.
        folder: Where the two go.
        width: d, of its embedding.
        logit_scale: See `head.attach_head`.
        logit_bias: See `head.attach_head`.
    """
    import onnx_ir as ir

    from invariclip.export.graphs.head import attach_head
    from invariclip.export.graphs.writing import write_graph

    bank = np.random.default_rng(0).normal(size=(CLASSES, width))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    model = ir.load(image)
    attach_head(model, None, logit_scale, logit_bias)
    write_graph(model, folder / "bare.onnx")
    attach_head(model, bank, logit_scale, logit_bias)
    write_graph(model, folder / "head.onnx")


def time_head(bare: str, headed: str, backend: str, compute: Compute, threads: int, repetitions: int) -> dict[str, Any]:
    """Times two graphs call by call in turn, in one engine: a head costs less than a machine drifts in a second.

    Args:
        bare: The graph without a class head.
        headed: The same with one.
        backend: As `open_backend` takes it.
        compute: As `open_backend` takes it.
        threads: As `open_backend` takes them.
        repetitions: Calls of each that are timed.

    Returns:
        `bare` and `headed`: seconds of each call; the calls of the same place followed each other.
    """
    from invariclip.backends import open_backend

    engines = {
        side: open_backend(backend, Path(file), threads=threads, compute=compute)
        for side, file in (("bare", bare), ("headed", headed))
    }
    name = engines["bare"].input_names[0]
    shape = engines["bare"].input_shapes[name]
    # A graph that resizes by itself takes any sides
    sides = [side or 224 for side in shape[1:3]]
    batch = np.random.default_rng(0).integers(0, 256, (1, *sides, 3), dtype=np.uint8)
    taken: dict[str, list[float]] = {side: [] for side in engines}
    for repetition in range(repetitions + 2):
        order = ("bare", "headed") if repetition % 2 else ("headed", "bare")
        for side in order:
            start = time.perf_counter()
            engines[side].run({name: batch})
            if repetition > 1:
                taken[side].append(time.perf_counter() - start)
    return taken
