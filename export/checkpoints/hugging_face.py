"""Models in transformers' layout (CLIPModel, SiglipModel), as open_clip's: config, preprocessing, names of the weights.

Both libraries compute the same: what differs are the names, one matrix for queries, keys and values, and how a config
says it. `read` makes open_clip's config of transformers' one, `create` the module, `as_open_clip` renames and reshapes
its weights. transformers itself is not needed. What open_clip has no module for is refused.

A config leaves out what is transformers' default, so the defaults here are those of `configuration_clip.py` and
`configuration_siglip.py`; Siglip2 at a fixed resolution is a SiglipModel there, and Siglip2Model is NaFlex.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from invariclip.errors import CheckpointError
from invariclip.records import read_json, to_record

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG_FILE = "config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Of the image processor; in the second, which transformers 5 writes, it is one part."""
_MAX_CONFIG = 16 * 2**20
_ARCHITECTURES = {"CLIPModel": "clip", "SiglipModel": "siglip", "Siglip2Model": "siglip2"}
_NAFLEX = "siglip2"
_OPTIONS = (
    "available: CLIPModel and SiglipModel with both towers (Siglip2 of a fixed resolution is one), or any model in "
    "open_clip's layout"
)
_MEANS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that `PixelSpec` has."""
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""timm's names of transformers' activations."""
_TRUNK = "vit_base_patch16_siglip_224"
"""A timm model of SigLIP's kind; its sizes are replaced by the config's."""


@dataclass(frozen=True)
class ClipText:
    """`text_config` of a CLIPModel."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


@dataclass(frozen=True)
class ClipVision:
    """`vision_config` of a CLIPModel."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class SiglipText:
    """`text_config` of a SiglipModel."""

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    projection_size: int | None = None


@dataclass(frozen=True)
class SiglipVision:
    """`vision_config` of a SiglipModel."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True


@dataclass(frozen=True)
class Processor:
    """The image processor's settings; None is the kind's default."""

    do_resize: bool = True
    do_center_crop: bool | None = None
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: float = 1 / 255
    resample: int = 3
    size: int | dict[str, int | None] | None = None
    crop_size: int | dict[str, int | None] | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Config:
    """A model in transformers' layout, in open_clip's words.

    Attributes:
        model_cfg: open_clip's `model_cfg`.
        preprocess_cfg: open_clip's `preprocess_cfg`.
        trunk: What timm's model is made with, for SigLIP's image tower; else None.
    """

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    trunk: dict[str, Any] | None


def read(folder: Path) -> Config | None:
    """The config of a folder in transformers' layout; None where it has no `config.json`, or one of something else.

    Raises:
        CheckpointError: The files are damaged, or say something that open_clip has no module for.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    plain = read_json(file, "a model's config", max_bytes=_MAX_CONFIG, error=CheckpointError)
    kind = plain.get("model_type")
    named = plain.get("architectures") or []
    if not isinstance(kind, str | None) or not isinstance(named, list):
        raise CheckpointError(f"{file}: model_type must be a text, and architectures a list of them; fetch it again")
    kind = next((_ARCHITECTURES[str(one)] for one in named if str(one) in _ARCHITECTURES), kind)
    if kind is None and not named:
        return None
    if kind == _NAFLEX:
        raise CheckpointError(
            f"{file}: Siglip2Model is NaFlex, which takes images of any resolution, and is not supported; take a "
            "Siglip2 of a fixed resolution, such as siglip2-base-patch16-224"
        )
    if kind not in _MEANS or (named and not set(map(str, named)) & set(_ARCHITECTURES)):
        what = f"{', '.join(map(str, named)) or 'a model'} (model_type {kind!r:.50})"
        raise CheckpointError(f"{file}: {what!s:.200} in transformers' layout is not supported; {_OPTIONS}")
    config = _clip(plain, file) if kind == "clip" else _siglip(plain, file)
    return Config(config[0], _preprocessing(folder, str(kind), config[0]["vision_cfg"]["image_size"]), config[1])


def create(config: Config) -> torch.nn.Module:
    """The open_clip model of a config, with weights as its constructors draw them."""
    import timm
    from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg

    model_cfg = dict(config.model_cfg)
    kind = CustomTextCLIP if model_cfg.pop("custom_text", False) else CLIP
    module: torch.nn.Module = kind(**model_cfg)
    if config.trunk is not None:
        sizes = {key: value for key, value in config.trunk.items() if key != "eps"}
        norm = partial(torch.nn.LayerNorm, eps=config.trunk["eps"])
        visual: Any = module.visual
        visual.trunk = timm.create_model(_TRUNK, num_classes=0, norm_layer=norm, **sizes)
    size = config.model_cfg["vision_cfg"]["image_size"]
    set_model_preprocess_cfg(module, {"size": size, "mode": "RGB", "fill_color": 0, **config.preprocess_cfg})
    return module


def _clip(plain: dict[str, Any], file: Path) -> tuple[dict[str, Any], None]:
    text = _part(ClipText, plain, "text_config", file)
    vision = _part(ClipVision, plain, "vision_config", file)
    width = plain.get("projection_dim", 512)
    if type(width) is not int or width < 1:
        raise CheckpointError(f"{file}: projection_dim {width!r:.50} is no width")
    act = _one_activation(text, vision, file)
    cfg = {
        "embed_dim": width,
        "quick_gelu": act == "quick_gelu",
        "vision_cfg": {
            **_tower(vision, file),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        "text_cfg": {
            **_tower(text, file),
            **_words(text),
            "heads": text.num_attention_heads,
            # 2 was wrong in early configs, and transformers then takes the highest id, too
            **({} if text.eos_token_id == 2 else {"pool_type": "eos", "eos_id": text.eos_token_id}),
        },
    }
    return cfg, None


def _siglip(plain: dict[str, Any], file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    text = _part(SiglipText, plain, "text_config", file)
    vision = _part(SiglipVision, plain, "vision_config", file)
    if not vision.vision_use_head:
        raise CheckpointError(f"{file}: a SiglipModel without its pooling head (vision_use_head) is not supported")
    width = text.hidden_size if text.projection_size is None else text.projection_size
    if width != vision.hidden_size:
        raise CheckpointError(
            f"{file}: text embeddings have {width} values (projection_size), image embeddings {vision.hidden_size}"
        )
    _tower(vision, file)
    cfg = {
        "embed_dim": width,
        "custom_text": True,
        "init_logit_bias": -10,
        "quick_gelu": _activation(text, file) == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": _TRUNK,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **_tower(text, file),
            **_words(text),
            "heads": text.num_attention_heads,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }
    trunk = {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": _ratio(vision),
        "act_layer": _ACTIVATIONS[_activation(vision, file)],
        "eps": vision.layer_norm_eps,
    }
    return cfg, trunk


def _part(kind: Any, plain: dict[str, Any], name: str, file: Path) -> Any:
    """One tower's part of a config; `text_config_dict`, which older files have, counts where it is there."""
    part = plain.get(f"{name}_dict")
    part = plain.get(name) if part is None else part
    if not isinstance(part, dict | None):
        raise CheckpointError(f"{file}: {name} is no object")
    known = {one.name for one in fields(kind)}
    stored = {key: value for key, value in (part or {}).items() if key in known}
    record = to_record(kind, stored, f"{file}: {name}", error=CheckpointError)
    sizes = {key: value for key, value in asdict(record).items() if type(value) is int and key != "eos_token_id"}
    wrong = next((f"{key} {value}" for key, value in sizes.items() if not 1 <= value <= 2**24), "")
    if wrong or record.hidden_size % record.num_attention_heads:
        wrong = wrong or f"hidden_size {record.hidden_size} is no multiple of its {record.num_attention_heads} heads"
        raise CheckpointError(f"{file}: {name} describes no tower: {wrong}")
    if not 0 < record.layer_norm_eps < 1:
        raise CheckpointError(f"{file}: {name} describes no tower: layer_norm_eps {record.layer_norm_eps}")
    if getattr(record, "num_channels", 3) != 3:
        raise CheckpointError(f"{file}: images of {record.num_channels} channels are not supported; only of 3")
    return record


def _tower(part: Any, file: Path) -> dict[str, Any]:
    """What both kinds' transformers have, as open_clip's `vision_cfg` and `text_cfg` say it."""
    tanh = {"act_kwargs": {"approximate": "tanh"}} if _activation(part, file) == "gelu_pytorch_tanh" else {}
    return {
        "width": part.hidden_size,
        "layers": part.num_hidden_layers,
        "mlp_ratio": _ratio(part),
        "norm_kwargs": {"eps": part.layer_norm_eps},
        **tanh,
    }


def _ratio(part: Any) -> float:
    """Such that `int(width * ratio)`, as both libraries take it, is the config's width."""
    return float((part.intermediate_size + 0.5) / part.hidden_size)


def _words(text: Any) -> dict[str, Any]:
    """What of a `text_cfg` concerns the tokenizer: the folder's own, and no cleaning but its own."""
    return {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "hf_tokenizer_name": "transformers' layout",
        "tokenizer_kwargs": {"clean": "verbatim"},
    }


def _activation(part: Any, file: Path) -> str:
    act: str = part.hidden_act
    if act not in _ACTIVATIONS:
        raise CheckpointError(f"{file}: hidden_act {act!r:.50} is not supported; available: {', '.join(_ACTIVATIONS)}")
    return act


def _one_activation(text: Any, vision: Any, file: Path) -> str:
    """open_clip's switch to QuickGELU is one for both towers."""
    acts = {_activation(text, file), _activation(vision, file)}
    if len(acts) > 1 and "quick_gelu" in acts:
        raise CheckpointError(
            f"{file}: towers with different activations ({' and '.join(sorted(acts))}) are not supported"
        )
    return acts.pop()


def _preprocessing(folder: Path, kind: str, image_size: int) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` of the folder's image processor.

    Raises:
        CheckpointError: It is missing, damaged, or does what no `PixelSpec` says.
    """
    file = next((folder / name for name in PROCESSOR_FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: in transformers' layout, but has no {PROCESSOR_FILES[0]}; fetch it, too")
    plain = read_json(file, "an image processor's config", max_bytes=_MAX_CONFIG, error=CheckpointError)
    part = plain.get("image_processor", plain)
    known = {one.name for one in fields(Processor)}
    stored = {key: value for key, value in part.items() if key in known} if isinstance(part, dict) else {}
    settings = to_record(Processor, stored, str(file), error=CheckpointError)
    if not settings.do_resize or not settings.do_rescale or abs(settings.rescale_factor * 255 - 1) > 1e-6:
        raise CheckpointError(f"{file}: only image processors that resize and rescale by 1/255 are supported")
    if settings.resample not in _FILTERS:
        raise CheckpointError(
            f"{file}: resample {settings.resample} is not supported; available: 2 (bilinear), 3 (bicubic)"
        )
    mean, std = _MEANS[kind]
    normalized = settings.do_normalize
    return {
        "size": image_size,
        "mean": list((settings.image_mean or mean) if normalized else (0.0, 0.0, 0.0)),
        "std": list((settings.image_std or std) if normalized else (1.0, 1.0, 1.0)),
        "interpolation": _FILTERS[settings.resample],
        "resize_mode": _resize_mode(settings, kind, image_size, file),
    }


def _resize_mode(settings: Processor, kind: str, image_size: int, file: Path) -> str:
    """`squash` or `shortest`, where the result is what the tower takes."""
    edge = {"shortest_edge": image_size}
    square = {"height": image_size, "width": image_size}
    default: dict[str, int] = edge if kind == "clip" else square
    size, crop = (
        {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given
        for given in (settings.size, settings.crop_size)
    )
    size = default if size is None else size
    cropped = settings.do_center_crop if settings.do_center_crop is not None else kind == "clip"
    if isinstance(size, int):  # what an old config's number means is the kind's own
        size = dict.fromkeys(default, size)
    if size == square:
        mode = "squash"
    elif size == edge and cropped:
        mode = "shortest"
    else:
        mode = ""
    if not mode or (cropped and crop not in (None, image_size, square)):
        raise CheckpointError(
            f"{file}: size {size} with crop_size {crop if cropped else None} does not end at the tower's {image_size} "
            "pixels by one resize and one crop of them; not supported"
        )
    return mode


def names_are_theirs(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether tensors have transformers' names."""
    return any(name.startswith(("vision_model.", "text_model.")) for name in tensors)


def as_open_clip(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with transformers' names, as open_clip names and shapes them.

    Args:
        tensors: All of a CLIPModel, or of a SiglipModel (told by its pooling head); left as they are.

    Raises:
        KeyError: Queries, keys or values are not all there.
    """
    siglip = any(name.startswith("vision_model.head.") for name in tensors)
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):  # older versions stored them
            continue
        if found := _QKV.fullmatch(name):
            if found["which"] == "q":
                parts = [tensors[f"{found['layer']}{which}_proj.{found['kind']}"] for which in "qkv"]
                renamed[_qkv_name(found, siglip=siglip)] = torch.cat(parts)
        else:
            renamed.update(_renamed(name, tensor, siglip=siglip))
    return renamed


_QKV = re.compile(r"(?P<layer>.*\.self_attn\.)(?P<which>[qkv])_proj\.(?P<kind>weight|bias)")


def _qkv_name(found: re.Match[str], *, siglip: bool) -> str:
    layer = _place(found["layer"], siglip=siglip)
    return (
        f"{layer}qkv.{found['kind']}" if siglip and layer.startswith("visual.") else f"{layer}in_proj_{found['kind']}"
    )


_CLIP_IMAGE = (
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"visual_projection\.weight", "visual.proj"),
)
_SIGLIP_IMAGE = (
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.trunk.patch_embed.proj."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.trunk.pos_embed"),
    (r"vision_model\.post_layernorm\.", "visual.trunk.norm."),
    (r"vision_model\.encoder\.layers\.", "visual.trunk.blocks."),
    (r"vision_model\.head\.probe", "visual.trunk.attn_pool.latent"),
    (r"vision_model\.head\.attention\.out_proj\.", "visual.trunk.attn_pool.proj."),
    (r"vision_model\.head\.layernorm\.", "visual.trunk.attn_pool.norm."),
    (r"vision_model\.head\.", "visual.trunk.attn_pool."),
)
_TEXT = (
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"text_model\.head\.", "text_projection."),
    (r"text_projection\.weight", "text_projection"),
)
_BLOCK = (
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
)
_TIMM_BLOCK = (
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
)


def _place(name: str, *, siglip: bool) -> str:
    """open_clip's name of a tensor whose name is transformers'."""
    image = name.startswith(("vision_model.", "visual_projection."))
    outer = (_SIGLIP_IMAGE if siglip else _CLIP_IMAGE) if image else _TEXT
    pattern, replacement = next((one for one in outer if re.match(one[0], name)), ("", ""))
    name = re.sub(pattern, replacement, name, count=1)
    for pattern, replacement in _TIMM_BLOCK if image and siglip else _BLOCK:
        name = re.sub(pattern, replacement, name, count=1)
    text = siglip and not image and not name.startswith("logit_")
    return f"text.{name}" if text else name


def _renamed(name: str, tensor: torch.Tensor, *, siglip: bool) -> dict[str, torch.Tensor]:
    """One tensor under open_clip's name and in its shape; SigLIP's query, key and value of the head become two."""
    if name.startswith("vision_model.head.attention.in_proj_"):
        kind = name.rpartition("_")[2]
        width = len(tensor) // 3
        pool = "visual.trunk.attn_pool"
        return {f"{pool}.q.{kind}": tensor[:width], f"{pool}.kv.{kind}": tensor[width:]}
    place = _place(name, siglip=siglip)
    if place.endswith("visual.proj") or place == "text_projection":
        tensor = tensor.T
    if place == "visual.trunk.pos_embed":
        tensor = tensor[None]
    return {place: tensor}
