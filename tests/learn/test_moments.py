"""Moments of tokens against plain loops; tokens on their way from a plate to the source."""

import numpy as np
import pytest
import torch

from coda_ray.learn.moments import Moments, align, token_sums


def plate(seed, images=7):
    """Tokens (images, 1 + 5, 4) with gains and offsets of their own."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(images, 6, 4)) * rng.uniform(0.5, 3, 4) + rng.normal(size=4)).float()


def moments(features):
    return Moments.of(token_sums(features).double().sum(0), torch.tensor(float(len(features)), dtype=torch.float64))


def test_moments_equal_plain_loops():
    features = plate(0)
    found = moments(features)
    for d in range(4):
        for kind, chosen in enumerate((slice(0, 1), slice(1, 6))):
            values = [float(x) for image in features[:, chosen, d] for x in image]
            mean = sum(values) / len(values)
            std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
            assert found.mean[kind, d].item() == pytest.approx(mean, abs=1e-6)
            assert found.std[kind, d].item() == pytest.approx(std, abs=1e-6)


def test_sums_of_plates_are_those_of_all():
    parts = [plate(1), plate(2, images=3)]
    sums = torch.stack([token_sums(part).double().sum(0) for part in parts])
    count = torch.tensor([7.0, 3.0], dtype=torch.float64)
    each, joined = Moments.of(sums, count), Moments.of(sums.sum(0), count.sum())
    torch.testing.assert_close(each.rows(torch.tensor([1])).mean[0], moments(parts[1]).mean)
    torch.testing.assert_close(joined.std, moments(torch.cat(parts)).std)


def test_an_aligned_plate_has_the_moments_of_the_source():
    source, target = moments(plate(3)), plate(4)
    own = moments(target)
    found = moments(align(target, Moments(own.mean.expand(7, 2, 4), own.std.expand(7, 2, 4)), source))
    torch.testing.assert_close(found.mean, source.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std, source.std, atol=1e-5, rtol=0)


def test_each_image_is_aligned_by_its_own_plate():
    source, parts = moments(plate(5)), [plate(6), plate(7, images=3)]
    own = Moments(*(torch.stack(values) for values in zip(*((m.mean, m.std) for m in map(moments, parts)), strict=True)))
    codes = torch.tensor([1, 0, 0, 1])
    mixed = torch.stack([parts[1][0], parts[0][0], parts[0][1], parts[1][1]])
    found = align(mixed, own.rows(codes), source)
    for i, (part, image) in enumerate([(1, 0), (0, 0), (0, 1), (1, 1)]):
        m = moments(parts[part])
        for token in range(6):
            kind = int(token > 0)
            expected = (parts[part][image, token] - m.mean[kind]) / m.std[kind] * source.std[kind] + source.mean[kind]
            torch.testing.assert_close(found[i, token], expected)


def test_a_constant_feature_becomes_the_mean_of_the_source():
    target, source = plate(8), moments(plate(9))
    target[..., 2] = 0.1
    own = moments(target)
    found = align(target, Moments(own.mean.expand(7, 2, 4), own.std.expand(7, 2, 4)), source)
    torch.testing.assert_close(found[:, 0, 2], source.mean[0, 2].expand(7))
    torch.testing.assert_close(found[:, 1:, 2], source.mean[1, 2].expand(7, 5))
    assert torch.isfinite(found).all()


def test_shapes_that_do_not_fit_are_told():
    own = moments(plate(0))
    with pytest.raises(ValueError, match=r"tokens \(7, 6, 4\), moments \(2, 4\)"):
        align(plate(0), own, own)
