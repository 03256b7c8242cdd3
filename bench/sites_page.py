"""The committed page about sites: what the JSON says, in Markdown."""

from __future__ import annotations

from typing import Any

from invariclip.bench.stylebench.evaluate_page import interval, table
from invariclip.site import KIND_SCALE, PER_KIND, PRIOR

WAYS = {"zero-shot": "Zero-shot", "prototypes": "Class prototypes", "probe": "Linear probe, C = 0.316"}
_NOTES = {
    "whole shift": "the whole difference of the means, whatever the pictures show",
    "centring": "pictures less the sample's mean, classes' pictures less their own environment's",
    "no projection": "the same without a projection, against the mean of unprojected training pictures",
}
HARM = 0.5
"""Points that adaptation may cost where it cannot help."""


def render(result: dict[str, Any]) -> str:
    """The page; every figure in percent."""
    worlds = result["worlds"]
    parts = [
        "# A place's own pictures",
        "A few unlabelled pictures of a camera, a shop or a style say how its embeddings are moved as a whole. "
        "`invariclip adapt` measures that, and answers with the site named lose it; texts, prototypes and probes stay "
        "as they are.\n\n"
        "```sh\ninvariclip adapt mine.icm --images yard -o yard.safetensors\n"
        "invariclip predict mine.icm today.jpg --site yard.safetensors\n```",
        "\n".join(_headline(name, way, rows) for name, ways in worlds.items() for way, rows in ways.items()),
        "\n".join(_harm(name, way, rows) for name, ways in worlds.items() for way, rows in ways.items()),
        _DECIDE.format(both=_both(worlds)),
        _FORM.format(prior=PRIOR, per_kind=PER_KIND, scale=KIND_SCALE),
        _MEASURED.format(seeds=result["seeds"], draws=result["draws"], model=result["model"]),
    ]
    for name, ways in worlds.items():
        for way, rows in ways.items():
            parts += [f"## {name}: {_title(way)}", _rows(rows)]
    parts.append(_MADE)
    return "\n\n".join(parts) + "\n"


def _headline(name: str, way: str, rows: dict[str, Any]) -> str:
    base, after, few = rows["no projection"], rows["projection"], rows["20 pictures"]
    return (
        f"- {name}, {_title(way)}: {base['mean']['value']:.1f} % without a projection, "
        f"{after['mean']['value']:.1f} with it, {few['mean']['value']:.1f} adapted to 20 pictures: "
        f"{interval(few['to_none'], signed=True)} over none, **{interval(few['to_projection'], signed=True)}** over "
        "the projection."
    )


def _harm(name: str, way: str, rows: dict[str, Any]) -> str:
    kinds = ["1 picture", *(row for row in rows if "kind" in row)]
    worst = min((row for row in kinds if row in rows), key=lambda row: rows[row]["to_projection"]["value"])
    change = rows[worst]["to_projection"]
    kept = "within" if change["value"] >= -HARM else "**beyond**"
    wrong = rows["20 of another site"]["to_projection"]
    return (
        f"- {name}, {_title(way)}: of one picture and of skewed contents the worst is `{worst}`, "
        f"{interval(change, signed=True)} against the projection ({kept} the bound of −{HARM:g}); pictures of another "
        f"site do {interval(wrong, signed=True)}: a site is of one place."
    )


def _both(worlds: dict[str, Any]) -> str:
    """In how many tables a site with the projection does more than a site without."""
    pairs = [
        (f"{name}, {_title(way)}", rows["20 pictures"]["mean"]["value"], rows["20, no projection"]["mean"]["value"])
        for name, ways in worlds.items()
        for way, rows in ways.items()
    ]
    less = [
        f"{name}: {alone:.1f} % without it, {together:.1f} with it"
        for name, together, alone in pairs
        if together < alone
    ]
    more = f"the site does more with the projection in {len(pairs) - len(less)} of {len(pairs)} tables"
    return "; not in ".join([more, *less])


def _title(way: str) -> str:
    return WAYS[way][0].lower() + WAYS[way][1:]


def _rows(rows: dict[str, Any]) -> str:
    sites = list(rows["projection"]["sites"])
    body = []
    for row, found in rows.items():
        note = next((text for key, text in _NOTES.items() if row.endswith(key) and row != "no projection"), "")
        body.append([
            f"{row}: {note}" if note else row,
            *(f"{found['sites'][site]:.1f}" for site in sites),
            f"{found['mean']['value']:.1f}",
            "" if row == "no projection" else interval(found["to_none"], signed=True),
            "" if row in ("no projection", "projection") else interval(found["to_projection"], signed=True),
        ])  # fmt: skip
    return table(["measured on", *(site.replace("_", " ") for site in sites), "mean", "to none", "to projection"], body)


_DECIDE = """## Which to use
| you have | do |
|---|---|
| pairs: one thing in two settings | `calibrate`: the projection serves every place, also unseen ones |
| pictures of one place, no pairs | `calibrate --interventions all`, then `adapt` |
| pairs, and pictures of the place | both: {both} |
| pictures of one or two kinds of things alone | `adapt` counts them for little, and says so; the cost stands above |
| a stream of several places mixed | a site for each place: see `20, half of another site` |"""

_FORM = """## The form
z ↦ (z − δ)/|z − δ| with δ = e/(e + {prior:g}) · (m − m₀): m is the mean of the site's unit embeddings, m₀ that of the
pictures that were calibrated on, every environment counting the same. What the pictures show moves m as well, so they
count only as far as they show different kinds of things: e = min(n, {per_kind:g}·(k − 1)), k being the exponential of
the entropy of what they are taken for on average, by a softmax of {scale:g} · cosine over the classes, before anything
is taken away. All of it are sums, so sites stream and add up, and take as many bytes whatever the number of pictures.

It was chosen among others on pictures that are no part of the tables: the training styles under changes that no
projection was fitted on, see [site-forms.md](site-forms.md). Where a sample's pictures are all of one kind the whole
shift costs up to ten points there, this form next to nothing. The row *centring* takes each environment's mean away
from classes' pictures too: that asks for every class to be embedded anew, and is not what `adapt` does."""

_MEASURED = """## What was measured
- Each style of stylebench and domain of PACS that nothing was fitted or chosen on is a site. Its pictures are halved at
  random: it is measured on some of one half, without labels, and scored on the other. {seeds} seeds, {draws} halves;
  `{model}`; the projections are those that the tables of stylebench and PACS chose.
- `of one kind`: pictures of one class alone (PACS) or of one group, such as food (stylebench, where a class has one
  picture); all classes are scored.
- In brackets: 95 % intervals by bootstrap over concepts (stylebench) or over pictures within class (PACS); differences
  are paired, over the same pictures.
- That a site's mean helps was known from PACS and stylebench with other encoders before; the form was not chosen on
  them. Not compared here: CORAL, T3A, TDA, which cost more at run time."""

_MADE = "Made by `python -m invariclip.bench.sites --pacs FOLDER`, after the tables of stylebench and PACS."
