"""Where every image and word comes from: packages pinned by version and digest, and the styles they hold.

Licences were read in the packages themselves (`evidence` says in which file), not in an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from invariclip.export.reference.packages import Package

Reader = Literal["iconify", "folder", "photographs"]


@dataclass(frozen=True)
class Style:
    """One way of drawing the concepts.

    Attributes:
        name: The style's folder name and its value in manifests.
        package: Key into `PACKAGES`.
        reader: How the images lie in the package.
        held_out: True when nothing may ever be fitted or selected on this style.
        folder: For `folder` and `photographs`: where the images lie inside the package.
        phrases: How a caption names the style; empty for held-out styles, which no caption may describe.
    """

    name: str
    package: str
    reader: Reader
    held_out: bool
    folder: str = ""
    phrases: tuple[str, ...] = ()


def _iconify(name: str, version: str, sha256: str, licence: str, author: str) -> Package:
    return Package(
        "npm", f"@iconify-json/{name}", version, sha256, licence, "info.json, package.json", author, "SVG bodies"
    )


PACKAGES: dict[str, Package] = {
    "noto": _iconify(
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Google Inc (Noto Emoji)",
    ),
    "twemoji": _iconify(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twitter, Inc and other contributors (Twemoji)",
    ),
    "fluent-flat": _iconify(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Microsoft Corporation (Fluent Emoji)",
    ),
    "fluent-high-contrast": _iconify(
        "fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "MIT",
        "Microsoft Corporation (Fluent Emoji)",
    ),
    "emojione": _iconify(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "EmojiOne 2.3 (continued as EmojiTwo)",
    ),
    "openmoji-colour": _iconify(
        "openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        "OpenMoji project, HfG Schwäbisch Gmünd",
    ),
    "openmoji": Package(
        "npm",
        "openmoji",
        "17.0.0",
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
        "CC-BY-SA-4.0",
        "LICENSE.txt, package.json",
        "OpenMoji project, HfG Schwäbisch Gmünd",
        "black/svg: line art",
    ),
    "fluent-3d": Package(
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        "package.json, README.md",
        "Microsoft Corporation (Fluent Emoji), packed by LobeHub",
        "assets: 256 px renders",
    ),
    "photographs": Package(
        "apt",
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2.0-only",
        "usr/share/doc/tuxpaint-stamps-default/copyright",
        "Bill Kendrick and the Tux Paint contributors",
        "photo cut-outs named in photographs.json",
    ),
    "names": Package(
        "npm",
        "unicode-emoji-json",
        "0.9.0",
        "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
        "MIT",
        "LICENSE",
        "Mu-An Chiou",
        "English CLDR names and groups",
    ),
    "keywords": Package(
        "npm",
        "emojilib",
        "4.0.3",
        "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
        "MIT",
        "LICENSE",
        "Mu-An Chiou",
        "English keywords",
    ),
}

STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style("noto", "noto", "iconify", False, phrases=("an emoji drawing", "a glossy emoji", "a shaded emoji")),
        Style("twemoji", "twemoji", "iconify", False, phrases=("a flat sticker", "a simple flat icon", "a flat emoji")),
        Style(
            "fluent-flat",
            "fluent-flat",
            "iconify",
            False,
            phrases=("a flat vector illustration", "a modern flat icon", "a bold flat drawing"),
        ),
        Style(
            "fluent-3d",
            "fluent-3d",
            "folder",
            False,
            folder="assets",
            phrases=("a 3D render", "a 3D model", "a computer graphic"),
        ),
        Style(
            "emojione",
            "emojione",
            "iconify",
            False,
            phrases=("a clip art image", "an old emoji", "a small cartoon"),
        ),
        Style("openmoji", "openmoji-colour", "iconify", True),
        Style("openmoji-black", "openmoji", "folder", True, folder="black/svg"),
        Style("fluent-high-contrast", "fluent-high-contrast", "iconify", True),
        Style("photograph", "photographs", "photographs", True, folder="usr/share/tuxpaint/stamps"),
    )
}

TRAINING_STYLES: tuple[str, ...] = tuple(name for name, style in STYLES.items() if not style.held_out)
HELD_OUT_STYLES: tuple[str, ...] = tuple(name for name, style in STYLES.items() if style.held_out)


def licence_of(style: str) -> str:
    """The SPDX licence of one style's images."""
    return PACKAGES[STYLES[style].package].licence
