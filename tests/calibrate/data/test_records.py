"""Records in ranges: the same as in one go, and the same as the csv module reads."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.calibrate.data import records as lines
from invariclip.calibrate.data.records import read_records, spans
from invariclip.errors import InputError

CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters=["\n", '"', ",", "\t"]), max_size=8)
ROWS = st.lists(st.tuples(CELL.filter(str.strip), CELL), min_size=1, max_size=12)


def in_ranges(path, size):
    found = spans(path, size)
    assert all(span.records == size for span in found[:-1])
    return [record for span in found for record in read_records(path, span)]


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, size=st.integers(1, 5), ending=st.sampled_from(["\n", "\r\n"]), mark=st.booleans())
def test_ranges_of_csv_are_what_the_csv_module_reads(tmp_path_factory, rows, size, ending, mark):
    path = tmp_path_factory.mktemp("csv") / "list.csv"
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writerows([("first", "second"), *rows])
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.getvalue().encode())
    expected = [dict(zip(("first", "second"), row, strict=True)) for row in rows]
    assert [row for _, row in in_ranges(path, size)] == expected
    assert list(read_records(path)) == in_ranges(path, size)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=9)), max_size=9), size=st.integers(1, 4))
def test_ranges_of_jsonl(tmp_path_factory, rows, size):
    path = tmp_path_factory.mktemp("jsonl") / "list.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert in_ranges(path, size) == [(2 * index + 1, row) for index, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b'x,y\n1,2\n5" disk,3\nc,d\n', "line 3 is not CSV"),
        ("a.csv", b'x,y\n"1,2\n', "line 2 is not CSV"),
        ("a.csv", b"x,y\n1,2\n3,4,5\n", "line 3 has 3 cells, the header 2"),
        ("a.csv", b"x,y\n\xff,2\n", "line 2 cannot be read as UTF-8"),
        ("a.jsonl", b'{"x": 1}\n{x}\n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"x": 1, "x": 2}\n', "line 1 is not JSON .*'x' stands twice"),
        ("a.jsonl", b'{"x": NaN}\n', "line 1 is not JSON .*NaN is no number"),
        ("a.csv", b"x,y,x\n1,2,3\n", "two columns are called 'x'"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"x": "' + b"a" * (1 << 20), "line 1 is longer than"),
    ],
)
def test_damage_is_told_with_its_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        list(read_records(tmp_path / name))


def test_missing(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        spans(tmp_path / "none.csv", 3)


def test_a_record_is_not_held_beyond_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_RECORD", 100)
    (tmp_path / "a.csv").write_text('x\n"' + "a\n" * 100)
    with pytest.raises(InputError, match="line 2 is longer than 100 bytes"):
        spans(tmp_path / "a.csv", 3)
