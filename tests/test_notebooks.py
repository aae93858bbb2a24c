"""The notebooks: what is kept in them, and that they run as they stand, on one Ray and in one folder."""

import ast
import re
from itertools import chain
from pathlib import Path

import nbformat
import psutil
import pytest
import ray

from coda_ray.config import CHANNELS
from coda_ray.jump.simulate.layout import draw_plates
from coda_ray.jump.simulate.settings import PRESETS
from coda_ray.tracking.store import RunStore
from coda_ray.tracking.sync import sync
from invented import invented_results, write_sweep
from notebooks.run import METADATA, code_hash, executed
from real_images import REAL_IMAGES

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"(?<![\w.:/])(/\w+/|[A-Za-z]:\\)")
MOST_BYTES = 500_000
GONE_WITHIN_S = 60


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook):
    """Everything in the outputs that can be read."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "")
            yield from (data for kind, data in output.get("data", {}).items() if kind.startswith("text/"))


def shapes(notebook):
    """Kinds of output of each code cell."""
    return [[output.get("name") or sorted(output.data) for output in cell.outputs] for cell in code_cells(notebook)]


@pytest.fixture(scope="module")
def desk(ray_cluster, tmp_path_factory):
    """The folder of notebooks of a copy of the repository, with the real images beside it as far as they are there."""
    repository = tmp_path_factory.mktemp("desk") / "repository"
    (repository / "notebooks").mkdir(parents=True)
    (repository / "configs").symlink_to(ROOT / "configs")
    if REAL_IMAGES.exists():
        (repository.parent / "shared").symlink_to(REAL_IMAGES.parents[1])
    return repository / "notebooks"


def test_there_are_five():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_whole_and_say_nothing_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook.metadata == METADATA | {"code": code_hash(notebook)}, "run `make notebooks` after a change of code"
    kinds = list(chain.from_iterable(shapes(notebook)))
    assert any("image/png" in kind for kind in kinds)
    assert "stderr" not in kinds
    assert not [text for text in texts(notebook) if ABSOLUTE.search(text)]
    assert path.stat().st_size < MOST_BYTES


def test_columns_of_mlflow_that_notebooks_read_are_written(tmp_path):
    results = invented_results(tmp_path)
    write_sweep(results)
    store = RunStore(f"sqlite:///{tmp_path / 'mlflow.db'}", "coda_ray", (tmp_path / "artifacts").as_uri())
    sync(results, store)
    runs = store.client.search_runs([store.experiment_id])
    written = {f"{kind}.{name}" for run in runs for kind in ("tags", "params", "metrics") for name in getattr(run.data, kind)}
    for path in NOTEBOOKS:
        code = "\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4)))
        read = set(re.findall(r"\b(?:tags|params|metrics)\.\w+", code))
        assert read <= written, path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_to_files(path):
    told = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    assert all((path.parent / link).exists() for link in re.findall(r"\]\(([^)#]+)\)", told))


def test_the_stains_of_own_plates_are_those_of_the_simulator():
    (path,) = (path for path in NOTEBOOKS if path.name.startswith("04"))
    (line,) = re.findall(r"^STAINS = (.+)$", "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells), re.M)
    for preset in ("tiny", "demo"):
        plates = [plate for plate in draw_plates(PRESETS[preset]) if plate.source == "sim_c"]
        for numbers in (plate.channel_numbers for plate in plates):
            assert ast.literal_eval(line).items() <= {str(n): name for n, name in zip(numbers, CHANNELS, strict=True)}.items()


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_as_it_stands_and_leaves_nothing_running(path, desk):
    here = psutil.Process()
    before = set(here.children(recursive=True))
    address = ray.get_runtime_context().gcs_address
    notebook = executed(path, desk, RAY_ADDRESS=address, PYTHONPATH=str(ROOT))
    assert not [text for text in texts(notebook) if "Traceback" in text]
    # Without the real cells notebook 03 has a picture less.
    if REAL_IMAGES.exists() or not path.stem.startswith("03"):
        assert shapes(notebook) == shapes(nbformat.read(path, as_version=4))
    _, left = psutil.wait_procs(set(here.children(recursive=True)) - before, timeout=GONE_WITHIN_S)
    assert not [process.name() for process in left]
