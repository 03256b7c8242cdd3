"""Lists of sources and of interventions in YAML and JSON."""

import json
from pathlib import Path

import yaml

from fuzz import tiny
from fuzz.base import Family as Base
from fuzz.base import WrongError
from fuzz.mutate import HOSTILE, damaged, restructured, written
from invariclip.calibrate.data.sources.config import KINDS, sources_of

ODD = (
    "&a [*a]", "*none", "!!python/object/apply:os.system ['true']", "!!binary YQ==", "2026-01-01", "1e400", ".inf",
    ".nan",
    "0o17", "1_000", "yes", "~", "? a", "<<: {a: 1}", "- - - - - - - - - - a", "{" * 30, "[" * 3000, "a: b: c", "\t- a",
    "%YAML 9.9\n---", "--- a\n--- b", "'", '"\\ud800"', "|+\n a\n", "\0", "\x85", "\u2028", "!!set {a}", "12:30:45",
    "0x1F", "- a\n- b",
)  # fmt: skip


class Family(Base):
    """See the module."""

    count = 5_000
    what = (
        "lists of sources as YAML and JSON: other types, kinds, keys and values, names twice, aliases, tags, "
        "merges, several "
        "documents, depth, damaged bytes; accepted ones are opened and their shards listed"
    )
    reference = "PyYAML's safe loader and msgspec, entry by entry: kind, name, weight and every other key"

    def open(self, folder):
        self.folder = Path(folder) / "sources"
        self.folder.mkdir(exist_ok=True)
        photos = tiny.once(self.folder, "photos", _photos)
        (self.folder / "pairs.csv").write_text(f"first,second\n{photos}/red/a/0.png,{photos}/blue/a/0.png\n")
        (self.folder / "captions.jsonl").write_text('{"first": "a", "second": "b"}\n')
        (self.folder / "names.txt").write_text("cat\ndog\n")
        self.plain = {"sources": [
            {"kind": "images", "name": "photos", "path": "photos", "pairs_by": "name", "interventions": "greyscale",
            "draws": 2,
             "seed": 3, "environments": ["red", "blue"]},
            {"kind": "pairs", "path": "pairs.csv", "weight": 2, "points": "first", "allow_outside": True},
            {"kind": "texts", "name": "captions", "path": "captions.jsonl", "weight": 0.5},
            {"kind": "texts", "name": "templates", "classes_file": "names.txt", "templates": ["a {}", "the {}"]},
            {"kind": "images", "name": "changed", "path": "photos", "natural": False, "points": True,
             "interventions": ["greyscale", {"fog": {"density": [1, 2]}}]},
        ]}  # fmt: skip
        for suffix, text in ((".yaml", yaml.safe_dump(self.plain)), (".json", json.dumps(self.plain))):
            self._read(text.encode(), suffix)

    def draw(self, rng):
        suffix = rng.choice((".yaml", ".yaml", ".json"))
        how = rng.random()
        plain = json.loads(json.dumps(self.plain))
        plain["sources"] = rng.sample(plain["sources"], rng.choice((1, 1, 2, 5)))
        kind = "as it is"
        if how < 0.6:
            kind, plain = restructured(rng, plain, raw=suffix == ".json")
        elif how < 0.75:
            kind, entry = "another key or kind", rng.choice(plain["sources"])
            keys = sorted(
                {key for known in KINDS.values() for key in known.keys} | {"kind", "name", "weight", "Weight"}
            )
            entry[rng.choice(keys)] = rng.choice((*HOSTILE, *KINDS, "photos", "none", "all", True, 2))
        if suffix == ".json":
            text = written(plain)
        else:
            text = yaml.safe_dump(plain, allow_unicode=True, default_flow_style=rng.choice((True, False, None)))
        if how >= 0.75 and suffix == ".yaml":
            kind = "odd YAML"
            places = [place for place in range(len(text)) if text[place] in " \n"]
            place = rng.choice(places)
            text = text[: place + 1] + rng.choice(ODD) + rng.choice(("", "\n", " ")) + text[place + 1 :]
        content = text.encode("utf-8", "surrogatepass")
        if how >= 0.88:
            kind, content = damaged(rng, content)
        return f"{suffix[1:]}: {kind}", lambda: self._read(content, suffix)

    def _read(self, content, suffix):
        path = self.folder / f"list{suffix}"
        path.write_bytes(content)
        sources = sources_of(path)
        text = content.decode("utf-8-sig")
        # a safe loader that also wants names once
        plain = json.loads(text, object_pairs_hook=_once) if suffix == ".json" else yaml.load(text, _Once)  # noqa: S506
        entries = plain["sources"]
        if list(plain) != ["sources"] or len(entries) != len(sources):
            raise WrongError(f"{len(sources)} sources of {len(entries)}, or other keys beside them: {list(plain)}")
        for entry, source in zip(entries, sources, strict=True):
            _require(entry, source, self.folder)
        for source in sources:
            source.shards()


def _require(entry, source, folder):
    known = {"kind", "name", "weight", *KINDS[entry["kind"]].keys}
    if entry.keys() - known:
        raise WrongError(f"nobody reads {sorted(map(str, entry.keys() - known))}")
    if source.name != entry.get("name", entry["kind"]) or source.weight != float(entry.get("weight", 1)):
        raise WrongError(f"called {source.name!r} with weight {source.weight!r}, and the list says {entry!r:.200}")
    for key in ("natural", "seed", "allow_outside", "pairs_by", "environments", "splits", "points"):
        if key in entry and hasattr(source, key) and entry[key] is not None:
            said, read = entry[key], getattr(source, key)
            same = (tuple([said] if isinstance(said, str) else said) == read if key in ("environments", "splits")
                    else said == read and type(said) is type(read))  # fmt: skip
            if not same:
                raise WrongError(f"{key} {said!r:.100} was read as {read!r:.100}")
    for key in ("draws", "seed"):
        changes = getattr(source, "changes", None)
        if changes is not None and entry.get(key) is not None and getattr(changes, key) != entry[key]:
            raise WrongError(f"{key} {entry[key]!r} was read as {getattr(changes, key)!r}")
    if (
        "path" in entry
        and isinstance(getattr(source, "path", None), str)
        and source.path != str(folder / entry["path"])
    ):
        raise WrongError(f"path {entry['path']!r:.100} was read as {source.path!r:.100}")


def _once(pairs):
    if len({name for name, _ in pairs}) != len(pairs):
        raise WrongError("accepted a name that stands twice")
    return dict(pairs)


class _Once(yaml.SafeLoader):
    """A safe loader that refuses names which stand twice."""

    def construct_mapping(self, node, deep=False):
        return _once([(self.construct_object(key, deep=True), self.construct_object(value, deep=True))
                      for key, value in node.value])  # fmt: skip


_Once.add_constructor("tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node))


def _photos(into):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for environment in ("red", "blue"):
        for number in range(3):
            (into / environment / "a").mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                into / environment / "a" / f"{number}.png"
            )
