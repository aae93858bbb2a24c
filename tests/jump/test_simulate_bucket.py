import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from coda_ray.config import CHANNELS, Place
from coda_ray.jump.simulate import PRESETS, SIMULATOR_VERSION, write_bucket
from coda_ray.jump.simulate.bucket import simulate_site
from coda_ray.jump.simulate.layout import draw_plates, draw_wells
from coda_ray.jump.simulate.microscope import illumination
from coda_ray.jump.simulate.world import NAMES, compound_effects, draw_batch, optics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

SMALL = PRESETS["tiny"].model_copy(update={"moas": 2, "dmso_wells": 1, "field_px": 64})
GALLERY = "s3://cellpainting-gallery"


def write(folder: Path, *, defects: bool = False) -> dict[str, str]:
    """Write a small bucket; return path → sha256 of every file."""
    seen: list[tuple[int, int]] = []
    settings = SMALL.model_copy(update={"defects": defects})
    told = write_bucket(settings, Place(address=str(folder)), lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    assert seen[-1] == (told["sites"], told["sites"])
    assert told["version"] == SIMULATOR_VERSION
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def bucket(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bucket")
    write(folder)
    return folder


def read_list(path: Path) -> pd.DataFrame:
    """Image list in either layout, with one local path per column of files."""
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str)
    for kind in ("Orig", "Illum"):
        for c in CHANNELS:
            if f"URL_{kind}{c}" not in table:
                table[f"URL_{kind}{c}"] = table[f"PathName_{kind}{c}"].str.rstrip("/") + "/" + table[f"FileName_{kind}{c}"]
    return table


def test_two_writes_give_the_same_bytes(bucket: Path, tmp_path: Path) -> None:
    first = {str(p.relative_to(bucket)): hashlib.sha256(p.read_bytes()).hexdigest() for p in bucket.rglob("*") if p.is_file()}
    assert write(tmp_path) == first


def test_every_listed_file_is_there_and_lists_hold_every_site(bucket: Path) -> None:
    lists = sorted(bucket.glob("cpg0016-jump/*/workspace/load_data_csv*/*/*/load_data_with_illum.*"))
    assert {"".join(p.suffixes) for p in lists} == {".csv", ".csv.gz", ".parquet"}
    listed = set()
    for path in lists:
        table = read_list(path)
        assert len(table) == SMALL.wells_per_plate * SMALL.sites_per_well
        for c in CHANNELS:
            listed |= set(table[f"URL_Orig{c}"])
            assert all((bucket / url.removeprefix(f"{GALLERY}/")).is_file() for url in table[f"URL_Illum{c}"])
    on_disk = {f"{GALLERY}/{p.relative_to(bucket)}" for p in bucket.rglob("*.tif*")}
    assert listed == on_disk


def test_pixels_are_those_of_the_site(bucket: Path) -> None:
    wells, effects = draw_wells(SMALL), compound_effects(SMALL)
    for plate in [p for p in draw_plates(SMALL) if p.run == 0]:
        scope, batch = optics(SMALL, plate.source), draw_batch(SMALL, plate.source, plate.batch)
        light = illumination(scope, batch, SMALL.field_px)
        well, content = list(wells.items())[-1]
        effect = effects[content] if content >= 0 else np.zeros(len(NAMES))
        expected = simulate_site(SMALL, plate, well, 0, effect, scope, batch, light)
        for k in range(len(CHANNELS)):
            with tifffile.TiffFile(bucket / plate.images / plate.image_name(well, 0, k)) as file:
                assert len(file.pages) == 1
                assert file.pages[0].dtype == np.uint16
                assert file.pages[0].compression.name == ("NONE" if plate.style == "yokogawa" else "LZW")
                assert np.array_equal(file.asarray(), expected[k])


def test_record_tells_the_world(bucket: Path) -> None:
    record = json.loads((bucket / "simulation.json").read_text())
    assert record["version"] == SIMULATOR_VERSION
    assert record["settings"]["seed"] == SMALL.seed
    assert set(record["sources"]) == set(SMALL.sources)
    plates = pd.read_csv(bucket / "metadata" / "plate.csv.gz", dtype=str)
    told = {name for s in record["sources"].values() for b in s["batches"].values() for name in b["plates"]}
    assert told == set(plates["Metadata_Plate"])
    assert len(record["moas"]) == SMALL.moas
    assert not (bucket / "defects.json").exists()


def test_a_bucket_that_is_written_again_counts_only_when_it_is_whole(tmp_path: Path) -> None:
    write(tmp_path, defects=True)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bucket(SMALL, Place(address=str(tmp_path)), stop)
    assert not (tmp_path / "simulation.json").exists()
    assert not (tmp_path / "defects.json").exists()


def test_planted_defects_are_found_where_they_are_listed(bucket: Path, tmp_path: Path) -> None:
    spoiled = write(tmp_path, defects=True)
    for d in json.loads((tmp_path / "defects.json").read_text()):
        path = d["address"].removeprefix(f"{GALLERY}/")
        if d["kind"] == "zero_filled":
            assert not any((tmp_path / path).read_bytes())
        elif d["kind"] == "truncated":
            with pytest.raises((tifffile.TiffFileError, ValueError, IndexError, RuntimeError)):
                tifffile.imread(tmp_path / path)
        elif d["kind"] == "missing_file":
            assert path not in spoiled
        elif d["kind"] == "well_not_listed":
            assert d["well"] not in set(read_list(tmp_path / path)["Metadata_Well"])
        elif d["kind"] == "duplicate_rows":
            rows = read_list(tmp_path / path)
            assert ((rows["Metadata_Well"] == d["well"]) & (rows["Metadata_Site"] == d["site"])).sum() == 2
        elif d["kind"] == "wrong_illumination_name":
            url = read_list(tmp_path / path)[f"URL_Illum{d['channel']}"][0]
            assert not (tmp_path / url.removeprefix(f"{GALLERY}/")).exists()
        elif d["kind"] == "no_illumination":
            assert not (tmp_path / path).exists()
        elif d["kind"] == "recorded_as_dmso":
            wells = pd.read_csv(tmp_path / path, dtype=str)
            row = wells[(wells["Metadata_Plate"] == d["plate"]) & (wells["Metadata_Well"] == d["well"])]
            assert list(row["Metadata_JCP2022"]) == ["JCP2022_033924"]
