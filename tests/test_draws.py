import numpy as np
from scipy.stats import kstest

from coda_ray.draws import uniforms


def test_a_draw_depends_on_its_own_counter_alone():
    together = uniforms(7, np.arange(1000), 5, stream=3)
    alone = uniforms(7, np.array([123]), 5, stream=3)
    np.testing.assert_array_equal(together[123], alone[0])
    np.testing.assert_array_equal(together[:, :2], uniforms(7, np.arange(1000), 2, stream=3))


def test_seed_and_stream_separate():
    counters = np.arange(500)
    first = uniforms(0, counters, 4, stream=1)
    for other in (uniforms(1, counters, 4, stream=1), uniforms(0, counters, 4, stream=2)):
        assert not np.isin(first, other).any()


def test_draws_are_uniform_and_uncorrelated():
    u = uniforms(11, np.arange(20_000), 3, stream=0)
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.T:
        assert kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(np.column_stack([u[:-1], u[1:]]).T)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.05
