"""The fit of evidence: it is what its definition says, and what it gives is calibrated where the model is right."""

import numpy as np
import pytest
import torch

from invariclip.calibrate.prompts.losses import fused_log_evidence
from invariclip.calibrate.prompts.scales import fit_scales, fit_temperature, served_loss
from invariclip.calibrate.prompts.scores import fused_answers, reliability
from invariclip.uncertainty import fuse


def _world(seed, count, classes=8, width=16, templates=3, noise=0.9):
    """Images around class directions, some far from all of them, and templates that see classes a little apart."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    bank = centres + 0.2 * np.random.default_rng(98).normal(size=(templates, classes, width))
    labels = rng.integers(classes, size=count)
    vectors = centres[labels] + noise * rng.uniform(0.5, 4, (count, 1)) * rng.normal(size=(count, width))
    return (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        labels,
        bank / np.linalg.norm(bank, axis=2, keepdims=True),
    )


def test_the_loss_is_that_of_what_is_served():
    rng = np.random.default_rng(0)
    opinions, labels = rng.normal(size=(2, 6, 5)), np.asarray([0, 1, 2, 3, 4, 0])
    base_rate = rng.dirichlet(np.ones(5), size=6)
    fused = fuse(np.swapaxes(opinions, 0, 1), base_rate)
    right = fused.probabilities.argmax(axis=1) == labels
    assert 0 < right.sum() < 6
    of_doubt = np.where(right, -np.log1p(-fused.uncertainty), -np.log(fused.uncertainty))
    reference = np.mean(-np.log(fused.probabilities[np.arange(6), labels]) + of_doubt)
    ours = served_loss(
        fused_log_evidence([*torch.from_numpy(opinions)]), torch.from_numpy(np.log(base_rate)), torch.from_numpy(labels)
    )
    assert float(ours) == pytest.approx(reference)


def test_probabilities_and_u_are_calibrated_on_other_images():
    vectors, labels, bank = _world(1, 2000)
    tau = 5.0
    scales = fit_scales(vectors, labels, bank, tau)
    again = fit_scales(vectors, labels, bank, tau)
    np.testing.assert_array_equal(scales.bias, again.bias)
    others, truth, _ = _world(2, 4000)
    answer = fused_answers(others, bank, tau, *scales.numbers)
    right = answer.belief.argmax(axis=1) == truth
    assert 0.3 < right.mean() < 0.95
    logits = tau * others @ bank[0].T
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    plain = reliability(softmax.max(axis=1), softmax.argmax(axis=1) == truth).error
    assert reliability(answer.probabilities.max(axis=1), right).error < min(0.08, 0.6 * plain)
    assert reliability(1 - answer.uncertainty, right).error < 0.1
    # every template has a say: leaving its evidence out changes the answer's strength
    for template in range(len(bank)):
        cosines = others @ bank[template].T
        strength = scales.scale[template] * tau * cosines.max(axis=1) + scales.bias[template] - np.log(8)
        assert np.quantile(strength, 0.9) > -3


def test_the_temperature_is_that_which_drew_the_labels():
    rng = np.random.default_rng(3)
    cosines = rng.uniform(-1, 1, (4000, 6))
    labels = np.array([rng.choice(6, p=p) for p in torch.from_numpy(7.0 * cosines).softmax(dim=1).numpy()])
    found = fit_temperature(cosines, labels, 50.0)
    assert found == pytest.approx(7.0, rel=0.06)
    logits, wanted = torch.from_numpy(cosines), torch.from_numpy(labels)
    losses = [
        float(torch.nn.functional.cross_entropy(tau * logits, wanted)) for tau in (0.97 * found, found, 1.03 * found)
    ]
    assert losses[1] < min(losses[0], losses[2])
