import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from coda_ray.analysis.corrections import Coral, LinearProbe, Sphering, harmony, zscore_plates


def correlated(rng, rows, width):
    return rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def shifted_clusters(rng, shift=3.0):
    """Four clusters, each in three batches that are shifted against each other: features, clusters, batches."""
    clusters, batches = np.arange(360) % 4, np.arange(360) // 4 % 3
    features = rng.normal(size=(4, 8))[clusters] * 6 + rng.normal(size=(3, 8))[batches] * shift + rng.normal(size=(360, 8))
    return features, clusters, batches


def batch_shift(features, clusters, batches):
    """Mean distance of a batch's centre from its cluster's centre."""
    gaps = []
    for c in set(clusters):
        centre = features[clusters == c].mean(axis=0)
        gaps += [np.linalg.norm(features[(clusters == c) & (batches == b)].mean(axis=0) - centre) for b in set(batches)]
    return np.mean(gaps)


@pytest.mark.parametrize("regularisation", [0.0, 0.3])
def test_sphered_controls_have_the_covariance_that_the_regularisation_leaves(regularisation):
    rng = np.random.default_rng(1)
    controls = correlated(rng, 200, 7)
    sphering = Sphering.fit(controls, regularisation=regularisation)
    sphered = sphering.transform(controls).astype(np.float64)
    covariance = np.cov(controls, rowvar=False)
    ridge = regularisation * np.trace(covariance) / 7
    # V Λ / (Λ + ε) Vᵀ; the identity without regularisation.
    np.testing.assert_allclose(
        np.cov(sphered, rowvar=False), covariance @ np.linalg.inv(covariance + ridge * np.eye(7)), atol=1e-4
    )
    np.testing.assert_allclose(sphered.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(sphering.whitening @ (covariance + ridge * np.eye(7)) @ sphering.whitening, np.eye(7), atol=1e-8)
    np.testing.assert_array_equal(sphering.whitening.round(9), sphering.whitening.T.round(9))  # ZCA, not PCA


def test_sphering_makes_an_effect_stand_out_from_variation_that_controls_show_too():
    rng = np.random.default_rng(2)
    spread = np.array([20.0, 1.0, 1.0])
    controls, treated = rng.normal(size=(300, 3)) * spread, rng.normal(size=(300, 3)) * spread + [0, 4, 0]
    sphering = Sphering.fit(controls)

    def told_apart(a, b):
        """Share of treated wells that are nearer to the treated mean than to the mean of the controls."""
        return (np.linalg.norm(b - b.mean(axis=0), axis=1) < np.linalg.norm(b - a.mean(axis=0), axis=1)).mean()

    # The nearest mean weighs all directions alike: in raw features the noisy one drowns the effect.
    assert told_apart(sphering.transform(controls), sphering.transform(treated)) > 0.95
    assert told_apart(controls, treated) < 0.95


def test_sphering_with_fewer_controls_than_features_rests_on_the_regularisation():
    rng = np.random.default_rng(3)
    controls = rng.normal(size=(5, 12))
    assert np.isfinite(Sphering.fit(controls).transform(rng.normal(size=(4, 12)))).all()
    with pytest.raises(ValueError, match="12 features without regularisation needs more than 12 controls, it has 5"):
        Sphering.fit(controls, regularisation=0.0)


@pytest.mark.parametrize("reference", ["all", "some"])
def test_plates_are_scaled_one_by_one_by_their_reference_images(reference):
    rng = np.random.default_rng(7)
    plates = rng.permutation(np.repeat(["s/b/p1", "s/b/p2", "t/b/p1"], [9, 12, 15]))
    features = correlated(rng, 36, 5) + 50 * (plates == "s/b/p2")[:, None]
    chosen = np.ones(36, bool) if reference == "all" else rng.random(36) < 0.5
    found = zscore_plates(features, plates, chosen)
    assert found.dtype == np.float32
    for i in range(36):
        own = [features[j] for j in range(36) if plates[j] == plates[i] and chosen[j]]
        mean = sum(own) / len(own)
        spread = np.sqrt(sum((row - mean) ** 2 for row in own) / len(own))
        np.testing.assert_allclose(found[i], (features[i] - mean) / spread, rtol=1e-4, atol=1e-5)


def test_a_feature_without_spread_on_a_plate_is_centred_alone():
    rows = np.array([[3.1, 1.0], [3.1, 3.0], [3.1, 5.0], [4.1, 9.0]])
    found = zscore_plates(rows, np.full(4, "p"), np.array([True, True, True, False]))
    np.testing.assert_allclose(found[:, 0], [0, 0, 0, 1], atol=1e-6)
    assert found[3, 1] > 3


def root_written_out(matrix, exponent):
    """A power of a symmetric matrix, eigenvector by eigenvector."""
    values, vectors = np.linalg.eigh(matrix)
    return sum(value**exponent * np.outer(vector, vector) for value, vector in zip(values, vectors.T, strict=True))


@pytest.mark.parametrize("rows", [200, 4])
def test_coral_gives_the_source_the_covariance_of_the_target(rows):
    rng = np.random.default_rng(8)
    source, target = correlated(rng, rows, 6), correlated(rng, rows + 3, 6) * 7
    source[:, 2] = 5.0  # constant
    coral = Coral.fit(source, target)
    spread = source.std(axis=0)
    spread[2] = 1
    ours, theirs = (source - source.mean(axis=0)) / spread, (target - target.mean(axis=0)) / target.std(axis=0)
    own, wanted = (np.cov(side.T) + np.eye(6) for side in (ours, theirs))
    expected = ours @ root_written_out(own, -0.5) @ root_written_out(wanted, 0.5)
    np.testing.assert_allclose(coral.transform_source(source), expected, atol=1e-4)
    np.testing.assert_allclose(coral.transform_target(target), theirs, atol=1e-5)


def test_coral_helps_a_classifier_where_the_target_is_mixed_otherwise():
    rng = np.random.default_rng(9)
    labels, mixing = np.arange(400) % 2, np.array([[1.0, 0.0], [0.9, 0.5]])
    source, target = (rng.normal(size=(400, 2)) * [3.0, 0.3] + np.outer(labels, [0, 2]) for _ in range(2))
    target = target @ mixing
    coral = Coral.fit(source, target)

    def right(ours, theirs):
        return (LinearProbe.fit(ours, labels, 2).probabilities(theirs).argmax(axis=1) == labels).mean()

    assert right(coral.transform_source(source), coral.transform_target(target)) > right(source, target) + 0.2


def test_harmony_brings_batches_together_and_keeps_clusters_apart(capfd):
    rng = np.random.default_rng(4)
    features, clusters, batches = shifted_clusters(rng)
    corrected = harmony(features, batches, seed=0)
    assert corrected.shape == features.shape
    assert corrected.dtype == np.float32
    assert batch_shift(corrected, clusters, batches) < 0.3 * batch_shift(features, clusters, batches)
    centres = np.stack([corrected[clusters == c].mean(axis=0) for c in range(4)])
    nearest = np.linalg.norm(corrected[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == clusters).mean() > 0.95
    names = np.array(["b1", "b2", "b3"])[batches]
    np.testing.assert_array_equal(harmony(features, names, seed=0, threads=2), corrected)
    assert capfd.readouterr() == ("", "")


def test_harmony_takes_a_square_matrix_by_rows():
    rng = np.random.default_rng(5)
    features, batches = rng.normal(size=(40, 40)), np.arange(40) % 2
    features[batches == 1] += 2
    padded = np.hstack([features, np.zeros((40, 1))])  # not square, the same distances
    np.testing.assert_allclose(harmony(features, batches, seed=0), harmony(padded, batches, seed=0)[:, :40], atol=1e-4)


def test_the_probe_is_a_logistic_regression_with_a_column_for_every_class():
    rng = np.random.default_rng(6)
    labels = rng.choice([0, 2, 3], size=120)
    features = (rng.normal(size=(5, 6))[labels] + rng.normal(size=(120, 6))) * [1, 10, 100, 1, 1, 1] + 5
    probe = LinearProbe.fit(features[:80], labels[:80], 5)
    found = probe.probabilities(features[80:])
    mean, std = features[:80].mean(axis=0), features[:80].std(axis=0)
    plain = LogisticRegression().fit((features[:80] - mean) / std, labels[:80])
    np.testing.assert_allclose(found[:, [0, 2, 3]], plain.predict_proba((features[80:] - mean) / std), atol=1e-5)
    assert found.shape == (40, 5)
    assert not found[:, [1, 4]].any()
    assert (found.argmax(axis=1) == labels[80:]).mean() > 0.6


def test_wrong_input_is_refused():
    rows, names = np.ones((3, 2)), np.array(["a", "b", "b"])
    with pytest.raises(ValueError, match="not finite"):
        Sphering.fit(rows * np.nan)
    with pytest.raises(ValueError, match=r"features \(0, 2\) must be \(N, D\)"):
        Sphering.fit(rows[:0])
    with pytest.raises(ValueError, match="two controls or more, it has 1"):
        Sphering.fit(rows[:1])
    with pytest.raises(ValueError, match="3 controls are all alike"):
        Sphering.fit(rows)
    with pytest.raises(ValueError, match="regularisation = -1"):
        Sphering.fit(rows, regularisation=-1)
    twice = np.repeat(np.random.default_rng(0).normal(size=(30, 1)), 2, axis=1)
    with pytest.raises(ValueError, match="has no inverse"):
        Sphering.fit(twice, regularisation=0.0)
    with pytest.raises(ValueError, match="features have 3 columns, the controls had 2"):
        Sphering.fit(twice).transform(np.ones((1, 3)))
    with pytest.raises(ValueError, match="two batches or more, it has"):
        harmony(rows, np.zeros(3), seed=0)
    with pytest.raises(ValueError, match="30 rows or more, it has 3"):
        harmony(rows, names, seed=0)
    with pytest.raises(ValueError, match="for 2 classes"):
        LinearProbe.fit(rows, np.array([0, 1, 2]), 2)
    with pytest.raises(ValueError, match="all labels are 1"):
        LinearProbe.fit(rows, np.array([1, 1, 1]), 2)
    with pytest.raises(ValueError, match=r"plates \(2,\) and features \(3, 2\)"):
        zscore_plates(rows, names[:2], np.ones(3, bool))
    with pytest.raises(ValueError, match="plate a has 1 images to take its mean and spread from"):
        zscore_plates(rows, names, np.ones(3, bool))
    with pytest.raises(ValueError, match="the target has 1"):
        Coral.fit(rows, rows[:1])
    with pytest.raises(ValueError, match="must have the same features"):
        Coral.fit(rows, np.ones((3, 3)))
    with pytest.raises(ValueError, match="features have 3 columns, those of the fit had 2"):
        Coral.fit(rows, rows).transform_target(np.ones((3, 3)))
