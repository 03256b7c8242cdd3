"""CDC's losses against torch.distributions, scipy and float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma
from torch.distributions import Dirichlet, kl_divergence

from invariclip.calibrate.prompts import losses
from invariclip.uncertainty import fuse, opinions


def _logs(seed, shape, low=-6.0, high=6.0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(low, high, shape))


@pytest.mark.parametrize("classes", [2, 7, 200])
def test_the_evidential_loss_is_the_mean_cross_entropy_under_the_dirichlet(classes):
    log_evidence, labels = _logs(1, (5, classes)), torch.arange(5) % classes
    alpha = log_evidence.exp().numpy() + 1
    reference = digamma(alpha.sum(axis=1)) - digamma(alpha[np.arange(5), labels.numpy()])
    np.testing.assert_allclose(losses.evidential_loss(log_evidence, labels).numpy(), reference, atol=1e-9)


def test_the_evidential_loss_is_what_sampling_says():
    torch.manual_seed(0)
    log_evidence = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    sampled = Dirichlet(log_evidence.exp() + 1).sample((200_000,))[:, 0, 1]
    loss = losses.evidential_loss(log_evidence, torch.tensor([1]))
    assert float(loss) == pytest.approx(float(-sampled.log().mean()), abs=0.01)


@pytest.mark.parametrize("classes", [2, 7, 200])
def test_the_divergence_is_that_of_torch(classes):
    log_evidence, labels = _logs(2, (5, classes)), torch.arange(5) % classes
    alpha = (log_evidence.exp() + 1).scatter(1, labels[:, None], 1.0)
    reference = kl_divergence(Dirichlet(alpha), Dirichlet(torch.ones_like(alpha)))
    torch.testing.assert_close(losses.misleading_loss(log_evidence, labels), reference, rtol=1e-9, atol=1e-9)
    # what is said for the right class does not mislead
    other = log_evidence.scatter(1, labels[:, None], 3.0)
    torch.testing.assert_close(losses.misleading_loss(other, labels), losses.misleading_loss(log_evidence, labels))


@pytest.mark.parametrize("value", [-100.0, -30.0, 0.0, 15.0, 19.9, 20.1, 40.0, 100.0])
def test_no_loss_overflows_and_float32_keeps_four_digits(value):
    log_evidence = torch.tensor([[value, 1.0, -2.0]], requires_grad=True)
    labels = torch.tensor([1])
    for loss in (losses.evidential_loss, losses.misleading_loss):
        ours = loss(log_evidence, labels)
        wide = loss(log_evidence.double(), labels)
        torch.testing.assert_close(ours.double(), wide, rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(ours.sum(), log_evidence)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [losses.evidential_loss, losses.misleading_loss])
def test_gradients_are_those_of_finite_differences(loss):
    log_evidence = _logs(3, (3, 5), -3, 8).requires_grad_()
    labels = torch.tensor([0, 3, 4])
    assert torch.autograd.gradcheck(lambda given: loss(given, labels), (log_evidence,), eps=1e-6, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(2, 30))
def test_fused_evidence_is_the_closed_form_of_serving(seed, templates, classes):
    opinions = _logs(seed, (templates, 4, classes), -8, 8)
    log_evidence = losses.fused_log_evidence(list(opinions))
    # e = K·b/u: the opinion that has this belief and uncertainty
    fused = fuse(opinions.permute(1, 0, 2).numpy(), np.full((4, classes), 1 / classes))
    reference = np.log(classes * fused.belief / fused.uncertainty[:, None])
    np.testing.assert_allclose(log_evidence.numpy(), reference, atol=1e-8)


def test_fused_evidence_has_finite_gradients_at_both_ends():
    for value in (-300.0, -40.0, 0.0, 40.0, 300.0):
        opinions = torch.full((2, 1, 3), value, requires_grad=True)
        fused = losses.fused_log_evidence(list(opinions))
        (gradient,) = torch.autograd.grad(fused.sum(), opinions)
        assert torch.isfinite(fused).all()
        assert torch.isfinite(gradient).all()


def test_diversity_is_the_mean_cosine_of_other_templates():
    rng = np.random.default_rng(4)
    classes = rng.normal(size=(3, 5, 6))
    classes /= np.linalg.norm(classes, axis=2, keepdims=True)
    pairs = [(classes[m] * classes[n]).sum(axis=1).mean() for m in range(3) for n in range(3) if m != n]
    assert float(losses.diversity_loss(torch.from_numpy(classes))) == pytest.approx(np.mean(pairs))
    assert float(losses.diversity_loss(torch.from_numpy(classes[:1]))) == 0


def test_consistency_is_the_divergence_from_the_hand_written_template():
    logits, hand_written = _logs(5, (4, 6)), _logs(6, (4, 6))
    reference = torch.nn.functional.kl_div(
        logits.log_softmax(1), hand_written.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    torch.testing.assert_close(losses.consistency_loss(logits, hand_written), reference)
    torch.testing.assert_close(losses.consistency_loss(logits, logits), torch.zeros(4, dtype=torch.float64))


def test_evidence_is_that_of_serving():
    logits = _logs(5, (6, 9), -4, 4)
    scale, bias = torch.tensor(1.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    background = losses.usual_background(logits, scale)
    # the usual rivals of these images, seven times weaker
    ordered = np.sort(1.7 * logits.numpy(), axis=1)
    assert 1.7 * float(background) == pytest.approx(np.logaddexp.reduce(ordered[:, :-1], axis=1).mean() - 2)
    wanted, _ = opinions(logits.numpy()[:, None], 1.0, *(np.array([float(x)]) for x in (scale, bias, background)))
    np.testing.assert_allclose(losses.log_evidence(logits, scale, bias).numpy(), wanted[:, 0], atol=1e-12)
    steep = (100 * logits.float()).requires_grad_()
    found = losses.log_evidence(steep, scale.float(), bias.float())
    (gradient,) = torch.autograd.grad(found.sum(), steep)
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient).all()
