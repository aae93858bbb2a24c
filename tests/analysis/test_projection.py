import numpy as np
import pytest

from coda_ray.analysis.projection import project


# umap compiles for many seconds.
@pytest.mark.slow
def test_clusters_stay_apart_and_a_seed_gives_one_map():
    rng = np.random.default_rng(0)
    cluster = np.arange(90) % 3
    features = rng.normal(size=(3, 16))[cluster] * 5 + rng.normal(size=(90, 16))
    # By cosine: the length of an embedding says nothing.
    features *= rng.uniform(0.1, 10, size=(90, 1))
    places = project(features, seed=1)
    assert places.shape == (90, 2)
    assert places.dtype == np.float32
    distances = np.linalg.norm(places[:, None] - places, axis=2) + np.diag(np.full(90, np.inf))
    assert (cluster[distances.argmin(axis=1)] == cluster).all()
    np.testing.assert_array_equal(project(features, seed=1), places)
    assert not np.array_equal(project(features, seed=2), places)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"features \(15, 4\) must be \(N, D\) with more than 15 rows"):
        project(np.ones((15, 4)), seed=0)
    with pytest.raises(ValueError, match="not finite"):
        project(np.full((20, 4), np.nan), seed=0)
