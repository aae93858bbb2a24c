import numpy as np
import pytest

from coda_ray.analysis.cka import MinibatchCka


def layers(rng, images, widths, of=None):
    """One array (images, width) per layer, partly a function of the given features."""
    made = [rng.normal(size=(images, width)) + 3 for width in widths]
    return made if of is None else [layer + of @ rng.normal(size=(of.shape[1], layer.shape[1])) for layer in made]


def gram(features):
    """Linear kernel without its diagonal, entry by entry."""
    n = len(features)
    return [
        [sum(x * y for x, y in zip(features[i], features[j], strict=True)) if i != j else 0.0 for j in range(n)] for i in range(n)
    ]


def unbiased_hsic(features_a, features_b):
    """HSIC₁ by its three sums."""
    k, l_, n = gram(features_a.tolist()), gram(features_b.tolist()), len(features_a)
    everyone = range(n)
    trace = sum(k[i][j] * l_[j][i] for i in everyone for j in everyone)
    totals = sum(map(sum, k)) * sum(map(sum, l_)) / ((n - 1) * (n - 2))
    path = sum(k[i][j] * l_[j][m] for i in everyone for j in everyone for m in everyone)
    return (trace + totals - 2 / (n - 2) * path) / (n * (n - 3))


def test_one_minibatch_equals_the_sums_of_unbiased_hsic():
    rng = np.random.default_rng(0)
    a = layers(rng, 9, (5, 3))
    b = layers(rng, 9, (4, 6, 2), of=a[0])
    cka = MinibatchCka()
    cka.update(a, b)
    expected = [[unbiased_hsic(x, y) / np.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y)) for y in b] for x in a]
    np.testing.assert_allclose(cka.matrix(), expected, atol=1e-10)
    assert cka.matrix().shape == (2, 3)


def test_minibatches_average_each_hsic_before_the_ratio():
    rng = np.random.default_rng(1)
    a = layers(rng, 24, (5, 3))
    b = layers(rng, 24, (4,), of=a[0])
    cka, parts = MinibatchCka(), [slice(0, 8), slice(8, 16), slice(16, 24)]
    for part in parts:
        cka.update([x[part] for x in a], [y[part] for y in b])

    def mean_hsic(x, y):
        return np.mean([unbiased_hsic(x[part], y[part]) for part in parts])

    expected = [[mean_hsic(x, y) / np.sqrt(mean_hsic(x, x) * mean_hsic(y, y)) for y in b] for x in a]
    np.testing.assert_allclose(cka.matrix(), expected, atol=1e-10)


def test_many_small_minibatches_approach_one_large_one():
    rng = np.random.default_rng(2)
    a = layers(rng, 1600, (32,))
    b = layers(rng, 1600, (32,), of=a[0])
    small, large = MinibatchCka(), MinibatchCka()
    large.update(a, b)
    for start in range(0, 1600, 16):
        small.update([a[0][start : start + 16]], [b[0][start : start + 16]])
    # The biased estimate from 16 images at a time is 0.86, the truth 0.69.
    np.testing.assert_allclose(small.matrix(), large.matrix(), atol=0.03)
    assert 0.6 < large.matrix()[0, 0] < 0.75


def test_rotation_scale_and_shift_change_nothing():
    rng = np.random.default_rng(3)
    features = rng.normal(size=(20, 5)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    skewed = features * [9, 1, 1, 1, 1]
    cka = MinibatchCka()
    cka.update([features], [features @ rotation, 7 * features, features + 1000, skewed])
    np.testing.assert_allclose(cka.matrix()[0, :3], 1, atol=1e-5)
    assert cka.matrix()[0, 3] < 0.95


def test_unrelated_layers_have_about_none():
    rng = np.random.default_rng(4)
    cka = MinibatchCka()
    for _ in range(50):
        cka.update(layers(rng, 32, (64,)), layers(rng, 32, (64,)))
    assert abs(cka.matrix()[0, 0]) < 0.02  # the biased estimate is about 0.7


def test_wrong_input_is_refused():
    rng, cka = np.random.default_rng(5), MinibatchCka()
    good = layers(rng, 6, (3, 3))
    with pytest.raises(ValueError, match="no mini-batch"):
        cka.matrix()
    with pytest.raises(ValueError, match=r"features of b have shapes \[\(6, 3\), \(5, 3\)\]"):
        cka.update(good, [good[0], good[1][:5]])
    with pytest.raises(ValueError, match="a has 6 images and b 5"):
        cka.update(good, [layer[:5] for layer in good])
    with pytest.raises(ValueError, match="of a has 3 images"):
        cka.update([layer[:3] for layer in good], good)
    with pytest.raises(ValueError, match="not finite"):
        cka.update(good, [good[0] * np.inf])
    cka.update(good, good)
    with pytest.raises(ValueError, match=r"\(2, 1\), were \(2, 2\)"):
        cka.update(good, good[:1])
    flat = MinibatchCka()
    flat.update(good, [good[0], np.full((6, 3), 0.1)])
    with pytest.raises(ValueError, match="layer 1 of b gives all images the same"):
        flat.matrix()
