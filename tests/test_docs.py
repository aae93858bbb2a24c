"""What the documents tell a person to type and to open: every command is understood by its job, every link leads somewhere."""

import re
import runpy
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "deploy").rglob("*.md"))]
OTHERS = [*sorted((ROOT / "notebooks").glob("*.ipynb")), *sorted((ROOT / "configs").glob("*.yaml"))]
RAYJOB = ROOT / "deploy/kuberay/rayjob.yaml"
# What a reader is told to copy and to change.
COPIES = {"MY.yaml": "configs/notebooks.yaml"}
# A word that a reader replaces: such a line is no command yet.
OPEN = re.compile(r"…|[A-Z]{3,}(\.yaml)?$")


def typed(document):
    """Lines to be typed: of bash blocks, between backticks, in cells of text, and at the head of a configuration."""
    text = document.read_text()
    if document.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    if document.suffix == ".yaml":
        return re.findall(r"^#   (.+)$", text, re.MULTILINE)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines + re.findall(r"`([^`\n]*python jobs/[^`\n]+)`", prose)


def commands():
    """Every `python jobs/…` that can be typed as it stands: document, arguments, whether it is submitted to a cluster."""
    for document in [*DOCUMENTS, *OTHERS]:
        for line in typed(document):
            words = shlex.split(line, comments=True)
            own = [COPIES.get(word, word) for word in words[words.index("python") + 1 :]] if "python" in words else []
            if own and own[0].startswith("jobs/") and not any(OPEN.search(word) for word in own):
                yield document.relative_to(ROOT), own, "submit" in words
    entrypoint = yaml.safe_load(RAYJOB.read_text())["spec"]["entrypoint"]
    yield RAYJOB.relative_to(ROOT), shlex.split(entrypoint.replace("/opt/coda_ray/", ""))[1:], True


def test_every_job_is_shown():
    """But those that the Makefile runs; so the commands below are found at all."""
    jobs = {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")} - {"jobs/demo.py", "jobs/online_demo.py"}
    assert {job for _, (job, *_), _ in commands()} == jobs


@pytest.mark.parametrize(
    ("document", "words", "submitted"), [pytest.param(*shown, id=f"{shown[0]}: {' '.join(shown[1])}") for shown in commands()]
)
def test_commands_name_jobs_and_options_that_exist(document, words, submitted, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    job, *options = words
    monkeypatch.setattr(sys, "argv", [job, *options, "--print-config"])
    if submitted:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(SystemExit) as left:
        runpy.run_path(job, run_name="__main__")
    assert not left.value.code, capsys.readouterr().err
    if submitted:  # every node must reach these
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["metadata"]["address"].startswith("s3://")
        assert config["tiles"]["address"].startswith("s3://")


def test_what_is_simulated_lies_where_the_next_command_looks():
    shown = list(commands())
    pairs = [(one, other) for one, other in pairwise(shown) if one[1][0] == "jobs/simulate.py"]
    assert pairs
    for (document, words, _), (_, following, _) in pairs:
        out = words[words.index("--out") + 1]
        config = yaml.safe_load((ROOT / following[following.index("--config") + 1]).read_text())
        assert config["bucket"]["address"] == out, document
        assert config["metadata"]["address"] == f"{out}/metadata", document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        found = document.parent / path if path else document
        assert found.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_has_the_targets_that_are_shown(document):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", document.read_text(), re.MULTILINE)) <= targets
