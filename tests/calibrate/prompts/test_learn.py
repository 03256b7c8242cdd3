"""Learning on a genuine tiny checkpoint: seeded, resumed to the same bits, answering as serving will."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from invariclip.artifact.learned_prompts import LearnedPrompts, class_banks, read_semantics, write_semantics
from invariclip.calibrate.data.encode import embed_texts
from invariclip.calibrate.data.images import read_images
from invariclip.calibrate.prompts import training
from invariclip.calibrate.prompts.learn import full_bank, learn
from invariclip.calibrate.prompts.options import PromptOptions
from invariclip.calibrate.prompts.scores import fused_answers
from invariclip.calibrate.prompts.texts import LearnedTexts, hand_written_bank, starting_context
from invariclip.errors import InputError, SemanticsError
from invariclip.export.checkpoints.families import load_family
from invariclip.export.checkpoints.learned_contexts import with_semantics

OPTIONS = PromptOptions(
    learned=2, context_tokens=3, steps=8, check_every=4, classes=6, images=16, target_risk=0.9, confidence=0.6,
    held=0.3, augmentations=(None, None),
)  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint):
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    return load_checkpoint(str(tiny_checkpoint))


@pytest.fixture
def images(manifest):
    return read_images(manifest)


def test_templates_start_at_the_hand_written_words(checkpoint):
    options = PromptOptions(learned=2, context_tokens=4, templates=("a photo of a {}.",), noise=0.0)
    start, _ = starting_context(checkpoint, options)
    texts = LearnedTexts(checkpoint, torch.from_numpy(start))
    ours = texts.bank(texts.ids(["cat", "big dog"]))
    theirs = embed_texts(checkpoint, ["a photo of a cat.", "a photo of a big dog."])
    np.testing.assert_allclose(ours[0], theirs, atol=1e-6)
    np.testing.assert_allclose(ours[1], theirs, atol=1e-6)


def test_missing_words_are_the_vocabularys_mean_and_seeds_differ(checkpoint):
    table = checkpoint.module.token_embedding.weight.detach().numpy()
    start, spread = starting_context(checkpoint, PromptOptions(learned=1, context_tokens=6, noise=0.0))
    np.testing.assert_allclose(start[0, :2], np.repeat(table.mean(axis=0, keepdims=True), 2, axis=0), atol=1e-6)
    assert spread == pytest.approx(table.std(), rel=1e-4)
    one, other = (starting_context(checkpoint, PromptOptions(seed=seed))[0] for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_gradients_reach_the_vectors_alone(checkpoint, tiny_projection):
    context = torch.nn.Parameter(torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)))
    texts = LearnedTexts(checkpoint, context, tiny_projection)
    found = texts.embed(texts.ids(["cat", "dog"]))
    assert found.shape == (2, 2, 8)
    found[0].sum().backward()
    assert context.grad[0].abs().sum() > 0
    assert context.grad[1].abs().sum() == 0  # the other template's
    assert all(parameter.grad is None for parameter in checkpoint.module.parameters())
    with torch.no_grad():
        whole = replace_cut(texts, ["cat", "dog"])
    np.testing.assert_allclose(found.detach().numpy(), whole.numpy(), atol=1e-6)


def test_a_tower_that_masks_its_padding_reads_texts_no_longer_than_they_are():
    loaded = load_family("roberta-ViT-B-32", short=True)
    start, _ = starting_context(loaded, PromptOptions(learned=2, context_tokens=3))
    texts = LearnedTexts(loaded, torch.from_numpy(start))
    ids = texts.ids(["cat", "very big dog"])
    assert texts.cut
    assert ids.shape[-1] < loaded.tokenizer.spec.context_length
    short = texts.bank(ids)
    with torch.no_grad():
        whole = replace_cut(texts, ["cat", "very big dog"]).double().numpy()
    np.testing.assert_allclose(short, whole, atol=1e-6)


def replace_cut(texts, names):
    """The same embeddings with texts at full length."""
    texts.cut = False
    try:
        return texts.embed(texts.ids(names))
    finally:
        texts.cut = True


def test_what_is_learnt_is_seeded_written_and_answers(checkpoint, images, tiny_projection, tmp_path):
    first = learn(checkpoint, images, OPTIONS, tiny_projection)
    again = learn(checkpoint, images, OPTIONS, tiny_projection)
    assert first.semantics.digest == again.semantics.digest
    assert (
        learn(checkpoint, images, replace(OPTIONS, seed=1), tiny_projection).semantics.digest != first.semantics.digest
    )
    write_semantics(tmp_path / "cdc.safetensors", first.semantics)
    read = read_semantics(tmp_path / "cdc.safetensors")
    assert read.digest == first.semantics.digest
    read.require_owner(checkpoint.sha256, tiny_projection.digest)
    with pytest.raises(SemanticsError, match="projection"):
        read.require_owner(checkpoint.sha256, None)
    json.dumps(read.provenance, allow_nan=False)
    assert (
        read.provenance["facts"]["train"] + read.provenance["facts"]["validation"] + read.provenance["facts"]["held"]
        == 30
    )
    names = ("thing 1", "something new")
    bank = full_bank(
        checkpoint,
        read.context,
        hand_written_bank(checkpoint, names, read.templates, tiny_projection),
        names,
        tiny_projection,
    )
    np.testing.assert_allclose(np.linalg.norm(bank, axis=2), 1)
    answer = fused_answers(
        bank[0], bank, checkpoint.logit_scale, read.evidence_scale, read.evidence_bias, read.background
    )
    np.testing.assert_allclose(answer.belief.sum(axis=1) + answer.uncertainty, 1)


def test_class_embeddings_are_those_that_are_exported(checkpoint, tiny_projection):
    options = PromptOptions(learned=2, context_tokens=3, templates=("a photo of a {}.", "a sketch of a {}."))
    context, _ = starting_context(checkpoint, options)
    ones = np.ones(3)
    semantics = LearnedPrompts(context, ones, ones, ones, options.templates, checkpoint.sha256, tiny_projection.digest)
    exported = replace(checkpoint, module=with_semantics(checkpoint.module, semantics))

    def embed(texts, before):
        return tiny_projection.apply(exported.encode_texts(exported.tokenizer(texts, prefix=before)))

    names = ("cat", "a much longer name", "dog")
    theirs = class_banks(embed, names, options.templates, semantics.facts)
    ours = full_bank(
        checkpoint, context, hand_written_bank(checkpoint, names, options.templates, tiny_projection), names,
        tiny_projection,
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_a_stopped_training_goes_on_to_the_same_result(checkpoint, images, tmp_path, monkeypatch):
    options = replace(OPTIONS, patience=100)
    whole = learn(checkpoint, images, options, cache=tmp_path / "whole")
    steps = []
    step = training._Learner.step

    def stopping(self, number):
        steps.append(number)
        if number == 6 and steps.count(6) == 1:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(training._Learner, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn(checkpoint, images, options, cache=tmp_path / "stopped")
    resumed = learn(checkpoint, images, options, cache=tmp_path / "stopped")
    assert steps == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    assert resumed.semantics.digest == whole.semantics.digest
    assert resumed.facts["curve"] == whole.facts["curve"]
    # a damaged file costs the training, not the result
    for file in (tmp_path / "stopped" / "cdc").iterdir():
        file.write_bytes(b"damaged")
    assert learn(checkpoint, images, options, cache=tmp_path / "stopped").semantics.digest == whole.semantics.digest


def test_learning_lowers_the_loss(checkpoint, images):
    found = learn(checkpoint, images, replace(OPTIONS, steps=40, check_every=10, noise=1.0, target_risk=None))
    curve = dict(map(tuple, found.facts["curve"]))
    assert curve[found.facts["best_step"]] < curve[0]
    assert found.threshold is None


@pytest.mark.parametrize("losses", [("softmax",), ("evidential",), ("evidential", "diversity")])
def test_losses_can_be_left_out(checkpoint, images, losses):
    every = learn(checkpoint, images, replace(OPTIONS, patience=100))
    some = learn(checkpoint, images, replace(OPTIONS, losses=losses, patience=100))
    assert some.semantics.digest != every.semantics.digest


def test_one_class_teaches_nothing(checkpoint, images):
    with pytest.raises(InputError, match="two classes or more"):
        learn(checkpoint, [p for p in images if p.name == "thing 1"], OPTIONS)
