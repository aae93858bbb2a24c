"""Jobs as a person runs them: processes, exit codes, `ray job submit`, drivers and nodes that die, Ctrl-C."""

import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from coda_ray.cluster import LOCAL_STARTS
from coda_ray.config import dump_config
from coda_ray.lease import Lease
from coda_ray.pipeline.train_stages import pretrain
from coda_ray.storage import open_place
from synthetic import place, small_config, write_tiles

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
    settings = PRESETS["demo"].model_copy(update={"seed": 7}).model_dump(exclude={"severity"})  # older than this setting
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
    from coda_ray.jump.simulate.serve import own_keys

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.setenv(name, "mine")
    key = own_keys()
    assert (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]) == key
    assert "mine" not in key
    assert not {"AWS_SESSION_TOKEN", "AWS_PROFILE"} & os.environ.keys()


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_configuration_is_valid_and_prints_itself(name):
    own = name == "backbone.yaml"  # which no other job reads
    done = job("backbone.py" if own else "matrix.py", "--config", f"configs/{name}", "--print-config")
    assert done.returncode == 0, done.stderr
    told = yaml.safe_load(done.stdout)
    assert told["world" if own else "matrix"]["sources"]


MATRIX = {"sources": ["a"], "targets": ["b"], "methods": ["supervised", "oda", "coda"], "granularities": ["source"], "seeds": [0]}
# Three learning rates one after the other, scored often: a trial is long beside what Ctrl-C takes to stop it.
SWEEP = {
    "pairs": [("a", "b")],
    "space": {"adapt.lr": [1e-3, 3e-4, 1e-4]},
    "search": "grid",
    "objective": "mean_entropy",
    "score_every": 2,
    "at_once": 1,
}


def study(root: Path, results: str, **sections: object) -> Path:
    """Write the configuration of a small matrix, or of what else is given, over two sources; its tiles are shared."""
    sections = sections or {"pretrain": {"steps": 40}, "tracking": {"enabled": True}, "matrix": MATRIX}
    config = small_config(root, results={"address": str(root / results)}, **sections)
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
    """A cluster with token authentication: a head that runs no stage, and nodes of one CPU."""

    environment: dict[str, str]
    """Of its clients."""
    dashboard: str
    address: str
    nodes: list[psutil.Popen] = field(default_factory=list)

    @property
    def driver(self) -> dict[str, str]:
        """The environment of a job that joins from this machine."""
        return {**self.environment, "RAY_ADDRESS": self.address}

    def job(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `ray job`."""
        command = ["ray", "job", words[0], "--address", self.dashboard, *words[1:]]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)

    def submit(self, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Submit a job and follow it; a head that has just started says for a while that it has no agent yet."""
        for _ in range(30):
            done = self.job("submit", "--working-dir", ".", *options, "--", "python", *arguments)
            if "No available agent" not in done.stdout + done.stderr:
                break
            time.sleep(2)
        return done

    def node_of(self, pid: int) -> psutil.Popen | None:
        """Find the node that a process belongs to, while it lives."""
        with suppress(psutil.NoSuchProcess):
            parents = {parent.pid for parent in psutil.Process(pid).parents()}
            return next((node for node in self.nodes if node.pid in parents), None)
        return None


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Processes that wait for another stage would hold up its end.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # As in the image.
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port, dashboard = free_port(), free_port()
    started = Head(environment, f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}")
    said = tmp_path_factory.mktemp("head") / "head.log"
    running = []
    try:
        head = ["--head", "--num-cpus=0", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        running.append(start_node(head, environment, said))
        for number in range(2):
            # The log monitor of the head reads the files of all nodes of a machine.
            joins = [f"--address={started.address}", "--num-cpus=1", "--include-log-monitor=false"]
            # No fixed ports: the next node of this machine would want them too.
            joins += ["--min-worker-port=0", "--max-worker-port=0"]
            started.nodes.append(start_node(joins, environment, said.with_name(f"node {number}.log")))
        running += started.nodes
        wait_until_answered(f"{started.dashboard}/api/version", environment["RAY_AUTH_TOKEN"], said)
        yield started
    finally:
        alive = [node for node in reversed(running) if node.poll() is None]
        for node in alive:
            node.terminate()
        for node in alive:
            node.wait()


def start_node(arguments, environment, said):
    """Start a node, again where this machine was too busy for Ray's own time limits."""
    # The agent takes jobs in; on its usual port may sit the agent of another Ray of this machine.
    command = ["ray", "start", "--block", "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}"]
    command += ["--disable-usage-stats", "--object-store-memory=300000000", *arguments]
    for _ in range(LOCAL_STARTS):
        with said.open("w") as log:
            node = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
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


@pytest.mark.long
@pytest.mark.own_ray
def test_ray_job_submit_runs_adapt_and_matrix_unchanged(submitted):
    root, jobs = submitted
    for done in jobs:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "source → target" in done.stdout
    assert set(transfers_of(root, "submitted")["method"]) == {"supervised", "dual-dino", "dual-cb", "oda", "coda"}


@pytest.mark.long
@pytest.mark.own_ray
@pytest.mark.parametrize(
    ("credentials", "told"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "Forbidden: Invalid authentication token"),
        ({"RAY_AUTH_MODE": "disabled"}, "Unauthorized: Missing authentication token"),
    ],
)
def test_a_cluster_with_a_token_refuses_who_has_another_or_none(head, credentials, told):
    command = ["ray", "job", "submit", "--address", head.dashboard, "--working-dir", "configs", "--", "python", "--version"]
    environment = {**head.environment, **credentials}
    refused = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert told in refused.stderr


@pytest.mark.long
@pytest.mark.own_ray
def test_a_driver_that_was_killed_is_started_again_to_the_same_end(head, submitted):
    root, _ = submitted
    command = [sys.executable, "jobs/matrix.py", "--config", str(study(root, "killed"))]
    with subprocess.Popen(
        command, cwd=ROOT, env=head.driver, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        for line in driver.stdout or ():
            if re.match(r"\[4/\d+\]", line):
                driver.send_signal(signal.SIGKILL)
                break
    assert driver.returncode == -signal.SIGKILL
    assert not (root / "killed" / "transfers.parquet").exists()
    again = subprocess.run(command, cwd=ROOT, env=head.driver, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert re.search(r"stages, [1-9]\d* of them finished before", again.stdout)
    pd.testing.assert_frame_equal(transfers_of(root, "killed"), transfers_of(root, "submitted"))
    # A busy machine may not take in every run in time; then they are sent later.
    for name in ("submitted", "killed"):
        assert job("sync_mlflow.py", "--config", str(root / f"{name}.yaml")).returncode == 0
    assert runs_of(root, "killed") == runs_of(root, "submitted")
    assert all(run.endswith("FINISHED") for run in runs_of(root, "killed"))


SWEPT = {"adapt": {"steps": 14}, "criteria": {"tiles": 16}, "tune": SWEEP}


@pytest.fixture(scope="module")
def swept(head, tmp_path_factory):
    """The folder of an undisturbed sweep on a cluster."""
    root = tmp_path_factory.mktemp("sweep")
    done = job("tune.py", "--config", str(study(root, "undisturbed", **SWEPT)), env=head.driver)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def another(swept: Path, name: str) -> tuple[Path, str]:
    """Results and configuration of the same sweep once more, from what no trial changes."""
    for kind in ("pretrain", "classify"):
        shutil.copytree(swept / "undisturbed" / kind, swept / name / kind)
    return swept / name, str(study(swept, name, **SWEPT))


@pytest.mark.long
@pytest.mark.own_ray
def test_a_submitted_sweep_that_is_stopped_leaves_its_table(head, swept):
    results, file = another(swept, "stopped")
    begun = head.submit("jobs/tune.py", "--config", file, options=("--submission-id", "stopped", "--no-wait"))
    assert begun.returncode == 0, begun.stdout + begun.stderr
    while "finished" not in statuses_of(results).values():
        assert "RUNNING" in (now := head.job("status", "stopped").stdout) or "PENDING" in now, head.job("logs", "stopped").stdout
    done = head.job("stop", "stopped")
    assert done.returncode == 0, done.stdout + done.stderr
    now = head.job("status", "stopped")
    assert "Job 'stopped' was stopped" in now.stdout + now.stderr
    (table,) = results.glob("report/*/trials.csv")
    assert {"finished", "unadapted"} <= set(pd.read_csv(table)["status"])
    assert "the same command again continues it" in head.job("logs", "stopped").stdout


def statuses_of(results: Path) -> dict[Path, str]:
    """Status of every trial of a sweep that has a record."""
    return {file: json.loads(file.read_text())["status"] for file in results.glob("sweeps/*/*.json")}


class Sweep:
    """`jobs/tune.py` in a process group of its own, with a mark that whatever it starts has too."""

    def __init__(self, command: list[str], results: Path, log: Path) -> None:
        self.results, self.log, self.mark = results, log, secrets.token_hex(8)
        environment = {**os.environ, "CODA_RAY_TEST": self.mark}
        with log.open("w") as said:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )

    def records(self) -> dict[Path, str]:
        """Status of every trial that has a record."""
        return statuses_of(self.results)

    def wait_until(self, **counts: int) -> None:
        """Wait until so many trials have a status."""
        while not all(list(self.records().values()).count(status) >= count for status, count in counts.items()):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def end(self, how: signal.Signals) -> int:
        """Send a signal, to all of the group as a terminal does where it is Ctrl-C, and wait for the end."""
        if how is signal.SIGINT:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        return self.process.wait()

    def left(self) -> list[str]:
        """Command lines of what it started and still runs, half a minute after its end."""
        for _ in range(300):
            found = []
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    if process.environ().get("CODA_RAY_TEST") == self.mark:
                        found.append(" ".join(process.cmdline()))
            if not found:
                break
            time.sleep(0.1)
        return found


@pytest.mark.long
@pytest.mark.own_ray
def test_a_sweep_that_is_killed_and_then_interrupted_comes_to_the_same_table(head, swept):
    results, configured = another(swept, "disturbed")
    command = [sys.executable, "jobs/tune.py", "--config", configured]

    killed = Sweep(command, results, swept / "killed.log")
    killed.wait_until(finished=1, running=1)
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    assert killed.left() == []
    (first,) = [file for file, status in killed.records().items() if status == "finished"]
    written = {first: first.stat().st_mtime_ns}

    interrupted = Sweep(command, results, swept / "interrupted.log")
    interrupted.wait_until(finished=2, running=1)
    assert interrupted.end(signal.SIGINT) == 130, interrupted.log.read_text()
    assert interrupted.left() == []
    said = interrupted.log.read_text()
    assert "3 trials, 1 of them finished before" in said
    assert "the same command again continues it" in said
    assert "Traceback" not in said
    (file,) = results.glob("report/*/trials.csv")
    assert list(pd.read_csv(file)["status"]).count("finished") == 2
    assert set(pd.read_csv(file)["status"]) == {"finished", "interrupted", "unadapted"}
    written |= {path: path.stat().st_mtime_ns for path, status in interrupted.records().items() if status == "finished"}
    assert len(written) == 2

    done = job("tune.py", *command[2:], env=head.driver)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 trials, 2 of them finished before" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written
    (undisturbed,) = (swept / "undisturbed").glob("report/*/trials.csv")
    pd.testing.assert_frame_equal(pd.read_csv(file), pd.read_csv(undisturbed), check_exact=True)
    assert set(pd.read_csv(file)["status"]) == {"finished", "unadapted"}


def weights_of(root: Path, results: str) -> dict[str, str]:
    """Hash of the weights of every stage that trained."""
    found = {}
    for file in (root / results).glob("*/*/done.json"):
        facts = json.loads(file.read_text())
        if "sha256" in facts:
            found[file.parent.name] = facts["sha256"]
    return found


def broken_off(root: Path, results: str) -> list[str]:
    """Titles of the stages that have a checkpoint and no end."""
    folders = {file.parents[2] for file in (root / results).glob("*/*/checkpoints/*/state.json")}
    return [json.loads((path / "stage.json").read_text())["title"] for path in folders if not (path / "done.json").exists()]


class Driver:
    """`jobs/matrix.py` on a Ray of its own."""

    def __init__(self, config: Path, log: Path) -> None:
        self.log = log
        command = [sys.executable, "jobs/matrix.py", "--config", str(config)]
        # Ray tells lines that differ in their numbers alone once.
        environment = {**os.environ, "RAY_DEDUP_LOGS": "0"}
        with log.open("w") as said:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_until(self, words: str) -> None:
        """Wait until it has said something."""
        while words not in self.said:
            assert self.process.poll() is None, self.said
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.own_ray
def test_two_jobs_that_start_at_once_train_each_stage_once_and_come_to_the_same_table(tmp_path):
    sections = {"pretrain": {"steps": 40}, "matrix": MATRIX, "tracking": {"enabled": False}}
    alone = Driver(study(tmp_path, "alone", **sections), tmp_path / "alone.log")
    assert alone.process.wait() == 0, alone.said
    file = study(tmp_path, "shared", **sections)
    first = pretrain(small_config(tmp_path, **sections), "a", objective="dino", seed=0)
    # Both come to the same missing stage, and find it held; then one of them gets it.
    with Lease(open_place(place(tmp_path / "shared")).child(f"{first.path}/lease"), "the test", 600.0) as held:
        assert held.acquire(wait=False, say=pytest.fail)
        drivers = [Driver(file, tmp_path / f"{name}.log") for name in ("one", "two")]
        for driver in drivers:
            driver.wait_until(f"{first.title}: the test (process {os.getpid()} on ")
    for driver in drivers:
        assert driver.process.wait() == 0, driver.said
    told = [re.findall(r"pid=\d+\)\S* (.+): (?:starts|continues at step \d+), ", driver.said) for driver in (alone, *drivers)]
    assert len(told[0]) == len(set(told[0])) > 0
    assert sorted(told[1] + told[2]) == sorted(told[0])
    pd.testing.assert_frame_equal(transfers_of(tmp_path, "shared"), transfers_of(tmp_path, "alone"), check_exact=True)
    assert weights_of(tmp_path, "shared") == weights_of(tmp_path, "alone")


@pytest.mark.long
@pytest.mark.own_ray
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_job_that_is_interrupted_gives_its_stages_back(tmp_path, how):
    sections = {"pretrain": {"steps": 100_000}, "matrix": MATRIX, "tracking": {"enabled": False}}
    driver = Driver(study(tmp_path, "ended", **sections), tmp_path / "ended.log")
    driver.wait_until(": step 3/100000")
    driver.process.send_signal(how)
    assert driver.process.wait() != 0
    terms = [file for file in (tmp_path / "ended").glob("*/*/lease/*.json") if file.name == "000001.json"]
    assert terms
    assert all(file.with_name("000001.released.json").exists() for file in terms), driver.said


@pytest.mark.long
@pytest.mark.own_ray
def test_a_node_that_dies_in_the_middle_changes_nothing(head, submitted):
    root, _ = submitted
    command = [sys.executable, "jobs/matrix.py", "--config", str(study(root, "lost"))]
    # Ray tells lines that differ in their numbers alone once.
    environment = {**head.driver, "RAY_DEDUP_LOGS": "0"}
    nodes, lost, said = set(), None, []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        for line in driver.stdout or ():
            said.append(line)
            speaker = re.search(r"\(\w+ pid=(\d+)", line)
            node = head.node_of(int(speaker[1])) if speaker else None
            nodes |= {node} if node else set()
            if node and not lost and any(f"{title}: step" in line for title in broken_off(root, "lost")):
                lost = node
                for process in [node, *node.children(recursive=True)]:
                    process.kill()
                node.wait()
    told = "".join(said)
    assert driver.returncode == 0, told
    assert lost
    assert len(nodes) == 2
    assert "continues at step" in told, told
    pd.testing.assert_frame_equal(transfers_of(root, "lost"), transfers_of(root, "submitted"))
    assert weights_of(root, "lost") == weights_of(root, "submitted")
