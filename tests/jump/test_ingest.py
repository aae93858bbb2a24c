import json
import re
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tifffile
from skimage.transform import downscale_local_mean

from coda_ray.config import CHANNELS, Config, Place
from coda_ray.jump import prepare
from coda_ray.jump.ingest import _SITE_SCHEMA, IngestError, IngestSummary, _Plate, _Run, _SiteRenderer, _Work, run_ingest
from coda_ray.jump.layout import PlateName
from coda_ray.jump.plates import PlateFacts
from coda_ray.jump.simulate.serve import serve_folder
from coda_ray.jump.tables import ANNOTATIONS, read_tables
from coda_ray.storage import open_place
from coda_ray.tiles.store import TileStore, read_tiles
from real_images import real_list
from simulated import KEY, write_tiny

pytestmark = pytest.mark.slow
UNIT = ["Metadata_Source", "Metadata_Batch", "Metadata_Plate", "Metadata_Well", "Metadata_Site"]


@pytest.fixture(scope="session")
def broken_bucket(ray_cluster, tmp_path_factory):
    """The tiny bucket with one defect of each kind."""
    return write_tiny(tmp_path_factory.mktemp("broken") / "bucket", defects=True)


def config_of(bucket, tiles, metadata=None, **ingest):
    place = bucket if isinstance(bucket, Place) else Place(address=str(bucket))
    metadata = metadata or place.model_copy(update={"address": f"{place.address}/metadata"})
    tiles = tiles if isinstance(tiles, Place) else Place(address=str(tiles))
    return Config(bucket=place, metadata=metadata, tiles=tiles, ingest={"plate_sample": 4, "tiles_per_shard": 3, **ingest})


def ingest(config, report=lambda progress: None):
    return run_ingest(config, report)


def store_of(config):
    return TileStore.open(open_place(config.tiles), prepare.preparation_of(config))


def tables_of(config, name="index"):
    """All rows of one table of the store, in the order of wells."""
    store = store_of(config)
    frames = [pd.read_parquet(f"{store.folder.root}/{plate}/{name}.parquet") for plate in store.plates()]
    return pd.concat(frames, ignore_index=True).sort_values(UNIT, ignore_index=True)


def notes_of(config):
    store = store_of(config)
    return {plate: json.loads(store.folder.read(f"{plate}/plate.json"))["notes"] for plate in store.plates()}


def test_each_planted_defect_is_found_and_nothing_else(broken_bucket, tmp_path):
    config = config_of(broken_bucket, tmp_path / "tiles", channels=list(CHANNELS), max_bad_share=0.5)
    summary = ingest(config)
    planted = {defect["kind"]: defect for defect in json.loads((broken_bucket / "defects.json").read_text())}
    reasons = {
        "zero_filled": "file is empty or zero-filled",
        "truncated": "TIFF is truncated or damaged",
        "missing_file": "file is missing",
        "duplicate_rows": "site is listed more than once; the first row was taken",
    }
    quarantine = tables_of(config, "quarantine")
    found = quarantine[["Metadata_Plate", "Metadata_Well", "Metadata_Site", "channel", "reason"]].fillna("")
    expected = [
        (d["plate"], d["well"], d["site"], "" if kind == "duplicate_rows" else d["channel"], reason)
        for kind, reason in reasons.items()
        for d in [planted[kind]]
    ]
    assert sorted(found.itertuples(index=False, name=None)) == sorted(expected)
    assert summary.quarantined == dict.fromkeys(reasons.values(), 1)
    for kind in ("zero_filled", "truncated", "missing_file"):
        (address,) = quarantine.loc[quarantine["reason"] == reasons[kind], "address"]
        assert address == planted[kind]["address"].replace("s3://cellpainting-gallery", str(broken_bucket))
    notes = {plate.rsplit("/")[-1]: found for plate, found in notes_of(config).items() if found}
    wrong, none = planted["wrong_illumination_name"], planted["no_illumination"]
    assert set(notes) == {planted[k]["plate"] for k in ("well_not_listed", "partial_plate", "recorded_as_dmso")} | {
        wrong["plate"],
        none["plate"],
    }
    assert planted["well_not_listed"]["well"] in notes[planted["well_not_listed"]["plate"]][0]
    assert "wells are not in the image list" in notes[planted["partial_plate"]["plate"]][0]
    assert planted["recorded_as_dmso"]["well"] in notes[planted["recorded_as_dmso"]["plate"]][0]
    assert [n for n in notes[wrong["plate"]] if n.startswith(f"{wrong['channel']}: illumination file is missing")]
    assert any(n.startswith(f"illumination estimated: {wrong['channel']} from ") for n in notes[wrong["plate"]])
    (estimated,) = [n for n in notes[none["plate"]] if n.startswith("illumination estimated: ")]
    assert [part.split()[0] for part in estimated.split(": ")[1].split(", ")] == list(CHANNELS)
    index = tables_of(config)
    assert planted["digit_plate_name"]["plate"] in set(index["Metadata_Plate"])
    planted_dmso = planted["recorded_as_dmso"]
    (dmso,) = index[
        (index["Metadata_Plate"] == planted_dmso["plate"]) & (index["Metadata_Well"] == planted_dmso["well"])
    ].itertuples()
    assert dmso.Metadata_Control == "negcon"
    assert pd.isna(dmso.Metadata_MoA)
    assert len(index) == summary.tiles


def test_one_plate_per_lab_with_unknown_compounds_and_unbalanced_classes(ray_cluster, tmp_path):
    shape = {"batches_per_source": 1, "field_px": 64, "unknown_moas": 1, "unknown_only_in": ["sim_b"]}
    bucket = write_tiny(tmp_path / "bucket", **shape, imbalance=2.0, imbalance_by_source=True)
    config = config_of(bucket, tmp_path / "tiles")
    summary = ingest(config)
    record = json.loads((bucket / "simulation.json").read_text())
    (secret,) = record["unknown_moas"].values()
    unknown = {compound["jcp2022"] for compound in secret["compounds"].values()}
    index = tables_of(config)
    assert len(index) == summary.tiles
    assert not any(notes_of(config).values())
    for source, here in index.groupby("Metadata_Source"):
        assert here["Metadata_Plate"].nunique() == here["Metadata_Batch"].nunique() == 1
        held = record["sources"][source]["moa_wells"]
        assert here["Metadata_MoA"].value_counts().to_dict() == {moa: held[moa] for moa in record["moas"]}
        nameless = here[here["Metadata_MoA"].isna() & here["Metadata_Control"].isna()]
        assert set(nameless["Metadata_JCP2022"]) == (unknown if source == "sim_b" else set())


def test_tiles_hold_what_a_slow_preparation_gives(tiny_bucket, tmp_path):
    """Supplied illumination, both layouts: pixels against the steps one by one, read by paths written out by hand."""
    bucket = tiny_bucket.folder
    config = config_of(bucket, tmp_path / "tiles", sources=["sim_a"], plate_sample=1000)
    ingest(config)
    index = store_of(config).index(["sim_a"])
    plate, rows = next(iter(index.frame.groupby("Metadata_Plate")))
    (path,) = bucket.glob(f"cpg0016-jump/sim_a/workspace/load_data_csv/*/{plate}/load_data_with_illum.csv")
    listed = pd.read_csv(path, dtype="str")
    here = listed.map(lambda cell: str(cell).replace("s3://cellpainting-gallery", str(bucket)))

    for c, channel in enumerate(config.ingest.channels):
        corrected = []
        for row in here.to_dict("records"):
            function = np.load(row[f"URL_Illum{channel}"])
            raw = tifffile.imread(row[f"URL_Orig{channel}"]) / (function / function.mean())
            corrected.append(prepare.resize(raw.astype(np.float32), (48, 48)))
            assert np.corrcoef(corrected[-1].ravel(), downscale_local_mean(raw, (2, 2)).ravel())[0, 1] > 0.98
        cap = np.percentile(np.concatenate([image.ravel() for image in corrected]), 99.99)
        for row, image in zip(here.to_dict("records"), corrected, strict=True):
            low, high = np.percentile(image, [0.05, 99.95])
            expected = np.clip((image - low) / (min(high, cap) - low), 0, 1) * 255
            number = rows.index[rows["Metadata_Well"] == row["Metadata_Well"]].to_numpy()
            (tile,) = read_tiles(index, number, 48)
            assert np.abs(tile[c] - expected).max() <= 0.51
    assert rows["pixel_size_um"].nunique() == 1
    scope = pd.read_csv(bucket / "metadata" / "microscope_config.csv").set_index("Metadata_Source")
    assert rows["pixel_size_um"].iloc[0] == pytest.approx(scope.loc["sim_a", "Metadata_Pixel_Size_Microns"] * 2, rel=1e-5)


def test_a_second_run_does_nothing_and_reads_no_image(tiny_bucket, tmp_path):
    bucket = shutil.copytree(tiny_bucket.folder, tmp_path / "bucket")
    config = config_of(bucket, tmp_path / "tiles")
    first = ingest(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiles").rglob("*") if path.is_file()}
    shutil.rmtree(bucket / "cpg0016-jump")
    second = ingest(config)
    assert (first.plates, first.plates_before, second.plates, second.plates_before) == (9, 0, 0, 9)
    assert "nothing to do: 9 plates are in" in second.text()
    assert "left out" not in second.text()
    assert second.bytes_read == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "tiles").rglob("*") if path.is_file()}


def test_tables_that_come_later_annotate_finished_plates_without_their_images(tiny_bucket, tmp_path):
    bucket = shutil.copytree(tiny_bucket.folder, tmp_path / "bucket")
    late = shutil.copytree(bucket / "metadata", tmp_path / "late")
    config, whole = config_of(bucket, tmp_path / "tiles"), config_of(tiny_bucket.folder, tmp_path / "whole")
    tables = [bucket / "metadata" / name for name in ("compound_platemap.tsv", "well.csv.gz", "perturbation_control.csv")]
    for table in tables:
        table.unlink()
    ingest(config)
    assert tables_of(config)[list(ANNOTATIONS)].isna().to_numpy().all()
    shutil.rmtree(bucket / "cpg0016-jump")
    shutil.copytree(late, bucket / "metadata", dirs_exist_ok=True)
    summary = ingest(config)
    assert (summary.plates, summary.plates_before, summary.annotated, summary.bytes_read) == (0, 9, 9, 0)
    assert summary.text().startswith("no image to read: 9 plates are in")
    assert "9 finished plates were annotated anew" in summary.text()
    ingest(whole)
    pd.testing.assert_frame_equal(tables_of(config), tables_of(whole))
    # Tables that are not at hand take nothing away.
    for table in tables:
        table.unlink()
    assert ingest(config).annotated == 0
    pd.testing.assert_frame_equal(tables_of(config), tables_of(whole))


def test_labels_that_are_added_to_a_list_of_ones_own_reach_finished_plates(ray_cluster, tmp_path):
    path = real_list(tmp_path / "list.csv")
    config = config_of(tmp_path, tmp_path / "tiles", image_list=str(path), channels=["DNA"])
    ingest(config)
    listed = pd.read_csv(path).assign(Metadata_MoA="kinase inhibitor")
    listed.loc[0, "Metadata_MoA"] = None
    listed.to_csv(path, index=False)
    assert ingest(config).annotated == len(listed) - 1
    labels = tables_of(config).set_index("Metadata_Plate")["Metadata_MoA"]
    assert labels.isna().sum() == 1
    assert set(labels.dropna()) == {"kinase inhibitor"}


def test_a_run_that_died_resumes_and_ends_alike(tiny_bucket, tmp_path):
    class DriverDiedError(Exception):
        pass

    def die_after_two_plates(progress):
        if progress.plates_done >= 2:
            raise DriverDiedError

    bucket = shutil.copytree(tiny_bucket.folder, tmp_path / "bucket")
    whole, broken = config_of(bucket, tmp_path / "whole"), config_of(bucket, tmp_path / "broken")
    ingest(whole)
    with pytest.raises(DriverDiedError):
        ingest(broken, die_after_two_plates)
    done = store_of(broken).plates()
    assert 2 <= len(done) < 9
    for plate in done:
        # What is finished is not read again.
        shutil.rmtree(
            bucket / "cpg0016-jump" / plate.split("/")[0] / "images" / plate.split("/")[1] / "illum" / plate.split("/")[2]
        )
    second = ingest(broken)
    assert (second.plates, second.plates_before) == (9 - len(done), len(done))
    pd.testing.assert_frame_equal(tables_of(broken), tables_of(whole))


def test_too_much_broken_stops_with_the_worst_reasons(tiny_bucket, tmp_path):
    bucket = shutil.copytree(tiny_bucket.folder, tmp_path / "bucket")
    images = sorted((bucket / "cpg0016-jump" / "sim_a").rglob("*.tiff"))
    for path in images:
        path.write_bytes(b"no image")
    with pytest.raises(IngestError) as caught:
        ingest(config_of(bucket, tmp_path / "tiles", sources=["sim_a"]))
    assert "max_bad_share = 0.05" in str(caught.value)
    assert f"file is not a TIFF, as {bucket}/" in str(caught.value)
    store = store_of(config_of(bucket, tmp_path / "tiles", sources=["sim_a"]))
    (path,) = re.findall(r"the sites are in (\S+?/quarantine\.parquet)", str(caught.value))
    assert pd.read_parquet(path)["reason"].eq("file is not a TIFF").all()
    assert store.plates() == []
    accepted = ingest(config_of(bucket, tmp_path / "tiles", sources=["sim_a"], max_bad_share=1.0))
    assert accepted.quarantined == {"file is not a TIFF": 24}
    assert accepted.tiles == 0


def test_folder_s3_and_s3_with_keys_give_identical_tiles(tiny_bucket, tmp_path):
    folder = config_of(tiny_bucket.folder, tmp_path / "one", sources=["sim_c"])
    anonymous = config_of(tiny_bucket.place, tmp_path / "two", sources=["sim_c"])
    assert ingest(folder).tiles == ingest(anonymous).tiles == 24
    (tmp_path / "three").mkdir()
    with serve_folder(tmp_path, key=KEY) as writable, serve_folder(tiny_bucket.folder.parent, key=KEY, read_only=True) as signed:
        source = Place(address=f"s3://{tiny_bucket.folder.name}", endpoint_url=signed)
        keyed = config_of(source, Place(address="s3://three/deep", endpoint_url=writable), sources=["sim_c"])
        ingest(keyed)
    local = config_of(tiny_bucket.folder, tmp_path / "three" / "deep", sources=["sim_c"])
    expected = tables_of(folder)
    for other in (anonymous, local):
        pd.testing.assert_frame_equal(tables_of(other), expected)


def test_a_refused_request_stops_the_run_and_quarantines_nothing(tiny_bucket, tmp_path):
    """The lists are readable, the images are not: that is no broken image."""
    bucket = shutil.copytree(tiny_bucket.folder, tmp_path / "bucket")
    victim = sorted((bucket / "cpg0016-jump" / "sim_a").rglob("*.tiff"))[0]
    victim.unlink()
    victim.symlink_to(victim)
    config = config_of(bucket, tmp_path / "tiles", sources=["sim_a"], channels=list(CHANNELS))
    with pytest.raises(IngestError) as caught:
        ingest(config)
    assert f"{victim}: gave up after 5 attempts" in str(caught.value)
    assert "run the ingest again" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(victim.parent.parent.name) not in " ".join(store_of(config).plates())


def test_one_physical_pixel_size_for_all(tiny_bucket, tmp_path):
    config = config_of(tiny_bucket.folder, tmp_path / "tiles", pixel_size_um=1.5)
    ingest(config)
    index = tables_of(config)
    assert index["pixel_size_um"].between(1.45, 1.55).all()
    assert index.groupby("Metadata_Source")["height"].nunique().eq(1).all()
    assert index["height"].nunique() > 1
    shutil.copytree(tiny_bucket.folder / "metadata", tmp_path / "metadata")
    (tmp_path / "metadata" / "microscope_config.csv").unlink()
    lacking = config_of(tiny_bucket.folder, tmp_path / "t2", Place(address=str(tmp_path / "metadata")), pixel_size_um=1.5)
    with pytest.raises(IngestError, match=r"pixel_size_um = 1.5.*'sim_a'"):
        ingest(lacking)
    table = "Metadata_Source,Metadata_Pixel_Size_Microns\nsim_a,0,5\n".replace("0,5", '"0,5"')
    (tmp_path / "metadata" / "microscope_config.csv").write_text(table)
    with pytest.raises(ValueError, match=r"microscope_config\.csv: sim_a: Metadata_Pixel_Size_Microns = '0,5' is no size"):
        read_tables(open_place(lacking.metadata))


def test_plates_without_a_list_are_noted(tiny_bucket, tmp_path):
    bucket = shutil.copytree(tiny_bucket.folder, tmp_path / "bucket")
    shutil.rmtree(bucket / "cpg0016-jump" / "sim_b" / "workspace")
    (broken,) = list((bucket / "cpg0016-jump" / "sim_c" / "workspace").rglob("*.gz"))[:1]
    broken.write_bytes(b"no list")
    with pytest.raises(IngestError, match="no image list was found"):
        ingest(config_of(bucket, tmp_path / "tiles", sources=["sim_b"]))
    summary = ingest(config_of(bucket, tmp_path / "tiles", sources=["sim_b", "sim_c"]))
    assert summary.plates == 2
    assert summary.left_out == 4
    assert "4 chosen plates were left out" in summary.text()
    assert sum("no image list in the bucket; left out" in note for note in summary.notes) == 3
    assert sum(f"{broken}: not an image list" in note for note in summary.notes) == 1


@pytest.mark.parametrize("channels", [["DNA", "RNA", "AGP"], ["DNA", "ER", "Mito"]])
def test_real_fields_through_a_hand_made_list(ray_cluster, tmp_path, channels):
    path = real_list(tmp_path / "list.csv")
    config = config_of(
        tmp_path, tmp_path / "tiles", Place(address=str(tmp_path)), image_list=str(path), channels=channels, max_bad_share=1.0
    )
    summary = ingest(config)
    listed = pd.read_csv(path, dtype="str")
    if "ER" in channels:
        (row,) = tables_of(config, "quarantine").itertuples()
        assert (row.channel, row.reason) == ("ER", "channel ER is not listed")
        assert row.Metadata_Plate == "jump_cpg0000_pilot_BR00117006"
        listed = listed[listed["Metadata_Plate"] != row.Metadata_Plate]
    assert summary.tiles == len(listed)
    index = store_of(config).index(sorted(listed["Metadata_Source"].unique()))
    assert index.frame[["height", "width"]].eq(540).all(axis=None)
    assert index.frame["Metadata_MoA"].isna().all()
    assert sum(note.count(" from 1 sites") for note in summary.notes) == len(channels) * len(listed)
    for row in listed.to_dict("records"):
        (tile,) = read_tiles(index, np.flatnonzero(index.frame["Metadata_Plate"] == row["Metadata_Plate"]), 540)
        for c, channel in enumerate(channels):
            raw = tifffile.imread(row[f"URL_Orig{channel}"])
            corrected = prepare.correct(raw, prepare.estimate_illumination([raw]), (540, 540))
            assert (tile[c] == prepare.stretch(corrected, (0.05, 99.95), np.percentile(corrected, 99.99))).all()


def test_a_list_of_ones_own_must_name_source_batch_and_plate(ray_cluster, tmp_path):
    path = real_list(tmp_path / "list.csv")
    pd.read_csv(path).drop(columns="Metadata_Batch").to_csv(path, index=False)
    with pytest.raises(IngestError, match="column Metadata_Batch is missing"):
        ingest(config_of(tmp_path, tmp_path / "tiles", image_list=str(path)))
    with pytest.raises(IngestError, match=r"image_list = .*there is no such file"):
        ingest(config_of(tmp_path, tmp_path / "tiles", image_list=str(tmp_path / "none.csv")))


def test_a_source_that_reads_as_a_pool_is_refused(tmp_path):
    path = real_list(tmp_path / "list.csv")
    pd.read_csv(path).assign(Metadata_Source="a+b").to_csv(path, index=False)
    with pytest.raises(IngestError, match=r"Metadata_Source = 'a\+b': \+ stands between the labs of a pool.*rename the source"):
        ingest(config_of(tmp_path, tmp_path / "tiles", image_list=str(path)))


def test_nothing_to_do_tells_of_plates_left_out():
    summary = IngestSummary("here", 0, 5, 0, 2, 0, {}, 0, 1.0, ("s/b/p: no image list in the bucket; left out",))
    assert summary.text().splitlines()[:2] == [
        "nothing to do: 5 plates are in here",
        "2 chosen plates were left out: no image list of theirs can be read",
    ]


def test_an_image_of_a_channel_without_measured_brightness_is_set_aside_with_the_reason(tmp_path):
    config = config_of(tmp_path, tmp_path / "tiles", channels=["DNA"])
    tifffile.imwrite(tmp_path / "a.tiff", np.arange(64, dtype=np.uint16).reshape(8, 8))
    work = _Work([], open_place(config.bucket), store_of(config), config.ingest, {})
    site = _SiteRenderer(PlateName("s", "b", "p"), PlateFacts(shape=(8, 8)), work)
    rendered = site.render({"Orig_DNA": str(tmp_path / "a.tiff")})
    assert rendered.tile is None
    assert (rendered.channel, rendered.reason) == (
        "DNA", "no sampled image of channel DNA has its plate's shape, so its brightness is unknown"
    )  # fmt: skip


def test_a_stopped_run_gives_examples_and_keeps_the_quarantine_of_unfinished_plates(tmp_path):
    names = [PlateName("s", "b", plate) for plate in ("p0", "p1")]
    plates = [_Plate(name, pd.DataFrame(), [], missing=30) for name in names]
    store = TileStore.open(open_place(Place(address=str(tmp_path))), {"channels": ["DNA"]})
    rows = [
        {**dict(zip(UNIT, (*name, "A01", str(site)), strict=True)), "plate_number": number, "bytes_read": 0,
         "reason": "file is empty" if site % 2 else "channel DNA is not listed",
         "address": f"at/{site}.tiff" if site % 2 else None}
        for number, name in enumerate(names) for site in range(10)
    ]  # fmt: skip
    run = _Run(plates, store, 0.05, [], lambda progress: None)
    with pytest.raises(IngestError) as caught:
        run.take(pa.Table.from_pylist(rows, schema=_SITE_SCHEMA))
    text = str(caught.value)
    assert "10 × file is empty, as at/1.tiff" in text
    assert "10 × channel DNA is not listed, as s/b/p0/A01/0" in text
    (path,) = re.findall(r"the sites are in (\S+) and 1 like it", text)
    kept = pd.read_parquet(path)
    assert len(kept) == 10
    assert set(kept["address"].dropna()) == {f"at/{site}.tiff" for site in range(1, 10, 2)}
    assert store.plates() == []
