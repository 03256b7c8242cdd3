"""JSON that others write: a manifest whose digest is right, and requests to the server; and the reader under both."""

import base64
import contextlib
import json
from pathlib import Path

import msgspec

from fuzz import tiny
from fuzz.base import Family as Base
from fuzz.base import WrongError
from fuzz.compare import same_json
from fuzz.mutate import HOSTILE, damaged, restructured, written
from invariclip.artifact.folder import MANIFEST, read_manifest
from invariclip.records import parse_json, seal
from invariclip.serve import requests
from invariclip.serve.limits import Limits

PIXEL = base64.b64encode(b"not yet an image").decode()
CLASSIFY = {
    "images": [PIXEL, {"name": "a.png", "data": PIXEL}, f"data:image/png;base64,{PIXEL}"], "classes": ["cat", "dög",
    "木"],
    "templates": ["a photo of a {}.", "{}"], "abstain_above": 0.5, "uncertainty": "energy", "top": 3, "site": "yard",
}  # fmt: skip
EMBED = {"texts": ["a", "b, c"], "site": None}
PLAIN = {"a": [1, 2.5, -3e-7, True, None, 'é\u2028"\\'], "b": {"c": {"d": []}, "": 0}, "n": 2**60, "😀": "😀"}


class Family(Base):
    """See the module."""

    count = 12_000
    what = (
        "JSON texts, manifests under a digest that is right, and bodies of requests: other types and values, "
        "names lost, "
        "more, twice or renamed, depth, NaN, numbers beyond all bounds, halves of surrogate pairs, damaged bytes"
    )
    reference = (
        "texts: msgspec's parser; manifests: what is written again; requests: the standard library's JSON, and "
        "RFC 4648, field by field"
    )

    def open(self, folder):
        self.manifests = [
            parse_json((make(folder) / MANIFEST).read_bytes(), "x") for make in (tiny.cdc_artifact, tiny.site_artifact)
        ]
        self.folder = Path(folder) / "manifest"
        self.folder.mkdir(exist_ok=True)
        for plain in (PLAIN, *self.manifests):
            _text(json.dumps(plain).encode())
        for manifest in self.manifests:
            self._manifest(_sealed(manifest))
        for plain, asked in ((CLASSIFY, requests.classify), (EMBED, requests.embed)):
            _request(json.dumps(plain).encode(), asked)

    def draw(self, rng):
        what = rng.choice(("text", "manifest", "manifest", "classify", "embed"))
        plain = {
            "text": PLAIN, "manifest": rng.choice(self.manifests), "classify": CLASSIFY, "embed": EMBED
        }[what]  # fmt: skip
        if rng.random() < 0.25:
            text = json.dumps(plain, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1))).encode()
            kind, content = damaged(rng, text)
        else:
            kind, changed = restructured(rng, plain)
            while rng.random() < 0.2 and isinstance(changed, dict) and kind != "twice":
                with contextlib.suppress(TypeError, ValueError, UnicodeError):
                    changed[rng.choice(list(changed) or [""])] = rng.choice(HOSTILE)
            content = written(changed).encode("utf-8", "surrogatepass")
        act = {"text": _text, "manifest": lambda given: self._manifest(_resealed(given)),
               "classify": lambda given: _request(given, requests.classify),
               "embed": lambda given: _request(given, requests.embed)}[what]  # fmt: skip
        return f"{what}: {kind}", lambda: act(content)

    def _manifest(self, content):
        (self.folder / MANIFEST).write_bytes(content)
        manifest = read_manifest(self.folder)
        given = msgspec.json.decode(content)
        del given["file_sha256"]
        kept = json.loads(json.dumps(manifest.to_json()))
        missing = {name: value for name, value in kept.items() if name not in given}
        known = {"left_out": {}, "fast_pixels": {}, "cdc": None, "cdc_file": None, "site": None, "site_file": None}
        if any(name not in known or known[name] != value for name, value in missing.items()):
            raise WrongError(f"fields that the file lacks were made up: {sorted(missing)}")
        _require_within(given, kept, "")


def _require_within(given, kept, path):
    """That all that was given was kept as it was."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            if name not in kept:
                raise WrongError(f"{path}.{name} was dropped")
            _require_within(value, kept[name], f"{path}.{name}")
    elif not same_json(given, kept):
        raise WrongError(f"{path}: {given!r:.100} was read as {kept!r:.100}")


def _sealed(manifest):
    return seal(json.dumps({"file_sha256": "0" * 64, **manifest}).encode())


def _resealed(content):
    with contextlib.suppress(ValueError):  # the place of the digest is gone
        return seal(content)
    return content


def _text(content):
    ours = parse_json(content, "a text")
    try:
        theirs = msgspec.json.decode(content.removeprefix(b"\xef\xbb\xbf"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WrongError(f"accepted what msgspec refuses ({error})") from None
    if not same_json(ours, theirs):
        raise WrongError(f"read as {ours!r:.200}, by msgspec as {theirs!r:.200}")


def _request(content, asked):
    question = asked(requests.Body(requests.from_json(content, Limits())), Limits())
    given = json.loads(content.decode("utf-8-sig"))
    images = given.get("images")
    images = images if isinstance(images, list) else [] if images is None else [images]
    texts = [one["data"] if isinstance(one, dict) else one for one in images]
    texts = [text.partition(",")[2] if text.startswith("data:") else text for text in texts]
    if [image.data for image in question.images] != list(map(_decoded, texts)):
        raise WrongError("its images are not what the body's base64 says")
    known = {"images", "texts", "site"} if asked is requests.embed else {
        "images", "classes", "templates", "abstain_above", "uncertainty", "top", "site"
    }  # fmt: skip
    if given.keys() - known:
        raise WrongError(f"nobody reads {sorted(given.keys() - known)}")
    if asked is requests.embed:
        _require_texts(given.get("texts"), question.texts, ())
        return
    _require_texts(given.get("classes"), question.classes, None)
    if isinstance(given.get("templates"), list):
        _require_texts(given["templates"], question.templates, None)
    top = given.get("top", 3)
    if question.top != int(top) or isinstance(top, bool | float):
        raise WrongError(f"top {top!r} was read as {question.top!r}")
    if given.get("uncertainty") != question.uncertainty:
        raise WrongError(f"uncertainty {given.get('uncertainty')!r} was read as {question.uncertainty!r}")
    limit = given.get("abstain_above", requests.UNSAID)
    in_range = isinstance(limit, int | float) and not isinstance(limit, bool) and 0 <= limit <= 1
    if in_range and question.abstain_above != limit:
        raise WrongError(f"abstain_above {limit!r} was read as {question.abstain_above!r}")


def _decoded(text):
    """Base64's letters among others, as RFC 4648 has them, without its library."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    bits = "".join(f"{letters.index(letter):06b}" for letter in "".join(text.split()).rstrip("="))
    return bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits) - 7, 8))


def _require_texts(given, read, nothing):
    if isinstance(given, str):
        given = [given] if read and len(read) == 1 else [part.strip() for part in given.split(",") if part.strip()]
    if (nothing if given is None else tuple(given)) != read:
        raise WrongError(f"texts {given!r:.100} were read as {read!r:.100}")
