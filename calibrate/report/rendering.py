"""What the pages of all rooms share: stylesheet, plots as SVG, thumbnails, and templates rendered to one HTML file."""

from __future__ import annotations

import base64
import html
import io
import os
import re
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from invariclip.errors import InputError, MissingExtraError
from invariclip.files import user_cache, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

THUMBNAIL = 112
"""Pixels of the longer side."""
MAX_BYTES = 4000
"""Of one small image. The page of a calibration has at most 152 of them (48 in pairs that were changed, 36 natural
ones, 68 around what was found): below 1 MB, base64 included."""
STYLESHEET = Path(__file__).with_name("style.css")
INK, SOFT, BEFORE, AFTER = "#1c2430", "#5b6675", "#8796a6", "#1a7f4b"
SERIES = ("#2a6fb0", "#b5521b", "#1a7f4c", "#8a4fa3", "#7a6a12", "#b3376f")
"""Lines of a plot beside each other: as dark as each other, and each with a marker of its own."""
_VARIABLES = {
    INK: "ink",
    SOFT: "soft",
    BEFORE: "before",
    AFTER: "after",
    **{colour: f"series-{number}" for number, colour in enumerate(SERIES)},
}
LONGEST_LABEL = 26


@dataclass(frozen=True)
class Thumbnail:
    """An image of a page.

    Attributes:
        src: A data URI.
        name: Its class.
        setting: Its environment, and how it was changed, if it was.
    """

    src: str
    name: str
    setting: str

    @property
    def alt(self) -> str:
        """What it shows, for those who do not see it."""
        return f"{self.name}, {self.setting}"


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """uint8 [H, W, 3] as a WebP of at most `MAX_BYTES` bytes."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = b""
    for quality in (80, 60, 40, 20, 5):
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=quality, method=6)
        content = stream.getvalue()
        if len(content) <= MAX_BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def require_page_packages(asked_by: str) -> None:
    """Asked before the work of minutes whose result a page shows.

    Args:
        asked_by: The option or command, for the message.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        if find_spec(package) is None:
            raise MissingExtraError(f'`{asked_by}` needs {package}: pip install "invariclip[calibrate]"')


def write_html(path: Path, template: Path, **values: Any) -> None:
    """Renders a template with autoescaping and `style`, the shared stylesheet, and writes it atomically.

    Raises:
        InputError: The file cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = STYLESHEET.read_text(encoding="utf-8")
    page = environment.from_string(template.read_text(encoding="utf-8")).render(style=style, **values)
    # A file's name need not be UTF-8; such bytes come as lone surrogates, which no page can hold.
    write_atomically(path, page.encode("utf-8", "replace"))


def _confine_matplotlib() -> None:
    """Before its import: its list of fonts goes to our cache, and no program is asked for fonts, for it brings ours."""
    os.environ.setdefault("MPL_IGNORE_SYSTEM_FONTS", "1")
    if "MPLCONFIGDIR" not in os.environ:
        with suppress(InputError):  # no home: matplotlib takes a temporary folder
            os.environ["MPLCONFIGDIR"] = str(user_cache() / "matplotlib")


@contextmanager
def drawing() -> Iterator[None]:
    """Settings that must hold while a figure is made and saved: text stays text, in colours the page's scheme turns."""
    _confine_matplotlib()
    import matplotlib as mpl

    colours = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(colours, INK) | {
        # Names of classes and environments come from outside: a dollar is no formula.
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "invariclip",
        "font.family": "DejaVu Sans",
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        # The browser draws the text and has glyphs that the font used for measuring lacks.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


def new_figure(title: str, width: float, height: float) -> tuple[Any, Any]:
    """An empty matplotlib figure of so many inches with its axes and a title; call it within `drawing`."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9.5)
    return figure, axes


def svg(figure: Any, alt: str) -> str:
    """The figure as an `<svg>` element with a description, in the page's own font and colours.

    It carries no date and no random identifier, so that the same numbers give the same page.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Groups are numbered anew in every figure, and a page holds several; what is referred to has a digest for a name.
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    text = text.replace("'DejaVu Sans'", "var(--font, sans-serif)")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)


def label(name: str) -> str:
    """A name as a plot shows it: on one line, and cut where it is long."""
    flat = " ".join(name.split())
    return flat if len(flat) <= LONGEST_LABEL else flat[: LONGEST_LABEL - 1] + "…"


def skipped_by_reason(skipped: Sequence[str], paths: frozenset[str]) -> list[tuple[str, int, str]]:
    """What was skipped, the most frequent reason first: the reason, how many, and one of the files.

    Args:
        skipped: Lines `path: reason`.
        paths: All files that were given: a path may hold a colon of its own.
    """
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for line in skipped:
        parts = line.split(": ")
        ends = (count for count in range(1, len(parts)) if ": ".join(parts[:count]) in paths)
        count = next(ends, 0)
        path, reason = ": ".join(parts[:count]), ": ".join(parts[count:])
        reasons[reason] += 1
        examples.setdefault(reason, Path(path).name)
    return [(reason, count, examples[reason]) for reason, count in reasons.most_common()]
