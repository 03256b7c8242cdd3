"""Headers of safetensors files: offsets, dtypes, lengths, names; as a checkpoint, as embeddings, as a file of ours."""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from fuzz import tiny
from fuzz.base import Family as Base
from fuzz.base import WrongError
from fuzz.compare import same_array
from fuzz.mutate import HOSTILE, damaged, restructured, written
from invariclip.artifact.projection import PROJECTION_FILE, read_projection
from invariclip.calibrate.data.sources.embeddings import open_tables
from invariclip.export.checkpoints.weights import read_state_dict
from invariclip.records import seal

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1",
          "BOOL": "|b1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}  # fmt: skip
ODD = ("F8_E4M3", "BF16", "F4", "X", "f32", "", "F6_E2M3", "C64")


class Family(Base):
    """See the module."""

    count = 8_000
    what = (
        "offsets that overlap, leave gaps, turn round or leave the file, shapes and dtypes that do not fit "
        "them, lengths of "
        "the header up to 2^64, headers that are no JSON, names twice or odd, damaged bytes; read as a checkpoint, as "
        "embeddings to calibrate on, and as a projection under a digest that is right"
    )
    reference = "a reader of a page that takes every tensor's bytes by its own offsets, bit by bit"

    def open(self, folder):
        self.path = Path(folder) / "fuzzed.safetensors"
        rng = np.random.default_rng(0)
        self.weights = save({"a.weight": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(size=5),
                             "c": np.arange(6, dtype=np.int64), "d": rng.normal(size=(2,
                             2)).astype(np.float16)})  # fmt: skip
        self.rows = save({"first": rng.normal(size=(6, 4)).astype(np.float32), "weights": rng.random(6),
                          "second": rng.normal(size=(6, 4)).astype(np.float32)})  # fmt: skip
        projection = tiny.projection()
        self.ours = PROJECTION_FILE.to_bytes(
            {"A_inv": projection.A_inv, "eigenvalues": projection.eigenvalues,
            "training_mean": projection.training_mean},
            {"estimator": "icm", "strength": 3.0, "provenance": {}},
        )  # fmt: skip
        self.readers = {"checkpoint": (self.weights, self._checkpoint), "embeddings": (self.rows, self._embeddings),
                        "projection": (self.ours, self._projection)}  # fmt: skip
        for content, act in self.readers.values():
            act(content)

    def draw(self, rng):
        what = rng.choice(list(self.readers))
        content, act = self.readers[what]
        kind, changed = _changed(rng, content)
        if what == "projection" and rng.random() < 0.9:
            try:
                changed = seal(changed)
            except ValueError:
                kind = f"{kind}, unsealed"
        return f"{what}: {kind}", lambda: act(changed)

    def _checkpoint(self, content):
        self.path.write_bytes(content)
        read = read_state_dict(self.path)
        held = _read(content)
        # those that wrappers and counters are named by are taken off and left out, as documented
        if len(read) != len(held):
            raise WrongError(f"{len(read)} of {len(held)} tensors")
        for name, tensor in read.items():
            same = [one for key, one in held.items() if key.endswith(name)]
            array = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
            if not any(array.tobytes() == raw and list(tensor.shape) == list(shape) for _, shape, raw in same):
                raise WrongError(f"{name} holds what the file does not")

    def _embeddings(self, content):
        self.path.write_bytes(content)
        table = open_tables({"": self.path})
        held = _read(content)
        if set(table.columns) != set(held):
            raise WrongError(f"columns {sorted(table.columns)}, and the file holds {sorted(held)}")
        parts = list(table.read(0, table.rows, 4)) if table.rows else []
        for name, (dtype, shape, raw) in held.items():
            wanted = np.frombuffer(raw, DTYPES[dtype]).reshape(shape)
            got = np.concatenate([part[name] for part in parts]) if parts else np.empty(shape, wanted.dtype)
            if not same_array(got, wanted):
                raise WrongError(f"{name} is not what the file holds")

    def _projection(self, content):
        self.path.write_bytes(content)
        read, held = read_projection(self.path), _read(content)
        for name, array in (
            ("A_inv", read.A_inv),
            ("eigenvalues", read.eigenvalues),
            ("training_mean", read.training_mean),
        ):
            dtype, shape, raw = held[name]
            if not same_array(array, np.frombuffer(raw, DTYPES[dtype]).reshape(shape)):
                raise WrongError(f"{name} is not what the file holds")


def _read(content):
    """The tensors of a safetensors file, by name: dtype, shape, bytes; as its format says, and no more."""
    length = int.from_bytes(content[:8], "little")
    pairs = json.loads(content[8 : 8 + length], object_pairs_hook=list)
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise WrongError("accepted a name that stands twice")
    data, held, taken = content[8 + length :], {}, []
    for name, entry in pairs:
        if name == "__metadata__":
            continue
        if len({key for key, _ in entry}) != len(entry):
            raise WrongError("accepted a field that stands twice")
        facts = dict(entry)
        start, stop = facts["data_offsets"]
        if not 0 <= start <= stop <= len(data):
            raise WrongError(f"accepted offsets {start} to {stop} of {len(data)} bytes")
        held[name] = facts["dtype"], facts["shape"], data[start:stop]
        taken.append((start, stop))
    reached = 0
    for start, stop in sorted(taken):
        if start != reached:
            raise WrongError("accepted tensors that overlap or leave a gap")
        reached = stop
    if reached != len(data):
        raise WrongError("accepted bytes that belong to no tensor")
    return held


def _changed(rng, content):
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = rng.choice(("structure", "structure", "offsets", "offsets", "shape", "dtype", "length", "bytes", "name",
                       "padded", "more data"))  # fmt: skip
    if kind == "bytes":
        return damaged(rng, content)
    if kind == "length":
        wrong = rng.choice((0, 1, 7, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1,
        rng.randrange(2**64),
                            100_000_001))  # fmt: skip
        return kind, struct.pack("<Q", wrong) + content[8:]
    tensors = [name for name in header if name != "__metadata__"]
    chosen = rng.choice(tensors)
    entry = header[chosen]
    if kind == "structure":
        kind, header = restructured(rng, header)
    elif kind == "offsets":
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = rng.choice((
            [start - 1, stop], [start, stop + 1], [stop, start], [start, stop + 8], [start + 4, stop + 4], [0,
            len(data)],
            [start, 2**64], [2**63, 2**63 + 4], [-4, stop], [start, start], [start, stop, 1], [start], [0.0, 4.0],
            header[rng.choice(tensors)]["data_offsets"],
        ))  # fmt: skip
    elif kind == "shape":
        entry["shape"] = rng.choice((
            [], [0], [1], [2**62, 4], [2**32, 2**32], [2**64], [-1, -12], [12], [3, 4, 1], [1] * 70, [4, 3], [2.0], "x",
            [0, 2**62], [6, 0],
        ))  # fmt: skip
    elif kind == "dtype":
        entry["dtype"] = rng.choice((*DTYPES, *ODD, *HOSTILE[:6]))
    elif kind == "name":
        header[
            rng.choice(("", "é", "a.weight\0", "__metadata__", "../x", "module.a", "model.b", "x" * 5000, "\ud800"))
        ] = header.pop(chosen)
    head = written(header).encode("utf-8", "surrogatepass")
    if kind == "padded":
        head += rng.choice((b" " * 7, b" " * 4096, b"\0" * 8, b"\n", b"x"))
    if kind == "more data":
        data += bytes(rng.choice((1, 8, 4096)))
    return kind, struct.pack("<Q", len(head)) + head + data
