"""Lists that people write, a line each: classes, templates, and pairs or images as JSONL, CSV and TSV."""

import csv
import io
import json
import unicodedata
from pathlib import Path

from fuzz.base import Family as Base
from fuzz.base import WrongError
from fuzz.mutate import HOSTILE, damaged, written
from invariclip.calibrate.data.images import read_images
from invariclip.calibrate.data.records import TEXT_COLUMNS, read_pairs, spans
from invariclip.calibrate.data.sources.config import sources_of
from invariclip.preprocessing.prompts import check_prompts, read_lines, read_templates

NAMES = ("cat", "dog", "a red house", "Straße", "猫", "naïve", "👩‍🚀", "dog, big", "C++", "#1", '"quoted"', "tab\there",
         "e\u0301", "\u00a0hard space\u00a0", "zero\u200bwidth", "right\u202eleft", "x" * 300)  # fmt: skip
BREAKS = ("\n", "\n", "\n", "\r\n", "\r", "\n\n", " \n", "\u2028", "\x0b", "\x0c", "\x85", "\x1c", "\0", "\x1b", "\t")
TEMPLATES = (
    "a photo of a {}.",
    "{}",
    "# a remark",
    "a {} and a {}",
    "no place",
    "{} {",
    "a drawing of {}",
    "{0}",
    "#{}",
)
CODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252",
           "shift_jis", "gb18030", "utf-7")  # fmt: skip


class Family(Base):
    """See the module."""

    count = 8_000
    what = (
        "class lists, prompt lists, lists of pairs and manifests of images (JSONL, CSV, TSV) in twelve "
        "encodings, with and "
        "without byte order marks, with every kind of line break, NUL and other control characters, quotes, long and "
        "empty lines, names twice, damaged bytes"
    )
    reference = "Python's text files and csv module over the whole file, and msgspec's JSON"

    def open(self, folder):
        self.folder = Path(folder) / "lists"
        self.folder.mkdir(exist_ok=True)
        self._lines("cat\ndög\n".encode())
        self._templates(b"a {}\n# no\n{}\n")
        self._pairs(b'first,second,weight\na,"b\nc",1.5\n', ".csv")
        self._pairs(b'{"first": "a", "second": "b"}\n', ".jsonl")
        self._images(b"path,environment,concept\na.png,x,y\n", ".csv")

    def draw(self, rng):
        what = rng.choice(("classes", "templates", "pairs", "images", "sources"))
        if what in ("classes", "templates", "sources"):
            pool = NAMES if what != "templates" else (*TEMPLATES, *(f"{name} {{}}" for name in NAMES))
            lines = [rng.choice(pool) for _ in range(rng.choice((0, 1, 2, 5, 40)))]
            text = "".join(line + rng.choice(BREAKS if rng.random() < 0.3 else ("\n",)) for line in lines)
            act = {"classes": self._lines, "templates": self._templates, "sources": self._sources}[what]
            kind, content = _encoded(rng, text)
            return f"{what}: {kind}", lambda: act(content)
        suffix = rng.choice((".jsonl", ".csv", ".tsv"))
        kind, content = _encoded(rng, _records(rng, what, suffix))
        act = self._pairs if what == "pairs" else self._images
        return f"{what}{suffix}: {kind}", lambda: act(content, suffix)

    def _write(self, content, suffix=".txt"):
        path = self.folder / f"list{suffix}"
        path.write_bytes(content)
        return path

    def _lines(self, content):
        read = read_lines(self._write(content), "classes")
        _require(read, _text_lines(content))
        check_prompts(read, ("{}",))
        if len(set(read)) != len(read):
            raise WrongError("a class twice was accepted")

    def _sources(self, content):
        self._write(content)
        plain = {
            "sources": [{"kind": "texts", "classes_file": str(self.folder / "list.txt"), "templates": ["{}", "a {}"]}]
        }
        _require(sources_of(plain)[0].classes, _text_lines(content))

    def _templates(self, content):
        read = read_templates(self._write(content))
        _require(read, tuple(line for line in _text_lines(content) if not line.startswith("#")))
        if any(line.count("{}") != 1 for line in read):
            raise WrongError("a template without its one place was accepted")

    def _pairs(self, content, suffix):
        path = self._write(content, suffix)
        read = [(pair.first, pair.second, pair.weight) for pair in read_pairs(path, None, TEXT_COLUMNS)]
        wanted = []
        for row in _rows(content, suffix):
            first, second = (
                next(row[name] for name in TEXT_COLUMNS[which] if name in row) for which in ("first", "second")
            )
            weight = row.get("weight")
            wanted.append((first, second, 1.0 if weight in (None, "") else float(weight)))
        _require(read, wanted)
        parts = [pair for span in spans(path, 3) for pair in read_pairs(path, span, TEXT_COLUMNS)]
        _require([(pair.first, pair.second, pair.weight) for pair in parts], wanted)

    def _images(self, content, suffix):
        read = read_images(self._write(content, suffix))
        rows = _rows(content, suffix)
        _require([image.environment for image in read], [str(row["environment"]) for row in rows])
        _require([image.concept for image in read], [str(row["concept"]) for row in rows])
        _require([image.path for image in read], [self.folder / str(row["path"]) for row in rows])


def _require(read, wanted):
    if read != wanted:
        raise WrongError(f"read as {read!r:.200} in place of {wanted!r:.200}")


def _text_lines(content):
    """Lines as text files have them in Python, stripped; other control characters belong to no name."""
    with io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig") as stream:
        lines = tuple(line.strip() for line in stream if line.strip())
    for line in lines:
        strange = [sign for sign in line if sign != "\t" and unicodedata.category(sign) in ("Cc", "Zl", "Zp")]
        if strange:
            raise WrongError(f"accepted {line!r:.100}")
    return lines


def _rows(content, suffix):
    """Records by csv over the whole file, or a JSON object in each line."""
    text = content.decode("utf-8-sig")
    if suffix == ".jsonl":
        import msgspec

        rows = []
        for line in text.split("\n"):
            if line.strip():
                pairs = json.loads(line, object_pairs_hook=list)
                if len({name for name, _ in pairs}) != len(pairs):
                    raise WrongError(f"accepted a name twice: {line!r:.100}")
                rows.append(msgspec.json.decode(line))
        return rows
    delimiter = "," if suffix == ".csv" else "\t"
    cells = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
             if len(row) > 1 or any(cell.strip() for cell in row)]  # fmt: skip
    header = cells[0] if cells else []
    if len(set(header)) != len(header):
        raise WrongError(f"accepted a column twice: {header!r:.100}")
    return [dict(zip(header, row, strict=False)) for row in cells[1:]]


def _records(rng, what, suffix):
    columns = {"pairs": ["first", "second", "weight"], "images": ["path", "environment", "concept"]}[what]
    if rng.random() < 0.15:
        columns.insert(rng.randrange(4), rng.choice((*columns, "note", "", "split", "a", "caption_1")))
    rng.shuffle(columns)
    rows = []
    for _ in range(rng.choice((0, 1, 3, 8))):
        row = {"first": rng.choice(NAMES), "second": rng.choice(NAMES), "weight": rng.choice(("1", "0.5", "", "2")),
               "path": f"{rng.randrange(99)}.png", "environment": rng.choice(("red", "blue")),
               "concept": rng.choice(NAMES)}  # fmt: skip
        if rng.random() < 0.12:
            row[rng.choice(list(row))] = rng.choice((
                "", " ", "nan", "-1", "inf", "1e999", "../out.png", "/etc/hostname", "a\nb", 'a"b', '"', "a\rb", "a\0b",
                "x" * 2000, "0x10", "1_000", "\u0661", "\\", "a,b", "1e-400",
            ))  # fmt: skip
        rows.append(row)
    end = rng.choice(("\n", "\n", "\r\n", "\r"))
    if suffix == ".jsonl":
        lines = []
        for row in rows:
            plain = {name: row.get(name, "more") for name in columns}
            if rng.random() < 0.1:
                plain[rng.choice(columns)] = rng.choice(HOSTILE)
            lines.append(written(plain))
            if rng.random() < 0.05:
                lines[-1] = lines[-1].replace("{", '{"first": "other", ', 1)
        return end.join(lines)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter="," if suffix == ".csv" else "\t", lineterminator=end,
                        quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))  # fmt: skip
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(name, "more") for name in columns]
        writer.writerow(
            cells[:-1] if rng.random() < 0.04 else [*cells, "one too many"] if rng.random() < 0.04 else cells
        )
    return stream.getvalue()


def _encoded(rng, text):
    coding = rng.choice(CODINGS)
    content = text.encode(coding, "surrogatepass" if coding.startswith("utf") and coding != "utf-7" else "replace")
    how = rng.random()
    if how < 0.25:
        kind, content = damaged(rng, content)
        return f"{coding}, {kind}", content
    if how < 0.3:
        return f"{coding}, in the middle of a mark", b"\xef\xbb\xbf" * 2 + content
    return coding, content
