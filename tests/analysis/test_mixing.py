import math

import numpy as np
import pytest
from scipy.stats import chi2
from sklearn.metrics import silhouette_samples

from coda_ray.analysis.mixing import batch_mixing


def labelled_batches(rng, rows, shift, batches=3):
    """Two labels, each in batches that are shifted against each other: features, batches, labels."""
    batch, label = rng.integers(0, batches, rows), rng.integers(0, 2, rows)
    features = rng.normal(size=(rows, 5)) + 6 * label[:, None] + shift * rng.normal(size=(batches, 5))[batch]
    return features.astype(np.float32), batch, label


def simpson(distances, batches, perplexity):
    """Simpson index of the batches of neighbours, weighted by a Gaussian of distance with the given perplexity."""
    low, high, beta = 0.0, math.inf, 1.0
    for _ in range(200):
        weights = [math.exp(-d * beta) for d in distances]
        total = sum(weights)
        entropy = math.log(total) + beta * sum(d * w for d, w in zip(distances, weights, strict=True)) / total
        if entropy > math.log(perplexity):
            low, beta = beta, beta * 2 if high == math.inf else (beta + high) / 2
        else:
            high, beta = beta, (beta + low) / 2
    return sum((sum(w for w, b in zip(weights, batches, strict=True) if b == name) / total) ** 2 for name in set(batches))


def ilisi_by_hand(features, batches, neighbours):
    scores = []
    for i, row in enumerate(features):
        near = sorted((math.dist(row, other), j) for j, other in enumerate(features) if j != i)[:neighbours]
        scores.append(1 / simpson([d for d, _ in near], [batches[j] for _, j in near], (neighbours + 1) // 3))
    return (np.median(scores) - 1) / (len(set(batches)) - 1)


def kbet_by_hand(features, batches, neighbours):
    """Of one label; the image itself is among its neighbours."""
    names, size = sorted(set(batches)), neighbours + 1
    accepted = 0
    for row in features:
        near = sorted((math.dist(row, other), b) for other, b in zip(features, batches, strict=True))[:size]
        statistic = 0.0
        for name in names:
            expected = size * batches.count(name) / len(batches)
            statistic += (sum(b == name for _, b in near) - expected) ** 2 / expected
        accepted += chi2.sf(statistic, len(names) - 1) >= 0.05
    return accepted / len(features)


# Importing scib-metrics takes many seconds.
@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_scores_equal_plain_computations(shift):
    features, batch, label = labelled_batches(np.random.default_rng(0), 160, shift)
    found = batch_mixing(features, np.array(["p", "q", "r"])[batch], label)
    assert found["ilisi"] == pytest.approx(ilisi_by_hand(features.tolist(), batch.tolist(), 90), abs=1e-3)
    of_label = [(features[label == name], batch[label == name]) for name in (0, 1)]
    # Of about 80 images in three batches, a quarter of a batch is below the least number, 10.
    kbet = np.mean([kbet_by_hand(rows.tolist(), names.tolist(), 10) for rows, names in of_label])
    assert found["kbet"] == pytest.approx(kbet, abs=1e-6)
    silhouette = np.mean([(1 - np.abs(silhouette_samples(rows, names))).mean() for rows, names in of_label])
    assert found["silhouette_batch"] == pytest.approx(silhouette, abs=1e-4)


@pytest.mark.slow
def test_mixed_batches_score_high_and_separate_ones_low():
    mixed = batch_mixing(*labelled_batches(np.random.default_rng(1), 400, shift=0.0))
    apart = batch_mixing(*labelled_batches(np.random.default_rng(1), 400, shift=30.0))
    assert mixed["ilisi"] > 0.75
    assert mixed["kbet"] > 0.85
    assert mixed["silhouette_batch"] > 0.9
    assert max(apart.values()) < 0.2
    assert all(0 <= value <= 1 for value in (*mixed.values(), *apart.values()))


@pytest.mark.slow
def test_labels_of_one_batch_or_few_images_are_left_out():
    features, batch, label = labelled_batches(np.random.default_rng(2), 200, shift=0.5)
    lonely = np.concatenate([label, np.full(40, 2), np.full(20, 3)])  # 40 images in one batch, 20 in two
    batches = np.concatenate([batch, np.zeros(40, int), np.arange(20) % 2])
    more = np.concatenate([features, np.random.default_rng(3).normal(size=(60, 5)) + 100])
    with_lonely, without = batch_mixing(more, batches, lonely), batch_mixing(features, batch, label)
    assert with_lonely["kbet"] == without["kbet"]
    assert with_lonely["silhouette_batch"] == pytest.approx(without["silhouette_batch"], abs=1e-6)


def test_wrong_input_is_refused():
    features, batch, label = labelled_batches(np.random.default_rng(4), 40, shift=0.0)
    with pytest.raises(ValueError, match=r"features \(40, 5\), batches \(39,\) and labels \(40,\) must be"):
        batch_mixing(features, batch[1:], label)
    with pytest.raises(ValueError, match="not finite"):
        batch_mixing(features * np.nan, batch, label)
    with pytest.raises(ValueError, match="all features are of batch b; mixing needs two"):
        batch_mixing(features, np.full(40, "b"), label)
    with pytest.raises(ValueError, match="none of the 40 labels has 30 images in several batches"):
        batch_mixing(features, batch, np.arange(40))
