import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.selection import judge, judge_together, main
from coda_ray.analysis.selection import CRITERIA, agreement, mean_entropy, mutual_information, rank_me


def entropy(shares):
    return -sum(p * math.log(p) for p in shares if p > 0)


def softmax(rng, rows, classes, scale=2.0):
    logits = np.exp(scale * rng.normal(size=(rows, classes)))
    return (logits / logits.sum(1, keepdims=True)).astype(np.float32)


def test_rank_me_is_the_perplexity_of_the_singular_values():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(40, 6)) * [9, 4, 1, 1, 0.2, 0] + 3).astype(np.float32)
    # The singular values by the eigenvalues of the Gram matrix; the paper's small number moves little.
    values = np.sqrt(np.clip(np.linalg.eigvalsh(features.astype(np.float64).T @ features), 0, None))
    expected = math.exp(entropy(values / values.sum()))
    assert rank_me(features) == pytest.approx(expected, rel=1e-5)
    papers = values / values.sum() + 1e-7
    assert rank_me(features) == pytest.approx(math.exp(entropy(papers)), rel=1e-4)


def test_rank_me_counts_directions():
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert rank_me(7 * rotation) == pytest.approx(8)
    assert rank_me(rotation[:, :3] @ rng.normal(size=(3, 1)) @ np.ones((1, 5))) == pytest.approx(1)
    features = rng.normal(size=(30, 4))
    assert rank_me(features) == pytest.approx(rank_me(1e-3 * features))
    assert rank_me(features) > rank_me(features + 20)


def test_entropy_and_information_equal_sums_over_images():
    probabilities = softmax(np.random.default_rng(2), 25, 5)
    rows = [[p / math.fsum(row) for p in row] for row in probabilities.astype(float).tolist()]
    of_images = math.fsum(entropy(row) for row in rows) / 25
    of_mean = entropy([math.fsum(row[k] for row in rows) / 25 for k in range(5)])
    assert mean_entropy(probabilities) == pytest.approx(of_images, abs=1e-12)
    assert mutual_information(probabilities) == pytest.approx(of_mean - of_images, abs=1e-12)


def test_information_is_that_of_the_joint_distribution():
    probabilities = softmax(np.random.default_rng(3), 12, 4).astype(np.float64)
    joint = probabilities / probabilities.sum(1, keepdims=True) / 12
    of_class = joint.sum(0)
    terms = [joint[i, k] * math.log(joint[i, k] / (of_class[k] / 12)) for i in range(12) for k in range(4)]
    assert mutual_information(probabilities) == pytest.approx(math.fsum(terms), abs=1e-12)


def test_entropy_and_information_at_their_ends():
    sure, unsure, same = np.eye(4), np.full((6, 4), 0.25), np.eye(4)[[2, 2, 2]]
    assert mean_entropy(sure) == 0
    assert mutual_information(sure) == pytest.approx(math.log(4))
    assert mean_entropy(unsure) == pytest.approx(math.log(4))
    assert mutual_information(unsure) == pytest.approx(0, abs=1e-12)
    assert mean_entropy(same) == mutual_information(same) == 0


def test_every_criterion_has_a_direction():
    assert set(CRITERIA.values()) == {"higher", "lower"}
    assert {name for name, direction in CRITERIA.items() if direction == "lower"} == {"mean_entropy", "held_out_loss"}
    assert "moa_map" not in CRITERIA


def test_wrong_input_is_refused():
    good = softmax(np.random.default_rng(4), 5, 3)
    for criterion in (rank_me, mean_entropy, mutual_information):
        with pytest.raises(ValueError, match=r"\(5,\) must be \(N, D\)"):
            criterion(good[:, 0])
        with pytest.raises(ValueError, match=r"\(0, 3\) must be"):
            criterion(good[:0])
        with pytest.raises(ValueError, match="not finite"):
            criterion(good * np.nan)
    with pytest.raises(ValueError, match="all 5 features are zero"):
        rank_me(0 * good)
    for wrong in (good - 0.5, np.vstack([good, 0 * good[:1]])):
        with pytest.raises(ValueError, match="give softmax outputs"):
            mean_entropy(wrong)


def test_agreement_equals_ranks_counted_by_hand():
    rng = np.random.default_rng(5)
    criterion, oracle = rng.permutation(12).astype(float), rng.permutation(12).astype(float)
    # Spearman's formula for ranks without ties.
    expected = 1 - 6 * ((criterion - oracle) ** 2).sum() / (12 * (12**2 - 1))
    found = agreement(criterion, oracle, "higher")
    assert found.rank_correlation == pytest.approx(expected)
    assert found.chosen == oracle[criterion == 11][0]
    assert found.regret == 11 - found.chosen
    assert found.models == 12
    assert agreement(-criterion, oracle, "lower") == found


def test_the_best_model_counts_even_where_the_criterion_does_not_know_it():
    found = agreement(np.array([1.0, 2.0, np.nan]), np.array([30.0, 40.0, 90.0]), "higher")
    assert (found.chosen, found.regret, found.models) == (40, 50, 2)
    assert found.rank_correlation == pytest.approx(1)


def test_models_that_are_liked_alike_are_averaged_and_have_no_rank():
    found = agreement(np.zeros(3), np.array([10.0, 20.0, 60.0]), "lower")
    assert found.chosen == pytest.approx(30)
    assert math.isnan(found.rank_correlation)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"\(3,\) and oracle \(2,\)"):
        agreement(np.zeros(3), np.zeros(2), "higher")
    with pytest.raises(ValueError, match="not finite"):
        agreement(np.zeros(2), np.array([1, np.nan]), "higher")
    with pytest.raises(ValueError, match="cannot choose"):
        agreement(np.full(2, np.nan), np.zeros(2), "higher")


def test_a_criterion_is_judged_among_the_states_of_one_method():
    # A loss that tells right within each method, and whose scale differs between the methods.
    states = [
        ("unadapted oda", "oda", 0, 5.0, 0.40), ("o1", "oda", 100, 4.0, 0.50), ("o1", "oda", 200, 3.0, 0.60),
        ("unadapted coda", "coda", 0, 9.0, 0.45), ("c1", "coda", 100, 8.0, 0.55), ("c1", "coda", 200, 7.0, 0.70),
        ("unadapted tent", "tent", 0, 1.0, 0.45),
    ]  # fmt: skip
    scores = pd.DataFrame(states, columns=["trial", "method", "step", "held_out_loss", "oracle_accuracy"])
    scores = scores.assign(source="a", target="b", **{name: np.nan for name in CRITERIA if name != "held_out_loss"})
    found = judge(scores, "oracle_accuracy")
    own = found[found["way"] == "held_out_loss"].set_index("method")
    assert own["regret"].to_dict() == {"oda": 0, "coda": 0}
    assert own["rank_correlation"].to_dict() == pytest.approx({"oda": 1, "coda": 1})
    start = found[found["way"] == "unadapted"].set_index("method")["chosen"]
    assert start.to_dict() == pytest.approx({"oda": 40, "coda": 45})
    assert found.attrs["states"] == {("a", "b", "coda"): 3, ("a", "b", "oda"): 3}
    with pytest.raises(ValueError, match="no method has two states"):
        judge(scores[scores["method"] == "tent"], "oracle_accuracy")


def test_one_state_for_all_transfers_is_chosen_by_the_mean_over_them():
    # o1 is the best on the mean, o2 on one pair alone; the criterion likes o2 on the mean. Of c1 one pair was not scored.
    states = [
        ("a", "unadapted oda", "oda", 0, 0.1, 0.40), ("b", "unadapted oda", "oda", 0, 0.1, 0.30),
        ("a", "o1", "oda", 100, 0.3, 0.50), ("b", "o1", "oda", 100, 0.2, 0.60),
        ("a", "o2", "oda", 100, 0.2, 0.70), ("b", "o2", "oda", 100, 0.5, 0.30),
        ("a", "c1", "coda", 100, 0.9, 0.95),
        ("a", "unadapted coda", "coda", 0, 0.8, 0.20), ("b", "unadapted coda", "coda", 0, 0.7, 0.30),
    ]  # fmt: skip
    scores = pd.DataFrame(states, columns=["source", "trial", "method", "step", "replicate_map", "oracle_accuracy"])
    scores = scores.assign(target="t", **{name: np.nan for name in CRITERIA if name != "replicate_map"})
    found = judge_together(scores, "oracle_accuracy").set_index(["way", "method"])
    assert found.loc[("the best (oracle)", "oda"), "chosen"] == pytest.approx(55)
    assert found.loc[("replicate_map", "oda")].to_dict() == pytest.approx({"rank_correlation": 0.5, "chosen": 50, "regret": 5})
    assert found.loc[("replicate_map", "all"), "regret"] == pytest.approx(55 - 25)
    assert found.loc[("unadapted", "all"), "chosen"] == pytest.approx(30)
    # A seed more of one state does not weigh more.
    doubled = pd.concat([scores, scores[scores["trial"] == "o2"]])
    again = judge_together(doubled, "oracle_accuracy").set_index(["way", "method"])
    pd.testing.assert_frame_equal(again, found)
    # What a criterion cannot be measured on somewhere, it does not choose.
    scores.loc[scores["trial"].eq("o2") & scores["source"].eq("a"), "replicate_map"] = np.nan
    assert judge_together(scores, "oracle_accuracy").set_index(["way", "method"]).loc[("replicate_map", "oda"), "regret"] == 0
    with pytest.raises(ValueError, match="no state was scored on every transfer"):
        judge_together(scores.iloc[[0, 8]], "oracle_accuracy")


def test_the_tables_of_the_study_are_those_of_its_scores(capsys):
    docs = Path(__file__).resolve().parents[2] / "docs"
    assert main([str(docs / "tables" / "selection.csv")]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) > 2 * len(CRITERIA)
    assert "\n".join(printed) in re.sub(r"\n\n[^|]*\n\n(?=\| choose by)", "\n", (docs / "selection.md").read_text())
