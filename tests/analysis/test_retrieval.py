import math

import numpy as np
import pandas as pd
import pytest

from coda_ray.analysis import retrieval
from coda_ray.analysis.retrieval import moa_map, replicate_map, replicate_precision


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def ap_by_sorting(profile, positives, negatives):
    """Mean of the precision at every positive, down the list."""
    ranked = sorted([(cosine(profile, p), 1) for p in positives] + [(cosine(profile, n), 0) for n in negatives], reverse=True)
    hits = precision = 0
    for rank, (_, positive) in enumerate(ranked, 1):
        hits += positive
        precision += positive * hits / rank
    return precision / len(positives)


def chance(positives, negatives):
    """Mean AP of random rankings: the i-th of n places is a positive with m - 1 others spread over the rest."""
    m, n = positives, positives + negatives
    return sum(1 / n * (1 + (i - 1) * (m - 1) / (n - 1)) / i for i in range(1, n + 1))


def mean_over_groups(scores):
    """Mean over compounds of the mean over their profiles."""
    return sum(sum(of) / len(of) for of in scores.values()) / len(scores)


@pytest.fixture
def plate_set():
    """Five compounds and DMSO in three batches, compounds c3 and c4 in one batch only; an empty and a poscon well."""
    rng = np.random.default_rng(0)
    rows = []
    for batch in ("b1", "b2", "b3"):
        rows += [(f"c{c}", batch, None) for c in range(3) for _ in range(2)]
        rows += [("dmso", batch, "negcon")] * 3 + [("positive", batch, "poscon")]
    rows += [("c3", "b1", None), ("c4", "b2", None), ("nothing", "b3", "empty")]
    frame = pd.DataFrame(rows, columns=["Metadata_JCP2022", "Metadata_Batch", "Metadata_Control"])
    frame["Metadata_MoA"] = frame["Metadata_JCP2022"].map(
        {"c0": "x", "c1": "x", "c2": "y", "c3": "x", "positive": "y", "c4": "z"}
    )
    frame = frame.sample(frac=1, random_state=1)  # out of order, with a shuffled index
    effect = {name: rng.normal(size=6) for name in sorted(frame["Metadata_JCP2022"].unique())}
    profiles = np.stack([effect[name] for name in frame["Metadata_JCP2022"]]) + rng.normal(size=(len(frame), 6))
    return profiles.astype(np.float32), frame


@pytest.mark.parametrize("against", ["controls", "compounds"])
def test_replicate_map_equals_sorting_by_hand(plate_set, against):
    profiles, frame = plate_set
    wells = list(zip(profiles.tolist(), frame["Metadata_JCP2022"], frame["Metadata_Batch"], strict=True))
    scores, normalized, number = {}, {}, 0
    for profile, compound, batch in wells:
        positives = [p for p, c, b in wells if c == compound and b != batch]
        others = {"dmso"} if against == "controls" else {"c0", "c1", "c2", "c3", "c4", "positive"} - {compound}
        negatives = [p for p, c, _ in wells if c in others]
        if compound not in ("dmso", "nothing") and positives:
            ap, random = ap_by_sorting(profile, positives, negatives), chance(len(positives), len(negatives))
            scores.setdefault(compound, []).append(ap)
            normalized.setdefault(compound, []).append((ap - random) / (1 - random))
            number += 1
    found = replicate_map(profiles, frame, against=against, seed=0)
    assert found["map"] == pytest.approx(mean_over_groups(scores), abs=1e-6)
    assert found["normalized_map"] == pytest.approx(mean_over_groups(normalized), abs=1e-6)
    assert (found["compounds"], found["profiles"]) == (4, number) == (4, 21)


@pytest.mark.parametrize("at_once", [5, 256])
def test_replicate_precision_is_the_map_against_compounds(plate_set, monkeypatch, at_once):
    monkeypatch.setattr(retrieval, "RANKED_AT_ONCE", at_once)
    profiles, frame = plate_set
    treated = ~frame["Metadata_Control"].isin(["negcon", "empty"]).to_numpy()
    wells = (frame.loc[treated, name].to_numpy() for name in ("Metadata_JCP2022", "Metadata_Batch"))
    whole = replicate_map(profiles, frame, against="compounds", seed=0)
    assert replicate_precision(profiles[treated], *wells) == pytest.approx(whole["map"], abs=1e-6)


def test_moa_map_ranks_the_medians_of_compounds(plate_set):
    profiles, frame = plate_set
    names, moa = frame["Metadata_JCP2022"].to_numpy(), {"c0": "x", "c1": "x", "c2": "y", "c3": "x", "positive": "y", "c4": "z"}
    median = {c: [float(np.median(values)) for values in profiles[names == c].T] for c in moa}
    scores = {}
    for c in moa:
        positives = [median[o] for o in moa if o != c and moa[o] == moa[c]]
        if positives:
            scores[c] = [ap_by_sorting(median[c], positives, [median[o] for o in moa if moa[o] != moa[c]])]
    found = moa_map(profiles, frame, seed=0)
    assert found["map"] == pytest.approx(mean_over_groups(scores), abs=1e-6)
    assert (found["compounds"], found["profiles"]) == (5, 5)


def world(rng, strength):
    """Twelve compounds of four mechanisms and DMSO in four batches."""
    rows = [(f"c{c:02d}", f"b{b}", None, f"m{c % 4}") for c in range(12) for b in range(4)]
    rows += [("dmso", f"b{b}", "negcon", None) for b in range(4) for _ in range(8)]
    frame = pd.DataFrame(rows, columns=["Metadata_JCP2022", "Metadata_Batch", "Metadata_Control", "Metadata_MoA"])
    of_moa, of_compound = rng.normal(size=(5, 20)), rng.normal(size=(13, 20))
    of_moa[4] = of_compound[12] = 0
    moa = [int(name[1:]) if isinstance(name, str) else 4 for name in frame["Metadata_MoA"]]
    compound = [12 if name == "dmso" else int(name[1:]) for name in frame["Metadata_JCP2022"]]
    return strength * (of_moa[moa] + of_compound[compound]) + rng.normal(size=(len(rows), 20)), frame


def test_strong_effects_are_significant_and_noise_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    profiles, frame = world(np.random.default_rng(1), strength=3.0)
    for against in ("controls", "compounds"):
        found = replicate_map(profiles, frame, against=against, seed=0)
        assert found["map"] > 0.9
        assert found["significant"] == 1.0
        assert found == replicate_map(profiles, frame, against=against, seed=0)
    strong = moa_map(profiles, frame, seed=0)
    noise, _ = world(np.random.default_rng(2), strength=0.0)
    for against in ("controls", "compounds"):
        found = replicate_map(noise, frame, against=against, seed=0)
        assert abs(found["normalized_map"]) < 0.15
        assert found["significant"] < 0.2
    assert strong["normalized_map"] > moa_map(noise, frame, seed=0)["normalized_map"] + 0.3
    assert not list(tmp_path.iterdir())  # no random rankings left in the home directory


def test_wrong_input_is_refused(plate_set):
    profiles, frame = plate_set
    with pytest.raises(ValueError, match=r"profiles \(2, 6\) and metadata of 33 rows"):
        replicate_map(profiles[:2], frame, against="controls", seed=0)
    with pytest.raises(ValueError, match="lacks the column Metadata_Batch"):
        replicate_map(profiles, frame.drop(columns="Metadata_Batch"), against="controls", seed=0)
    with pytest.raises(ValueError, match="row of zeros"):
        moa_map(np.vstack([profiles[1:], 0 * profiles[:1]]), frame, seed=0)
    with pytest.raises(ValueError, match="some wells lack Metadata_JCP2022"):
        replicate_map(profiles, frame.assign(Metadata_JCP2022=None), against="compounds", seed=0)
    treated = (frame["Metadata_Control"] != "negcon").to_numpy()
    with pytest.raises(ValueError, match="no controls to rank"):
        replicate_map(profiles[treated], frame[treated], against="controls", seed=0)
    one = (frame["Metadata_JCP2022"] == "c0").to_numpy()
    with pytest.raises(ValueError, match="no compounds to rank"):
        replicate_map(profiles[one], frame[one], against="compounds", seed=0)
    with pytest.raises(ValueError, match="two batches"):
        replicate_map(profiles, frame.assign(Metadata_Batch="b1"), against="controls", seed=0)
    with pytest.raises(ValueError, match="compound c0 has several labels"):
        moa_map(profiles, frame.assign(Metadata_MoA=np.where(one & (frame["Metadata_Batch"] == "b1"), "y", "x")), seed=0)
    with pytest.raises(ValueError, match="1 compounds of 1 mechanisms"):
        moa_map(profiles[one], frame[one], seed=0)
    compounds, batches = np.array(["x", "x", "y"]), np.array(["b1", "b2", "b1"])
    with pytest.raises(ValueError, match="row of zeros"):
        replicate_precision(0 * profiles[:3], compounds, batches)
    with pytest.raises(ValueError, match="lack their compound or batch"):
        replicate_precision(profiles[:3], np.array(["x", None, "y"]), batches)
    with pytest.raises(ValueError, match="no compounds to rank"):
        replicate_precision(profiles[:2], compounds[:2], batches[:2])
    with pytest.raises(ValueError, match="two batches"):
        replicate_precision(profiles[:3], compounds, np.full(3, "b1"))
