"""`make fuzz`: all families or some, as many inputs as asked for, and the page docs/fuzzing.md."""

import hashlib
import sys
from pathlib import Path

import click

from fuzz import report
from fuzz.base import attempt
from fuzz.families import NAMES, family
from fuzz.runner import Tally, run
from invariclip.cli.main import run_command
from invariclip.console import note, say

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@click.command()
@click.argument("families", nargs=-1, type=click.Choice(NAMES))
@click.option("--count", default=0, type=click.IntRange(min=0), help="Inputs in all; 0 takes each family's own number.")
@click.option("--only", type=click.IntRange(min=0), help="Try the one input of this number, and show what comes of it.")
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "build" / "fuzz", help="For files and state.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Write the page here; its record goes beside it.")
def fuzz(families, count, only, folder, out):
    """Try damaged and made-up inputs, each in its turn; exits 1 if any was not refused and not right.

    A run that was stopped goes on where it was, as long as neither the code nor a library has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if only is not None:
        return _one(families, only, folder)
    chosen, key = families or NAMES, code_digest()
    whole = sum(family(name).count for name in NAMES)
    tallies = {}
    for place, name in enumerate(chosen, 1):
        opened = family(name)
        wanted = max(1, round(opened.count * count / whole)) if count else opened.count
        tallies[name] = run(
            name, opened, wanted, folder, state=folder / f"{name}.state.json", key=key,
            tell=_Told(f"{place} of {len(chosen)}, {name}", wanted),
        )  # fmt: skip
    for line in report.lines(tallies):
        say(line)
    if out is not None:
        report.write(out, tallies, key)
    return 1 if any(tally.findings for tally in tallies.values()) else 0


def _one(families, number, folder):
    for name in families or NAMES:
        opened = family(name)
        opened.open(folder)
        tried = attempt(opened, name, number)
        say(f"{name} {number}: {tried.kind}: {tried.outcome}: {tried.why}")
    return 0


def code_digest():
    """Of all code that an outcome depends on, and of the libraries' versions."""
    digest = hashlib.sha256(report.versions_line().encode())
    for folder in ("runtime", "export", "calibrate", "tests/fuzz"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class _Told:
    """Says how far a family is, now and then."""

    def __init__(self, what, wanted):
        self.what, self.wanted, self.live = what, wanted, sys.stderr.isatty()
        self.every = max(1, wanted // (100 if self.live else 10))

    def __call__(self, tally: Tally):
        if tally.done % self.every and tally.done != self.wanted:
            return
        line = f"{self.what}: {tally.done:,} of {self.wanted:,}, {len(tally.findings)} findings"
        if self.live and tally.done != self.wanted:
            sys.stderr.write(f"\r{line}")
            sys.stderr.flush()
        else:
            note(f"\r{line}" if self.live else line)


if __name__ == "__main__":
    run_command(fuzz, "python -m fuzz")
