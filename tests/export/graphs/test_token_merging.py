"""Merging tokens: the matching against a plain account of it, what proportional attention promises, and the graphs."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.artifact.manifest import EMBEDDING
from invariclip.backends import open_backend
from invariclip.errors import InputError
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.graphs.rewrites import RewriteNotApplicableError, Subject
from invariclip.export.graphs.rewrites.plan import NAMES, rewrite_encoder
from invariclip.export.graphs.token_merging import MERGE_NODES, Merge, image_shape, thin_tokens
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.trace import ImageTower, part_of
from invariclip.export.graphs.writing import write_graph

SCHEDULE = (13, 13, 8, 5)  # of 17 tokens; five blocks
VISION = {"image_size": 32, "layers": 5, "width": 64, "patch_size": 8}
VECTORS = np.random.default_rng(7).normal(size=(64, 6)).astype(np.float32)


def told(x, size, metric, gone, prefix):
    """ToMe's matching as one would tell it: sort the pairs, move the first, weigh by what a token stands for."""
    unit = metric / np.maximum(np.linalg.norm(metric, axis=1, keepdims=True), 1e-6)
    patches = range(prefix, len(x))
    sources, targets = list(patches)[0::2], list(patches)[1::2]
    best = {source: max(unit[source] @ unit[target] for target in targets) for source in sources}
    partner = {source: max(targets, key=lambda target: unit[source] @ unit[target]) for source in sources}
    order = sorted(sources, key=lambda source: -best[source])
    members = {target: [target] for target in targets}
    for source in order[:gone]:
        members[partner[source]].append(source)
    groups = [[place] for place in range(prefix)] + [[source] for source in order[gone:]] + list(members.values())
    tokens = [np.average(x[group], axis=0, weights=size[group]) for group in groups]
    return np.stack(tokens), np.array([size[group].sum() for group in groups])


@st.composite
def merges(draw):
    prefix = draw(st.integers(1, 3))
    before = prefix + draw(st.integers(2, 20))
    gone = draw(st.integers(1, (before - prefix + 1) // 2))
    return prefix, before, gone, draw(st.integers(0, 2**20))


@settings(deadline=None, max_examples=60)
@given(merges())
def test_a_merge_is_what_token_merging_tells(case):
    prefix, before, gone, seed = case
    rng = np.random.default_rng(seed)
    x, metric = rng.normal(size=(2, 3, before, 5)).astype(np.float32)
    size = rng.integers(1, 9, (3, 1, before)).astype(np.float32)
    merge = Merge(before, before - gone, prefix)
    tokens, together = merge(torch.from_numpy(x), torch.from_numpy(size), torch.from_numpy(metric))
    assert tokens.shape == (3, before - gone, 5)
    for row in range(3):
        wanted, wanted_size = told(x[row], size[row, 0], metric[row], gone, prefix)
        np.testing.assert_allclose(tokens[row], wanted, atol=2e-6)
        np.testing.assert_array_equal(together[row, 0], wanted_size)


@settings(deadline=None, max_examples=60)
@given(merges(), st.integers(1, 4))
def test_every_place_is_taken_and_no_patch_is_lost_whatever_the_ties(case, kinds):
    prefix, before, gone, seed = case
    # few kinds of token: nearly every similarity is a tie; one kind is all zeros
    which = np.random.default_rng(seed).integers(0, kinds, (2, before))
    metric = np.where(which[..., None] == 0, 0, VECTORS[which])
    merge = Merge(before, before - gone, prefix)
    slots = merge.slots(torch.from_numpy(metric)).numpy()[:, 0]
    for row in slots:
        np.testing.assert_array_equal(np.unique(row), np.arange(before - gone))
        np.testing.assert_array_equal(row[:prefix], np.arange(prefix))
    _, size = merge(torch.from_numpy(metric), None, torch.from_numpy(metric))
    np.testing.assert_array_equal(size.sum(-1), [[before]] * 2)


@pytest.fixture(scope="module")
def deep(write, tmp_path_factory):
    """A ViT of five blocks and 17 tokens; attention that is far from uniform."""
    loaded = load_checkpoint(write(tmp_path_factory.mktemp("deep") / "vit", VISION))
    for block in loaded.module.visual.transformer.resblocks:
        block.attn.in_proj_weight.data.mul_(3.0)
    return loaded


@pytest.fixture(scope="module")
def thinned(deep):
    """A schedule → the torch tower with it, from uint8 images to unit embeddings; None merges nothing."""

    @cache
    def tower(schedule):
        subject = Subject("image", part_of(deep.module, "image"), deep.pixels)
        rewrite_encoder(subject, torch.zeros(1, 3, 32, 32), NAMES)
        if schedule:
            thin_tokens(subject, schedule)
        module = ImageTower(subject.encoder, deep.pixels)
        return lambda rows: module(torch.from_numpy(rows)).detach().numpy()

    return tower


@pytest.fixture(scope="module")
def graph(deep, tmp_path_factory):
    """The graph of `SCHEDULE`, and its file."""
    made = tower_graph(deep, "image", tokens=SCHEDULE)
    path = tmp_path_factory.mktemp("graph") / "image.onnx"
    write_graph(made.model, path)
    return made, path


def alike(one, other):
    return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)


def test_merging_moves_the_answers_a_little_and_more_merging_more(thinned, deep, batch):
    rows = batch(deep, 12)
    wanted = thinned(None)(rows)
    some, many = (alike(wanted, thinned(schedule)(rows)).mean() for schedule in ((16, 16, 16, 16), SCHEDULE))
    assert 0.5 < many < some < 1 - 1e-6


def test_tokens_are_compared_by_their_keys_and_merged_between_attention_and_mlp(deep, batch):
    subject = Subject("image", part_of(deep.module, "image"), deep.pixels)
    rewrite_encoder(subject, torch.zeros(1, 3, 32, 32), NAMES)
    thin_tokens(subject, SCHEDULE)
    (stack,) = subject.encoder.visual.transformer.resblocks
    seen = {}
    stack.register_forward_pre_hook(lambda _, given: seen.update(tokens=given[0]))
    stack.merges[0].register_forward_hook(lambda _, given, gave: seen.update(given=given, gave=gave))
    stack.blocks[0].mlp.register_forward_pre_hook(lambda _, given: seen.update(mlp=given[0]))
    with torch.inference_mode():
        ImageTower(subject.encoder, deep.pixels)(torch.from_numpy(batch(deep, 2)))
        block = stack.blocks[0]
        normed = block.norm_1(seen["tokens"])
        x, size, metric = seen["given"]
        assert torch.equal(x, seen["tokens"] + block.attention(normed))
        assert size is None
        assert torch.equal(metric, block.attention.k(normed))
        assert torch.equal(seen["mlp"], block.norm_2(seen["gave"][0]))


def test_equal_tokens_merge_without_a_trace(thinned, deep):
    # without positions the patches of one colour are equal, and proportional attention weighs what they became as many
    positions = deep.module.visual.positional_embedding.data
    kept = positions.clone()
    rows = np.full((3, 32, 32, 3), [[[[10]]], [[[120]]], [[[250]]]], dtype=np.uint8)
    rows[1, 16:] = 30  # two colours, and each always has sources and targets of its own
    try:
        positions[1:] = 0
        wanted = thinned(None)(rows)
        for schedule in (SCHEDULE, (9, 5, 3, 3), (17, 17, 17, 9)):
            assert np.abs(thinned(schedule)(rows) - wanted).max() <= 1e-5
    finally:
        positions.copy_(kept)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_graph_answers_like_torch_in_every_batch(graph, thinned, deep, batch, engine):
    rows = batch(deep, 17)
    wanted = thinned(SCHEDULE)(rows)
    backend = open_backend(engine, graph[1], threads=1)
    for count in (1, 2, 17):
        got = backend.run({backend.input_names[0]: rows[:count]}, (EMBEDDING,))[EMBEDDING]
        assert got.dtype == np.float32
        assert np.abs(got - wanted[:count]).max() <= 1e-5


def test_in_bfloat16_it_stays_close(graph, thinned, deep, batch):
    rows = batch(deep, 16)
    backend = open_backend("openvino", graph[1], threads=1, compute="bfloat16")
    got = backend.run({backend.input_names[0]: rows}, (EMBEDDING,))[EMBEDDING]
    # noise images: a pair that rounding exchanges moves an answer; most keep theirs
    assert np.median(alike(thinned(SCHEDULE)(rows), got)) > 0.995


def test_the_graph_needs_nothing_that_sorts_or_scatters_and_names_what_must_stay_float(graph):
    made, _ = graph
    kinds = {node.op_type for node in made.model.graph}
    assert not kinds & {"TopK", "Scatter", "ScatterElements", "ScatterND", "GatherND", "GatherElements", "NonZero"}
    named = [node for node in made.model.graph if node.name.startswith(MERGE_NODES)]
    assert [node.name for node in named] == [f"merge_{n}_{part}" for n in range(3) for part in ("similarity", "move")]
    assert {node.op_type for node in named} == {"MatMul"}
    # of 17 and of 13 tokens the class token goes past the product, which then is over an even number
    assert [node.outputs[0].shape[1] for node in named[1::2]] == [12, 7, 5]
    assert [node.inputs[0].shape[2] for node in named[1::2]] == [16, 12, 8]
    assert [step.detail for step in made.plan if step.name == "tokens"] == [
        "17 tokens before the first block, then 13 ×2, 8 ×1, 5 ×1"
    ]


def test_tensorrt_takes_it(graph):
    pytest.importorskip("tensorrt_rtx", reason='TensorRT-RTX: pip install "invariclip[tensorrt-rtx]"')
    from invariclip.export.tensorrt.engines import build_on_cpu

    assert build_on_cpu(graph[1]).engine_bytes > 10_000


def test_a_timm_tower_with_a_class_token_can_have_fewer(kind, batch, tmp_path):
    loaded = kind("timm")
    shape = image_shape(loaded)
    assert (shape.blocks, shape.tokens, shape.prefix) == (2, 101, 1)
    made = tower_graph(loaded, "image", tokens=(51,))
    write_graph(made.model, tmp_path / "timm.onnx")
    backend = open_backend("onnxruntime", tmp_path / "timm.onnx", threads=1)
    rows = batch(loaded, 3)
    got = backend.run({backend.input_names[0]: rows}, (EMBEDDING,))[EMBEDDING]
    assert alike(loaded.encode_images(rows), got).min() > 0.9


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet", "has no transformer blocks|needs the rewrite plain-attention"),
        ("mean", "needs the rewrite pooled-last-block"),
        ("first", "needs the rewrite"),
        ("timm, mean", "needs the rewrite pooled-last-block"),
        ("eva", "turned by their position"),
    ],
)
def test_a_tower_that_does_not_fit_is_refused(kind, name, reason):
    with pytest.raises(InputError, match=rf"the image tower cannot have fewer tokens: .*({reason}).*with all"):
        tower_graph(kind(name), "image", tokens=(9,))


def test_the_shape_of_a_tower_that_does_not_fit_is_refused_in_the_same_words(kind):
    with pytest.raises(InputError, match="the image tower cannot have fewer tokens: it has no transformer blocks"):
        image_shape(kind("resnet"))
    with pytest.raises(InputError, match="turned by their position"):
        image_shape(kind("eva"))


def test_texts_are_refused_and_so_is_a_tower_without_its_rewrites(deep):
    with pytest.raises(InputError, match="the text tower cannot have fewer tokens: its tokens are words"):
        tower_graph(deep, "text", tokens=SCHEDULE)
    subject = Subject("image", part_of(deep.module, "image"), deep.pixels)
    before = subject.encoder
    with pytest.raises(RewriteNotApplicableError, match="needs the rewrite plain-attention"):
        thin_tokens(subject, SCHEDULE)
    assert subject.encoder is before


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ((13, 13, 8), "every block but the last: 4, not 3"),
        ((13, 13, 8, 3), "block 4 of 5 gets 8 tokens and can leave 4 to 8"),
        ((8, 8, 8, 8), "block 1 of 5 gets 17 tokens and can leave 9 to 17 of them, not 8"),
        ((13, 14, 8, 5), "block 2 of 5 gets 13 tokens and can leave 7 to 13 of them, not 14"),
    ],
)
def test_a_schedule_that_the_tower_cannot_have_is_refused(deep, schedule, words):
    with pytest.raises(InputError, match=words):
        tower_graph(deep, "image", tokens=schedule)


def test_what_a_checkpoints_shape_says(deep):
    shape = image_shape(deep)
    assert (shape.blocks, shape.tokens, shape.prefix, shape.width, shape.inner) == (5, 17, 1, 64, 64)
    assert (shape.key_weights, shape.query_weights, shape.mlp, shape.stem) == (8192, 8192, 32768, 16 * 64 * 192)
    assert shape.all == (17, 17, 17, 17)
    costs = [shape.flops((left,) * 4, merge=0) for left in (17, 13, 9)]
    assert costs == sorted(costs, reverse=True)
