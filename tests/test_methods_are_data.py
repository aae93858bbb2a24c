"""The table of methods: what every row must say, what a new one may not forget, and the keys that do not move."""

import hashlib
import re
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest

from coda_ray.config import Config, Estimate
from coda_ray.jump.prepare import preparation_of
from coda_ray.jump.tables import CONTROL
from coda_ray.methods import ADAPTING, NAMES, PER_UNIT, ROWS, SECTIONS, UNADAPTED, Loss, model_with, row_of, trained_by
from coda_ray.pipeline.methods.plans import TRAINED, TREATED
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.transfer import plan, stages_of
from coda_ray.storage import open_place
from coda_ray.tiles.store import COMPOUND, LABEL, TileStore
from coda_ray.tracking.report_figures import NAMED
from synthetic import small_config

ROOT = Path(__file__).resolve().parents[1]
by_name = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
# Hash of the kinds and keys of all stages that a method needs, in their order: finished results stay what they are.
KEYS = {
    ("supervised", "source"): "d7eead2ea7ec348e",
    ("supervised", "batch"): "d7eead2ea7ec348e",
    ("dual-mae", "source"): "89031e0ee61bdc09",
    ("dual-mae", "batch"): "89031e0ee61bdc09",
    ("dual-dino", "source"): "239dee8980c7d2b3",
    ("dual-dino", "batch"): "239dee8980c7d2b3",
    ("dual-cb", "source"): "b4083483c6dfb2f4",
    ("dual-cb", "batch"): "b4083483c6dfb2f4",
    ("ttt", "source"): "272a21271dbe429a",
    ("ttt", "batch"): "272a21271dbe429a",
    ("oda-mae", "source"): "3a2456e3c5b72ebe",
    ("oda-mae", "batch"): "914a64ba00b2c86c",
    ("oda", "source"): "ed8c5ce2f13adfa9",
    ("oda", "batch"): "d331e6684d93104d",
    ("coda", "source"): "72f8f3648c7bfe6d",
    ("coda", "batch"): "ffcb9baab5379fbd",
    ("probe", "source"): "f986dbbde6b5ceec",
    ("probe", "batch"): "f986dbbde6b5ceec",
    ("standardise", "source"): "c6256cf003a4c49f",
    ("standardise", "batch"): "c6256cf003a4c49f",
    ("sphering", "source"): "244c4f8a3a5ddd35",
    ("sphering", "batch"): "b14aa2bbb43ca767",
    ("coral", "source"): "b1575bee7640bca7",
    ("coral", "batch"): "de1426dc54fc941f",
    ("harmony", "source"): "eceda5dc90715486",
    ("harmony", "batch"): "fd5aa200bf1ac51d",
    ("tent", "source"): "a1cf7dafcbaa0746",
    ("tent", "batch"): "26fa7693ada58aeb",
}


def write_rows(config, source):
    """Index rows of tiles that nobody reads: the same everywhere."""
    store = TileStore.open(open_place(config.tiles), preparation_of(config))
    for batch in range(2):
        for number in range(2):
            plate = f"{source}b{batch}p{number}"
            path = store.plate_path(source, f"b{batch}", plate)
            rows = [
                {
                    "Metadata_Source": source, "Metadata_Batch": f"b{batch}", "Metadata_Plate": plate,
                    "Metadata_Well": f"A{well:02d}", "Metadata_Site": "1",
                    COMPOUND: f"c{well}" if well < 6 else "DMSO", CONTROL: None if well < 6 else "negcon",
                    LABEL: f"moa {well // 2}" if well < 6 else None,
                    "shard": f"{path}/shard-00000.npy", "row": well, "offset": 128 + 2048 * well, "height": 32, "width": 32,
                    "crc32": 100 * batch + 10 * number + well,
                }
                for well in range(7)
            ]  # fmt: skip
            store.finish_plate(path, pd.DataFrame(rows), pd.DataFrame(), {})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("methods"), evaluate={"minibatch": 16, "profiles": True})
    for source in "ab":
        write_rows(config, source)
    return config


@pytest.mark.parametrize(("method", "granularity"), KEYS)
def test_keys_of_stages_stay_as_they_are(config, method, granularity):
    stages = stages_of(plan(config, Request("a", "b", method, granularity, 0)))
    told = " ".join(f"{stage.kind} {stage.key}" for stage in stages)
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == KEYS[method, granularity]


def test_sphering_as_it_was_has_the_results_that_it_had(config):
    settings = {"sphering": "apart", "zscore": "none", "sphering_epsilon": 0.01}
    before = config.model_copy(update={"baselines": config.baselines.model_copy(update=settings)})
    stages = stages_of(plan(before, Request("a", "b", "sphering", "source", 0)))
    told = " ".join(f"{stage.kind} {stage.key}" for stage in stages)
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "3d5e49a36849af1b"


@by_name
def test_a_row_is_whole(row):
    assert row.style.colour in NAMED, f"{row.name}: style.colour"
    assert row.unadapted or row.name in {**TRAINED, **TREATED}, f"{row.name}: has no line in pipeline/methods/plans.py"
    assert (row.name in TRAINED) == bool(row.trains), f"{row.name}: trains"
    assert row.model in (*UNADAPTED, None), f"{row.name}: model"
    assert set(row.rivals) <= set(NAMES) - {row.name}, f"{row.name}: rivals"
    assert row.section is None or row.section in Config.model_fields, f"{row.name}: section {row.section} is not in config.py"
    if row.trains:
        for field in ("objective", "section", "rate", "card"):
            assert getattr(row, field), f"{row.name}: {field}"
        assert f"{row.rate}_per_s" in Estimate.model_fields, f"{row.name}: estimate.{row.rate}_per_s is not in config.py"
        assert trained_by(row.objective) is row, f"{row.name}: another method has its objective"
        assert row.name in PER_UNIT, f"{row.name}: per_unit"
        assert row.section in SECTIONS
    if row.unadapted:
        assert row.card, f"{row.name}: card"
        assert model_with(row.loss) is row, f"{row.name}: another model has its loss"


@by_name
def test_a_reader_finds_every_method(row):
    named = re.search(rf"`{re.escape(row.name)}`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert named, f"{row.name}: README.md does not say what it is"


def test_rows_differ():
    assert len(set(NAMES)) == len(ROWS)
    assert {row.loss for row in ROWS if row.unadapted} == {*get_args(Loss), None}
    assert {row_of(name).trains for name in ADAPTING} == {"extractor"}


def test_no_other_module_asks_for_a_name():
    """A name of a method in quotes elsewhere is a second place that a new row would have to touch."""
    allowed = {"methods.py", "pipeline/methods/plans.py", "tracking/report_tables.py", "tracking/published.py", "config.py"}
    names = "|".join(re.escape(name) for name in NAMES)
    for file in (ROOT / "coda_ray").rglob("*.py"):
        if str(file.relative_to(ROOT / "coda_ray")) in allowed or "pipeline/methods" in str(file):
            continue
        found = re.findall(rf'method\)? (?:[=!]=|in|not in) \(?"(?:{names})"', file.read_text(encoding="utf-8"))
        assert not found, f"{file.relative_to(ROOT)}: {found}"
