"""CORAL, T3A and TDA against what their papers say, image by image."""

import math

import numpy as np
import pytest

from invariclip.bench.studies.sites import peers
from invariclip.calibrate.projection.classifiers import unit

WIDTH, CLASSES = 8, 4
RNG = np.random.default_rng(0)
BANK = unit(RNG.normal(size=(CLASSES, WIDTH)))
LABELS = np.asarray([3, 5, 7, 9])
IMAGES = unit(BANK[RNG.integers(0, CLASSES, 60)] + 0.4 * RNG.normal(size=(60, WIDTH)))


@pytest.fixture
def classes():
    return peers.Classes(LABELS, BANK, np.zeros(CLASSES), 10.0)


def test_nearest_names_by_cosine():
    found = peers.nearest(BANK, LABELS)
    assert (found(IMAGES) == LABELS[np.argmax(IMAGES @ BANK.T, axis=1)]).all()
    assert found.logits(IMAGES) == pytest.approx(100 * IMAGES @ BANK.T, abs=1e-4)


def test_a_bias_counts(classes):
    pushed = peers.Classes(LABELS, BANK, np.asarray([0, 1e3, 0, 0.0]), 1.0)
    assert (pushed(IMAGES) == 5).all()


@pytest.mark.parametrize("exponent", [-0.5, 0.5])
def test_powers_of_a_shrunk_covariance(exponent):
    rows = RNG.normal(size=(5, WIDTH))  # fewer than dimensions: directions without variance
    centred = rows - rows.mean(axis=0)
    covariance = centred.T @ centred
    covariance *= WIDTH / np.trace(covariance)
    values, axes = np.linalg.eigh((covariance + 3 * np.eye(WIDTH)) / 4)
    wanted = IMAGES @ (axes * values**exponent) @ axes.T
    assert peers.colours(rows).power(IMAGES, exponent, 3.0) == pytest.approx(wanted, abs=1e-10)


def test_coral_gives_a_site_the_colours_of_training():
    stretch = np.linspace(0.5, 2, WIDTH)
    mean = 3 * unit(RNG.normal(size=WIDTH))
    training = 0.01 * RNG.normal(size=(4000, WIDTH))
    site = mean + 0.01 * RNG.normal(size=(4000, WIDTH)) * stretch
    own = peers.colours(site)
    moved = peers.recoloured(site, np.zeros(WIDTH), site.mean(axis=0), own, peers.colours(training), 1e-6)
    spread = (3 * moved - site.mean(axis=0)) @ (np.eye(WIDTH) - np.outer(mean, mean) / 9)
    before = (site - site.mean(axis=0)) @ (np.eye(WIDTH) - np.outer(mean, mean) / 9)
    assert spread.std(axis=0).max() / spread.std(axis=0).min() < before.std(axis=0).max() / before.std(axis=0).min() / 2


def test_coral_of_a_large_shrinkage_is_the_shift_alone():
    shift = 0.2 * BANK[0]
    found = peers.recoloured(IMAGES, shift, IMAGES.mean(axis=0), peers.colours(IMAGES[:9]),
                             peers.colours(IMAGES[9:]), 1e9)  # fmt: skip
    assert found == pytest.approx(unit(IMAGES - shift), abs=1e-6)


def _t3a_by_hand(classes, sample, keep):
    """Algorithm by the book: one support after the other, filtered by entropy."""
    supports = {place: [] for place in range(CLASSES)}
    for place, weight in enumerate(unit(classes.weights)):
        supports[place].append((_entropy(classes, weight), weight))
    for image in sample:
        place = int(np.argmax(classes.logits(image[None])[0]))
        supports[place].append((_entropy(classes, image), image))
    kept = [sorted(each, key=lambda pair: pair[0])[: keep or None] for each in supports.values()]
    return unit(np.stack([np.sum([vector for _, vector in each], axis=0) for each in kept]))


def _entropy(classes, vector):
    logits = classes.logits(vector[None])[0].astype(np.float64)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return -float(sum(share * math.log(share) for share in shares if share > 0))


@pytest.mark.parametrize("keep", [1, 3, 20, 0])
def test_t3a_keeps_the_supports_of_least_entropy(classes, keep):
    found = peers.t3a(classes, IMAGES).filtered(keep)
    assert found.weights == pytest.approx(_t3a_by_hand(classes, IMAGES, keep), abs=1e-6)
    assert (found.labels == LABELS).all()


def test_t3a_without_images_is_the_classifier(classes):
    assert peers.t3a(classes, IMAGES[:0]).filtered(5).weights == pytest.approx(BANK)


def _tda_by_hand(classes, sample):
    """The published stream: a full cache takes an image for its worst."""
    positive, negative = {}, {}
    for image in sample:
        logits = classes.logits(image[None])[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        entropy, taken = _entropy(classes, image), int(np.argmax(logits))
        scaled = entropy / math.log2(CLASSES)
        for cache, shots, allowed in ((positive, 3, True), (negative, 2, 0.2 < scaled < 0.5)):
            if allowed:
                kept = cache.setdefault(taken, [])
                kept.append((entropy, image, shares))
                kept.sort(key=lambda each: each[0])
                del kept[shots:]

    def logits_of(image):
        found = classes.logits(image[None])[0].astype(np.float64)
        for place, kept in positive.items():
            for _, key, _ in kept:
                found[place] += 2.0 * math.exp(-5.0 * (1 - image @ key))
        for kept in negative.values():
            for _, key, shares in kept:
                found -= 0.117 * math.exp(-(1 - image @ key)) * ((shares > 0.03) & (shares < 1.0))
        return found

    return logits_of, sum(map(len, positive.values())), sum(map(len, negative.values()))


def test_tda_answers_as_its_stream_does(classes):
    caches = peers.tda(classes, IMAGES[:30])
    logits_of, positive, negative = _tda_by_hand(classes, IMAGES[:30])
    assert (len(caches.positive), len(caches.negative)) == (positive, negative)
    assert positive > CLASSES
    assert negative > 0
    wanted = [LABELS[int(np.argmax(logits_of(image)))] for image in IMAGES[30:]]
    assert caches(IMAGES[30:]).tolist() == wanted
    assert (caches(IMAGES[30:]) != classes(IMAGES[30:])).any()  # they do say something


def test_tda_costs_what_it_keeps(classes):
    caches = peers.tda(classes, IMAGES[:30])
    keys = len(caches.positive) + len(caches.negative)
    assert caches.numbers == keys * WIDTH + len(caches.positive) + len(caches.negative) * CLASSES
    assert caches.products == keys * WIDTH + len(caches.positive) + int(caches.masks.sum())
