"""Files that come with a model, read without trust: tensors (nothing is unpickled), and JSON of bounded size.

A digest names the weights whatever the container: `sha256` over the tensors of the file in the order of their names;
each contributes `name NUL dtype NUL shape NUL` and its bytes, little-endian, row by row. A `.pt` and a `.safetensors`
with the same tensors therefore have the same digest; a float16 copy of float32 weights has another one, because it is
another model.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from invariclip.errors import CheckpointError
from invariclip.records import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
INDEX_SUFFIX = ".safetensors.index.json"
"""Ending of the file that says which tensor lies in which of several files."""
_AT_A_TIME = 64 * 2**20
"""Bytes read through one mapping of a file: pages of a mapping stay in memory for as long as it does."""
_MAX_INDEX = 64 * 2**20
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's files keep beside the weights."""
_SHOWN = 3


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a checkpoint, as the file stores them.

    A training checkpoint's `state_dict` entry and a `module.` before every name (from DistributedDataParallel) go.

    Args:
        path: `.safetensors`, or the index of several; or `.pt`, `.pth`, `.bin`, which torch reads with
            `weights_only=True` and nothing else.

    Returns:
        Tensors by name, on the CPU, in the file's dtypes; in memory once, and independent of the file from then on.

    Raises:
        CheckpointError: The file is missing, of another format, truncated, or holds objects besides tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    sharded = path.name.endswith(INDEX_SUFFIX)
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES and not sharded:
        raise CheckpointError(f"{path}: not a checkpoint format; known endings: {' '.join(CHECKPOINT_SUFFIXES)}")
    content: Any
    if sharded:
        content = _read_shards(path)
    else:
        content = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_torch(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    named = content if isinstance(content, dict) else {}
    tensors = {str(name): value for name, value in named.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: not a checkpoint, it holds no tensors by name")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if name not in _NOT_WEIGHTS}


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
        CheckpointError: The tensors belong to another model; the message names the first that differ.
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
    tensors.clear()
    for key, own in wanted.items():
        renamed[key] = renamed[key].to(own.dtype).contiguous()
    module.load_state_dict(renamed, strict=True, assign=True)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            left = list(file.keys())
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
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(places.values())):
        shard = index.with_name(file) if file not in ("", ".", "..") and "/" not in file and "\\" not in file else None
        if shard is None or shard.suffix != ".safetensors":
            raise CheckpointError(f"{index}: names {file!r}; its files must be .safetensors beside it")
        if not shard.is_file():
            raise CheckpointError(
                f"{shard}: no such file, but {index.name} names it; fetch all parts of the checkpoint"
            )
        tensors.update(_read_safetensors(shard))
    odd = sorted(set(places) ^ set(tensors))
    if odd:
        raise CheckpointError(f"{index}: does not say what its files hold: {', '.join(odd[:_SHOWN])}")
    return tensors


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on pickle protocols and archives that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError, ... depending on where it breaks
        reason = str(error).split("\n", 1)[0]
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path}: a TorchScript archive, which holds code; save its state_dict() as .safetensors first"
            ) from error
        if "GLOBAL" in str(error) or "Unsupported class" in str(error):
            raise CheckpointError(
                f"{path}: refused, it holds Python objects besides tensors and nothing of it was run; save its "
                "state_dict() as .safetensors"
            ) from error
        raise CheckpointError(f"{path}: not a checkpoint, or damaged ({reason})") from error


def _as_open_clip(tensors: dict[str, torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The same steps as open_clip's `load_checkpoint`, without its interpolation of positional embeddings."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    renamed: dict[str, torch.Tensor] = dict(convert_state_dict(module, dict(tensors)))
    if "positional_embedding" in renamed and not hasattr(module, "positional_embedding"):
        renamed = convert_to_custom_text_state_dict(renamed)
    for scalar in ("logit_scale", "logit_bias"):
        own = getattr(module, scalar, None)
        if own is not None and scalar in renamed and renamed[scalar].numel() == 1:
            renamed[scalar] = renamed[scalar].reshape(own.shape)
    # transformers stopped storing these positions in 4.31
    renamed.pop("text.transformer.embeddings.position_ids", None)
    return renamed
