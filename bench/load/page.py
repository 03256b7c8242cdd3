"""The record of `bench.load` as tables between two marks of a page that is otherwise written by hand."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from invariclip.bench.latency.summary import median_of_rounds
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

BEGIN, END = "<!-- tables of bench.load -->", "<!-- end of the tables -->"
HEAD = [
    "clients",
    "server",
    "answers/s",
    "rounds from to",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "images a run",
    "CPU ms",
    "× first",
]


def with_tables(page: str, groups: dict[str, Any]) -> str:
    """The page with its tables replaced.

    Args:
        page: Markdown that holds `BEGIN` and `END`.
        groups: Setting and turns by title, see `load.Turn`.

    Raises:
        InputError: It does not hold them, once and in this order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"the page has no place for the tables: it needs the lines {BEGIN} and {END}")
    tables = "\n\n".join(_table(title, group) for title, group in groups.items())
    return f"{before}{BEGIN}\n{tables}\n{end}{after}"


def _table(title: str, group: dict[str, Any]) -> str:
    setting, turns = group["setting"], group["turns"]
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    busy = "".join(
        f"; {who} took {median(shares):.0%} of the processors' time in the median turn, {max(shares):.0%} at most"
        for what, who in (("others", "other programs"), ("steal", "other machines of the host"))
        if (shares := [turn[what] for turn in turns if turn[what] is not None])
    )
    about = (
        f"{setting['images']}; {setting['rounds']} rounds of {setting['seconds']:g} s a row, medians over rounds; "
        f"{setting['threads']} engine threads; {setting['processor']}; {versions}; {setting['date']}{busy}"
    )
    names = list(dict.fromkeys(turn["candidate"] for turn in turns))
    clients = sorted({turn["clients"] for turn in turns})
    rows = [_row(turns, many, name, names[0]) for many in clients for name in names]
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return f"**{title}** ({about})\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(turns: Sequence[dict[str, Any]], clients: int, name: str, first: str) -> list[str]:
    def of(candidate: str, what: str) -> list[float]:
        found = [turn for turn in turns if (turn["clients"], turn["candidate"]) == (clients, candidate)]
        return [turn[what] for turn in sorted(found, key=lambda turn: turn["round"])]

    speed = of(name, "per_second")
    compared = ""
    if name != first:
        times = median_of_rounds([own / other for own, other in zip(speed, of(first, "per_second"), strict=True)])
        compared = f"{times.value:.2f} [{times.low:.2f}, {times.high:.2f}]"
    return [
        str(clients), name, f"{median(speed):.1f}", f"{min(speed):.1f} to {max(speed):.1f}",
        *(f"{median(of(name, what)):.0f}" for what in ("p50", "p95", "p99")),
        f"{median(of(name, 'batch')):.1f}", f"{median(of(name, 'cpu_ms')):.1f}", compared,
    ]  # fmt: skip
