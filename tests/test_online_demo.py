"""The demo of plates that arrive, as a person runs it: two watchers, one of them killed, end alike."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.long
@pytest.mark.own_ray
def test_plates_are_watched_and_a_killed_watcher_ends_like_one_that_is_not(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "jobs" / "online_demo.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ledgers: equal" in done.stdout
    assert done.stdout.count("killed when plate") == 2
    for name in ("undisturbed", "killed"):
        results = tmp_path / "online-demo" / name / "results"
        table = pd.read_csv(results / "watch" / "plates.csv")
        assert table["state"].tolist() == ["reported", "aside", "reported", "reported"]
        assert "quarantined" in table["reason"][1]
        assert (table["granularity"] == "plate").any()
        claims = [json.loads(file.read_text()) for file in (results / "watch" / "ledger").glob("*.json")]
        assert sum(claim["state"] == "watching" for claim in claims) == (0 if name == "undisturbed" else 2)
        with sqlite3.connect(results / "mlflow.db") as database:
            kinds = [row[0] for row in database.execute("select value from tags where key = 'kind'")]
            versions = database.execute("select count(*) from model_versions").fetchone()[0]
        database.close()
        assert kinds.count("plate") == 3
        assert versions == table["model_key"].nunique()
