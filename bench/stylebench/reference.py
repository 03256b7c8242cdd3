"""The reference model: an open_clip model whose image tower starts from ImageNet, small enough to be committed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from invariclip.export.models.torchvision_ops import declare_missing_ops

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from PIL import Image

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 256,
        "vision_cfg": {
            "timm_model_name": "resnet18",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {
        "size": [224, 224],
        "mode": "RGB",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    },
}
"""What open_clip reads from `open_clip_config.json`. The ONNX trunk was trained with ImageNet's mean and deviation."""

WEIGHTS_FILE = "open_clip_model.safetensors"
CONFIG_FILE = "open_clip_config.json"


def untrained(seed: int) -> Any:
    """The reference model in its random start, an `open_clip.CLIP`."""
    declare_missing_ops()
    import open_clip

    torch.manual_seed(seed)
    return open_clip.CLIP(**CONFIG["model_cfg"])


def preprocessing() -> Callable[[Image.Image], torch.Tensor]:
    """The transform of `CONFIG`, made by open_clip itself."""
    declare_missing_ops()
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform: Callable[[Image.Image], torch.Tensor] = image_transform_v2(
        PreprocessCfg(**CONFIG["preprocess_cfg"]), is_train=False
    )
    return transform


def tokenizer() -> Callable[[list[str]], torch.Tensor]:
    """open_clip's tokenizer with the context of `CONFIG`."""
    declare_missing_ops()
    import open_clip

    made: Callable[[list[str]], torch.Tensor] = open_clip.SimpleTokenizer(
        context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"]
    )
    return made


def encode_texts(model: Any, tokens: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Unit text embeddings, as `model.encode_text` gives them, from tokens cut to the longest text.

    The tower is causal and pools the end-of-text token, so what comes after it cannot matter; captions are short and
    the context is 77, so this is most of the work saved.

    Args:
        model: An `open_clip.CLIP`.
        tokens: Token ids [N, context].
        rows: The token table's rows for `tokens`, [N, context, width]-like and at least as long as the longest text,
            when the caller looked them up itself.
    """
    length = int(tokens.argmax(dim=1).max()) + 1
    cut = tokens[:, :length]
    words = model.token_embedding(cut) if rows is None else rows[:, :length]
    hidden = words + model.positional_embedding[:length]
    hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))
    pooled = hidden[torch.arange(len(cut)), cut.argmax(dim=1)]
    return torch.nn.functional.normalize(pooled @ model.text_projection, dim=-1)


def save_reference(model: Any, folder: Path) -> None:
    """Writes config and float16 weights as open_clip's `local-dir:` reads them; each file beside, then renamed."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = folder / (CONFIG_FILE + ".part")
    config.write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    config.replace(folder / CONFIG_FILE)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    halves = {n: (t.half() if t.is_floating_point() else t).contiguous() for n, t in state.items()}
    weights = folder / (WEIGHTS_FILE + ".part")
    save_file(halves, str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)
    weights.replace(folder / WEIGHTS_FILE)


def load_reference(folder: Path) -> Any:
    """The saved model, loaded by open_clip as anyone would, in float32 and evaluation mode."""
    declare_missing_ops()
    import open_clip

    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval()
