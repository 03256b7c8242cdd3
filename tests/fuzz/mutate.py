"""Bytes damaged as disks, networks and editors damage them, and JSON that is changed where its structure is."""

import json

HOSTILE = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 1e308, -1e308, 5e-324, 0.5, -0.0, "", " ", "0",
    "a", "x" * 5000, "\0", "a\nb", "\u2028", "\ud800", "\udc80", "../x", "/etc/hostname", "é", "{}", "NaN", [], {},
    [[]], [None], [0], [1.5, "a"], {"a": 1}, {"": None}, ["a"] * 300,
)  # fmt: skip
"""Values of every type, at the edges of their ranges."""


class Raw(str):
    """JSON text that stands in a value's place as it is."""

    __slots__ = ()


class Pairs(list):
    """An object as name and value, in order; a name may stand twice."""

    __slots__ = ()


RAW = (Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-1e999"), Raw("9" * 400), Raw("9" * 5000),
       Raw('"\\ud800"'), Raw('"\\udc00x"'), Raw("01"), Raw("1."), Raw("'a'"), Raw(""), Raw("[" * 3000 + "]" * 3000),
       Raw('{"a":' * 3000 + "1" + "}" * 3000), Raw("[" * 200000), Raw('"\t"'), Raw("0x1"), Raw("nul"), Raw("1e-400"),
       Raw('"\\u0000"'), Raw("1E5"), Raw("-0"), Raw("1.0"), Raw('"\\ud83d\\ude00"'))  # fmt: skip


def damaged(rng, content):
    """How bytes are damaged, and the damaged bytes; never the same as before."""
    kind, act = rng.choice(_DAMAGES)
    for _ in range(20):
        found = act(rng, content)
        if found != content:
            return kind, found
    return "one bit", _bit(rng, content or b"\0")


def _bit(rng, content):
    changed = bytearray(content or b"\0")
    place = rng.randrange(len(changed))
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _bytes(rng, content):
    changed = bytearray(content or b"\0")
    for _ in range(rng.choice((2, 3, 8, 64))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _run(rng, content):
    """Some bytes in a row become others: noise, zeros, or ones."""
    size = min(len(content), rng.choice((2, 8, 64, 512, 4096)))
    start = rng.randrange(len(content) - size + 1)
    new = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size))
    return content[:start] + new + content[start + size :]


def _cut(rng, content):
    return content[: rng.choice((0, 1, 8, rng.randrange(len(content) + 1), max(0, len(content) - rng.randrange(1, 9))))]


def _grown(rng, content):
    return content + rng.choice((b"\0", b"\n", rng.randbytes(rng.randrange(1, 64)), content[:512], bytes(512)))


def _lost(rng, content):
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice((1, 2, 16, 512)) :]


def _put_in(rng, content):
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.randbytes(rng.choice((1, 2, 16, 512))) + content[start:]


def _exchanged(rng, content):
    """Two pieces of equal size change places."""
    size = max(1, min(len(content) // 2, rng.choice((1, 16, 256))))
    first, second = sorted(rng.randrange(max(1, len(content) - size + 1)) for _ in range(2))
    if second < first + size:
        return _bit(rng, content)
    one, two = content[first : first + size], content[second : second + size]
    return content[:first] + two + content[first + size : second] + one + content[second + size :]


_DAMAGES = (
    ("one bit", _bit), ("one bit", _bit), ("one bit", _bit), ("some bytes", _bytes), ("bytes in a row", _run),
    ("cut off", _cut), ("cut off", _cut), ("longer", _grown), ("a piece lost", _lost), ("a piece put in", _put_in),
    ("pieces exchanged", _exchanged),
)  # fmt: skip


def written(value, indent=None):
    """JSON text of a value in which `Raw` and `Pairs` may stand."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(name)}: {written(one)}" for name, one in value) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {written(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if _is_text(value) else json.dumps(value)


def _is_text(value):
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def restructured(rng, plain, raw=True):
    """What was done to a JSON value, and the changed value, of which nothing is shared with the old one.

    Args:
        rng: Draws.
        plain: Of JSON's types.
        raw: Whether text may stand in it that is no JSON.
    """
    changed = json.loads(json.dumps(plain))
    kind = rng.choice(("another value", "another value", "another type", "a field lost", "a field more", "twice",
                       "renamed", "nested", "longer list"))  # fmt: skip
    places = list(_places(changed))
    holder, key = rng.choice(places) if places else (None, None)
    if holder is None:
        return "another value", rng.choice(HOSTILE)
    if kind == "twice" and raw:
        return kind, _twice(rng, changed)
    if kind == "a field lost":
        del holder[key]
    elif kind == "a field more":
        objects = [changed, *(h[k] for h, k in places if isinstance(h[k], dict))]
        objects = [one for one in objects if isinstance(one, dict)] or [{}]
        rng.choice(objects)[rng.choice(("extra", "", "a" * 300, "é", "\ud800", "path", "schema"))] = rng.choice(HOSTILE)
    elif kind == "renamed" and isinstance(holder, dict):
        holder[rng.choice((key.upper(), f"{key} ", key[:-1], f"{key}\0", "é"))] = holder.pop(key)
    elif kind == "nested":
        holder[key] = rng.choice(([holder[key]], {"a": holder[key]}, [[[holder[key]]]]))
    elif kind == "longer list" and isinstance(holder[key], list) and holder[key]:
        holder[key] = holder[key] * rng.choice((2, 3, 50))
    elif kind == "another value" and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        value = holder[key]
        holder[key] = rng.choice((value + 1, value - 1, -value, value * 2, 0, value * 10**6, value + 0.5, 2**31, 2**63,
                                  1e300, *(RAW[:7] if raw else ())))  # fmt: skip
    else:
        kind = "another type"
        holder[key] = rng.choice((*HOSTILE, *(RAW if raw else ())))
    return kind, changed


def _places(value):
    """Every place in a value where another may be put: holder and key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield value, key
        yield from _places(one)


def _twice(rng, value):
    """An object of which one name stands twice, with the old value or another."""
    objects = [value] if isinstance(value, dict) and value else []
    holders = [(h, k) for h, k in _places(value) if isinstance(h[k], dict) and h[k]]
    if holders and (not objects or rng.random() < 0.7):
        holder, key = rng.choice(holders)
        holder[key] = _repeated(rng, holder[key])
        return value
    return _repeated(rng, value) if objects else Pairs([("a", 1), ("a", 1)])


def _repeated(rng, record):
    pairs = Pairs(record.items())
    name, value = rng.choice(pairs)
    pairs.insert(rng.randrange(len(pairs) + 1), (name, rng.choice((value, None, 1, "other"))))
    return pairs
