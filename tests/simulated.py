"""Simulated buckets, and the keys of the servers that serve them."""

KEY = ("coda-ray-test-key-0001", "coda-ray-test-secret-0001")


def write_tiny(folder, **changes):
    """Write the tiny preset into a folder that becomes a bucket."""
    # Here, because conftest.py sets what Ray reads when it is imported.
    from coda_ray.config import Place
    from coda_ray.jump.simulate.bucket import write_bucket
    from coda_ray.jump.simulate.settings import PRESETS

    write_bucket(PRESETS["tiny"].model_copy(update=changes), Place(address=str(folder)), lambda done, total: None)
    return folder
