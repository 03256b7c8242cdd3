"""A text tower with learned vectors behind its vocabulary: ordinary texts stay, negative ids are the vectors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from invariclip.artifact.learned_prompts import context_ids
from invariclip.artifact.manifest import EMBEDDING, TEXT_INPUT
from invariclip.backends import open_backend
from invariclip.errors import CheckpointError, SemanticsError
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.checkpoints.families import FAMILIES, load_family
from invariclip.export.checkpoints.learned_contexts import token_embedding, with_context_rows
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import write_graph

TEMPLATES, TOKENS = 2, 3
QUICK = ("ViT-B-32", "ViT-B-16-SigLIP", "coca_ViT-B-32", "MobileCLIP2-S0", "roberta-ViT-B-32")
"""One family of each kind of text tower."""


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return load_checkpoint(str(tiny_checkpoint))


def learned(embedding, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = float(embedding.weight.std())
    return spread * torch.randn(TEMPLATES, TOKENS, embedding.embedding_dim, generator=generator)


def prefixed(checkpoint, template, text="cat."):
    return torch.from_numpy(checkpoint.tokenizer(text, prefix=context_ids(template, TOKENS)))


def holds_for(checkpoint):
    module = checkpoint.module
    path, embedding = token_embedding(module)
    context = learned(embedding)
    twin = with_context_rows(module, nn.Parameter(context))
    ordinary = torch.from_numpy(checkpoint.tokenizer(["a photo of a cat.", "dogs"]))
    with torch.no_grad():
        assert torch.equal(twin.encode_text(ordinary), module.encode_text(ordinary))
        answers = [twin.encode_text(prefixed(checkpoint, template)) for template in (1, 2)]
        plain = module.encode_text(torch.from_numpy(checkpoint.tokenizer("cat.")))
        # the vectors of a real word are that word
        words = torch.from_numpy(checkpoint.tokenizer("a big red cat."))
        start = len(checkpoint.tokenizer.spec.start_token_ids)
        first = words[0, start : start + TOKENS]
        real = with_context_rows(module, embedding.weight[first][None])
        negative = words.clone()
        negative[0, start : start + TOKENS] = torch.tensor(context_ids(1, TOKENS))
        assert torch.equal(real.encode_text(negative), module.encode_text(words))
    assert not torch.allclose(answers[0], answers[1])
    assert not torch.allclose(answers[0], plain)
    parameter = dict(twin.named_parameters())[f"{path}.context"]
    twin.encode_text(prefixed(checkpoint, 2)).square().sum().backward()
    assert parameter.grad[0].eq(0).all()
    assert parameter.grad[1].abs().amax(dim=1).gt(0).all()
    assert embedding.weight.grad is None
    assert token_embedding(module)[1] is embedding


def test_the_tiny_model(checkpoint):
    holds_for(checkpoint)


@pytest.mark.parametrize("name", QUICK)
def test_each_kind_of_text_tower(name):
    holds_for(load_family(name, short=True))


def test_the_families_cover_each_kind():
    assert {one.name for one in FAMILIES} >= set(QUICK)


def test_vectors_of_another_width_are_refused(checkpoint):
    with pytest.raises(SemanticsError, match="16 wide"):
        with_context_rows(checkpoint.module, torch.zeros(2, 3, 15))


def test_a_tower_without_a_token_embedding_is_refused():
    with pytest.raises(CheckpointError, match="no token embedding"):
        with_context_rows(nn.Linear(2, 2), torch.zeros(2, 3, 15))


def test_an_id_beyond_the_vectors_is_out_of_range(checkpoint):
    twin = with_context_rows(checkpoint.module, torch.zeros(TEMPLATES, TOKENS, 16))
    ids = torch.from_numpy(checkpoint.tokenizer("cat.", prefix=(-1 - TEMPLATES * TOKENS,)))
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        twin.encode_text(ids)


def test_a_prefix_is_never_cut(checkpoint):
    room = checkpoint.tokenizer.spec.room
    ids = checkpoint.tokenizer("cat.", prefix=context_ids(1, room - 2))
    assert np.array_equal(ids[0, 1 : room - 1], -1 - np.arange(room - 2))


def test_a_tower_that_masks_its_padding_is_exported_at_any_length_with_learned_vectors_too(tmp_path):
    checkpoint = load_family("roberta-ViT-B-32", short=True)
    twin = with_context_rows(checkpoint.module, learned(token_embedding(checkpoint.module)[1]))
    graph = tower_graph(replace(checkpoint, module=twin), "text")
    assert graph.applied("text-cut")
    write_graph(graph.model, tmp_path / "text.onnx")
    whole = np.concatenate([checkpoint.tokenizer(["a big red cat.", "dogs"]), prefixed(checkpoint, 2).numpy()])
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(twin.encode_text(torch.from_numpy(whole)), dim=-1).numpy()
    longest = int((whole != checkpoint.tokenizer.spec.pad_token_id).sum(axis=1).max())
    for engine in ("onnxruntime", "openvino"):
        session = open_backend(engine, tmp_path / "text.onnx", threads=1)
        for length in (longest, longest + 3, whole.shape[1]):
            found = session.run({TEXT_INPUT: np.ascontiguousarray(whole[:, :length])})[EMBEDDING]
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        shorter = session.run({TEXT_INPUT: np.ascontiguousarray(whole[:, : longest - 1])})[EMBEDDING]
        assert np.abs(shorter - wanted).max() > 1e-4  # a text that is cut is another one
