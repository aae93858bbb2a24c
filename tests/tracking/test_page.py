import base64
import io
import re

import numpy as np
import pandas as pd
import pytest

from coda_ray.tracking.page import PAGE, report_files
from invented import Page, findings


@pytest.fixture
def written(results):
    return report_files(findings(results))


def test_the_page_is_whole_and_needs_nothing_else(written):
    text = written[PAGE].decode()
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|<script|//[a-z]", re.sub(r"base64,[^\"]*", "", text))
    pictures = [address for address in page.addresses if address.startswith("data:image/png;base64,")]
    files = {name for name in written if name.endswith(".png")}
    assert {base64.b64decode(picture.partition(",")[2]) for picture in pictures} == {written[name] for name in files}
    linked = {address for address in page.addresses if not address.startswith(("data:", "#"))}
    assert linked == set(written) - {PAGE}


def test_every_table_and_figure_is_there(written):
    page = Page(written[PAGE].decode())
    for name in ("data", "table-2-accuracy-source", "table-4-macro-f1-source", "table-2-well-accuracy-source", "feature-scores"):
        assert name in page.tables
    for name in ("differences-source", "figure-3-examples", "figure-7-bars-source", "figure-5-map-A-B", "figure-6-layers-own"):
        assert name in page.names
        assert f"{name}.svg" in written


def test_the_numbers_are_those_of_the_transfers(written, results):
    page, frame = Page(written[PAGE].decode()), findings(results).transfers
    table = page.tables["table-2-accuracy-source"]
    assert table[0] == ["source → target", "supervised", "coda"]
    rows = {row[0]: row[1:] for row in table[1:]}
    for target in "BC":
        scores = frame[(frame["target"] == target) & (frame["method"] == "coda")]["accuracy"]
        assert rows[f"A → {target}"][1] == f"{100 * scores.mean():.1f} ± {100 * scores.std():.1f}"
    exact = pd.read_csv(io.BytesIO(written["table-2-accuracy-source.csv"]))
    assert exact[(exact["target"] == "B") & (exact["method"] == "coda")]["mean"].item() == scores.mean()
    assert page.tables["differences-table-source"][1] == ["coda − supervised", "B", "+30.0", "+20.0 to +40.0", "100", "10", "2"]


def test_text_is_escaped(results):
    unfinished = ["adapt <script>alert(1)</script> & co"]
    text = report_files(findings(results, unfinished=unfinished, notes=["<i>why</i>"]))[PAGE].decode()
    assert "<script" not in text
    assert "<b>" not in text
    assert "<i>" not in text
    page = Page(text)
    assert "matrix A → <b>B</b>, C" in "".join(page.text)
    assert unfinished[0] in page.text
    assert "<i>why</i>" in page.text
    assert "unfinished" in page.names


def test_what_is_finished_is_not_called_missing(written):
    page = Page(written[PAGE].decode())
    assert "unfinished" not in page.names
    assert "notes" not in page.names


def test_a_matrix_without_any_score_has_a_page(results):
    found = findings(
        results,
        transfers=findings(results).transfers.iloc[:0], matrix=pd.DataFrame(), maps=[], layers=[], examples=[],
        differences=findings(results).differences.iloc[:0], unfinished=["pretrain"],
    )  # fmt: skip
    page = Page(report_files(found)[PAGE].decode())
    assert set(page.tables) == {"data"}
    assert "unfinished" in page.names


def test_the_same_findings_give_the_same_bytes(results):
    assert report_files(findings(results)) == report_files(findings(results))


def test_missing_scores_are_dashes(results):
    found = findings(results)
    without = found.transfers.assign(ilisi=np.nan)
    page = Page(report_files(findings(results, transfers=without))[PAGE].decode())
    header, *rows = page.tables["feature-scores"]
    assert {row[header.index("batches mix (iLISI)")] for row in rows} == {"–"}
    assert {row[header.index("batches mix (kBET)")] for row in rows} == {"0.300 ± 0.000"}
