"""The tables in docs/serve.md are those of the committed records."""

import json
from pathlib import Path

import pytest

from invariclip.bench.load import __main__, arrivals, overhead, soak

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(
    ("name", "module"), [("serve", __main__), ("arrivals", arrivals), ("overhead", overhead), ("soak", soak)]
)
def test_the_page_has_the_tables_of_the_record(name, module):
    page = (DOCS / "serve.md").read_text(encoding="utf-8")
    groups = json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))
    assert groups
    assert module.with_tables(page, groups) == page


def test_ten_minutes_were_right():
    for title, record in json.loads((DOCS / "soak.json").read_text(encoding="utf-8")).items():
        first, last = soak.SoakRecord(**{key: value for key, value in record.items() if key != "setting"}).ends()
        assert (record["minutes"], record["wrong"], record["lost"]) == (10, 0, 0), title
        assert last <= 1.05 * first
