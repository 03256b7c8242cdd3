"""Training goes on exactly where it was interrupted, and starts from a head that whitens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from invariclip.bench.stylebench import fit as fitting
from invariclip.bench.stylebench.fit import Settings, fit, start_head
from invariclip.bench.stylebench.manifest import Picture
from invariclip.bench.stylebench.reference import tokenizer, untrained

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PICTURES = [
    Picture("", f"1f98{k}", name, ("animal",), "", style, "train", "train", "MIT", "")
    for k, name in enumerate(("lion", "owl", "fox", "bat"))
    for style in ("noto", "twemoji")
]
FEATURES = np.abs(np.random.default_rng(0).standard_normal((2, len(PICTURES), 512))).astype(np.float32)
SETTINGS = Settings(steps=4, batch=3)


def stopping_after(steps: int):
    def progress(items: Iterable[int], *, total: int | None = None, desc: str = ""):
        del total, desc
        for done, item in enumerate(items):
            if done == steps:
                raise KeyboardInterrupt
            yield item

    return progress


def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fitting, "SAVE_EVERY", 2)
    whole, broken = untrained(1), untrained(1)
    fit(whole, tokenizer(), FEATURES, PICTURES, SETTINGS)
    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tokenizer(), FEATURES, PICTURES, SETTINGS, state, stopping_after(3))
    resumed = untrained(2)
    log = fit(resumed, tokenizer(), FEATURES, PICTURES, SETTINGS, state)
    assert log[-1]["step"] == SETTINGS.steps
    for name, tensor in whole.state_dict().items():
        if name.startswith(("visual.head", "token_embedding", "transformer", "text_projection", "logit_scale")):
            assert torch.allclose(tensor, resumed.state_dict()[name], atol=1e-6), name


def test_the_head_starts_as_a_whitening():
    rng = np.random.default_rng(1)
    features = (rng.standard_normal((2000, 512)) * np.geomspace(10, 0.1, 512)).astype(np.float32)
    model = untrained(0)
    start_head(model, features)
    with torch.no_grad():
        out = model.visual.head(torch.from_numpy(features)).numpy()
    moments = out.T @ out
    assert np.allclose(moments / moments[0, 0], np.eye(256), atol=1e-2)
