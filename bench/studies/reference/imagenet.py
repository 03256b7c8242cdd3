"""What ImageNet's classifier knows without a photograph: a direction for each class, its names and its kinds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from numpy.typing import NDArray

NOUNS = Path("usr/share/wordnet/data.noun")
PERSON = ("person", "man", "woman")
_WORN = frozenset({"clothing", "garment", "headdress"})
_ABSTRACT = frozenset(
    {
        *("entity", "physical entity", "object", "physical object", "whole", "unit", "artifact", "artefact"),
        *("living thing", "animate thing", "organism", "being", "matter", "abstraction", "abstract entity"),
        *("instrumentality", "instrumentation", "chordate", "craniate", "vertebrate", "placental", "placental mammal"),
        *("eutherian", "eutherian mammal", "ungulate", "hoofed mammal", "thing", "causal agent", "cause"),
        *("causal agency", "substance", "consumer goods", "commodity", "trade good", "good", "covering", "device"),
        *("equipment", "implement", "structure", "construction", "conveyance", "natural object", "plant part"),
        *("plant structure", "plant organ", "reproductive structure", "vascular plant", "tracheophyte", "part"),
        *("portion", "component part", "component", "relation", "domesticated animal", "domestic animal", "ware"),
        *("working dog", "whole thing", "even-toed ungulate", "artiodactyl mammal", "artiodactyl"),
        *("odd-toed ungulate", "perissodactyl", "perissodactyl mammal", "solid", "food product", "foodstuff"),
        *("durables", "durable goods", "consumer durables", "fabric", "process", "natural phenomenon", "phenomenon"),
        *("attribute", "measure", "group", "grouping", "psychological feature", "content", "creation", "product"),
        *("production", "system", "arrangement", "organization", "wheeled vehicle", "self-propelled vehicle", "area"),
        *("extent", "way", "facility", "installation"),
    }
)
"""WordNet's words above what an image would be called."""


@dataclass(frozen=True)
class ImageClass:
    """One class of the classifier.

    Attributes:
        names: Its lower-case names, the usual one first.
        kinds: What it is a kind of, from near to far, lower case.
        definition: WordNet's, or empty.
        worn: It is worn, or is a person: its photographs show people.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    definition: str
    worn: bool


def read_classes(wordnet: Path) -> list[ImageClass]:
    """The 1,000 classes in the order of the classifier's rows.

    Args:
        wordnet: The unpacked package.

    Raises:
        InputError: The package holds no such file.
    """
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    nouns = read_nouns(wordnet / NOUNS)
    classes = []
    for row in range(1000):
        names = tuple(name.lower() for name in info.index_to_description(row).split(", "))
        detailed = info.index_to_description(row, detailed=True)
        kinds = kinds_of(info.index_to_label_name(row)[1:], nouns)
        definition = detailed.split(": ", 1)[1] if ": " in detailed else ""
        classes.append(ImageClass(names, kinds, definition, bool(_WORN & set(kinds)) or "person" in kinds))
    return classes


def read_nouns(path: Path) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """WordNet's nouns: lemmas and the offsets of what each is a kind of, by offset.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path.name} cannot be read ({error.strerror}): fetch the package again") from error
    nouns = {}
    for line in lines:
        if not re.match(r"\d{8} ", line):
            continue
        parts = line.split(" ")
        count = int(parts[3], 16)
        lemmas = tuple(parts[4 + 2 * k].replace("_", " ").lower() for k in range(count))
        first = 4 + 2 * count
        pointers = [parts[first + 1 + 4 * k : first + 5 + 4 * k] for k in range(int(parts[first]))]
        nouns[parts[0]] = (lemmas, tuple(p[1] for p in pointers if p[0] in ("@", "@i") and p[2] == "n"))
    return nouns


def kinds_of(offset: str, nouns: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]) -> tuple[str, ...]:
    """Lemmas of everything that a noun is a kind of, depth first from near to far, without the abstract ones."""
    seen: list[str] = []

    def climb(here: str) -> None:
        for above in nouns[here][1]:
            if above not in seen:
                seen.append(above)
                climb(above)

    climb(offset)
    words = dict.fromkeys(word for above in seen for word in nouns[above][0])
    return tuple(word for word in words if word not in _ABSTRACT)


def class_directions(weight: torch.Tensor) -> NDArray[np.float32]:
    """Unit directions of the classes among the trunk's features, the mean of all taken away; float32 [1000, width].

    Under neural collapse (Papyan et al., PNAS 2020) the mean feature of a class lies along its classifier row.
    """
    rows = weight.numpy() - weight.numpy().mean(axis=0)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def photograph_mean(scale: torch.Tensor, shift: torch.Tensor) -> NDArray[np.float32]:
    """The mean feature of ImageNet's photographs, from the last batch norm alone; float32 [width].

    After a batch norm a channel has mean `shift` and deviation |`scale`| over the photographs that it was trained on.
    The feature is the mean of min(max(x, 0), 6) over places, whose expectation for a normal x is closed.
    """
    from scipy.stats import norm

    mean, deviation = shift.double().numpy(), scale.double().abs().numpy()

    def above(bound: float) -> NDArray[np.float64]:
        z = (mean - bound) / deviation
        return np.asarray((mean - bound) * norm.cdf(z) + deviation * norm.pdf(z))

    return np.asarray(above(0.0) - above(6.0), dtype=np.float32)
