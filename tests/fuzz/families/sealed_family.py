"""Files of our own that carry a digest: damaged, exchanged, and changed under a digest that is right."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fuzz import tiny
from fuzz.base import Family as Base
from fuzz.base import WrongError
from fuzz.compare import same_json
from fuzz.mutate import damaged, restructured, written
from invariclip.artifact.embeddings import Embeddings, embeddings_bytes, read_embeddings
from invariclip.artifact.learned_prompts import read_semantics, write_semantics
from invariclip.artifact.projection import read_projection, write_projection
from invariclip.profile import read_profile, write_profile
from invariclip.records import seal
from invariclip.sites.live_site import SiteWindow
from invariclip.sites.site import new_site, read_site, site_bytes
from invariclip.sites.site_log import SiteLog, replay

WINDOW = SiteWindow(floor=4, step=2, block=4, blocks=4)


class Family(Base):
    """See the module."""

    count = 20_000
    what = (
        "projection, learned prompts, moments, embeddings, sites, machine profile, a live site's log (its facts, its "
        "start, its parts), the state of a training, the cache of embeddings and of declined interventions: damaged as "
        "above, one in place of another, and their facts changed under a digest that is right"
    )
    reference = (
        "refused (a cache and a training's state: as if they were not there); under a digest that is right also "
        "accepted, where every field has its type and all is written again as it was read"
    )

    def open(self, folder):
        self.folder = Path(folder) / "sealed"
        self.folder.mkdir(exist_ok=True)
        self.whole, self.readers = {}, {}
        for name, (content, read) in _files(Path(folder), self.folder).items():
            self.whole[name], self.readers[name] = content, read
            read(content)

    def draw(self, rng):
        name = rng.choice(list(self.whole))
        content, how = self.whole[name], rng.random()
        if how < 0.7:
            kind, changed = damaged(rng, content)
        elif how < 0.8 or name.startswith("cache"):  # a cache's digest is its name
            kind = "another file's content"
            changed = self.whole[rng.choice([other for other in self.whole if _unlike(other, name)])]
        else:
            kind, changed = _resealed(rng, content)
            return f"{name}: {kind}, sealed", lambda: self.readers[name](changed, resealed=True)
        return f"{name}: {kind}", lambda: self._refused(name, changed)

    def _refused(self, name, changed):
        self.readers[name](changed)
        raise WrongError("was read without a word")


def _unlike(one, other):
    if "site" in one and "site" in other:  # a log starts with a site
        return False
    return one.partition(":")[0] != other.partition(":")[0]


def _resealed(rng, content):
    """Facts changed at their structure, in a file whose digest is right again."""
    if content[:1] == b"{":
        kind, plain = restructured(rng, json.loads(content))
        text = written(plain)
        return kind, _sealed(text.encode("utf-8", "surrogatepass"))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    key = next(iter(metadata))
    kind, facts = restructured(rng, json.loads(metadata[key]))
    metadata[key] = written(facts)
    head = json.dumps(header).encode("utf-8", "surrogatepass")
    return kind, _sealed(len(head).to_bytes(8, "little") + head + content[8 + length :])


def _sealed(content):
    try:
        return seal(content)
    except ValueError:  # the place of the digest is gone
        return content


def _files(folder, place):
    """Name to content, and what reads such content: it raises where it is refused."""
    tiny_site = tiny.site()
    vectors = np.eye(8, dtype=np.float32)[:5]
    found = {
        "projection": _by(place, write_projection, tiny.projection(), read_projection),
        "learned prompts": _by(place, write_semantics, tiny.learned_prompts(), read_semantics),
        "site": _by(place, lambda path, value: path.write_bytes(site_bytes(value)), tiny_site, read_site),
        "embeddings": _by(
            place, lambda path, value: path.write_bytes(embeddings_bytes(value)),
            Embeddings(vectors, tuple("abcdé"), "0" * 32), read_embeddings,
        ),
        "machine profile": _by(place, write_profile, read_profile(_profile(folder)), read_profile),
    }  # fmt: skip
    return {**found, **_moments(place), **_logs(place), **_training(place), **_caches(place)}


def _profile(folder):
    return next(tiny.plain_artifact(folder).glob("machine-*.json"))


def _by(place, write, value, read):
    """A file by what writes and reads it; what is read under a changed digest must be written as it was read."""
    path, again = place / "file", place / "again"
    write(path, value)
    whole = path.read_bytes()

    def reader(content, resealed=False):
        path.write_bytes(content)
        found = read(path)
        if resealed:
            write(again, found)
            _require_same(content, again.read_bytes())

    return whole, reader


def _require_same(content, again):
    """That nothing which a file says was dropped or became something else."""
    given, kept = _facts(content), _facts(again)
    for facts in (given, kept):
        facts.pop("file_sha256", None)
        for of_the_writer in ("invariclip", "numpy", "warnings"):
            facts.pop(of_the_writer, None)
    differ = sorted(
        key for key in given.keys() | kept.keys() if not same_json(given.get(key, "none"), kept.get(key, "none"))
    )
    if differ:
        raise WrongError(f"read and written again it differs in {', '.join(differ)}: "
                         f"{[(given.get(key, 'none'), kept.get(key, 'none')) for key in differ]!s:.300}")  # fmt: skip


def _facts(content):
    if content[:1] == b"{":
        return json.loads(content)
    length = int.from_bytes(content[:8], "little")
    return json.loads(next(iter(json.loads(content[8 : 8 + length])["__metadata__"].values())))


def _moments(place):
    from invariclip.calibrate.data.moments import empty
    from invariclip.calibrate.data.problems import ProblemCounts
    from invariclip.calibrate.data.stream.blocks import Shard
    from invariclip.calibrate.data.stream.state import MomentsState, read_state, write_state

    rng = np.random.default_rng(3)
    outer = rng.normal(size=(4, 4))
    state, tally = MomentsState(4, "0" * 64), ProblemCounts()
    tally.add("unreadable", ["a.png", "é.png"])
    points = empty(4)
    points = type(points)(**{**points.__dict__, "point_sum": outer[0], "point_outer": outer @ outer.T, "points": 9})
    pairs = empty(4)
    pairs = type(pairs)(**{**pairs.__dict__, "pair_outer": outer @ outer.T, "pairs": 5, "pair_weight": 4.5})
    state.add(Shard("photos", "one", {"a": 1}), {"points": points, "natural": pairs}, tally)
    return {"moments": _by(place, write_state, state, read_state)}


def _logs(place):
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(24, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    bank = np.eye(8, dtype=np.float32)[:3]
    whole = place / "log"
    if not whole.is_dir():
        log = SiteLog(whole, new_site("yard", "0" * 32, tiny.projection().training_mean, 3, {}), WINDOW, 1 << 20)
        log(rows[:10])
        log("freeze")
        log(rows[10:])
        log("thaw")
        log.flush()

    def of(name):
        def reader(content, resealed=False):
            changed = tiny.linked(whole, place / "changed-log")
            (changed / name).unlink()
            (changed / name).write_bytes(content)
            live = replay(changed, bank)
            if resealed and name == "log.json":
                window = json.loads(content)["window"]
                if {key: window.get(key, value) for key, value in asdict(WINDOW).items()} != asdict(live.window) or (
                    window.keys() - asdict(WINDOW).keys()
                ):
                    raise WrongError("its window is not what the file says")
            elif resealed:
                _require_log(content, name, changed)

        return (whole / name).read_bytes(), reader

    names = ("log.json", "start.safetensors", "000001.safetensors")
    return {f"site log: {name}": of(name) for name in names}


def _require_log(content, name, changed):
    """That a part says what was read of it."""
    facts = _facts(content)
    if name.startswith("start"):
        _require_same(content, site_bytes(read_site(changed / name)))
        return
    known = {"file_sha256", "schema", "events"}
    events = facts["events"]
    if facts.keys() - known or not all(
        len(one) == 2 and type(one[0]) is int and one[1] in ("freeze", "thaw", "reset") for one in events
    ):
        raise WrongError(f"holds what nobody reads, or events of another type: {facts!s:.200}")


def _training(place):
    import torch

    from invariclip.calibrate.prompts.training import TrainingState, read_state, write_state

    generator = torch.Generator().manual_seed(0)
    tensors = {"context": torch.randn(2, 3, 4, generator=generator), "bias": torch.zeros(3)}
    state = TrainingState(7, tensors, {"context": tensors["context"] + 1}, 0.5, 3, 1, [(1, 0.75), (3, 0.5)])
    path, again = place / "training", place / "training again"
    write_state(path, "key", state, {"0.step": torch.tensor(7.0)})
    whole = path.read_bytes()

    def reader(content, resealed=False):
        path.write_bytes(content)
        found = read_state(path, "key")
        if found is None:
            raise _not_there()
        if resealed:
            write_state(again, "key", *found)
            _require_same(content, again.read_bytes())

    return {"state of a training": (whole, reader)}


def _caches(place):
    from invariclip.calibrate.data.embed import Store

    rows = {bytes([number] * 32): np.full(8, number, dtype=np.float32) for number in range(6)}
    declined = {bytes([number] * 32): "has no background" for number in range(6, 9)}
    cache = place / "cache"
    Store(cache, "space", 8).add(rows, declined)
    files = {path.suffixes[-1]: path for path in Store(cache, "space", 8).folder.iterdir()}
    wholes = {suffix: path.read_bytes() for suffix, path in files.items()}

    def of(suffix):
        def reader(content, resealed=False):
            for each, path in files.items():
                path.write_bytes(wholes[each])
            files[suffix].write_bytes(content)
            store = Store(cache, "space", 8)
            kept = store.rows if suffix == ".safetensors" else store.declined
            if not kept:
                raise _not_there()
            wanted = rows if suffix == ".safetensors" else declined
            if kept.keys() != wanted.keys() or not all(np.array_equal(kept[key], wanted[key]) for key in wanted):
                raise WrongError("the cache holds what was never put in")

        return wholes[suffix], reader

    return {"cache: embeddings": of(".safetensors"), "cache: declined": of(".json")}


def _not_there():
    from invariclip.errors import InputError

    return InputError("as if it were not there: it is made again")
