"""MiniLM's sentence embeddings, as open_clip's tower with the mean pooler makes them before its head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invariclip.console import Progress, silent
from invariclip.export.reference.models import MINILM_FOLDER, MINILM_WIDTH

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_BATCH = 256
_CONTEXT = 77


class Sentences:
    """The published encoder from its unpacked package."""

    def __init__(self, package: Path) -> None:
        """Opens it; nothing is fetched."""
        from tokenizers import Tokenizer
        from transformers import AutoModel

        folder = package / MINILM_FOLDER
        self._model: Any = AutoModel.from_pretrained(str(folder)).eval()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_CONTEXT)

    def __call__(self, texts: Sequence[str], progress: Progress = silent) -> torch.Tensor:
        """float32 [N, 384], not of unit length; texts of one length share a batch."""
        ids = [encoded.ids for encoded in self._tokenizer.encode_batch(list(texts))]
        order = np.argsort([len(each) for each in ids], kind="stable")
        out = torch.zeros(len(texts), MINILM_WIDTH)
        starts = range(0, len(order), _BATCH)
        with torch.inference_mode():
            for start in progress(starts, total=len(starts), desc="texts"):
                rows = order[start : start + _BATCH]
                longest = max(len(ids[row]) for row in rows)
                tokens = torch.tensor([ids[row] + [0] * (longest - len(ids[row])) for row in rows])
                mask = (tokens != 0).long()
                hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
                out[torch.from_numpy(rows)] = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return out

    def in_templates(
        self, templates: Sequence[str], subjects: Sequence[str], progress: Progress = silent
    ) -> torch.Tensor:
        """float32 [T, N, 384]: every subject in every template."""
        texts = [template.format(subject) for template in templates for subject in subjects]
        return self(texts, progress).reshape(len(templates), len(subjects), MINILM_WIDTH)
