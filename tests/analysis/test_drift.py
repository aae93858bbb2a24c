"""Drift: zero for the same controls, growing with what a microscope changes, and beyond the ordinary only then."""

import numpy as np
import pytest

from coda_ray.analysis.drift import BEYOND_THE_ORDINARY, Controls, Reference

D = 32


def plates(count, *, shift=0.0, gain=1.0, seed=0, images=60):
    """Features of plates that differ a little by batch, under a change of microscope."""
    rng = np.random.default_rng(seed)
    scale = np.random.default_rng(9).uniform(0.5, 2, D)
    found = []
    for _ in range(count):
        batch = rng.normal(0, 0.1, D)
        found.append(shift + gain * scale * (rng.normal(size=(images, D)) + batch))
    return found


def test_it_is_the_distance_of_diagonal_normal_distributions():
    one, other = plates(1, seed=1)[0], plates(1, seed=2, shift=1.0, gain=1.3)[0]
    reference = Reference.of(plates(3))
    std = np.concatenate(plates(3)).std(0, ddof=1)
    # Dowson & Landau: |m - m'|² + tr(S + S' - 2 (S S')^½), feature by feature.
    square = [
        (
            (a.mean() - b.mean()) ** 2
            + a.var(ddof=1)
            + b.var(ddof=1)
            - 2 * a.std(ddof=1) * b.std(ddof=1)
            - (1 / 60 + 1 / 118) * (a.var(ddof=1) + b.var(ddof=1))
        )
        / s**2
        for a, b, s in zip(one.T, other.T, std, strict=True)
    ]
    assert reference.distance(Controls.of(one), Controls.of(other)) == pytest.approx(np.sqrt(np.mean(square)))
    assert reference.distance(Controls.of(one), Controls.of(one)) == 0


@pytest.mark.parametrize("images", [4, 12, 100])
def test_few_images_make_it_no_larger(images):
    """Samples of the same images are at no distance, on average over the square, whatever their number."""
    rng = np.random.default_rng(0)
    reference = Reference.of(list(rng.normal(0, 2, (3, 400, D))))
    near = [reference.drift(Controls.of(rng.normal(0, 2, (images, D)))) for _ in range(200)]
    # The biased distance would be 1.5 / images.
    assert np.mean(np.square(near)) < 0.2 * 1.5 / images
    moved = [reference.drift(Controls.of(rng.normal(2, 2, (images, D)))) for _ in range(200)]
    assert np.mean(np.square(moved)) == pytest.approx(1, abs=0.1)


def test_the_nearest_is_found_among_those_that_chance_alone_parts():
    known = [Controls.of(plate) for plate in plates(5, images=400)]
    reference = Reference.of(plates(5, seed=3))
    for number, plate in enumerate(known):
        found, distances = reference.nearest(plate, known)
        assert (found, distances[found]) == (number, 0.0)
    far = Controls.of(plates(1, seed=4, shift=1.0)[0])
    number, distances = reference.nearest(far, known)
    assert distances == [reference.distance(far, one) for one in known]
    assert min(distances) == distances[number] > 0.5


def test_another_microscope_is_beyond_the_ordinary_and_another_plate_is_not():
    reference = Reference.of(plates(6))
    assert len(reference.between) == 6
    assert reference.threshold == pytest.approx(BEYOND_THE_ORDINARY * max(reference.between))
    for seed in range(1, 8):
        assert reference.drift(Controls.of(plates(1, seed=seed)[0])) < reference.threshold
        assert reference.drift(Controls.of(plates(1, seed=seed, shift=0.6)[0])) > reference.threshold
        assert reference.drift(Controls.of(plates(1, seed=seed, gain=1.6)[0])) > reference.threshold


def test_the_distances_of_the_sources_plates_leave_the_plate_itself_out():
    known = plates(3)
    reference = Reference.of(known)
    rest = Controls.of(np.concatenate(known[1:]))
    assert reference.between[0] == pytest.approx(reference.distance(Controls.of(known[0]), rest))


def test_constant_features_and_single_plates_are_no_trouble():
    known = plates(2)
    for plate in known:
        plate[:, 0] = 3.0
    assert np.isfinite(Reference.of(known).drift(Controls.of(known[0] + 1)))
    single = Reference.of(known[:1])
    assert (single.between, single.threshold) == ((), None)
    assert Reference.of([known[0], known[1][:0]]).between == ()
    assert Reference.of([known[0][:1]]) is None
    with pytest.raises(ValueError, match=r"1 DMSO image\(s\)"):
        Controls.of(known[0][:1])


def test_features_that_are_no_numbers_are_refused():
    (plate,) = plates(1)
    plate[2, 3], plate[4, :2] = np.inf, np.nan
    with pytest.raises(ValueError, match=r"2 of 60 DMSO images have features that are no finite numbers"):
        Controls.of(plate)
