"""Jobs as a person runs them: processes, exit codes, a driver that is killed, `ray job submit`."""

import io
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
import yaml

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
            "granularities": ["batch"],
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
    import mlflow

    found = mlflow.MlflowClient(f"sqlite:///{root}/{results}/mlflow.db").search_runs(["1"])
    return sorted(f"{run.data.tags['kind']} {run.data.tags['key']} {run.info.status}" for run in found)


@pytest.mark.slow
def test_a_driver_that_was_killed_is_started_again_to_the_same_end(tmp_path):
    undisturbed = job("matrix.py", "--config", str(study(tmp_path, "whole")))
    assert undisturbed.returncode == 0, undisturbed.stderr
    file = study(tmp_path, "killed")
    driver = subprocess.Popen(
        [sys.executable, "jobs/matrix.py", "--config", str(file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert driver.stdout is not None
    for line in driver.stdout:
        if re.match(r"\[4/\d+\]", line):
            driver.send_signal(signal.SIGKILL)
            break
    driver.stdout.close()
    assert driver.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "transfers.parquet").exists()
    again = job("matrix.py", "--config", str(file))
    assert again.returncode == 0, again.stderr
    assert re.search(r"stages, [1-9]\d* of them finished before", again.stdout)
    pd.testing.assert_frame_equal(transfers_of(tmp_path, "killed"), transfers_of(tmp_path, "whole"))
    assert runs_of(tmp_path, "killed") == runs_of(tmp_path, "whole")
    assert all(run.endswith("FINISHED") for run in runs_of(tmp_path, "killed"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path):
    """A cluster of one head node with token authentication; yields the environment and address of its clients."""
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port, dashboard = free_port(), free_port()
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
    ]
    command += ["--num-cpus=4", "--node-ip-address=127.0.0.1", "--disable-usage-stats", "--object-store-memory=500000000"]
    log = (tmp_path / "head.log").open("w")
    node = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until_answered(node, f"{address}/api/version", environment["RAY_AUTH_TOKEN"], tmp_path / "head.log")
        yield environment, address
    finally:
        node.terminate()
        node.wait()
        log.close()


def wait_until_answered(node, url, token, log):
    """Ask the head until it answers; it says itself when it cannot start."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    for _ in range(600):
        assert node.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} never answered: {log.read_text()}")


def submit(address, arguments, environment):
    """Submit a job; a head that has just started says for a while that it has no agent yet."""
    command = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--", "python", *arguments]
    for _ in range(30):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(2)
    return done


@pytest.mark.slow
def test_ray_job_submit_runs_adapt_and_matrix_unchanged(head, tmp_path):
    environment, address = head
    file = study(tmp_path, "submitted")
    for arguments in (
        ["jobs/adapt.py", "--config", str(file), "--source", "a", "--target", "b", "--method", "coda", "--granularity", "batch"],
        ["jobs/matrix.py", "--config", str(file)],
    ):
        done = submit(address, arguments, environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "source → target" in done.stdout
    assert set(transfers_of(tmp_path, "submitted")["method"]) == {"supervised", "dual-dino", "dual-cb", "oda", "coda"}
    refused = subprocess.run(
        ["ray", "job", "list", "--address", address],
        env={**environment, "RAY_AUTH_TOKEN": "0" * 64}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode != 0
