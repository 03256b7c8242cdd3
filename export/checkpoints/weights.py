"""Files that come with a model, read without trust: tensors (nothing is unpickled), and JSON of bounded size.

A digest names the weights whatever the container: `sha256` over the tensors of the file in the order of their names;
each contributes `name NUL dtype NUL shape NUL` and its bytes, little-endian, row by row. A `.pt` and a `.safetensors`
with the same tensors therefore have the same digest; a float16 copy of float32 weights has another one, because it is
another model.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints import hugging_face
from invariclip.records import read_json, safetensors_header

if TYPE_CHECKING:
    from pathlib import Path

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
"""Endings of the file that says which tensor lies in which of several files, safetensors or torch's."""
_AT_A_TIME = 64 * 2**20
"""Bytes read through one mapping of a file: pages of a mapping stay in memory for as long as it does."""
_MAX_INDEX = 64 * 2**20
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "n_averaged")
"""Numbers that OpenAI's files and torch's averaged models keep beside the weights."""
_PLAIN = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
_AVERAGED = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema", "params_ema")
"""Entries of training checkpoints that hold weights, and those that hold their exponential moving averages."""
_PREFIXES = ("module.", "model.", "clip_model.", "clip.", "net.", "network.", "ema_model.")
"""What wrappers put before every name."""
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch's compiler and its wrappers put into names, at any depth."""
_MAX_DEPTH = 4
_SCRIPT = "/constants.pkl"
"""Ending of a name that every TorchScript archive has, and no other of torch's."""
_SHOWN = 3
_HEAD = 512
_CONVERT = "save its state_dict() as .safetensors (safetensors.torch.save_file) where it was made"


class CheckpointWarning(UserWarning):
    """A checkpoint may want something else than what was taken."""


def read_state_dict(path: Path, notes: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Reads the tensors of a checkpoint, as the file stores them.

    Of a training checkpoint the entry with the weights is taken; where it has plain and averaged ones, the plain ones,
    with a warning. What wrappers put before names (`module.`, `_orig_mod.`, …) goes.

    Args:
        path: `.safetensors`, or the index of several files; or `.pt`, `.pth`, `.bin`, `.ckpt`, which torch reads with
            `weights_only=True` and nothing else.
        notes: What was taken and stripped is appended, in words.

    Returns:
        Tensors by name, on the CPU, in the file's dtypes; in memory once, and independent of the file from then on.

    Raises:
        CheckpointError: The file is missing, of another format, truncated, holds objects besides tensors, or several
            sets of weights.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    sharded = path.name.endswith(INDEX_SUFFIXES)
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES and not sharded:
        raise CheckpointError(f"{path}: not a checkpoint format; known endings: {' '.join(CHECKPOINT_SUFFIXES)}")
    content: Any
    if sharded:
        content = _read_shards(path)
    else:
        content = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_torch(path)
    content, places = _weights_of(content, path)
    named = content if isinstance(content, Mapping) else {}
    tensors = {str(name): value for name, value in named.items() if isinstance(value, torch.Tensor)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _NOT_WEIGHTS}
    if not tensors:
        entries = " ".join(", ".join(str(name)[:40] for name in list(named)[:8]).split())
        raise CheckpointError(
            f"{path}: not a checkpoint, it holds no tensors by name{f' (entries: {entries})' if entries else ''}"
        )
    tensors, stripped = _unwrapped(tensors, path)
    if notes is not None:
        notes.extend(f"its {place}" for place in places)
        notes.extend(f"names without {prefix}" for prefix in stripped)
    return tensors


def _weights_of(content: Any, path: Path) -> tuple[Any, list[str]]:
    """The mapping that holds the weights, and the names of the entries that led there."""
    places: list[str] = []
    while isinstance(content, Mapping) and len(places) < _MAX_DEPTH:
        plain, averaged = (
            [name for name in names if isinstance(content.get(name), Mapping) and _holds_tensors(content[name])]
            for names in (_PLAIN, _AVERAGED)
        )
        if len(plain or averaged) > 1:
            raise CheckpointError(
                f"{path}: holds several sets of weights ({', '.join(plain + averaged)}), and nothing says which one "
                "is meant; save that one as .safetensors (safetensors.torch.save_file)"
            )
        if plain and averaged:
            warnings.warn(
                f"{path}: holds weights ({plain[0]}) and their moving averages ({', '.join(averaged)}); {plain[0]} is "
                "taken; for the others save them as .safetensors (safetensors.torch.save_file)",
                CheckpointWarning,
                stacklevel=4,
            )
        if not plain and not averaged:
            break
        places.append((plain or averaged)[0])
        content = content[places[-1]]
    return content, places


def _holds_tensors(entry: Mapping[Any, Any], depth: int = _MAX_DEPTH) -> bool:
    return any(
        isinstance(value, torch.Tensor) or (depth and isinstance(value, Mapping) and _holds_tensors(value, depth - 1))
        for value in entry.values()
    )


def _unwrapped(tensors: dict[str, torch.Tensor], path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors without what wrappers put into their names, and what that was."""
    stripped = sorted({found.removesuffix(".") for name in tensors for found in _INSIDE.findall(name)})
    names = {name: _INSIDE.sub("", name) for name in tensors}
    while prefix := next((one for one in _PREFIXES if all(name.startswith(one) for name in names.values())), None):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
        stripped.append(prefix.removesuffix("."))
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{path}: without {', '.join(stripped)} two tensors have the same name; {_CONVERT}")
    return {names[name]: tensor for name, tensor in tensors.items()}, stripped


def require_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Makes sure that every weight is a number.

    Raises:
        CheckpointError: Some are NaN or infinite; the message names their tensors and counts them.
    """
    counts = {}
    for name, stored in tensors.items():
        tensor = stored.float() if stored.dtype.itemsize == 1 else stored  # torch knows no infinity of float8
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            counts[name] = f"{name} ({int((~torch.isfinite(tensor)).sum()):,} of {tensor.numel():,} values)"
    if counts:
        more = f" and {len(counts) - _SHOWN} more tensors" if len(counts) > _SHOWN else ""
        raise CheckpointError(
            f"{where}: holds NaN or infinite weights in {', '.join(list(counts.values())[:_SHOWN])}{more}; training "
            "diverged or the file is damaged: take an earlier checkpoint"
        )


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes; see the module's text for the definition."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        state.update(f"{name}\0{dtype}\0{list(tensor.shape)}\0".encode())
        # bfloat16 has no NumPy dtype: hash the bytes, which need at least one dimension to be viewed as such
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def fit(tensors: dict[str, torch.Tensor], module: torch.nn.Module, where: str, name: str) -> None:
    """Makes tensors the weights of an open_clip model, upcast to its float32; every one must fit, none may be missing.

    The model takes the tensors themselves where dtype and layout allow, so that the weights are in memory once.

    Older and third-party layouts are renamed by open_clip's own converters first. Positional embeddings are *not*
    interpolated to another image size: that is training's business, here it means the wrong architecture was named.

    Args:
        tensors: As `read_state_dict` gave them; empty afterwards, so that upcasting frees one after the other.
        module: The open_clip model that takes them, changed in place.
        where: What to call the file in an error.
        name: What to call the model in an error.

    Raises:
        CheckpointError: The tensors belong to another model, and the message names the first that differ; or they are
            not finite.
    """
    try:
        renamed = _as_open_clip(tensors, module)
    except (KeyError, AttributeError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{where}: belongs to another model than {name} ({error!r})") from error
    wanted = module.state_dict()
    missing = [f"{key} is missing" for key in wanted if key not in renamed]
    shapes = [
        f"{key} is {list(renamed[key].shape)}, not {list(wanted[key].shape)}"
        for key in wanted
        if key in renamed and renamed[key].shape != wanted[key].shape
    ]
    extra = [f"{key} is not part of it" for key in renamed if key not in wanted]
    wrong = shapes + missing + extra
    if wrong:
        more = f" (and {len(wrong) - _SHOWN} more)" if len(wrong) > _SHOWN else ""
        raise CheckpointError(f"{where}: belongs to another model than {name}: {'; '.join(wrong[:_SHOWN])}{more}")
    require_finite(tensors, where)
    tensors.clear()
    for key, own in wanted.items():
        renamed[key] = renamed[key].to(own.dtype).contiguous()
    module.load_state_dict(renamed, strict=True, assign=True)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    _require_no_other_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            left = list(file.keys())
        with path.open("rb") as stream:
            safetensors_header(stream, str(path), error=CheckpointError)
        while left:
            taken = 0
            with safe_open(path, framework="pt", device="cpu") as file:
                while left and taken < _AT_A_TIME:
                    name = left.pop()
                    # a copy: what stays mapped would change, or crash the process, when somebody overwrites the file
                    tensors[name] = file.get_tensor(name).clone()
                    taken += tensors[name].nbytes
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a checkpoint, or damaged (safetensors: {error})") from error
    return tensors


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in several files, each of which lies beside the index."""
    stored = read_json(index, "an index of weights", max_bytes=_MAX_INDEX, error=CheckpointError).get("weight_map")
    if not isinstance(stored, dict):
        raise CheckpointError(f"{index}: not an index of weights, it has no readable weight_map")
    places = {str(name): str(file) for name, file in stored.items()}
    suffix = next(f".{one.split('.')[1]}" for one in INDEX_SUFFIXES if index.name.endswith(one))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(places.values())):
        shard = index.with_name(file) if file not in ("", ".", "..") and "/" not in file and "\\" not in file else None
        if shard is None or shard.suffix != suffix:
            raise CheckpointError(f"{index}: names {file!r}; its files must be {suffix} beside it")
        if not shard.is_file():
            raise CheckpointError(
                f"{shard}: no such file, but {index.name} names it; fetch all parts of the checkpoint"
            )
        part = _read_safetensors(shard) if suffix == ".safetensors" else _read_torch(shard)
        if not isinstance(part, Mapping) or not all(isinstance(one, torch.Tensor) for one in part.values()):
            raise CheckpointError(f"{shard}: holds something besides tensors by name; {_CONVERT}")
        tensors.update(part)
    odd = sorted(set(places) ^ set(tensors))
    if odd:
        raise CheckpointError(f"{index}: does not say what its files hold: {', '.join(odd[:_SHOWN])}")
    return tensors


def _read_torch(path: Path) -> Any:
    _require_no_other_file(path)
    damage = _damage_of_zip(path)
    if damage:
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {damage}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on pickle protocols and archives that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError, ... depending on where it breaks
        reason = str(error).split("\n", 1)[0]
        if "GLOBAL" in str(error) or "Unsupported class" in str(error):
            raise CheckpointError(
                f"{path}: refused, it holds Python objects besides tensors and nothing of it was run; {_CONVERT}"
            ) from error
        if "weights_only" in str(error) or not reason:  # torch advises to run what the file holds
            reason = f"torch reads no tensors from it; if it is a pickle, {_CONVERT}"
        raise CheckpointError(f"{path}: not a checkpoint, or damaged ({reason})") from error


def _damage_of_zip(path: Path) -> str:
    """What is wrong with the archive that torch writes, whose checksums torch does not look at; "" where nothing is.

    Torch's format before 1.6 has none, and of a damaged file torch gives tensors that nothing was ever read into.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len({member.filename for member in members}) != len(members):
                return "a name stands twice in its archive"
            if any(member.filename.endswith(_SCRIPT) for member in members):
                return "it is a TorchScript archive, which holds code; save its state_dict() as .safetensors first"
            # as torch writes them; so no file unpacks to more than its own size
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                return f"its archive is compressed, as torch writes none; {_CONVERT}"
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        with path.open("rb") as stream:
            if stream.read(2) == b"PK":
                return f"its archive cannot be read ({error})"
        return (
            "it is no archive, as torch writes them since 1.6; if it is a pickle or of the older format, in "
            "which damage "
            f"cannot be told, {_CONVERT}"
        )
    return f"{bad} is not what its checksum says; fetch it again" if bad else ""


def _require_no_other_file(path: Path) -> None:
    """Refuses what is often found in a checkpoint's place, saying what it is.

    Raises:
        CheckpointError: The file is empty, a Git LFS pointer, a web page, other text, an archive, or has the other
            container's ending.
    """
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    torchs = path.suffix.lower() != ".safetensors"
    known = _other_file(head) or _other_container(head, path, torchs=torchs)
    if known:
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {known}")


def _other_file(head: bytes) -> str:
    """What a file is that begins so and what to do; "" where it may be a checkpoint."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        return "it is empty; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
    if start[:14].lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "it is an HTML page; fetch the file itself (a link to the raw file, logged in where that is needed)"
    magic = next((what for begin, what in _MAGIC.items() if head.startswith(begin)), "")
    if magic:
        return magic
    if any(sign < ord("\t") for sign in head):
        return ""
    text = head.decode(errors="replace")
    if text[:-4].count("\ufffd"):  # the last character may be cut
        return ""
    return f"it is a text file that begins with {' '.join(text.split())[:40]!r}; fetch the weights themselves"


_MAGIC = {
    b"\x1f\x8b": "it is a gzip archive; unpack it first (gunzip, or tar xzf)",
    b"BZh": "it is a bzip2 archive; unpack it first",
    b"\xfd7zXZ": "it is an xz archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "it is a Zstandard archive; unpack it first",
    b"7z\xbc\xaf": "it is a 7z archive; unpack it first",
    b"\x89HDF": "it is an HDF5 file (Keras, TensorFlow); take the PyTorch weights",
    b"\x93NUMPY": "it is a NumPy array; save the weights by name with safetensors.numpy.save_file",
    b"GGUF": "it is a GGUF file; take the original PyTorch weights",
}


def _other_container(head: bytes, path: Path, *, torchs: bool) -> str:
    """As `_other_file`, of a file that has the content of the other container, or is a zip of something else."""
    if torchs and head[8:10] == b'{"':
        return "it is a safetensors file; rename it to .safetensors"
    if not torchs and head.startswith(b"\x80"):
        return "it is a pickle, as torch writes them; rename it to .pt"
    if not head.startswith(b"PK\x03\x04"):
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return ""  # damaged: torch says so
    if any(name.endswith(("/data.pkl", _SCRIPT)) for name in names):
        return "" if torchs else "it is a torch file; rename it to .pt"
    return f"it is a zip archive of {', '.join(names[:_SHOWN]) or 'nothing'}; unpack it first"


def _as_open_clip(tensors: dict[str, torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The same steps as open_clip's `load_checkpoint`, without its interpolation of positional embeddings."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    renamed: dict[str, torch.Tensor] = dict(convert_state_dict(module, dict(tensors)))
    if hugging_face.names_are_theirs(renamed):
        renamed = hugging_face.as_open_clip(renamed)
    if "positional_embedding" in renamed and not hasattr(module, "positional_embedding"):
        renamed = convert_to_custom_text_state_dict(renamed)
    for scalar in ("logit_scale", "logit_bias"):
        own = getattr(module, scalar, None)
        if own is not None and scalar in renamed and renamed[scalar].numel() == 1:
            renamed[scalar] = renamed[scalar].reshape(own.shape)
    # transformers stopped storing these positions in 4.31
    renamed.pop("text.transformer.embeddings.position_ids", None)
    return renamed
