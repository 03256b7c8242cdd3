"""A config as a model: read, its Hugging Face text tower resolved to local files, built, filled with random weights.

Libraries start layers where training likes to start: biases and the last norm of a residual branch at zero, norms at
one, layer scales at 1e-6. A graph that dropped such a layer would answer as before, and nothing would show it. So of
random weights every matrix is drawn once, by its fan-in, and every vector whose elements are all alike gets noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints import hugging_face
from invariclip.export.checkpoints.sources import CONFIG_FILE
from invariclip.export.checkpoints.surgery import shorten
from invariclip.export.checkpoints.tokenizer import require_text_settings
from invariclip.export.libraries import quiet
from invariclip.records import read_json

if TYPE_CHECKING:
    from invariclip.export.checkpoints.sources import CheckpointSource

TOWER_FILE = "config.json"
"""What describes a Hugging Face text tower, in the model's folder or in one below it with the tower's name."""
_MAX_CONFIG = 16 * 2**20
_TIMES, _SPARE_VALUES, _SPARE_TENSORS = 4, 1 << 27, 4096
"""Values that building a model may make for each value of its weights, and tensors for each tensor; and how many beside
them (SigLIP's image tower is made in its usual size first)."""
_EMBEDDING_STD = 0.02
_BIAS_STD = 0.05


def read_config(source: CheckpointSource, theirs: hugging_face.Config | None = None) -> dict[str, Any]:
    """The model part of an open_clip config: embed_dim, vision_cfg, text_cfg.

    Args:
        source: The model.
        theirs: Its config in transformers' layout, where that is what it has.

    Raises:
        CheckpointError: The config file is missing or not one.
    """
    from open_clip import get_model_config

    name = source.name
    if theirs is not None:
        return theirs.model_cfg
    if source.folder is None:
        config = get_model_config(source.identifier)
    elif not (source.folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{name}: the folder holds no {CONFIG_FILE}, and no {hugging_face.CONFIG_FILE} of a model"
        )
    else:
        plain = read_json(source.folder / CONFIG_FILE, "a model's config", max_bytes=_MAX_CONFIG, error=CheckpointError)
        config = plain.get("model_cfg")
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise CheckpointError(f"{name}: its {CONFIG_FILE} lacks embed_dim, vision_cfg or text_cfg")
    if type(config["embed_dim"]) is not int or not isinstance(config["vision_cfg"], dict):
        raise CheckpointError(f"{name}: its {CONFIG_FILE} needs a number as embed_dim and an object as vision_cfg")
    require_text_settings(config["text_cfg"], f"{name}: text_cfg of its {CONFIG_FILE}")
    return config


def text_tower(config: dict[str, Any], source: CheckpointSource) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The `text_cfg` with a Hugging Face tower's name resolved to a local folder, and that tower's own config.

    Args:
        config: As `read_config` gave it.
        source: Where the model lies.

    Returns:
        The `text_cfg` to build from, and the content of the tower's `config.json`, or None for open_clip's own towers.

    Raises:
        CheckpointError: The tower's files are missing, ask for code of their own, or `transformers` is not installed.
    """
    text_cfg: dict[str, Any] = dict(config.get("text_cfg") or {})
    wanted = text_cfg.get("hf_model_name")
    if not wanted:
        return text_cfg, None
    name = source.name
    candidates = [] if source.folder is None else [source.folder / str(wanted), source.folder]
    files = next((folder for folder in candidates if (folder / TOWER_FILE).is_file()), None)
    if files is None:
        where = f"was not found in {source.folder}" if source.folder is not None else "is not part of open_clip"
        raise CheckpointError(
            f"{name}: its text tower is {wanted}, whose {TOWER_FILE} {where}; pass as --model a folder with "
            f"{CONFIG_FILE}, the weights, and {wanted}'s {TOWER_FILE} and tokenizer.json"
        )
    tower = read_json(files / TOWER_FILE, "a model's config", max_bytes=_MAX_CONFIG, error=CheckpointError)
    from open_clip.hf_configs import arch_dict
    from open_clip.hf_model import transformers

    if transformers is None:
        raise CheckpointError(f'{name}: its text tower ({wanted}) needs transformers: pip install "invariclip[hf]"')
    if "auto_map" in tower:
        raise CheckpointError(f"{files / TOWER_FILE}: refused, auto_map asks to run code that comes with the model")
    if tower.get("model_type") not in arch_dict:
        raise CheckpointError(
            f"{files / TOWER_FILE}: model_type {tower.get('model_type')!r} is not known to open_clip; available: "
            f"{', '.join(arch_dict)}"
        )
    return {**text_cfg, "hf_model_name": str(files), "hf_model_pretrained": False}, tower


def build(
    source: CheckpointSource,
    text_cfg: dict[str, Any],
    *,
    seed: int | None,
    sizes: Sequence[int] | None = None,
    short: bool = False,
    theirs: hugging_face.Config | None = None,
) -> Any:
    """The model as open_clip builds it; the caller's random state stays as it was.

    Args:
        source: What to build.
        text_cfg: As `text_tower` gave it.
        seed: Of its random weights; None leaves the matrices unwritten, for weights that come from a file.
        sizes: How many values each tensor of the weights has that it is for: what takes far more is another model, or
            a damaged config, which could ask for all memory. None for any number.
        short: Keep the first and last block of every stack alone; what goes is never written, and costs nothing.
        theirs: Its config in transformers' layout, where that is what it has.

    Raises:
        CheckpointError: open_clip or timm cannot build what the config says.
    """
    try:
        values = math.inf if sizes is None else _TIMES * sum(sizes) + _SPARE_VALUES
        tensors = math.inf if sizes is None else _TIMES * len(sizes) + _SPARE_TENSORS
        with quiet(), torch.random.fork_rng(devices=[]), Unfilled(values, tensors):
            torch.manual_seed(seed or 0)
            module = _as_open_clip_builds_it(source, text_cfg) if theirs is None else hugging_face.create(theirs)
    except CheckpointError as error:
        raise CheckpointError(f"{source.name}: {error}") from error
    except Exception as error:  # a config is data: whatever it breaks in open_clip or timm is the config's fault
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source.name}: open_clip cannot build it ({type(error).__name__}: {reason})") from error
    if short:
        shorten(module)
    if seed is not None:
        fill(module, seed)
    return module


def _as_open_clip_builds_it(source: CheckpointSource, text_cfg: dict[str, Any]) -> Any:
    from open_clip import create_model

    return create_model(
        source.identifier,
        load_weights=False,
        pretrained_image=False,
        pretrained_text=False,
        device="cpu",
        **({"text_cfg": text_cfg} if text_cfg.get("hf_model_name") else {}),
    )


_ATEN = torch.ops.aten
_MAKERS = {_ATEN.empty, _ATEN.zeros, _ATEN.ones, _ATEN.full, _ATEN.rand, _ATEN.randn, _ATEN.empty_strided}
"""What makes a tensor of the size that is its first argument."""


class Unfilled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, matrices of new models keep what the allocator gave them.

    Building a model draws all its weights, only for a file's to replace them. Memory that nobody wrote is not resident
    either. Whoever builds so must fill every matrix afterwards: `fill`, or a strict `weights.fit`.
    """

    def __init__(self, values: float = math.inf, tensors: float = math.inf) -> None:
        """Takes how many tensors may be made, and of how many values in all, those that go again included."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.values, self.tensors = values, tensors

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leaves out operations that write into a matrix parameter.

        Raises:
            CheckpointError: There is no room for what is to be made.
        """
        if args and func.overloadpacket in _MAKERS and isinstance(args[0], Sequence):
            self.values -= math.prod(args[0])
            self.tensors -= 1
            if min(self.values, self.tensors) < 0:
                raise CheckpointError("its config describes a larger model than the weights are of")
        if args and isinstance(args[0], nn.Parameter) and _is_matrix(args[0]) and _writes(func):
            return args[0]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Fills a model with random weights, in place; scalars (temperature and bias of the logits) stay.

    Args:
        module: A model, built with or without `Unfilled`.
        seed: The same seed gives the same weights whatever was in memory before.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for owner in module.modules():
        norm = "norm" in type(owner).__name__.lower()
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            if _is_matrix(parameter):
                parameter.normal_(0, _std(parameter, name, owner), generator=generator)
            elif parameter.numel() > 1:
                _stir(parameter, generator, scale=norm and name == "weight")
        if isinstance(owner, nn.modules.batchnorm._BatchNorm):
            if owner.running_mean is not None:
                owner.running_mean.normal_(0, 0.1, generator=generator)
            if owner.running_var is not None:
                owner.running_var.uniform_(0.5, 1.5, generator=generator)


def _stir(vector: torch.Tensor, generator: torch.Generator, *, scale: bool) -> None:
    """Noise around the value that all elements share; vectors that already differ stay as they are."""
    common = float(vector.reshape(-1)[0])
    if not bool((vector == common).all()):
        return
    if common == 0 and not scale:
        vector.normal_(0, _BIAS_STD, generator=generator)
    elif common == 0:  # the last norm of a branch: it counts
        vector.uniform_(0.2, 0.5, generator=generator)
    elif abs(common) < 0.5:  # a layer scale: larger ones make deep stacks of batch norms amplify rounding
        vector.uniform_(0.05, 0.15, generator=generator)
    else:
        vector.normal_(common, 0.1 * abs(common), generator=generator)


def _std(matrix: torch.Tensor, name: str, owner: nn.Module) -> float:
    if isinstance(owner, nn.Embedding) or "pos" in name or "token" in name:
        return _EMBEDDING_STD
    return 1 / math.sqrt(matrix.numel() / matrix.shape[0])


def _is_matrix(tensor: torch.Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) > 1


def _writes(func: Any) -> bool:
    """Whether an operation is one of those that end in an underscore: `normal_`, `mul_`, `copy_`."""
    return str(func.overloadpacket.__name__).endswith("_")
