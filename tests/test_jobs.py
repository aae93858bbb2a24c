"""Jobs as a person runs them: processes, exit codes, a driver that is killed, `ray job submit`."""

import io
import json
import os
import re
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml

from coda_ray.cluster import LOCAL_STARTS
from coda_ray.config import dump_config
from synthetic import small_config, write_tiles

ROOT = Path(__file__).resolve().parents[1]
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))


def job(name, *arguments, **options):
    return subprocess.run(
        [sys.executable, f"jobs/{name}", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("name", JOBS)
def test_help_explains_and_needs_no_ray(name):
    done = job(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert done.stderr == ""


def test_a_wrong_value_is_one_message_and_code_2():
    done = job("adapt.py", "--source", "a", "--target", "b", "--adapt.lr", "-1", "--method", "cода")
    assert done.returncode == 2
    assert "adapt.lr = '-1'" in done.stderr
    assert "method = 'cода'" in done.stderr
    assert "Traceback" not in done.stderr


def test_seeds_are_not_negative_and_places_of_every_job_are_checked():
    arguments = ["--source", "a", "--target", "b", "--seed", "-1"]
    for done in (
        job("adapt.py", *arguments),
        job("demo.py", "--seed", "-1"),
        job("simulate.py", "--out", "gs://b"),
        job("simulate.py", "--out", "b", env={**os.environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}),
    ):
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_the_demo_stops_at_another_world_before_ray_starts(tmp_path):
    from coda_ray.jump.simulate.settings import PRESETS, SIMULATOR_VERSION

    bucket = tmp_path / "demo" / "bucket" / "cellpainting-gallery"
    bucket.mkdir(parents=True)
    settings = PRESETS["demo"].model_copy(update={"seed": 7}).model_dump()
    (bucket / "simulation.json").write_text(json.dumps({"version": SIMULATOR_VERSION - 1, "settings": settings}))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "demo.py", "--seed", "0"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    told = f"(version {SIMULATOR_VERSION - 1}, not {SIMULATOR_VERSION}; seed 7, not 0); run make clean"
    assert done.stderr == f"jobs/demo.py: demo/bucket holds another world {told}\n"


def test_the_demo_does_not_hold_the_keys_of_the_person_who_runs_it(monkeypatch):
    own_keys = runpy.run_path(str(ROOT / "jobs" / "demo.py"))["_own_keys"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.setenv(name, "mine")
    key = own_keys()
    assert (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]) == key
    assert "mine" not in key
    assert not {"AWS_SESSION_TOKEN", "AWS_PROFILE"} & os.environ.keys()


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_configuration_is_valid_and_prints_itself(name):
    done = job("matrix.py", "--config", f"configs/{name}", "--print-config")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["matrix"]["sources"]


def study(root: Path, results: str) -> Path:
    """Write the configuration of a small matrix over two sources; its tiles are shared."""
    config = small_config(
        root,
        results={"address": str(root / results)},
        pretrain={"steps": 12},
        tracking={"enabled": True},
        matrix={
            "sources": ["a"],
            "targets": ["b"],
            "methods": ["supervised", "oda", "coda"],
            "granularities": ["source"],
            "seeds": [0],
        },
    )
    if not (root / "tiles").exists():
        for source in ("a", "b"):
            write_tiles(config, source, batches=2, plates_per_batch=2)
    file = root / f"{results}.yaml"
    file.write_text(dump_config(config))
    return file


def transfers_of(root: Path, results: str) -> pd.DataFrame:
    return pd.read_parquet(io.BytesIO((root / results / "transfers.parquet").read_bytes())).drop(columns="seconds")


def runs_of(root: Path, results: str) -> list[str]:
    """List the MLflow runs of a matrix: its own and those of its transfers."""
    import mlflow

    found = mlflow.MlflowClient(f"sqlite:///{root}/{results}/mlflow.db").search_runs(["1"])
    kept = [run for run in found if run.data.tags.get("job") != "adapt"]
    return sorted(f"{run.data.tags['kind']} {run.data.tags['key']} {run.info.status}" for run in kept)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A cluster of one head node with token authentication."""

    environment: dict[str, str]
    """Of its clients."""
    dashboard: str
    address: str

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Submit a job and follow it; a head that has just started says for a while that it has no agent yet."""
        command = ["ray", "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", "python", *arguments]
        for _ in range(30):
            done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
            if "No available agent" not in done.stdout + done.stderr:
                break
            time.sleep(2)
        return done


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Processes that wait for another stage would hold up its end.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port, dashboard, agent = free_port(), free_port(), free_port()
    # The agent takes jobs in; on its usual port may sit the agent of another Ray of this machine.
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}"]
    command += ["--disable-usage-stats", "--object-store-memory=500000000"]
    started = Head(environment, f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}")
    said = tmp_path_factory.mktemp("head") / "head.log"
    node = start_head(command, environment, said)
    try:
        wait_until_answered(f"{started.dashboard}/api/version", environment["RAY_AUTH_TOKEN"], said)
        yield started
    finally:
        node.terminate()
        node.wait()


def start_head(command, environment, said):
    """Start a head, again where this machine was too busy for Ray's own time limits."""
    for _ in range(LOCAL_STARTS):
        with said.open("w") as log:
            node = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while node.poll() is None:
            if "Ray runtime started" in said.read_text():
                return node
            time.sleep(0.5)
        if "timed out during startup" not in said.read_text():
            break
    raise AssertionError(said.read_text())


def wait_until_answered(url, token, log):
    """Ask the head's dashboard until it answers."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    for _ in range(600):
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} never answered: {log.read_text()}")


@pytest.fixture(scope="module")
def submitted(head, tmp_path_factory):
    """The folder of a study whose jobs were submitted, and what they printed."""
    root = tmp_path_factory.mktemp("study")
    file = str(study(root, "submitted"))
    one = ["--source", "a", "--target", "b", "--method", "coda"]
    return root, [head.submit("jobs/matrix.py", "--config", file), head.submit("jobs/adapt.py", "--config", file, *one)]


@pytest.mark.slow
@pytest.mark.own_ray
def test_ray_job_submit_runs_adapt_and_matrix_unchanged(submitted):
    root, jobs = submitted
    for done in jobs:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "source → target" in done.stdout
    assert set(transfers_of(root, "submitted")["method"]) == {"supervised", "dual-dino", "dual-cb", "oda", "coda"}


@pytest.mark.slow
@pytest.mark.own_ray
def test_a_cluster_with_a_token_refuses_another(head):
    refused = subprocess.run(
        ["ray", "job", "list", "--address", head.dashboard],
        env={**head.environment, "RAY_AUTH_TOKEN": "0" * 64}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode != 0


@pytest.mark.slow
@pytest.mark.own_ray
def test_a_driver_that_was_killed_is_started_again_to_the_same_end(head, submitted):
    root, _ = submitted
    command = [sys.executable, "jobs/matrix.py", "--config", str(study(root, "killed"))]
    environment = {**head.environment, "RAY_ADDRESS": head.address}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        for line in driver.stdout or ():
            if re.match(r"\[4/\d+\]", line):
                driver.send_signal(signal.SIGKILL)
                break
    assert driver.returncode == -signal.SIGKILL
    assert not (root / "killed" / "transfers.parquet").exists()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert re.search(r"stages, [1-9]\d* of them finished before", again.stdout)
    pd.testing.assert_frame_equal(transfers_of(root, "killed"), transfers_of(root, "submitted"))
    assert runs_of(root, "killed") == runs_of(root, "submitted")
    assert all(run.endswith("FINISHED") for run in runs_of(root, "killed"))
