"""Packages that the reference model is learnt from and validated on, beside those of stylebench."""

from __future__ import annotations

from invariclip.export.reference.packages import Package

PACKAGES: dict[str, Package] = {
    "clipart": Package(
        "apt",
        "openclipart-svg",
        "1:0.18+dfsg-19",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        "CC-PDDC",
        "usr/share/doc/openclipart-svg/copyright",
        "the contributors of the Open Clip Art Library",
        "titles and subjects of the clip art",
    ),
    "clipart-png": Package(
        "apt",
        "openclipart-png",
        "1:0.18+dfsg-19",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        "CC-PDDC",
        "usr/share/doc/openclipart-png/copyright",
        "the contributors of the Open Clip Art Library",
        "the same clip art, drawn",
    ),
    "wordnet": Package(
        "apt",
        "wordnet-base",
        "1:3.0-37",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "LicenseRef-WordNet-3.0",
        "usr/share/doc/wordnet-base/copyright",
        "Cognitive Science Laboratory, Princeton University",
        "names of ImageNet's classes and of what they are kinds of",
    ),
    "validation": Package(
        "apt",
        "gcompris-qt-data",
        "3.1-2",
        "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        "GPL-3.0-or-later AND others",
        "usr/share/doc/gcompris-qt-data/copyright",
        "the GCompris contributors (KDE)",
        "photographs and cartoons with names, to choose by; none is learnt from or passed on",
    ),
}
