"""IsoCLIP on real checkpoints: what acts on embeddings is what the paper puts into both towers' last layers."""

import numpy as np
import pytest
import torch
from torch import nn

from invariclip.calibrate.evaluation.text_baselines import isoclip, projectors, spectrum
from invariclip.calibrate.projection.classifiers import unit
from invariclip.errors import CheckpointError
from invariclip.export.checkpoints.surgery import find, with_replaced
from invariclip.export.graphs.fold import IMAGE_SITES, TEXT_SITES, last_linear

ENDS = (
    "vit",
    "resnet, attention pool with bias",
    "timm, head with bias",
    "timm, MLP head",
    "text projection with bias",
)


def with_layer(module, sites, matrix):
    """The module whose last layer is another matrix, a bias being its last column."""
    site = next(site for site in sites if find(module, site) is not None)
    layer = find(module, site)
    if isinstance(layer, nn.Parameter):
        new = nn.Parameter(torch.from_numpy(matrix.T).float())
    else:
        inner = layer[-1] if isinstance(layer, nn.Sequential) else layer
        new = nn.Linear(inner.in_features, len(matrix), bias=inner.bias is not None)
        new.weight = nn.Parameter(torch.from_numpy(matrix[:, : inner.in_features].copy()).float())
        if inner.bias is not None:
            new.bias = nn.Parameter(torch.from_numpy(matrix[:, -1].copy()).float())
        if inner is not layer:
            new = with_replaced(layer, [str(len(layer) - 1)], new)
    return with_replaced(module, site.split("."), new)


@pytest.mark.parametrize("name", ENDS)
def test_the_maps_are_the_papers_layers(checkpoint, name):
    loaded = checkpoint(name)
    layers = projectors(loaded)
    left, values, right = np.linalg.svd(layers.image.T @ layers.text, full_matrices=False)
    rank = len(spectrum(layers))
    assert rank == (values > 1e-9 * values[0]).sum()
    kept = slice(3, rank - 1)  # four dropped, three of them at the top
    image = layers.image @ left[:, kept] @ left[:, kept].T
    text = layers.text @ right[kept].T @ right[kept]
    what = isoclip(layers, rank - 4)
    images = torch.rand(4, 3, *loaded.pixels.image_size)
    ids = torch.from_numpy(loaded.tokenizer(["a cat", "two dogs", ""]))
    for encoder, rows, sites, matrix, own in (
        ("encode_image", images, IMAGE_SITES, image, what.images),
        ("encode_text", ids, TEXT_SITES, text, what.texts),
    ):
        with torch.inference_mode():
            raw = getattr(loaded.module, encoder)(rows).numpy()
            wanted = getattr(with_layer(loaded.module, sites, matrix), encoder)(rows).numpy()
        np.testing.assert_allclose(own.apply(unit(raw)), unit(wanted), atol=2e-4)


def test_a_checkpoint_that_ends_otherwise_says_so(checkpoint):
    for name, tower in (("text without projection", "text"), ("timm, attention as head", "image")):
        with pytest.raises(CheckpointError, match=f"the {tower} tower does not end in a linear layer"):
            projectors(checkpoint(name))


def test_a_head_of_several_layers_gives_its_last(checkpoint):
    loaded = checkpoint("timm, MLP head")
    head = last_linear(loaded.module, "image", torch.rand(3, 3, *loaded.pixels.image_size))
    np.testing.assert_array_equal(head, loaded.module.visual.head.mlp.fc2.weight.double().numpy())
