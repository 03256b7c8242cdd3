"""Zero-shot classes as prompts, and prompts as one bank of class embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

DEFAULT_TEMPLATES = ("a photo of a {}.",)


def expand(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class in every template: class 0 in all templates, then class 1, and so on.

    Raises:
        InputError: No class, an empty or repeated class, no template, or a template without `{}`.
    """
    if not classes or not templates:
        raise InputError("zero-shot classification needs at least one class and one template")
    blank = [name for name in classes if not name.strip()]
    repeated = (
        sorted({name for name in classes if list(classes).count(name) > 1}) if len(set(classes)) < len(classes) else []
    )
    if blank or repeated:
        raise InputError(f"class names must not be empty or repeated: {(blank + repeated)[:5]}")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong:
        raise InputError(f"a template needs exactly one {{}} for the class name: {wrong[0]!r}")
    return [template.replace("{}", name) for name in classes for template in templates]


def class_bank(
    embed_texts: Callable[[list[str]], NDArray[np.floating]],
    classes: Sequence[str],
    templates: Sequence[str],
) -> NDArray[np.float64]:
    """Unit-length class embeddings: the mean of a class's unit-length prompt embeddings, scaled again.

    The mean is taken in whatever space `embed_texts` answers in, so with a projection in the projected space
    (CLIP-ICM's predictor takes the cosine *after* the projection).

    Args:
        embed_texts: Texts to unit-length embeddings [N, d].
        classes: K class names.
        templates: Prompt templates with one `{}` each.

    Returns:
        float64 [K, d].
    """
    embeddings = np.asarray(embed_texts(expand(classes, templates)), dtype=np.float64)
    means = embeddings.reshape(len(classes), len(templates), -1).mean(axis=1)
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True))
