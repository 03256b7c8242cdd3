"""Torch's checkpoint files: the zip, what lies in it, and the older format without one."""

import io
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from fuzz.base import Family as Base
from fuzz.base import WrongError
from fuzz.mutate import damaged
from invariclip.export.checkpoints.weights import read_state_dict

SENTINEL = "invariclip-fuzz-ran-code"
ATTACKS = tuple(
    b"\x80\x02c%s\n%s\n(X%s%sttR." % (module, name, struct.pack("<I", len(argument)), argument)
    for module, name, argument in (
        (b"os", b"system", b"touch %s"), (b"builtins", b"exec", b"open('%s','w')"), (b"builtins", b"eval",
        b"open('%s','w')"),
        (b"subprocess", b"getoutput", b"touch %s"), (b"torch", b"load", b"%s"), (b"pathlib", b"Path", b"%s"),
        (b"torch.serialization", b"load", b"%s"), (b"torch.jit._serialization", b"load", b"%s"),
    )
)  # fmt: skip


class Family(Base):
    """See the module."""

    count = 6_000
    what = (
        "state_dicts as torch writes them, plain, inside training checkpoints and in the older format without a "
        "zip: damaged "
        "bytes, members lost, twice, renamed, cut, longer, with other bytes under checksums that are right, "
        "pickles that "
        "call something, other opcodes"
    )
    reference = (
        "of damaged bytes the tensors that were saved, bit by bit; of other members under right checksums those that "
        "torch.load(weights_only=True) itself gives; no code of a file is ever run; the older format is refused"
    )
    memory = 2 << 30

    def open(self, folder):
        self.folder = Path(folder) / "checkpoints"
        self.folder.mkdir(exist_ok=True)
        self.sentinel = self.folder / SENTINEL
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(6, 5, generator=generator)
        tensors = OrderedDict(
            weight=torch.randn(3, 4, generator=generator), half=torch.randn(7, generator=generator).half(),
            turned=base.T,
            part=base[1:3], brain=torch.randn(5, generator=generator).bfloat16(), number=torch.tensor(4.5),
            count=torch.arange(6),
            none=torch.empty(0, 3),
        )  # fmt: skip
        self.seeds = {}
        for name, content, zipped in (
            ("plain", tensors, True), ("training", {"epoch": 3, "state_dict": tensors, "optimizer": {"lr": 0.1}}, True),
            ("wrapped", {f"module.{key}": value for key, value in tensors.items()}, True), ("older", tensors, False),
        ):  # fmt: skip
            stream = io.BytesIO()
            torch.save(content, stream, _use_new_zipfile_serialization=zipped)
            self.seeds[name] = stream.getvalue()
        self.saved = {name: _bits(tensor) for name, tensor in tensors.items()}
        for name in self.seeds:
            if name != "older":
                self._read(self.seeds[name], ".pt", damage=True)

    def draw(self, rng):
        name = rng.choice(list(self.seeds))
        content, how = self.seeds[name], rng.random()
        suffix = rng.choice((".pt", ".pt", ".bin", ".ckpt", ".pth"))
        if name == "older":
            kind, changed = damaged(rng, content) if how < 0.9 else ("as it is", content)
            return f"{name}: {kind}", lambda: self._refused(changed, suffix)
        if how < 0.5:
            kind, changed = damaged(rng, content)
            return f"{name}: {kind}", lambda: self._read(changed, suffix, damage=True)
        if how < 0.6:
            return f"{name}: calls something", lambda: self._read(self._attack(rng, content), suffix)
        kind, changed = _other_members(rng, content)
        return f"{name}: {kind}", lambda: self._read(changed, suffix)

    def _attack(self, rng, content):
        pickle = rng.choice(ATTACKS).replace(b"%s", str(self.sentinel).encode())
        if rng.random() < 0.2:
            return pickle
        return _rebuilt(content, lambda name, raw: pickle if name.endswith("data.pkl") else raw)

    def _refused(self, content, suffix):
        self._read(content, suffix)
        raise WrongError("a file of the older format was accepted: nothing in it tells damage")

    def _read(self, content, suffix, damage=False):
        """`damage`: whether every byte of the file is under a checksum, so that nothing else may come of it."""
        path = self.folder / f"weights{suffix}"
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = {name: _bits(tensor) for name, tensor in read_state_dict(path).items()}
        finally:
            if self.sentinel.exists():
                self.sentinel.unlink()
                raise WrongError("code of the file was run")
        if damage:
            if read != self.saved:
                raise WrongError("damage was read as weights")
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = list(_tensors(torch.load(path, map_location="cpu", weights_only=True)))
        for name, bits in read.items():
            if not any(key.endswith(name) and bits == _bits(tensor) for key, tensor in held):
                raise WrongError(f"{name!r:.100} is not in the file")
        names = {key for key, _ in held}
        if len(read) < len(names & {key for key, _ in held if "optimizer" not in key}) and "model" not in names:
            raise WrongError(f"{len(read)} of {len(names)} tensors")


def _bits(tensor):
    flat = tensor.detach().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _tensors(value, depth=5):
    """Tensors below a value, with their names."""
    if not isinstance(value, dict) or not depth:
        return
    for name, one in value.items():
        if isinstance(one, torch.Tensor):
            yield str(name), one
        else:
            yield from _tensors(one, depth - 1)


def _members(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def _zipped(members, packing=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand twice
        with zipfile.ZipFile(stream, "w", packing) as archive:
            for name, raw in members:
                archive.writestr(zipfile.ZipInfo(name), raw, packing)
    return stream.getvalue()


def _rebuilt(content, change):
    return _zipped([(name, change(name, raw)) for name, raw in _members(content)])


def _other_members(rng, content):
    members = _members(content)
    kind = rng.choice(("a member lost", "a member twice", "renamed", "cut", "longer", "other bytes", "other bytes",
    "an opcode",
                       "an opcode", "packed", "byte order", "a number in the pickle"))  # fmt: skip
    place = rng.randrange(len(members))
    name, raw = members[place]
    if kind == "a member lost":
        del members[place]
    elif kind == "a member twice":
        members.insert(rng.randrange(len(members) + 1), (name, rng.choice((raw, b"", damaged(rng, raw)[1]))))
    elif kind == "renamed":
        members[place] = (
            rng.choice((f"../{name}", f"/{name}", name.upper(), name.replace("archive", "x"), "data.pkl", f"{name}0")),
            raw,
        )
    elif kind == "cut":
        members[place] = (name, raw[: rng.randrange(len(raw) + 1)])
    elif kind == "longer":
        members[place] = (name, raw + rng.randbytes(rng.choice((1, 8, 5000))))
    elif kind == "other bytes":
        members[place] = (name, damaged(rng, raw)[1])
    elif kind == "packed":
        return kind, _zipped(members, zipfile.ZIP_DEFLATED)
    elif kind == "byte order":
        members = [
            (one, rng.choice((b"big", b"", b"middle", b"little\n")) if one.endswith("byteorder") else old)
            for one, old in members
        ]
    else:
        at = next(index for index, (one, _) in enumerate(members) if one.endswith("data.pkl"))
        members[at] = (members[at][0], _other_pickle(rng, members[at][1], kind == "an opcode"))
    return kind, _zipped(members)


def _other_pickle(rng, raw, opcode):
    """A pickle with another opcode, or another number: sizes, strides, offsets of tensors."""
    operations = [(one, argument, place) for one, argument, place in pickletools.genops(raw)]
    changed = bytearray(raw)
    if opcode:
        place = rng.choice(operations)[2]
        changed[place] = ord(rng.choice(pickletools.opcodes).code)
        return bytes(changed)
    numbers = [(one, place) for one, _, place in operations if one.name in ("BININT", "BININT1", "BININT2")]
    one, place = rng.choice(numbers)
    size = {"BININT": 4, "BININT1": 1, "BININT2": 2}[one.name]
    value = rng.choice((0, 1, 2, 3, 7, 255, -1, 2**31 - 1, 2**16, rng.randrange(100)))
    changed[place : place + 1 + size] = b"J" + struct.pack("<i", value)
    return bytes(changed)
