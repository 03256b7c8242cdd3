"""Folding commutes with the layer it is folded into, for every ending that open_clip knows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints.surgery import find
from invariclip.export.graphs import fold


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 40),
    D=st.integers(1, 40),
    share=st.floats(0.01, 1),
    rows=st.integers(1, 5),
    bias=st.booleans(),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**32 - 1),
)
def test_folding_commutes(width, D, share, rows, bias, scale, seed):
    rng = np.random.default_rng(seed)
    d = max(1, round(share * D))
    W, h = (rng.normal(size=shape) * scale for shape in ((D, width), (rows, width)))
    b = rng.normal(size=D) * scale if bias else None
    A = rng.normal(size=(D, d))
    weight, shift = fold.fold_linear(torch.from_numpy(W).float(), None if b is None else torch.from_numpy(b).float(), A)
    assert (weight.dtype, weight.shape) == (torch.float32, (d, width))
    W32, b32 = W.astype(np.float32).astype(np.float64), 0 if b is None else b.astype(np.float32).astype(np.float64)
    wanted = (h @ W32.T + b32) @ A
    got = h @ weight.double().numpy().T + (0 if shift is None else shift.double().numpy())
    # one rounding to float32 per weight, against the size of what is summed up
    size = np.abs(h) @ np.abs(W32.T) @ np.abs(A) + (0 if b is None else np.abs(b32) @ np.abs(A))
    assert (np.abs(got - wanted) <= 2.0**-23 * size).all()
    assert (shift is None) == (b is None)


def ending_names():
    from importlib import util
    from pathlib import Path

    spec = util.spec_from_file_location("endings", Path(__file__).parents[1] / "conftest.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: values[3:] for name, values in module.ENDINGS.items()}


@pytest.mark.parametrize("rank", [1, 8, 24])
@pytest.mark.parametrize(("name", "hows"), ending_names().items())
def test_every_ending(checkpoint, batch, name, hows, rank):
    loaded = checkpoint(name)
    A = np.random.default_rng(rank).normal(size=(24, rank))
    before = {key: value.clone() for key, value in loaded.module.state_dict().items()}
    images = torch.rand(4, 3, *loaded.pixels.image_size)
    ids = torch.from_numpy(loaded.tokenizer(["a cat", "two dogs", ""]))
    tower, texts = fold.fold_images(loaded.module, A, images), fold.fold_texts(loaded.module, A, ids)
    assert (tower.how, texts.how) == hows
    with torch.inference_mode():
        for folded, encoder, given_ in ((tower, "encode_image", images), (texts, "encode_text", ids)):
            raw = getattr(loaded.module, encoder)(given_).double().numpy()
            wanted = raw @ A
            got = getattr(folded.module, encoder)(given_)
            got = got if folded.matrix is None else got @ folded.matrix
            assert got.shape == wanted.shape
            np.testing.assert_allclose(got.numpy(), wanted, atol=1e-6 * (np.abs(raw) @ np.abs(A)).max())
            assert (folded.matrix is None) == (folded.how == "folded")
    # the original is the reference of every figure: it must not have moved
    after = loaded.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_folding_shares_all_other_weights(checkpoint):
    loaded = checkpoint("vit")
    A = np.random.default_rng(0).normal(size=(24, 8))
    folded = fold.fold_images(loaded.module, A, torch.rand(2, 3, 32, 32)).module
    assert folded.visual.conv1.weight.data_ptr() == loaded.module.visual.conv1.weight.data_ptr()
    assert folded.visual.proj.shape == (64, 8)
    assert loaded.module.visual.proj.shape == (64, 24)


# trunks whose own classifier is the projection: (kind of conftest, what timm calls it)
TRUNKS = {
    "eva": "visual.trunk.head",
    "eva, norm": "visual.trunk.head",
    "pe": "visual.trunk.head",
    "mobile": "visual.trunk.head.fc",
}


@pytest.mark.parametrize("name", TRUNKS)
def test_trunks_take_it_into_their_own_classifier(kind, name):
    loaded, A = kind(name), np.random.default_rng(0).normal(size=(24, 8))
    images = torch.rand((2, 3, *loaded.pixels.image_size), generator=torch.Generator().manual_seed(0))
    folded = fold.fold_images(loaded.module, A, images)
    assert (folded.how, folded.site, folded.matrix) == ("folded", TRUNKS[name], None)
    with torch.inference_mode():
        raw = loaded.module.encode_image(images).double().numpy()
        got = folded.module.encode_image(images).numpy()
    np.testing.assert_allclose(got, raw @ A, rtol=0, atol=1e-6 * (np.abs(raw) @ np.abs(A)).max())


class Late(nn.Module):
    """An encoder whose layer with a known name is followed by something else."""

    def __init__(self, after, site="visual.proj"):
        super().__init__()
        *way, last = site.split(".")
        place = self
        for name in way:
            place.add_module(name, nn.Module())
            place = getattr(place, name)
        setattr(place, last, nn.Parameter(torch.randn(6, 5)) if site == "visual.proj" else nn.Linear(6, 5))
        self.after, self.site = after, site

    def encode_image(self, x, normalize=False):
        layer, rows = find(self, self.site), x.flatten(1)[:, :6]
        return self.after(layer(rows) if isinstance(layer, nn.Linear) else rows @ layer)


@pytest.mark.parametrize(
    "after",
    [torch.tanh, lambda x: x / x.norm(dim=-1, keepdim=True) + 0.3, lambda x: x * torch.arange(1.0, 6)],
    ids=["another function", "already normalised", "expects the old width"],
)
@pytest.mark.parametrize("site", fold.IMAGE_SITES)
def test_a_layer_that_is_not_the_last_is_left_alone(after, site):
    model = Late(after, site)
    folded = fold.fold_images(model, np.random.default_rng(0).normal(size=(5, 3)), torch.randn(3, 1, 2, 3))
    assert (folded.how, folded.module is model, folded.site) == ("matmul", True, "")
    assert folded.matrix.shape == (5, 3)


@pytest.mark.parametrize("site", fold.IMAGE_SITES)
def test_at_every_site_the_last_layer_is_folded(site):
    model = Late(lambda x: x, site)
    folded = fold.fold_images(model, np.random.default_rng(0).normal(size=(5, 3)), torch.randn(3, 1, 2, 3))
    assert (folded.how, folded.site, folded.matrix) == ("folded", site, None)


@pytest.mark.parametrize("site", fold.IMAGE_SITES)
def test_the_last_layer_is_read_as_one_matrix(site):
    model, x = Late(lambda x: x, site), torch.randn(3, 1, 2, 3)
    matrix = fold.last_linear(model, "image", x)
    found = find(model, site)
    if isinstance(found, nn.Parameter):
        np.testing.assert_array_equal(matrix, found.detach().numpy().T)
    else:
        np.testing.assert_array_equal(matrix[:, :6], found.weight.detach().numpy())
        assert (found.bias is None and matrix.shape == (5, 6)) or np.array_equal(matrix[:, 6], found.bias.detach())


def test_a_tower_without_a_last_linear_layer_has_no_matrix_to_read():
    with pytest.raises(CheckpointError, match="the image tower does not end in a linear layer"):
        fold.last_linear(Late(torch.tanh, fold.IMAGE_SITES[0]), "image", torch.randn(3, 1, 2, 3))


def test_sequential_heads_fold_their_last_layer():
    model = Late(lambda x: x)
    model.visual = nn.Module()
    model.visual.proj = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 5))
    model.encode_image = lambda x, normalize=False: model.visual.proj(x.flatten(1)[:, :6])
    A = np.random.default_rng(0).normal(size=(5, 3))
    layer = fold._folded_layer(model.visual.proj, A)
    x = torch.randn(7, 6)
    torch.testing.assert_close(layer(x), model.visual.proj(x) @ torch.from_numpy(A).float())
