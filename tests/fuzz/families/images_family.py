"""Images of every format that is decoded, damaged or with other heads: the pixels that open_clip's transform makes."""

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from fuzz.base import Family as Base
from fuzz.base import WrongError
from fuzz.mutate import damaged
from invariclip.errors import InputError
from invariclip.export.libraries import declare_missing_ops
from invariclip.preprocessing.pixels import PixelSpec, pixels

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
SPECS = (
    PixelSpec((32, 32), MEAN, STD), PixelSpec((24, 24), MEAN, STD, "bilinear"), PixelSpec((32, 32), MEAN, STD,
    "bicubic", "squash"),
    PixelSpec((32, 32), MEAN, STD, "bicubic", "longest", 127), PixelSpec((20, 36), MEAN, STD),
)  # fmt: skip
WIDE = ("I;16", "I;16B", "I;16L", "I;16N")
SIDES = (0, 1, 2, 255, 65535, 65536, 2**31 - 1, 2**32 - 1)


class Family(Base):
    """See the module."""

    count = 12_000
    what = (
        "AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF and WebP in all modes, with EXIF, profiles, palettes, "
        "several frames: "
        "damaged bytes, sides and lengths in heads changed (PNG's with checksums that are right), chunks and "
        "segments lost, "
        "twice or exchanged, other formats in their place; read in both pixel modes"
    )
    reference = "Pillow alone and open_clip's transform; above eight bits NumPy's float64: bit by bit in mode `exact`"
    memory = 3 << 30

    def open(self, folder):
        declare_missing_ops()
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.transforms = [
            image_transform_v2(
                PreprocessCfg(size=spec.image_size, mean=MEAN, std=STD, interpolation=spec.interpolation,
                              resize_mode=spec.resize_mode, fill_color=spec.fill_color),
                is_train=False,
            )
            for spec in SPECS
        ]  # fmt: skip
        self.seeds = _seeds()
        for name, content in self.seeds.items():
            for place in range(len(SPECS)):
                try:
                    self._read(content, place)
                except InputError as error:
                    raise WrongError(f"{name} is refused undamaged: {error}") from error

    def draw(self, rng):
        name = rng.choice(list(self.seeds))
        content, place = self.seeds[name], rng.randrange(len(SPECS))
        how = rng.random()
        if how < 0.03:
            kind = "as it is"
        elif how < 0.6:
            kind, content = damaged(rng, content)
            if rng.random() < 0.3:
                _, content = damaged(rng, content)
        elif how < 0.95:
            kind, content = _other_head(rng, content)
        else:
            kind, content = "another format", rng.choice((
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) show\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
                b"\x0a\x05\x01\x08" + bytes(200), b"P7\nWIDTH 1\n", b"\0\0\1\0\1\0" + bytes(60), b"8BPS" + bytes(60),
                b"qoif" + bytes(60),
                b"DDS " + bytes(130), b"\x59\xa6\x6a\x95" + bytes(60), b"GIF89a", b"BM", b"II*\0", b"RIFF\4\0\0\0WEBP",
            ))  # fmt: skip
        return f"{name.partition(' ')[0]}: {kind}", lambda: self._read(content, place)

    def _read(self, content, place):
        spec = SPECS[place]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = pixels(content, spec)
            fast = pixels(content, spec, "fast")
            try:
                wanted = _reference(content, self.transforms[place])
            except Exception as error:
                raise WrongError(f"accepted what Pillow does not decode ({type(error).__name__}: {error})") from None
        if not np.array_equal(ours, wanted):
            raise WrongError(f"{(ours != wanted).mean():.1%} of the pixels are others")
        if fast.shape != ours.shape or fast.dtype != np.uint8:
            raise WrongError(f"the fast mode gives {fast.dtype} {fast.shape}")


def _reference(content, transform):
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.mode in WIDE:
            wide = np.asarray(image, dtype=np.float64)
            image = Image.fromarray(np.rint(wide / 65535 * 255).astype(np.uint8))
        elif image.mode in ("I", "F"):
            numbers = np.asarray(image, dtype=np.float64)
            limits = (1, 255, 65535) if image.mode == "F" else (255, 65535)
            limit = min(limit for limit in limits if numbers.max() <= limit)
            image = Image.fromarray(np.rint(numbers * (255 / limit)).astype(np.uint8))
        steps = list(transform.transforms)
        side = max(image.size)
        # a strip whose shorter side would be rounded to nothing, which torchvision refuses, keeps a pixel of it
        if (
            type(steps[0]).__name__ == "ResizeKeepRatio"
            and steps[0].longest
            and round(min(image.size) * 32 / side) == 0
        ):
            from torchvision.transforms.functional import InterpolationMode, resize

            sizes = [max(1, round(length * 32 / side)) for length in (image.height, image.width)]
            steps[0] = lambda strip: resize(strip, sizes, InterpolationMode.BICUBIC)
        for step in steps:
            image = step(image)
        return np.rint(image.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)


def _seeds():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:37, 0:53]
    base = np.stack([x * 4 % 256, y * 6 % 256, (x + y) * 2 % 256, np.where(x > y, 255, 90)], axis=-1)
    noisy = np.clip(base + rng.integers(-30, 30, base.shape), 0, 255).astype(np.uint8)
    rgba, rgb = Image.fromarray(noisy), Image.fromarray(np.ascontiguousarray(noisy[..., :3]))
    grey, palette = rgb.convert("L"), rgb.quantize(16)
    deep = Image.fromarray((noisy[..., 0].astype(np.uint16) * 257) ^ 77)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a remark"
    found = {}

    def add(name, image, form, **options):
        stream = io.BytesIO()
        image.save(stream, form, **options)
        found[name] = stream.getvalue()

    for mode, image in (("RGB", rgb), ("grey", grey), ("CMYK", rgb.convert("CMYK"))):
        add(f"JPEG {mode}", image, "JPEG", quality=80, exif=exif)
    add("JPEG progressive", rgb, "JPEG", progressive=True, subsampling=2)
    for mode, image in (("RGB", rgb), ("RGBA", rgba), ("grey", grey), ("palette", palette), ("bits", grey.convert("1")),
                        ("grey, alpha", rgba.convert("LA")), ("16 bits", deep)):  # fmt: skip
        add(f"PNG {mode}", image, "PNG")
    add("PNG frames", rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)], exif=exif)
    add("GIF one", palette, "GIF")
    add("GIF frames", palette, "GIF", save_all=True, append_images=[rgb.rotate(180).quantize(8)], transparency=0)
    for mode, image in (("RGB", rgb), ("grey", grey), ("palette", palette), ("bits", grey.convert("1"))):
        add(f"BMP {mode}", image, "BMP")
    for mode, image in (("RGB", rgb), ("grey", grey), ("16 bits", deep)):
        add(f"PPM {mode}", image, "PPM")
    for packing in (None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        add(f"TIFF {packing}", rgb, "TIFF", compression=packing)
    add("TIFF floats", Image.fromarray((noisy[..., 1] / 255).astype(np.float32)), "TIFF")
    add("TIFF 16 bits", deep, "TIFF")
    add("TIFF wholes", Image.fromarray(noisy[..., 2].astype(np.int32)), "TIFF")
    add("WebP lossy", rgb, "WEBP", quality=70, exif=exif)
    add("WebP lossless", rgba, "WEBP", lossless=True)
    add("AVIF one", rgb, "AVIF", speed=9)
    add("JP2 one", rgb, "JPEG2000")
    add("JP2 stream", grey, "JPEG2000", no_jp2=True)
    return found


def _other_head(rng, content):
    if content.startswith(b"\x89PNG"):
        return _other_png(rng, content)
    if content.startswith(b"\xff\xd8"):
        return _other_jpeg(rng, content)
    head = bytearray(content)
    place = rng.randrange(min(len(head) - 4, 120))
    number = rng.choice((*SIDES, rng.randrange(1 << 16)))
    size, order = rng.choice((2, 4)), rng.choice("<>")
    head[place : place + size] = struct.pack(f"{order}{'H' if size == 2 else 'I'}", number & (1 << 8 * size) - 1)
    return "a number in its head", bytes(head)


def _other_png(rng, content):
    """Chunks changed, with checksums that are right."""
    chunks, place = [], 8
    while place + 8 <= len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += 12 + size
    kind, at = rng.choice(("sides", "sides", "a chunk lost", "a chunk twice", "chunks exchanged", "a chunk more",
                           "a chunk's bytes")), rng.randrange(len(chunks))  # fmt: skip
    if kind == "sides":
        head = bytearray(chunks[0][1])
        start = rng.choice((0, 4))
        head[start : start + 4] = struct.pack(">I", rng.choice((*SIDES, rng.randrange(300))))
        if rng.random() < 0.4:
            head[rng.choice((8, 9, 10, 11, 12))] = rng.randrange(20)
        chunks[0] = (b"IHDR", bytes(head))
    elif kind == "a chunk lost":
        del chunks[at]
    elif kind == "a chunk twice":
        chunks.insert(at, chunks[at])
    elif kind == "chunks exchanged":
        rng.shuffle(chunks)
    elif kind == "a chunk more":
        bomb = zlib.compress(bytes(rng.choice((10, 1 << 22))))
        name = rng.choice(
            (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"gAMA", b"acTL", b"fcTL", b"fdAT", b"abcd")
        )
        body = rng.choice((b"", b"a\0\0" + bomb, bomb, rng.randbytes(30), bytes(300)))
        chunks.insert(rng.randrange(1, len(chunks) + 1), (name, body))
    else:
        name, body = chunks[at]
        chunks[at] = (name, damaged(rng, body or b"\0")[1])
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return kind, content[:8] + b"".join(parts)


def _other_jpeg(rng, content):
    """Segments changed, their lengths right."""
    segments, place = [], 2
    while place + 4 <= len(content) and content[place] == 0xFF and content[place + 1] != 0xDA:
        (size,) = struct.unpack(">H", content[place + 2 : place + 4])
        segments.append((content[place + 1], content[place + 4 : place + 2 + size]))
        place += 2 + size
    kind, at = rng.choice(("sides", "a segment lost", "a segment twice", "segments exchanged", "a segment's bytes",
                           "a segment more")), rng.randrange(len(segments))  # fmt: skip
    if kind == "sides":
        at = next(index for index, (marker, _) in enumerate(segments) if 0xC0 <= marker <= 0xC2)
        body = bytearray(segments[at][1])
        start = rng.choice((1, 3))
        body[start : start + 2] = struct.pack(">H", rng.choice((0, 1, 7, 53, 300, 65535)))
        segments[at] = (segments[at][0], bytes(body))
    elif kind == "a segment lost":
        del segments[at]
    elif kind == "a segment twice":
        segments.insert(at, segments[at])
    elif kind == "segments exchanged":
        rng.shuffle(segments)
    elif kind == "a segment more":
        body = rng.choice((b"", b"Exif\0\0" + rng.randbytes(40), b"Adobe" + rng.randbytes(7), rng.randbytes(20),
        b"MPF\0" + bytes(40),
                           b"ICC_PROFILE\0\1\1" + bytes(20)))  # fmt: skip
        segments.insert(at, (rng.choice((0xE0, 0xE1, 0xE2, 0xEE, 0xFE, 0xDB, 0xC4, 0xDD, 0xDC)), body))
    else:
        marker, body = segments[at]
        segments[at] = (marker, damaged(rng, body or b"\0")[1][:65000])
    parts = [bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body for marker, body in segments]
    return kind, content[:2] + b"".join(parts) + content[place:]
