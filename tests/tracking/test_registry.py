"""Exported models in MLflow's registry: versions, aliases, no pickle; and a server that says the same over HTTP."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
import yaml
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from coda_ray.config import Config, ConfigError
from coda_ray.learn.exported import DESCRIPTION, WEIGHTS, ExportedModel, unpack
from coda_ray.pipeline.models import find_model
from coda_ray.tracking.registry import Registered, RegistryError, alias_of, register
from coda_ray.tracking.store import open_client
from synthetic import random_export, small_config


@dataclass(frozen=True)
class World:
    """A registry with an unadapted and an adapted model."""

    config: Config
    address: str
    source: Registered
    adapted: Registered
    model: ExportedModel


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("registry")
    config = small_config(root, tracking={"enabled": True})
    made = {}
    for target in ("s", "t"):
        files = random_export(config, target=target, unit="x/y")
        model = unpack(files[DESCRIPTION], files[WEIGHTS], "here")
        made[target] = register(config, "moa", files | {"README.md": b"card"}, model.key, model.description["origin"])
    return World(config, f"sqlite:///{root}/results/mlflow.db", made["s"], made["t"], model)


@pytest.mark.parametrize(
    ("target", "unit", "alias"),
    [("s", "s", "source"), ("t", "t", "adapted-t-t"), ("t", "2022/b 1é", "adapted-t-2022_b_1_"), ("t", "u" * 300, None)],
)
def test_aliases_keep_to_the_letters_that_mlflow_allows(target, unit, alias):
    found = alias_of({"source": "s", "target": target, "unit": unit})
    assert found == alias or (alias is None and len(found) == 255)


@pytest.mark.slow
def test_versions_have_aliases_and_say_what_they_are(world):
    client = open_client(world.address)
    assert (world.source.version, world.source.alias, world.source.address) == ("1", "source", "models:/moa/1")
    assert (world.adapted.version, world.adapted.alias, world.adapted.fresh) == ("2", "adapted-t-x_y", True)
    version = client.get_model_version_by_alias("moa", "adapted-t-x_y")
    assert int(version.version) == 2
    origin = {"method": "supervised", "source": "s", "target": "t", "granularity": "source", "unit": "x/y", "seed": "0"}
    assert version.tags == {"key": world.model.key, **origin}


@pytest.mark.slow
def test_the_same_model_is_registered_once(world):
    files = random_export(world.config, target="t", unit="x/y")
    again = register(world.config, "moa", files, world.model.key, world.model.description["origin"])
    assert again == Registered("moa", "2", "adapted-t-x_y", False)
    assert len(open_client(world.address).search_model_versions("name = 'moa'")) == 2


@pytest.mark.slow
def test_an_alias_stays_with_the_newest_version_of_its_kind(world):
    made = {}
    for seed in (1, 2):
        files = random_export(world.config, target="v", unit="v", seed=seed)
        made[seed] = files, unpack(files[DESCRIPTION], files[WEIGHTS], "here")
    for seed, version, newest in ((1, "1", 1), (2, "2", 2), (1, "1", 2)):
        files, model = made[seed]
        assert register(world.config, "kinds", files, model.key, model.description["origin"]).version == version
        assert int(open_client(world.address).get_model_version_by_alias("kinds", "adapted-v-v").version) == newest


class Killed(BaseException):
    """What a process that is killed does not catch either."""


@pytest.mark.slow
def test_a_version_that_a_killed_process_left_without_tags_is_no_second_one(world, monkeypatch):
    from mlflow.tracking import MlflowClient

    files = random_export(world.config, target="u", unit="u")
    model = unpack(files[DESCRIPTION], files[WEIGHTS], "here")

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(MlflowClient, "set_model_version_tag", killed)
    with pytest.raises(Killed):
        register(world.config, "killed", files, model.key, model.description["origin"])
    monkeypatch.undo()
    again = register(world.config, "killed", files, model.key, model.description["origin"])
    assert again == Registered("killed", "1", "adapted-u-u", False)
    (version,) = open_client(world.address).search_model_versions("name = 'killed'")
    assert version.tags["key"] == model.key
    assert version.tags["target"] == "u"


@pytest.mark.slow
def test_what_is_logged_is_the_folder_and_code_and_no_pickle(world):
    logged = Path(world.config.results.address) / "mlflow_artifacts"
    files = [path for path in logged.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".md", ".py", ".safetensors", ".txt", ".yaml", ""}
    assert {path.name for path in files if not path.suffix} == {"MLmodel"}
    # Protocol 2 and later begin so; zip files, in which torch hides pickles, with PK.
    assert not [
        path for path in files if path.read_bytes()[:2] in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
    ]
    (requirements, *_) = sorted(logged.rglob("requirements.txt"))
    lines = requirements.read_text().split()
    assert all("://" not in line and "@" not in line and "+" not in line for line in lines)
    assert {line.partition("==")[0] for line in lines} >= {"torch", "timm", "safetensors", "mlflow"}
    flavour = yaml.safe_load(next(logged.rglob("MLmodel")).read_text())["flavors"]["python_function"]
    assert "model_code_path" in flavour
    assert "python_model" not in flavour


@pytest.mark.slow
def test_a_registered_model_is_found_by_version_and_alias(world):
    for address in ("models:/moa/2", "models:/moa@adapted-t-x_y"):
        assert find_model(world.config, address).key == world.model.key
    assert find_model(world.config, "models:/moa@source").description["origin"]["target"] == "s"
    for address in ("models:/moa/7", "models:/moa@nothing", "models:/other/1"):
        with pytest.raises(RegistryError, match=f"{address}: .* does not give it: .*; correct the name, the version or alias"):
            find_model(world.config, address)


def test_without_mlflow_there_is_no_registry(tmp_path):
    config = small_config(tmp_path)
    with pytest.raises(ConfigError, match=r"set MLFLOW_TRACKING_URI and tracking.enabled"):
        find_model(config, "models:/moa/1")


@pytest.fixture
def server(world, tmp_path):
    """`mlflow models serve` on loopback; as on a machine of its own, coda_ray comes with the model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--model-uri", "models:/moa@adapted-t-x_y"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": world.address, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # Not the package of this environment: what an editable installation finds is taken away.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
    )
    environment |= {"PYTHONPATH": str(tmp_path)}
    with open(tmp_path / "server.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    try:
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=Retry(total=90, backoff_factor=0.5, backoff_max=5)))
            assert session.get(f"http://127.0.0.1:{port}/ping", timeout=60).status_code == 200, (
                tmp_path / "server.log"
            ).read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.mark.long
def test_a_served_model_says_the_same_over_http(world, server):
    tiles = np.random.default_rng(0).integers(0, 255, (3, 2, 40, 36), dtype=np.uint8)
    answer = requests.post(f"{server}/invocations", json={"inputs": tiles.tolist()}, timeout=60)
    assert answer.status_code == 200, answer.text
    expected = world.model.predict(torch.from_numpy(tiles)).probabilities.numpy()
    rows = answer.json()["predictions"]
    assert list(rows[0]) == ["x", "y"]
    np.testing.assert_allclose([[row["x"], row["y"]] for row in rows], expected, rtol=1e-6)
    wrong = requests.post(f"{server}/invocations", json={"inputs": tiles[:, :1].tolist()}, timeout=60)
    assert wrong.status_code == 400
