"""The texts that graphs are traced with and checked on."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from invariclip.artifact.learned_prompts import LEARNED_TEXT, context_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.preprocessing.tokenizer import Tokenizer

T = TypeVar("T")

_THINGS = (
    "dog", "cat", "horse", "elephant", "giraffe", "guitar", "violin", "house", "person", "bicycle", "bus", "airplane",
    "boat", "apple", "pineapple", "bread", "pizza", "cup of coffee", "chair", "clock", "camera", "telephone", "book",
    "key", "hammer", "umbrella", "mountain", "river", "tree", "mushroom", "sunflower", "rose", "butterfly", "spider",
    "whale", "owl", "penguin", "snake", "crab", "snail", "moon", "rainbow", "fire", "snowman", "football", "trophy",
    "lighthouse", "bridge", "castle", "tractor", "rocket", "candle", "piano", "drum", "scissors", "envelope",
)  # fmt: skip
_MANNERS = ("{}", "a photo of a {}.", "a flat sticker of a {}", "a black and white line drawing of a {}, on paper")
_BEHIND = 8
"""Things that are put behind each learned template's vectors."""
_ODD = (
    "",
    "日本の城と桜",
    "ein Foto eines Hundes, der über die Wiese läuft",
    "👩‍🚀🚀 &amp; friends <3",
    "It's the dog's; they'd say we've won 42-17!",
    "<start_of_text> a text about <end_of_text> tokens",
    "a very long caption " + "with one more detail and another one " * 12,
)
TEXTS = (*(manner.format(thing) for thing in _THINGS for manner in _MANNERS), *_ODD)
"""What the text tower is checked on: short and long prompts, other scripts, empty, and one that is cut."""
PROMPTS = tuple(f"a photo of a {thing}." for thing in _THINGS)
"""What images are matched with where no classes are baked in."""


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spread, in order."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def ids_behind(contexts: tuple[int, int], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Ids of some things behind the vectors of each learned template, int64 [N, L].

    Args:
        contexts: M and n, see `learned_prompts.context_ids`.
        tokenizer: The checkpoint's.
    """
    learned, tokens = contexts
    texts = [LEARNED_TEXT.format(thing) for thing in spread(_THINGS, _BEHIND)]
    return np.concatenate(
        [tokenizer(texts, prefix=context_ids(template, tokens)) for template in range(1, learned + 1)]
    )


def ids_of(texts: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Ids of the texts, int64 [N, L], without a warning for the one that is meant to be too long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenizer(list(texts))
