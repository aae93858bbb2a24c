import numpy as np
import pytest

from coda_ray.analysis.metrics import compound_scores, image_scores, well_scores


def f1_by_hand(labels, predicted):
    """Macro-F1 over the present classes, from the definition."""
    scores = []
    for c in sorted(set(labels)):
        hit = sum(t == c and p == c for t, p in zip(labels, predicted, strict=True))
        wrong = sum((t == c) != (p == c) for t, p in zip(labels, predicted, strict=True))
        scores.append(2 * hit / (2 * hit + wrong))
    return sum(scores) / len(scores)


def softmax(rng, n, k):
    return rng.dirichlet(np.ones(k), size=n).astype(np.float32)


def test_image_scores_follow_the_definitions():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 2, 3], size=200)  # class 1 is absent, but will be predicted
    probabilities = softmax(rng, 200, 5)
    predicted = [int(np.argmax(row)) for row in probabilities]
    assert 1 in predicted
    scores = image_scores(labels, probabilities)
    assert scores["accuracy"] == sum(p == t for p, t in zip(predicted, labels, strict=True)) / 200
    assert scores["macro_f1"] == pytest.approx(f1_by_hand(labels.tolist(), predicted), abs=1e-12)


def test_an_absent_class_has_no_f1_of_its_own():
    probabilities = np.eye(3)[[0, 0, 1, 2]]
    assert image_scores(np.array([0, 0, 1, 1]), probabilities)["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("names", ["strings", "integers"])
@pytest.mark.parametrize(("score", "kind"), [(well_scores, "well"), (compound_scores, "compound")])
def test_group_scores_use_the_mean_softmax_of_each_group(score, kind, names):
    rng = np.random.default_rng(1)
    codes = rng.permutation(np.repeat(np.arange(30), 7))
    label_of = rng.integers(0, 4, size=30)
    probabilities = softmax(rng, len(codes), 4)
    truth, predicted = [], []
    for code in range(30):
        rows = [p for p, c in zip(probabilities, codes, strict=True) if c == code]
        truth.append(int(label_of[code]))
        predicted.append(int(np.argmax(sum(r.astype(float) for r in rows) / len(rows))))
    groups = codes if names == "integers" else np.array([f"plate{c % 3}/W{c:02d}" for c in codes])
    scores = score(groups, label_of[codes], probabilities)
    assert set(scores) == {f"{kind}_accuracy", f"{kind}_macro_f1"}
    assert scores[f"{kind}_accuracy"] == np.mean([t == p for t, p in zip(truth, predicted, strict=True)])
    assert scores[f"{kind}_macro_f1"] == pytest.approx(f1_by_hand(truth, predicted), abs=1e-12)


def test_a_compound_is_judged_over_all_its_wells():
    compounds = np.array(["a", "a", "a", "b"])
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]])
    labels = np.array([0, 0, 0, 1])
    assert well_scores(np.array(["p/1", "p/2", "q/1", "q/2"]), labels, probabilities)["well_accuracy"] == 0.5
    assert compound_scores(compounds, labels, probabilities) == {"compound_accuracy": 1.0, "compound_macro_f1": 1.0}


def test_the_mean_of_a_well_can_outvote_its_images():
    wells = np.array(["a", "a", "a"])
    probabilities = np.array([[0.51, 0.49], [0.51, 0.49], [0.0, 1.0]])
    labels = np.array([1, 1, 1])
    assert image_scores(labels, probabilities)["accuracy"] == pytest.approx(1 / 3)
    assert well_scores(wells, labels, probabilities)["well_accuracy"] == 1.0


def test_wrong_arrays_are_refused():
    good = np.full((2, 3), 1 / 3)
    with pytest.raises(ValueError, match="no image"):
        image_scores(np.array([], dtype=int), np.zeros((0, 3)))
    with pytest.raises(ValueError, match=r"must be \(N,\) and \(N, K\)"):
        image_scores(np.array([0]), good)
    with pytest.raises(ValueError, match="3 classes"):
        image_scores(np.array([0, 3]), good)
    with pytest.raises(ValueError, match="3 classes"):
        image_scores(np.array([0, -1]), good)
    with pytest.raises(ValueError, match="not finite"):
        image_scores(np.array([0, 1]), good * np.nan)
    with pytest.raises(ValueError, match="A01 has several labels"):
        well_scores(np.array(["A01", "A01"]), np.array([0, 1]), good)
    with pytest.raises(ValueError, match="one well per image"):
        well_scores(np.array(["A01"]), np.array([0, 1]), good)
    with pytest.raises(ValueError, match="compound JCP1 has several labels"):
        compound_scores(np.array(["JCP1", "JCP1"]), np.array([0, 1]), good)
    with pytest.raises(ValueError, match="one compound per image"):
        compound_scores(np.array(["JCP1"]), np.array([0, 1]), good)
