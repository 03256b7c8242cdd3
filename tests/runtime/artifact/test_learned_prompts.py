"""Learned templates: what is refused, the file, their owners, their ids, and the banks that they make."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from invariclip.artifact.learned_prompts import (
    LEARNED_PROMPTS_FILE,
    MAX_LEARNED,
    LearnedPrompts,
    class_banks,
    context_ids,
    read_semantics,
    write_semantics,
)
from invariclip.artifact.manifest import LearnedPromptsFacts
from invariclip.errors import InputError, SemanticsError
from invariclip.preprocessing.prompts import class_bank
from invariclip.records import seal


def semantics(learned=2, tokens=3, width=5, seed=0, **fields):
    rng = np.random.default_rng(seed)
    context = rng.normal(size=(learned, tokens, width)).astype(np.float32)
    scale, bias = rng.uniform(0.1, 1, learned + 1), rng.normal(size=learned + 1)
    given = {"templates": ("a photo of a {}.",), "checkpoint_sha256": "c" * 64, "abstain_above": 0.25}
    given["background"] = rng.uniform(-0.5, 0.5, learned + 1)
    return LearnedPrompts(context, scale, bias, **{**given, "provenance": {"seed": seed}, **fields})


@pytest.fixture
def path(tmp_path):
    write_semantics(tmp_path / "cdc.safetensors", semantics())
    return tmp_path / "cdc.safetensors"


def test_what_is_written_is_read(path):
    wanted, got = semantics(), read_semantics(path)
    for name in ("context", "evidence_scale", "evidence_bias", "background"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
        assert getattr(got, name).dtype == getattr(wanted, name).dtype
    for name in ("templates", "checkpoint_sha256", "projection_sha256", "abstain_above", "provenance", "digest"):
        assert getattr(got, name) == getattr(wanted, name)
    assert (got.learned, got.context_tokens) == (2, 3)
    assert got.facts == LearnedPromptsFacts(
        got.digest, 2, 3, tuple(wanted.evidence_scale), tuple(wanted.evidence_bias), tuple(wanted.background), 0.25
    )


def test_the_digest_sees_all_that_an_answer_depends_on():
    one = semantics()
    others = [
        replace(one, context=one.context + np.float32(1e-3)),
        replace(one, evidence_scale=one.evidence_scale * 2),
        replace(one, evidence_bias=one.evidence_bias + 1),
        replace(one, background=one.background + 0.1),
        replace(one, templates=("{}",)),
        replace(one, context=one.context.reshape(2, 5, 3)),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 1 + len(others)
    assert replace(one, provenance={}, abstain_above=None).digest == one.digest


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"context": np.zeros((2, 5), np.float32)}, r"must be \[M, n, width\]"),
        ({"context": np.zeros((MAX_LEARNED + 1, 1, 2), np.float32)}, "M up to 16"),
        ({"context": np.zeros((2, 65, 2), np.float32)}, "n up to 64"),
        ({"evidence_scale": np.ones(2)}, "need 3 values"),
        ({"evidence_bias": np.ones(4)}, "need 3 values"),
        ({"background": np.ones(2)}, "need 3 values"),
        ({"evidence_scale": np.array([1.0, 0.0, 1.0])}, "no scale above 0"),
        ({"evidence_bias": np.array([1.0, np.nan, 1.0])}, "not finite"),
        ({"templates": ()}, "need one {} each"),
        ({"templates": ("a photo",)}, "need one {} each"),
        ({"abstain_above": 1.5}, "not an uncertainty"),
    ],
)
def test_what_could_not_be_served_is_refused(changes, reason):
    with pytest.raises(SemanticsError, match=reason):
        replace(semantics(), **changes)


def test_owners():
    plain, projected = semantics(), semantics(projection_sha256="p" * 64)
    plain.require_owner("c" * 64, None)
    projected.require_owner("c" * 64, "p" * 64)
    with pytest.raises(SemanticsError, match="belong to the checkpoint cccccccccccccccc, not to dddd"):
        plain.require_owner("d" * 64, None)
    with pytest.raises(SemanticsError, match="in the space of projection none, not pppp"):
        plain.require_owner("c" * 64, "p" * 64)
    with pytest.raises(SemanticsError, match="in the space of projection pppppppppppppppp, not none"):
        projected.require_owner("c" * 64, None)


def facts_changed(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(seal(data.replace(old, new)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b""), "not learned templates"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "not learned templates"),
        (lambda path: save_file(load_file(path), path), "not learned templates"),
        (lambda path: facts_changed(path, b'\\"schema\\": 3', b'\\"schema\\": 7'), "schema 7 is not known"),
        (lambda path: facts_changed(path, b"abstain_above", b"abstain_avobe"), "not learned templates"),
        (lambda path: facts_changed(path, b": 0.25", b": 9.25"), "not an uncertainty"),
    ],
)
def test_damaged_files_are_refused(path, damage, reason):
    damage(path)
    with pytest.raises(SemanticsError, match=reason):
        read_semantics(path)


def test_a_file_is_bounded(path, monkeypatch):
    monkeypatch.setattr(
        "invariclip.artifact.learned_prompts.LEARNED_PROMPTS_FILE", replace(LEARNED_PROMPTS_FILE, max_bytes=100)
    )
    with pytest.raises(SemanticsError, match="larger than learned templates can be"):
        read_semantics(path)


def test_ids_count_down_from_minus_one():
    assert [context_ids(template, 3) for template in (1, 2)] == [(-1, -2, -3), (-4, -5, -6)]
    assert len({number for template in range(1, 17) for number in context_ids(template, 64)}) == 16 * 64


def test_a_bank_for_each_template():
    asked = []

    def embed(texts, before):
        asked.append((tuple(texts), before))
        rng = np.random.default_rng(sum(map(ord, "".join(texts))) + len(before))
        rows = rng.normal(size=(len(texts), 4))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    banks = class_banks(embed, ("cat", "dog"), ("{}", "a {}"), semantics().facts)
    assert asked == [
        (("cat", "a cat", "dog", "a dog"), ()),
        (("cat.", "dog."), (-1, -2, -3)),
        (("cat.", "dog."), (-4, -5, -6)),
    ]
    np.testing.assert_array_equal(banks[0], class_bank(lambda texts: embed(texts, ()), ("cat", "dog"), ("{}", "a {}")))
    assert banks.shape == (3, 2, 4)
    np.testing.assert_allclose(np.linalg.norm(banks, axis=-1), 1)
    with pytest.raises(InputError, match="empty or repeated"):
        class_banks(embed, ("cat", "cat"), ("{}",), semantics().facts)
