"""MLflow's pages as a person sees them, in a browser, and our own report.

`CODA_RAY_SCREENSHOTS` names a folder that keeps the pictures, `CODA_RAY_SHOW` a folder of real results to show instead of
the invented ones (docs/compare.md).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from browser import chromium, mlflow_server, page_of
from coda_ray.config import Place
from coda_ray.storage import Folder, open_place
from coda_ray.tracking.notes import transfer_name, trial_name
from coda_ray.tracking.page import PAGE, report_files
from coda_ray.tracking.records import read_records
from coda_ray.tracking.store import RunStore
from coda_ray.tracking.sync import sync
from invented import findings, invented_results, write_sweep

pytestmark = pytest.mark.slow
SIZE = (1280, 800)
# What a person sets once: the pages of model training, and no assistant.
SETTINGS = """
localStorage.setItem("mlflow.workflowType_v1", '"machine_learning"');
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
"""


@dataclass(frozen=True)
class Site:
    """A server that was filled from a results folder."""

    address: str
    results: Folder
    runs: dict[tuple[str, str], str]

    def job(self, kind):
        """The job of a kind; of several the one with most below it."""
        found = [job for job in read_records(self.results, "jobs") if job["kind"] == kind]
        return max(found, key=lambda job: len(job["transfers"]))

    def transfers(self, job):
        """Records of a job's transfers."""
        return [record for record in read_records(self.results, "transfers") if record["key"] in job["transfers"]]

    def trials(self, sweep):
        """Records of a sweep's trials."""
        return read_records(self.results, f"sweeps/{sweep['key']}")

    def runs_page(self, where=""):
        """The list of runs, filtered."""
        return f"{self.address}/#/experiments/1/runs?searchFilter={where}"

    def run_page(self, kind, key, tab=""):
        """The page of one run."""
        return f"{self.address}/#/experiments/1/runs/{self.runs[kind, key]}{tab}"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def site(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    if shown := os.environ.get("CODA_RAY_SHOW"):
        results = open_place(Place(address=shown))
    else:
        results = invented_results(folder / "results")
        write_sweep(results)
    (folder / "server").mkdir()
    with mlflow_server(folder / "server") as address:
        store = RunStore(address, "coda_ray")
        sync(results, store)
        runs = store.client.search_runs(["1"])
        yield Site(address, results, {(run.data.tags["kind"], run.data.tags["key"]): run.info.run_id for run in runs})


@pytest.fixture
def page(browser):
    with page_of(browser, *SIZE) as page:
        page.context.add_init_script(SETTINGS)
        yield page


@pytest.fixture
def shoot(tmp_path):
    """Keeps a picture of a page."""
    folder = Path(os.environ.get("CODA_RAY_SCREENSHOTS", tmp_path))

    def keep(page, name, **options):
        path = folder / f"{name}.png"
        page.screenshot(path=path, animations="disabled", **options)
        assert path.stat().st_size < 200_000

    return keep


def row_of(page, name):
    """The row of a run in the list."""
    return page.get_by_role("row").filter(has=page.get_by_text(name, exact=True))


def open_below(page, name):
    """Show the runs below a run."""
    row_of(page, name).get_by_role("button").first.click()


def show_columns(page, *names):
    """Choose what the list shows beside the names."""
    page.get_by_role("button", name="Columns").click()
    for name in ("Dataset", "Source", "Models", *names):
        page.get_by_role("textbox", name="Search columns").fill(name)
        found = page.locator("[class*=tree-treenode]").filter(has_text=re.compile(f"^{name}$"))
        found.locator("[class*=tree-checkbox]").first.click()
    page.keyboard.press("Escape")


def test_the_experiment_lists_a_matrix_with_its_transfers(page, site, shoot):
    matrix = site.job("matrix")
    page.goto(site.runs_page())
    row_of(page, matrix["name"]).wait_for()
    row_of(page, site.job("tune")["name"]).wait_for()
    shoot(page, "mlflow_jobs", clip={"x": 0, "y": 0, "width": SIZE[0], "height": 420})
    show_columns(page, "accuracy", "macro_f1", "method", "source", "target")
    open_below(page, matrix["name"])
    record = max(site.transfers(matrix), key=lambda record: record["accuracy"])
    row = row_of(page, transfer_name(record))
    row.wait_for()
    shoot(page, "mlflow_runs")


def test_a_matrix_tells_how_it_was_made(page, site, shoot):
    matrix = site.job("matrix")
    page.set_viewport_size({"width": SIZE[0], "height": 1000})
    page.goto(site.run_page("job", matrix["key"]))
    page.get_by_text("Show more").click()
    page.get_by_text(matrix["command"]).wait_for()
    page.get_by_role("heading", name=matrix["name"]).wait_for()
    if "commit" in matrix:
        page.get_by_text(matrix["commit"][:7]).wait_for()
    for used in matrix.get("data", [])[:1]:
        page.get_by_text(f"{used['name']} ({used['fingerprint']})").first.wait_for()
    page.get_by_text("Child runs", exact=True).locator("..").get_by_role("link").first.wait_for()
    shoot(page, "mlflow_job")
    assert "AWS" not in page.content()


def test_two_transfers_are_compared(page, site, shoot):
    matrix = site.job("matrix")
    across = [record for record in site.transfers(matrix) if record["source"] != record["target"]]
    (target, seed) = across[-1]["target"], across[-1]["seed"]
    chosen = [r for r in across if (r["target"], r["seed"]) == (target, seed) and r["method"] in ("supervised", "coda")]
    assert len(chosen) == 2
    page.goto(site.runs_page())
    open_below(page, matrix["name"])
    for record in chosen:
        row_of(page, transfer_name(record)).get_by_role("checkbox").first.check()
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("heading", name="Comparing 2 Runs").wait_for()
    for record in chosen:
        page.get_by_text(transfer_name(record)).first.wait_for()
        page.get_by_text(f"{record['accuracy']:.3g}").first.wait_for()
    page.get_by_text("Visualizations").click()
    page.get_by_role("link", name="accuracy", exact=True).wait_for()
    page.set_viewport_size({"width": SIZE[0], "height": 1300})
    shoot(page, "mlflow_compare")


def test_parallel_coordinates_and_scatter_plots_show_the_trials(page, site, shoot):
    sweep = site.job("tune")
    trials = site.trials(sweep)
    page.goto(site.runs_page("tags.kind%20%3D%20'trial'"))
    open_below(page, sweep["name"])
    for record in trials:
        row_of(page, trial_name(record)).get_by_role("checkbox").first.check()
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("heading", name=f"Comparing {len(trials)} Runs").wait_for()
    plot = page.locator(".js-plotly-plot").filter(has=page.locator(".axis-title"))
    plot.wait_for()
    axes = {text.strip() for text in plot.locator(".axis-title").all_text_contents()}
    assert {*sweep["config"]["tune"]["space"], "score"} <= axes
    shoot(page, "mlflow_sweep")
    page.get_by_role("tab", name="Scatter Plot").click()
    scattered = page.locator(".js-plotly-plot").filter(has=page.locator(".xtitle", has_text="adapt.lr"))
    scattered.wait_for()
    shown = scattered.evaluate("plot => plot.data.flatMap(points => [...points.x])")
    assert sorted(map(float, shown)) == sorted(record["point"]["adapt.lr"] for record in trials)


def test_the_heat_map_opens_as_a_picture(page, site, shoot):
    matrix = site.job("matrix")
    page.goto(site.run_page("job", matrix["key"], "/artifacts"))
    page.get_by_text("matrix-accuracy-source.png").first.click()
    picture = page.locator("img[src^='blob:'], img[src*='matrix-accuracy-source.png']").first
    picture.wait_for()
    page.wait_for_function("picture => picture.complete && picture.naturalWidth > 300", arg=picture.element_handle())
    shoot(page, "mlflow_heatmap")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    long = {"key": "k", "name": "matrix", "command": f"python jobs/matrix.py --results.address s3://{'lab' * 40}"}
    found = findings(invented_results(folder / "results"), job=long, remedy=long["command"], unfinished=["adapt coda A to B"])
    for name, content in report_files(found).items():
        (folder / name).write_bytes(content)
    return folder / PAGE


@pytest.mark.parametrize(("width", "name"), [(1280, "report"), (390, "report_phone")])
def test_the_report_opens_from_its_file_whole_and_fits(browser, report, shoot, width, name):
    with page_of(browser, width, 844, reduced_motion="reduce") as page:
        page.goto(report.as_uri())
        pictures = page.evaluate("Promise.all([...document.images].map(p => p.decode().then(() => p.naturalWidth)))")
        assert len(pictures) >= 5
        assert min(pictures) > 100
        tables = page.locator("table")
        assert tables.count() >= 5
        assert "50.5 ± 0.7" in page.locator("#table-2-accuracy-source").inner_text()
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert [address for address in page.asked if not re.match("file:|data:", address)] == []
        assert page.complaints == []
        page.screenshot(path=Path(os.environ.get("CODA_RAY_SCREENSHOTS", report.parent)) / f"{name}.png", full_page=True)
