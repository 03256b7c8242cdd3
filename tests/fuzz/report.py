"""The page docs/fuzzing.md, of its record alone."""

import sys
from importlib.metadata import version

from fuzz.base import GOOD, OUTCOMES
from fuzz.families import family
from invariclip.bench.studies.pages import table, write_result

LIBRARIES = ("msgspec", "numpy", "onnxruntime", "open_clip_torch", "pillow", "pyyaml", "safetensors", "tokenizers",
             "torch", "transformers")  # fmt: skip
HEAD = """# Fuzzing

`make fuzz` tries damaged and made-up inputs and counts what comes of each. Accepted inputs are held against a reference
that is not our code. This page is written by it.

- **refused**: a typed error in one line.
- **right**: accepted, and what came of it is what the reference says.
- **wrong**: accepted, and something else came of it; or the refusal is no line.
- **traceback**: any other exception. **memory**: more was asked for than the family's bound. **crash**: the process
  died. **hang**: no answer in the family's time.

An input is made from its family and its number alone: `cd tests && python -m fuzz FAMILY --only NUMBER` repeats it.
Inputs run in a process of their own whose address space is bounded. A run that is stopped goes on where it was.
`FUZZ_COUNT=N make fuzz` tries N inputs in all. `make test` tries the first few of every family.
"""


def versions_line():
    """Python and libraries that inputs run through."""
    return ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in LIBRARIES)])


def record(tallies, key):
    """What is kept of a run."""
    return {
        "code_sha256": key,
        "versions": versions_line(),
        "families": [{"name": name, **tally.to_json(), "totals": tally.totals()} for name, tally in tallies.items()],
    }


def lines(tallies):
    """A line for each family, and one for all."""
    found = []
    for name, tally in tallies.items():
        counts = ", ".join(f"{number:,} {outcome}" for outcome, number in tally.totals().items() if number)
        found.append(f"{name}: {tally.done:,} tried: {counts}")
        found += [f"  {number} {kind}: {outcome}: {why}" for number, kind, outcome, why in tally.findings]
    return found


def page(found):
    """The page of a record."""
    families = found["families"]
    body = [[one["name"], f"{one['done']:,}", *(f"{one['totals'][outcome]:,}" for outcome in OUTCOMES)]
            for one in families]  # fmt: skip
    sums = [sum(one["totals"][outcome] for one in families) for outcome in OUTCOMES]
    body.append(["**all**", f"{sum(one['done'] for one in families):,}", *(f"{number:,}" for number in sums)])
    about = [[one["name"], family(one["name"]).what, family(one["name"]).reference] for one in families]
    bad = [
        f"- {one['name']} {number}, {kind}: {outcome}: {why}"
        for one in families
        for number, kind, outcome, why in one["findings"]
    ]
    parts = [
        HEAD,
        "## What came of it\n",
        table(["family", "tried", *OUTCOMES], body),
        f"\nWith {found['versions']}. Counts by what was done to each file are in fuzzing.json.\n",
        "## What is tried\n",
        table(["family", "inputs", "what an accepted one is held against"], about),
    ]
    if bad:
        parts += ["\n## Findings\n", *bad]
    return "\n".join(parts) + "\n"


def write(out, tallies, key):
    """Writes the page and its record."""
    found = record(tallies, key)
    write_result(out, found, page(found))


def all_good(found):
    """Whether a record has nothing that is neither refused nor right."""
    return all(number == 0 for one in found["families"] for outcome, number in one["totals"].items()
               if outcome not in GOOD)  # fmt: skip
