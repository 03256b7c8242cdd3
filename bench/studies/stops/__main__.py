"""`python -m invariclip.bench.studies.stops` stops commands at many moments and writes docs/stops.md.

SIGKILL is what the system sends when memory runs out, and nothing can be done at it; SIGTERM and SIGINT are heard.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from invariclip.bench.studies.pages import table, write_result
from invariclip.bench.studies.stops.trial import Trials, command_named
from invariclip.bench.studies.stops.world import COMMANDS
from invariclip.cli.main import run_command
from invariclip.console import bar, note
from invariclip.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from invariclip.bench.studies.stops.world import StoppedCommand

_HEARD = (signal.SIGTERM, signal.SIGINT)


@click.command()
@click.option("--command", "names", multiple=True, type=click.Choice([one.name for one in COMMANDS]), help="[all]")
@click.option("--kills", default=10, show_default=True, type=click.IntRange(1), help="SIGKILLs of each command.")
@click.option("--others", default=2, show_default=True, type=click.IntRange(1), help="SIGTERMs and SIGINTs of each.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/stops"), show_default=True)
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/stops.md"), show_default=True)
def stops(names: tuple[str, ...], kills: int, others: int, work: Path, out: Path) -> int:
    """Stop commands at many moments, and compare what they give afterwards; exit 1 if anything is not right.

    Commands that are not named stay as they were in the record.
    """
    began, records = time.monotonic(), []
    kept = json.loads(out.with_suffix(".json").read_text(encoding="utf-8")) if names and out.exists() else {}
    wholes = dict(kept.get("whole_s", {}))
    for name in names or tuple(one.name for one in COMMANDS):
        trials = Trials(command_named(name), work.resolve())
        wholes[name] = round(trials.whole_s, 2)
        plan = list(moments(trials.command, kills, others))
        for number, moment, over, resumed in bar(plan, total=len(plan), desc=name):
            record = trials.stop(number, moment, over=over, resumed=resumed)
            records.append(record)
            for problem in record.problems:
                note(f"{name}, {record.signal} at {record.moment}: {problem}")
    order = [one.name for one in COMMANDS]
    others_kept = [one for one in kept.get("stops", []) if one["command"] not in names]
    result = {
        "version": __version__, "date": time.strftime("%Y-%m-%d"),
        "whole_s": {name: wholes[name] for name in order if name in wholes},
        "stops": sorted([*others_kept, *map(asdict, records)], key=lambda one: order.index(one["command"])),
    }  # fmt: skip
    write_result(out, result, page(result))
    note(f"{time.monotonic() - began:.0f} s")
    return 1 if any(record.problems for record in records) else 0


def moments(
    command: StoppedCommand, kills: int, others: int
) -> Iterator[tuple[signal.Signals, float | str, bool, bool]]:
    """Signals, when they come, whether over an older output, and whether resumed.

    SIGKILL comes first at each of the command's own moments, then evenly over its whole time; so do the others.
    """
    own: list[float | str] = [*command.moments[:kills]]
    left = kills - len(own)
    resumes = bool(command.kept) and command.name != "serve"
    own += [round((k + 0.5) / left, 3) for k in range(left)]
    for place, moment in enumerate(own):
        yield signal.SIGKILL, moment, place % 2 == 1, resumes and place % 3 == 2
    for number in _HEARD:
        for k in range(others):
            yield number, round((k + 0.7) / others, 3), k % 2 == 1, False


def page(result: dict[str, Any]) -> str:
    """The page of a record."""
    rows = []
    for name, whole in result["whole_s"].items():
        those = [one for one in result["stops"] if one["command"] == name]
        signals = Counter(one["signal"] for one in those)
        begun = sum(1 for one in those if one["left"])
        right = sum(1 for one in those if not one["problems"])
        sent = [str(signals[number.name]) for number in (signal.SIGKILL, *_HEARD)]
        rows.append([f"`{name}`", f"{whole:.1f} s", *sent, str(begun), f"{right} of {len(those)}"])
    killed = sum(1 for one in result["stops"] if one["signal"] == "SIGKILL")
    wrong = [one for one in result["stops"] if one["problems"]]
    said = [f"- `{one['command']}`, {one['signal']} at {one['moment']}: {'; '.join(one['problems'])}" for one in wrong]
    header = ["command", "whole run", "SIGKILL", "SIGTERM", "SIGINT", "work begun on disk", "right"]
    return _PAGE.format(
        version=result["version"], date=result["date"], killed=killed, stops=len(result["stops"]), wrong=len(wrong),
        table=table(header, rows), said="\n".join(["", *said, ""]) if said else "",
    )  # fmt: skip


_PAGE = """# Commands that are stopped

Made by `python -m invariclip.bench.studies.stops`, invariclip {version}, {date}: a tiny ViT and bundled images. Each
command runs as a process of its own and is stopped at moments spread evenly over its whole time, and when each file
appears that it writes on its way. Every second stop is over an older output; some of `collect` (`calibrate --sources`)
and `build` had been stopped once before. Then the same command runs again, to its end.
A row is from the last run of its command (`--command` renews some and keeps the others), so rows may be of different
commits.

{killed} SIGKILLs, {stops} stops in all, {wrong} not right.

{table}
{said}
*Work begun on disk* counts the stops after which something was there that was not there before. A stop is *right* if
all of this holds:

- After the stop an output is the old one or the whole new one: never a part, and never gone.
- After SIGTERM and SIGINT the command says one line and exits with 143 or 130 (`serve` ends in order, with 0). It
  leaves nothing but what the same command goes on from: the moments of `calibrate --sources`, the work folder of
  `build`.
- After the second run every file has the same bytes as without a stop, and no other file is there: not in the working
  folder, not in TMPDIR, in XDG_CACHE_HOME or in HOME. No process of the stopped command is left.

Two things differ between any two runs and are compared otherwise. Of the profile of `tune`, the measurements, the date
and the choice are left out; machine, engines, settings and candidates are compared. The log of `serve --adapt-log`
holds what a server was asked: each one is replayed without an error, and the server that is started again answers a
question with the same bytes as the first one.
"""


if __name__ == "__main__":
    run_command(stops)
