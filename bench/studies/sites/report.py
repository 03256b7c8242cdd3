"""The committed page about sites, and its figure: what the JSON says."""

from __future__ import annotations

from collections import Counter
from statistics import fmean
from typing import Any

from invariclip.bench.studies.pages import as_svg, interval, table, trim
from invariclip.bench.studies.sites.worlds import HALF, SIZES
from invariclip.calibrate.report.rendering import AFTER, BEFORE, INK, SERIES, SOFT
from invariclip.sites.site import KIND_SCALE, PER_KIND, PRIOR

SKEWED = {"20 of one kind": ("v", SERIES[1]), "20 of two kinds": ("^", SERIES[0]), "20, kinds by Zipf's law":
          ("d", SERIES[3])}  # fmt: skip
"""Row → marker and colour."""
_COLUMNS = 3


def plot(result: dict[str, Any]) -> str:
    """Every table's mean accuracy as SVG; bands are 95 % intervals of the paired difference to the projection."""
    from matplotlib.figure import Figure

    tables = [(name, way, rows) for name, ways in result["worlds"].items() for way, rows in ways.items()]
    height = -(-(len(tables) + 1) // _COLUMNS)
    figure = Figure(figsize=(9.6, 2.9 * height), layout="constrained")
    panels = list(figure.subplots(height, _COLUMNS, squeeze=False).flat)
    for axes, (name, way, rows) in zip(panels, tables, strict=False):
        _panel(axes, rows)
        axes.set_title(f"{name}: {WAYS[way][0].lower() + WAYS[way][1:]}", fontsize=9, loc="left", color=INK)
    for axes in panels[len(tables) :]:
        axes.axis("off")
    panels[len(tables)].legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="center left")
    return as_svg(figure)


def _panel(axes: Any, rows: dict[str, Any]) -> None:
    names = {f"{size} images" if size > 1 else "1 image": f"{size}" for size in SIZES} | {HALF: "half"}
    shown = [name for name in names if name in rows]
    base = rows["projection"]["mean"]["value"]
    axes.axhline(rows[NONE]["mean"]["value"], color=BEFORE, lw=1, ls=":", label="no projection")
    axes.axhline(base, color=INK, lw=1, ls="--", label="projection")
    changes = [rows[name]["to_projection"] for name in shown]
    places = range(len(shown))
    axes.fill_between(places, [base + each["low"] for each in changes], [base + each["high"] for each in changes],
                      color=AFTER, alpha=0.18, lw=0, label="95 % interval against the projection")  # fmt: skip
    axes.plot(places, [base + each["value"] for each in changes], "o-", ms=3.5, color=AFTER, label="adapted")
    few = shown.index("20 images")
    for number, (row, (marker, colour)) in enumerate(SKEWED.items()):
        change = rows[row]["to_projection"]
        spread = [[change["value"] - change["low"]], [change["high"] - change["value"]]]
        axes.errorbar([few + 0.2 * (number + 1)], [base + change["value"]], yerr=spread, fmt=marker, ms=4, lw=0.9,
                      color=colour, label=row)  # fmt: skip
    axes.set_xticks(places, [names[name] for name in shown])
    axes.set_xlabel("unlabelled images of the site", fontsize=8, color=SOFT)
    axes.set_ylabel("right, %", fontsize=8, color=SOFT)
    axes.tick_params(labelsize=8)
    trim(axes, margin=0.1)
    axes.yaxis.get_major_locator().set_params(integer=True)


WAYS = {"zero-shot": "Zero-shot", "prototypes": "Class prototypes", "probe": "Linear probe, C = 0.316"}
HARM = 0.5
"""Points that adaptation may cost where it cannot help."""
NONE, WHOLE = "no projection", "all of them, and scored on all"
BOUND = "bound: "
"""Begins rows that take the labels of the site's own images."""
ALIGNED, CHOSEN = "classes aligned", "chosen"
PEERS = ("CORAL", "T3A", "T3A after the site", "TDA")
SHIFTED = "means"
"""What rows are called that shift by the true means of the site's classes."""
GOAL = 9
"""Points over no projection that were wanted of the probe with 20 images."""


def render(result: dict[str, Any], stem: str = "sites") -> str:
    """The page; every figure in percent.

    Args:
        result: What the JSON beside it holds.
        stem: Name of the JSON and of the plot, without their endings.
    """
    worlds = result["worlds"]
    tables = [(name, way, rows) for name, ways in worlds.items() for way, rows in ways.items()]
    parts = [
        "# Sites: adapting to a few unlabelled images",
        "A camera, a shop or a style shifts all embeddings of its images. `invariclip adapt` measures the shift from a "
        "few unlabelled images, and it is removed from answers for that site; texts, prototypes and probes stay as "
        "they are.\n\n"
        "```sh\ninvariclip adapt mine.icm --images yard -o yard.safetensors\n"
        "invariclip predict mine.icm today.jpg --site yard.safetensors\n```\n\n"
        "The file says how many images were counted, the standard error of their mean, and how many images would "
        "measure the shift to a third of its length. In Python: `load(site=)`, `Model.with_site`. Over HTTP, for many "
        "sites at once or measured from the requests' own images: [serve.md](serve.md). In C++: [cpp.md](cpp.md). In "
        "the graph itself: `adapt -o NAME.icm`.",
        "\n".join(_headline(*each) for each in tables),
        f"![Accuracy by the number of the site's images]({stem}.svg)",
        "\n".join(_harm(*each) for each in tables),
        _DECIDE.format(both=_both(worlds), many=_many(tables)),
        _FORM.format(prior=PRIOR, per_kind=PER_KIND, scale=KIND_SCALE),
        _other_forms(tables, result["choices"]),
        _others(tables, result["choices"]),
        *(_bounds(name, ways["probe"]) for name, ways in worlds.items() if any(map(_is_bound, ways.get("probe", {})))),
        _MEASURED.format(seeds=result["seeds"], draws=result["draws"], model=result["model"], whole=WHOLE),
    ]
    for name, way, rows in tables:
        parts += [f"## {name}: {_title(way)}", _rows(rows)]
    parts.append(_MADE)
    return "\n\n".join(parts) + "\n"


def _headline(name: str, way: str, rows: dict[str, Any]) -> str:
    base, after, few = rows["no projection"], rows["projection"], rows["20 images"]
    return (
        f"- {name}, {_title(way)}: {base['mean']['value']:.1f} % without a projection, "
        f"{after['mean']['value']:.1f} with it, {few['mean']['value']:.1f} adapted to 20 images: "
        f"{interval(few['to_none'], signed=True)} over none, **{interval(few['to_projection'], signed=True)}** over "
        "the projection."
    )


def _harm(name: str, way: str, rows: dict[str, Any]) -> str:
    kinds = ["1 image", *(row for row in rows if row.endswith(("one kind", "two kinds", "Zipf's law")))]
    worst = min((row for row in kinds if row in rows), key=lambda row: rows[row]["to_projection"]["value"])
    change = rows[worst]["to_projection"]
    kept = "within" if change["value"] >= -HARM else "**beyond**"
    wrong = rows["20 of another site"]["to_projection"]
    return (
        f"- {name}, {_title(way)}: of one image and of skewed contents the worst is `{worst}`, "
        f"{interval(change, signed=True)} against the projection ({kept} the bound of −{HARM:g}); images of another "
        f"site do {interval(wrong, signed=True)}: measure each site on its own."
    )


def _both(worlds: dict[str, Any]) -> str:
    """In how many tables a site with the projection does more than a site without."""
    pairs = [
        (f"{name}, {_title(way)}", rows["20 images"]["mean"]["value"], rows["20, no projection"]["mean"]["value"])
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


def _gain(found: dict[str, Any], than: str = "to_adapted") -> str:
    return interval(found[than], signed=True)


def _against(found: dict[str, Any]) -> str:
    return f"{found['mean']['value']:.1f}, {_gain(found)}"


def _is_bound(row: str) -> bool:
    return row.startswith(BOUND)


def _verdict(tables: list[tuple[str, str, dict[str, Any]]], row: str) -> str:
    """Whether another form is better than `adapt`'s by more than chance somewhere, and worse by no more than HARM."""
    found = {f"{name}, {_title(way)}": rows[row]["to_adapted"] for name, way, rows in tables}
    more = [f"{table} ({interval(gain, signed=True)})" for table, gain in found.items() if gain["low"] > 0]
    less = [f"{table} ({interval(gain, signed=True)})" for table, gain in found.items() if gain["value"] < -HARM]
    taken = "no table speaks against it" if more and not less else "`adapt` does not have it"
    return (
        f"clearly more than `adapt`'s form in {'; '.join(more) or 'no table'}; more than {HARM:g} less in "
        f"{'; '.join(less) or 'none'}: {taken}."
    )


def _other_forms(tables: list[tuple[str, str, dict[str, Any]]], choices: dict[str, Any]) -> str:
    body = []
    for name, way, rows in tables:
        said = Counter(choice["form"] for choice in choices[name][way])
        body.append([
            f"{name}, {_title(way)}",
            *(f"{rows[row]['mean']['value']:.1f}" for row in ("projection", "20 images")),
            *(_against(rows[f"20 images, {word}"]) for word in (ALIGNED, CHOSEN)),
            *(_gain(rows[f"20 of one kind, {word}"], "to_projection") for word in (ALIGNED, CHOSEN)),
            "; ".join(f"{form} ({count})" for form, count in said.most_common()),
        ])  # fmt: skip
    head = ["table", "projection", "`adapt`", ALIGNED, CHOSEN, f"one kind, {ALIGNED}", f"one kind, {CHOSEN}",
            "chosen in so many worlds"]  # fmt: skip
    return "\n\n".join([
        _OTHER_FORMS.format(pooled=_pooled(choices)),
        table(head, body),
        f"- `{CHOSEN}`: {_verdict(tables, f'20 images, {CHOSEN}')}\n"
        f"- `{ALIGNED}`: {_verdict(tables, f'20 images, {ALIGNED}')}",
    ])  # fmt: skip


def _pooled(choices: dict[str, Any]) -> str:
    """What all training environments of all worlds say together; every table counts the same."""
    ways = [worlds for by_way in choices.values() for worlds in by_way.values()]

    def mean(form: str, sample: str) -> float:
        return fmean(fmean(choice["gains"][form][sample] for choice in worlds) for worlds in ways)

    skewed = {form: [mean(form, sample) for sample in by if sample != "20 images"]
              for form, by in ways[0][0]["gains"].items()}  # fmt: skip
    gains = {form: mean(form, "20 images") for form, found in skewed.items() if min(found) >= -HARM}
    told = ", ".join(f"{form} {gain:+.1f}" for form, gain in sorted(gains.items(), key=lambda each: -each[1]))
    return f"Over all training environments together, of those that skewed contents do not harm: {told}."


def _others(tables: list[tuple[str, str, dict[str, Any]]], choices: dict[str, Any]) -> str:
    """What CORAL, T3A and TDA gain over `adapt` on the same images, and cost."""
    body = []
    for name, way, rows in tables:
        said = choices[name][way]
        for size in ("20 images", "half of them"):
            costs = [rows[f"{size}, {peer}"]["cost"] for peer in PEERS]
            body.append([
                f"{name}, {_title(way)}: {size}",
                f"{rows[size]['mean']['value']:.1f}",
                *(_gain(rows[f"{size}, {peer}"]) for peer in PEERS),
                f"{sum(each['recolours'][size] for each in said)} of {len(said)}",
                " / ".join(f"{cost['numbers'] / 1000:,.0f}" for cost in costs),
                " / ".join(f"{cost['products'] / 1000:,.0f}" for cost in costs),
            ])  # fmt: skip
    head = [
        "table and sample",
        "`adapt`",
        *PEERS,
        "CORAL chosen",
        "thousand numbers kept",
        "thousand products an image",
    ]
    return "\n\n".join([_OTHERS, table(head, body), _recoloured(tables, choices)])


def _recoloured(tables: list[tuple[str, str, dict[str, Any]]], choices: dict[str, Any]) -> str:
    """What re-colouring comes to where the training environments decide it, as far as a table's worlds agree."""
    found: dict[str, list[str]] = {"all": [], "none": [], "some": []}
    for name, way, rows in tables:
        for size in ("20 images", "half of them"):
            said = [choice["recolours"][size] for choice in choices[name][way]]
            gain = f" {_gain(rows[f'{size}, CORAL'])}" if all(said) else ""
            found["all" if all(said) else "some" if any(said) else "none"].append(
                f"{name}, {_title(way)}, {size}{gain}"
            )
    told = {key: "; ".join(where) or "no table" for key, where in found.items()}
    return (
        "Re-coloured only where the training environments say so, all worlds are re-coloured (points against `adapt`) "
        f"in {told['all']}; none, so that nothing changes, in {told['none']}; some in {told['some']}."
    )


def _many(tables: list[tuple[str, str, dict[str, Any]]]) -> str:
    found = [(f"{name}, {_title(way)}", rows["half of them, T3A"]["to_adapted"]) for name, way, rows in tables]
    more = [f"{table} {interval(gain, signed=True)}" for table, gain in found if gain["low"] > 0]
    less = [f"{table} {interval(gain, signed=True)}" for table, gain in found if gain["high"] < 0]
    return f"more than `adapt` in {'; '.join(more) or 'no table'}; less in {'; '.join(less) or 'none'}"


def _bounds(name: str, rows: dict[str, Any]) -> str:
    """How far any shift gets a probe, with labels too."""
    few = [row for row in rows if row.startswith("20") and "of " not in row]
    best = max(few, key=lambda row: rows[row]["to_none"]["value"])
    bounds = [f"- {row.removeprefix(BOUND)}: {_gain(rows[row], 'to_none')}" for row in rows if _is_bound(row)]
    shift = max(
        (row for row in rows if _is_bound(row) and SHIFTED in row), key=lambda row: rows[row]["to_none"]["high"]
    )
    told = (
        f"So with these projections {GOAL:+g} is out of reach of a shift, with the classes' true means as well."
        if rows[shift]["to_none"]["high"] < GOAL
        else f"So with these projections {GOAL:+g} is within reach of a shift, where the classes' true means are known."
    )
    reached = [f"`{row}` {_gain(each, 'to_none')}" for row, each in rows.items()
               if not _is_bound(row) and each["to_none"]["value"] >= GOAL]  # fmt: skip
    told += f" Without labels {'; '.join(reached) or 'no row of the table'} is at {GOAL:+g} or more."
    return "\n\n".join([
        f"## How far a shift can take the probe: {name}",
        f"The goal was {GOAL:+g} points over no projection from 20 unlabelled images. `adapt` has "
        f"{_gain(rows['20 images'], 'to_none')}; the most of all rows with 20 images, named after the fact, is "
        f"`{best}` with {_gain(rows[best], 'to_none')}. Where the labels of half of the site's images are known:",
        "\n".join(bounds),
        told,
    ])  # fmt: skip


def _rows(rows: dict[str, Any]) -> str:
    sites = list(rows["projection"]["sites"])
    body = []
    for row, found in rows.items():
        body.append([
            row,
            *(f"{found['sites'][site]:.1f}" for site in sites),
            f"{found['mean']['value']:.1f}",
            "" if row == NONE else interval(found["to_none"], signed=True),
            "" if row in (NONE, "projection") else interval(found["to_projection"], signed=True),
        ])  # fmt: skip
    return table(["measured on", *(site.replace("_", " ") for site in sites), "mean", "to none", "to projection"], body)


_DECIDE = """## Which to use
| you have | do |
|---|---|
| pairs: one thing in two settings | `calibrate`: the projection serves every site, also unseen ones |
| images of one site, no pairs | `calibrate --interventions all`, then `adapt` |
| pairs, and images of the site | both: {both} |
| hundreds of images of the site | `adapt`; T3A, which is not in the product, does {many} |
| images of one or two kinds of things alone | `adapt` counts them for little, and says so; the cost stands above |
| a mixed stream of several sites | measure each site on its own: see `20, half of another site` |"""

_FORM = """## The form
z ↦ (z − δ)/|z − δ| with δ = e/(e + {prior:g}) · (m − m₀): m is the mean of the site's unit embeddings, m₀ that of the
images that were calibrated on, every environment counting the same. What the images show moves m as well, so they
count only as far as they show different kinds of things: e = min(n, {per_kind:g}·(k − 1)), k being the exponential of
the entropy of what they are taken for on average, by a softmax of {scale:g} · cosine over the classes, before anything
is taken away. All of it are sums, so sites stream and add up, and take as many bytes whatever the number of images.

It was chosen among others on images that are no part of the tables: the training styles under changes that no
projection was fitted on, see [site-forms.md](site-forms.md). Where a sample's images are all of one kind the whole
shift costs up to ten points there, this form next to nothing."""

_OTHER_FORMS = """## Other forms
Candidates are: the projection alone, `adapt`'s form, the same with *classes aligned* (every training environment's
images are moved to m₀ as a whole before prototypes or probes are made of them; by name nothing changes), and
*centring* (images less the sample's mean, classes' images less their own environment's, by name names less the mean
of the names); the last three with and without a projection. *Chosen* is what each world's own training environments
say, with each of them in turn as a site and a projection that was refitted without it (estimator, rank and λ stay those
of all of them): most right answers from 20 mixed images, of the forms that lose no more than 0.5 with images of one
or two kinds; the projection alone wins within one standard error. Nothing of the sites in the tables enters that.
{pooled}

The columns: percent right with 20 images and what that is against `adapt`; and of 20 images of one kind, against
the projection."""

_OTHERS = """## Beside CORAL, T3A and TDA
Measured on the very same images and then frozen; percent right, and points against `adapt`. Strength (CORAL) and
filter size (T3A) are those that the training environments chose, as above; TDA has its published settings. *CORAL
chosen*: in how many worlds the training environments, as sites, found its re-colouring better than the shift alone by
more than one standard error; the row is re-coloured whether they did or not. What is kept of a site, and what each
image costs more at run time, stand in the order of the columns; `adapt` keeps one number for each dimension and costs
nothing. T3A's classes belong to the site: they cannot be shared or exchanged as names can, and while they are still
being adapted embeddings of images have to be kept."""

_MEASURED = """## What was measured
- Each style of stylebench and domain of PACS that nothing was fitted or chosen on is a site. Its images are halved at
  random: it is measured on some of one half, without labels, and scored on the other. {seeds} seeds, {draws} halves;
  `{model}`; the projections are those that the tables of stylebench and PACS chose.
- `of one kind`: images of one class alone (PACS) or of one group, such as food (stylebench, where a class has one
  image); all classes are scored.
- In brackets: 95 % intervals by bootstrap over concepts (stylebench) or over images within class (PACS); differences
  are paired, over the same images.
- That a site's mean helps was known from PACS and stylebench with other encoders before; the form was not chosen on
  them.
- What was looked at: figures of these sites were known for `adapt`'s form, `no projection`, `whole shift` and
  `centring` before other forms were compared. Candidates of *chosen* and its rule were then set by figures of training
  environments alone. One seed of PACS was scored with two halves of each training environment in place of six, before
  all of this was run; then the row `T3A after the site` was added and the strengths of CORAL that are tried were cut.
  Training styles of stylebench are halved twice each, for time; environments of PACS six times. The bounds were
  computed last.
- `{whole}`: the site is measured on all its images, without labels, and scored on the same.
- `bound`: labels of the half that is shown are used; they are not available when adapting.
- `no projection`: the site's form against the mean of unprojected training images. `whole shift`: the whole
  difference of the means, whatever the images show."""

_MADE = "Made by `python -m invariclip.bench.studies.sites --pacs FOLDER`, after the tables of stylebench and PACS."
