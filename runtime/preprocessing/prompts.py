"""Zero-shot classes as prompts, and prompts as one bank of class embeddings."""

from __future__ import annotations

import os
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from invariclip.console import silent
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from invariclip.console import Progress

DEFAULT_TEMPLATES = ("a photo of a {}.",)
TEMPLATE_SETS = ("ensemble",)
"""Sets that are known by name, see `template_set`."""
MAX_CLASSES, MAX_TEMPLATES = 100_000, 1_000
MAX_LIST_BYTES = 1 << 24
"""Of a text file of class names or templates."""
_UNPRINTED = re.compile("[\0-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
"""Control characters but the tabulator, separators of lines, and a byte order mark that is not at the begin."""
PROMPTS_AT_ONCE = 1024
"""Prompts that are embedded before they are added up: memory does not grow with classes × templates."""


def text_list(texts: Iterable[str], what: str) -> tuple[str, ...]:
    """Names or prompts from any iterable of texts: a list, a generator, a NumPy array.

    Raises:
        InputError: It is one text, or holds something else.
    """
    if isinstance(texts, (str, bytes)) or not hasattr(texts, "__iter__"):
        raise InputError(f"{what} must be a list of texts, not {texts!r:.60}")
    listed = tuple(str(text) if isinstance(text, str) else text for text in texts)  # NumPy has texts of its own
    wrong = next((text for text in listed if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"{what} must be a list of texts; one of them is {wrong!r:.60}")
    return listed


def read_lines(path: str | os.PathLike[str], what: str) -> tuple[str, ...]:
    """Lines of a text file that people write, without blank ones, spaces around them and a byte order mark.

    A line ends as in any text file of Python's, with a line feed, a carriage return or both, and with nothing else.

    Args:
        path: UTF-8, no larger than `MAX_LIST_BYTES`.
        what: What it lists, in the plural, for errors.

    Raises:
        InputError: It cannot be read as text, is larger, or holds none; or a line holds control characters, as UTF-16
            that is read as UTF-8 does.
    """
    where = Path(path)
    try:
        with where.open("rb") as stream:
            content = stream.read(MAX_LIST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: cannot be read as text ({error})") from error
    if len(content) > MAX_LIST_BYTES:
        raise InputError(f"{where}: larger than a list of {what} can be ({MAX_LIST_BYTES:,} bytes)")
    numbered = enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)
    lines = {number: line.strip() for number, line in numbered if line.strip()}
    for number, line in lines.items():
        strange = _UNPRINTED.search(line)
        if strange:
            raise InputError(
                f"{where}: line {number} holds the character U+{ord(strange[0]):04X}, which belongs to no list of "
                f"{what}; save the file as UTF-8"
            )
    if not lines:
        raise InputError(f"{where}: lists no {what}; write one a line")
    return tuple(lines.values())


def check_prompts(classes: Sequence[str], templates: Sequence[str]) -> None:
    """Makes sure that classes and templates can become prompts.

    Raises:
        InputError: No class, an empty or repeated class, no template, a template without exactly one `{}` or given
            twice, or more of them than `MAX_CLASSES` and `MAX_TEMPLATES`.
    """
    if not classes or not templates:
        raise InputError("zero-shot classification needs at least one class and one template")
    if len(classes) > MAX_CLASSES or len(templates) > MAX_TEMPLATES:
        raise InputError(
            f"{len(classes):,} classes and {len(templates):,} templates are too many; "
            f"up to {MAX_CLASSES:,} and {MAX_TEMPLATES:,} are served"
        )
    for what, given in (("classes", classes), ("templates", templates)):
        if isinstance(given, str) or not all(isinstance(item, str) for item in given):
            raise InputError(f"{what} must be a list of texts, not {given!r:.60}")
    wrong = [name for name in classes if not name.strip()] + _repeated(classes)
    if wrong:
        raise InputError(f"class names must not be empty or repeated: {wrong[:5]}")
    slotless = [template for template in templates if template.count("{}") != 1]
    if slotless:
        raise InputError(f"a template needs exactly one {{}} for the class name: {slotless[0]!r}")
    twice = _repeated(templates)
    if twice:
        raise InputError(f"a template is given twice and would count twice: {twice[0]!r}")


def class_bank(
    embed_texts: Callable[[list[str]], NDArray[np.floating]],
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    progress: Progress = silent,
) -> NDArray[np.float64]:
    """Unit-length class embeddings: the mean of a class's unit-length prompt embeddings, scaled again.

    The mean is taken in whatever space `embed_texts` answers in, so with a projection in the projected space
    (CLIP-ICM's predictor takes the cosine *after* the projection). No more than `PROMPTS_AT_ONCE` prompts and their
    embeddings are held at a time.

    Args:
        embed_texts: Texts to unit-length embeddings [N, d].
        classes: K class names.
        templates: Prompt templates with one `{}` each.
        progress: `console.bar` or `console.silent`.

    Returns:
        float64 [K, d].

    Raises:
        InputError: What `check_prompts` refuses, or prompts of a class that have no mean direction.
    """
    check_prompts(classes, templates)
    total = len(classes) * len(templates)
    starts = range(0, total, PROMPTS_AT_ONCE)
    prompts = _prompts(classes, templates)
    sums: NDArray[np.float64] | None = None
    for start in progress(starts, total=len(starts), desc="embed classes"):
        block = [next(prompts) for _ in range(start, min(start + PROMPTS_AT_ONCE, total))]
        embeddings = np.asarray(embed_texts(block), dtype=np.float64)
        if sums is None:
            sums = np.zeros((len(classes), embeddings.shape[1]))
        np.add.at(sums, np.arange(start, start + len(block)) // len(templates), embeddings)
    # The sum and the mean point the same way, and only the direction is kept
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)  # type: ignore[arg-type]
    lost = [name for name, length in zip(classes, lengths[:, 0], strict=True) if not 0 < length < np.inf]
    if lost:
        raise InputError(f"the prompts of class {lost[0]!r} have no mean direction; give it other words")
    return np.asarray(sums / lengths)


def read_templates(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Templates from a text file: one a line, each with one `{}`; blank lines and lines that start with `#` are not.

    Raises:
        InputError: The file cannot be read as text, is too large, holds no template, or a wrong one.
    """
    return _parsed(read_lines(path, "templates"), os.fspath(path))


def template_set(name: str) -> tuple[str, ...]:
    """The templates that are known by a name.

    `ensemble` varies image, style, quality, number and setting, as the prompt ensembles do that OpenAI published for
    CLIP; the sentences are this project's own.

    Raises:
        InputError: No set has this name.
    """
    if name not in TEMPLATE_SETS:
        raise InputError(f"no set of templates is called {name!r}; available: {', '.join(TEMPLATE_SETS)}")
    return _parsed(
        files("invariclip.preprocessing").joinpath("templates.txt").read_text(encoding="utf-8").splitlines(), name
    )


def _parsed(lines: Sequence[str], source: str) -> tuple[str, ...]:
    templates = tuple(line for line in map(str.strip, lines) if line and not line.startswith("#"))
    if not templates:
        raise InputError(f"{source}: holds no template; write one a line, such as: a photo of a {{}}.")
    try:
        check_prompts(("class",), templates)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return templates


def _prompts(classes: Sequence[str], templates: Sequence[str]) -> Iterator[str]:
    """Every class in every template: class 0 in all templates, then class 1, and so on."""
    return (template.replace("{}", name) for name in classes for template in templates)


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)
