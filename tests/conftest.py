"""What tests of several rooms share: one Ray for the session, and simulated buckets behind a real S3 server."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from simulated import KEY, write_tiny

# Before Ray is imported anywhere: no token file in the home directory; and the keys that the workers of the session hold.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray ends idle workers beyond one per CPU, and read tasks, which reserve none, would start new ones all the time: seconds each.
os.environ.setdefault("RAY_num_workers_soft_limit", "6")
os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = KEY
os.environ.pop("AWS_SESSION_TOKEN", None)
os.environ.pop("RAY_ADDRESS", None)


JUMP_METADATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "jump-metadata"
JUMP_TABLES = {
    "plate.csv.gz": "plate.csv.gz",
    "target2_wells_8sources.csv.gz": "well.csv.gz",
    "perturbation_control.csv": "perturbation_control.csv",
    "microscope_config.csv": "microscope_config.csv",
    "JUMP-Target-2_compound_platemap.tsv": "JUMP-Target-2_compound_platemap.tsv",
    "JUMP-Target-2_compound_metadata.tsv": "JUMP-Target-2_compound_metadata.tsv",
    "repurposing_drugs_20200324.txt": "repurposing_drugs_20200324.txt",
    "repurposing_samples_20200324.txt.gz": "repurposing_samples_20200324.txt.gz",
}


def pytest_collection_modifyitems(items):
    """Put the files that take longest first, so that two processes of pytest-xdist end at about the same time."""
    own = {item.path for item in items if item.get_closest_marker("own_ray")}
    shared = {item.path for item in items if "ray_cluster" in item.fixturenames}
    items.sort(key=lambda item: (item.path not in own, item.path not in shared))


def pytest_make_parametrize_id(val, argname):
    """Name a parameter of bytes by its argument: what gzip packs holds the time, and two processes must find the same tests."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def jump_metadata(tmp_path_factory):
    """A folder of the real tables under the names that the repository of JUMP gives them."""
    import pandas as pd

    if not JUMP_METADATA.exists():
        pytest.skip(f"{JUMP_METADATA} is not there")
    folder = tmp_path_factory.mktemp("metadata")
    for name, copy in JUMP_TABLES.items():
        shutil.copy(JUMP_METADATA / name, folder / copy)
    compounds = pd.read_csv(JUMP_METADATA / "target2_compounds_jcp.csv", dtype="str")
    compounds = compounds.rename(columns={"InChIKey": "Metadata_InChIKey"})
    compounds.to_csv(folder / "compound.csv.gz", index=False)
    return folder


@dataclass(frozen=True)
class ServedBucket:
    """A bucket as a folder and as an anonymous, read-only S3 bucket."""

    folder: Path
    endpoint_url: str

    @property
    def place(self):
        """The bucket over S3."""
        from coda_ray.config import Place

        return Place(address=f"s3://{self.folder.name}", endpoint_url=self.endpoint_url, anonymous=True)

    @property
    def metadata(self):
        """Its metadata folder over S3."""
        return self.place.model_copy(update={"address": f"{self.place.address}/metadata"})


@pytest.fixture(scope="session")
def conditional():
    """An S3 server that knows conditional writes."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        s3fs.S3FileSystem(endpoint_url=url, key=KEY[0], secret=KEY[1], skip_instance_cache=True).mkdir("bucket")
        yield url
    finally:
        server.stop()


@pytest.fixture(params=["folder", "s3"])
def exclusive(request, tmp_path):
    """An empty place of each kind that refuses overwrites."""
    from coda_ray.config import Place
    from coda_ray.storage import open_place

    if request.param == "folder":
        return open_place(Place(address=str(tmp_path / "deep" / "er")))
    url = request.getfixturevalue("conditional")
    return open_place(Place(address=f"s3://bucket/{tmp_path.name}", endpoint_url=url, region="us-east-1"))


@pytest.fixture(scope="session")
def ray_cluster():
    """Ray on this machine, nothing of which is left afterwards; 3 stages at a time, each in a process of 1 GB."""
    import logging

    import ray

    from coda_ray.cluster import start_local

    start_local(num_cpus=3, object_store_memory=500_000_000, logging_level=logging.ERROR, log_to_driver=False)
    # Importing ray.data sets its log level.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_bucket(ray_cluster, tmp_path_factory):
    """The tiny simulated bucket without defects, served over S3."""
    from coda_ray.jump.simulate.serve import serve_folder

    folder = write_tiny(tmp_path_factory.mktemp("served") / "tiny")
    with serve_folder(folder.parent, read_only=True) as url:
        yield ServedBucket(folder, url)
