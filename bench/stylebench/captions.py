"""Captions as the web writes them: many plain, many that say how a thing is drawn, some with other words for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invariclip.bench.stylebench.sources import STYLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from invariclip.bench.stylebench.manifest import Picture

PLAIN = (
    "a picture of a {}.",
    "a photo of a {}.",
    "{}",
    "a {}",
    "an image of a {}.",
    "a picture of the {}.",
    "this is a {}.",
)
"""The first two are what users prompt with; they come up most."""

_PLAIN_WEIGHTS = (0.3, 0.25, 0.15, 0.1, 0.08, 0.06, 0.06)

STYLED = ("{style} of a {}.", "{style} of {}", "{}, {style}", "{style} showing a {}.", "{}: {style}.")

STYLE_SHARE = 0.5
"""How many captions name the style: enough that the style is in the embedding, as it is in CLIP's."""

KEYWORD_SHARE = 0.3
"""How many captions say a keyword as well: it is how the text tower hears words of concepts it never saw."""

LONE_KEYWORD_SHARE = 0.1
"""How many captions say a keyword in place of the name."""


def caption(picture: Picture, rng: np.random.Generator) -> str:
    """One caption for a picture in a training style.

    Args:
        picture: What is shown and how; its style must have phrases.
        rng: Draws the template and the words.
    """
    subject = _subject(picture, rng)
    phrases = STYLES[picture.style].phrases
    if phrases and rng.random() < STYLE_SHARE:
        template = STYLED[rng.integers(len(STYLED))]
        return template.format(subject, style=phrases[rng.integers(len(phrases))])
    return PLAIN[rng.choice(len(PLAIN), p=_PLAIN_WEIGHTS)].format(subject)


def _subject(picture: Picture, rng: np.random.Generator) -> str:
    draw = rng.random()
    if not picture.keywords or draw >= KEYWORD_SHARE + LONE_KEYWORD_SHARE:
        return picture.name
    keyword = picture.keywords[rng.integers(len(picture.keywords))]
    return keyword if draw < LONE_KEYWORD_SHARE else f"{picture.name}, {keyword}"


def vocabulary(pictures: Sequence[Picture]) -> list[str]:
    """Texts that between them hold every word that captions of these pictures can say."""
    styles = dict.fromkeys(picture.style for picture in pictures)
    phrases = [phrase for style in styles for phrase in STYLES[style].phrases]
    templates = [template.format("", style="") for template in (*PLAIN, *STYLED)]
    subjects = {word for picture in pictures for word in (picture.name, *picture.keywords)}
    # "dog." and "dog," are written without a space, which the tokenizer treats as the words apart
    return [*phrases, *templates, *sorted(subjects), ". , :"]
