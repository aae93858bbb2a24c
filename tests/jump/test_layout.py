import gzip
import io
from pathlib import Path

import pandas as pd
import pytest

from coda_ray.config import CHANNELS, Place
from coda_ray.jump.layout import PlateName, find_image_list, map_address, parse_image_list
from coda_ray.storage import open_place

METADATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "jump-metadata"
GALLERY = "s3://cellpainting-gallery"


def real(name):
    path = METADATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path.read_bytes()


def rows():
    return pd.DataFrame(
        {
            "Metadata_Source": "source_7",
            "Metadata_Batch": "b 1",
            "Metadata_Plate": ["0012345", "0012345"],
            "Metadata_Well": ["A01", "A02"],
            "Metadata_Site": ["0", "1"],
            "URL_OrigDNA": [f"{GALLERY}/x/Measurement 1/01.tiff", f"{GALLERY}/x/Measurement 1/02.tiff"],
            "URL_OrigER": [f"{GALLERY}/x/03.tiff", None],
            "URL_IllumDNA": f"{GALLERY}/x/illum.npy",
        }
    )


def csv(table):
    return table.to_csv(index=False).encode()


def parquet(table):
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def test_the_old_layout_as_it_is():
    got = parse_image_list(real("load_data_with_illum_BR00126114_2rows_2022layout.parquet"), "list", CHANNELS)
    base = f"{GALLERY}/cpg0016-jump/source_4/images/2021_08_23_Batch12"
    first = got.iloc[0]
    assert first[["Metadata_Plate", "Metadata_Well", "Metadata_Site"]].tolist() == ["BR00126114", "A01", "1"]
    assert first["Illum_Mito"] == f"{base}/illum/BR00126114/BR00126114_IllumMito.npy"
    assert first["Orig_DNA"].startswith(f"{base}/images/BR00126114__2021-09-01T15_39_48-Mea")
    assert first["Orig_DNA"].endswith("/r01c01f01p01-ch5sk1fk1fl1.tiff")
    assert not got.filter(like="_DNA").apply(lambda column: column.str.contains("[^:]//")).to_numpy().any()
    assert got.shape == (2, 5 + 10)


def test_the_current_layout_as_it_is():
    got = parse_image_list(real("load_data_with_illum_BR00117035_1row_2025layout.csv"), "list", CHANNELS).iloc[0]
    base = f"{GALLERY}/cpg0016-jump/source_4/images/2021_04_26_Batch1"
    assert got["Orig_ER"] == f"{base}/images/BR00117035__2021-05-02T16_02_51-Measurement1/Images/r01c01f01p01-ch4sk1fk1fl1.tiff"
    assert got["Illum_AGP"] == f"{base}/illum/BR00117035/BR00117035_IllumAGP.npy"
    assert got["Metadata_Site"] == "1"
    assert len(got) == 5 + 10


@pytest.mark.parametrize("write", [csv, lambda t: gzip.compress(csv(t), mtime=0), parquet, lambda t: b"\xef\xbb\xbf" + csv(t)])
def test_every_format_gives_the_same_strings(write):
    got = parse_image_list(write(rows()), "list", ["DNA", "ER", "Mito"])
    assert got["Metadata_Plate"].tolist() == ["0012345", "0012345"]
    assert got["Metadata_Site"].tolist() == ["0", "1"]
    assert got["Orig_DNA"].tolist() == rows()["URL_OrigDNA"].tolist()
    assert got["Orig_ER"].isna().tolist() == [False, True]
    assert "Orig_Mito" not in got
    assert list(got.filter(like="Illum_")) == ["Illum_DNA"]


def test_columns_of_another_order_more_columns_and_numbers_are_tolerated():
    table = rows().assign(Metadata_Site=[0, 1], Metadata_Row=3.5, URL_OrigBrightfield_H="x")[::-1]
    table = table[sorted(table, reverse=True)]
    for write in (csv, parquet):
        got = parse_image_list(write(table), "list", ["DNA"])
        assert got["Metadata_Site"].tolist() == ["1", "0"]
        assert set(got) == {*(c for c in rows() if c.startswith("Metadata_")), "Orig_DNA", "Illum_DNA"}


def test_slashes_between_path_and_file_are_normalised():
    table = (
        rows()
        .iloc[:, :5]
        .assign(PathName_OrigDNA=["s3://b/p/", "s3://b/p"], FileName_OrigDNA=["1.tiff", "/2.tiff"], PathName_OrigER="s3://b/p")
    )
    got = parse_image_list(csv(table), "list", ["DNA", "ER"])
    assert got["Orig_DNA"].tolist() == ["s3://b/p/1.tiff", "s3://b/p/2.tiff"]
    assert "Orig_ER" not in got


def test_lists_of_different_columns_unite_by_name():
    one, two = rows(), rows().drop(columns="URL_OrigER").assign(URL_OrigAGP="s3://a/agp.tiff")
    channels = ["DNA", "ER", "AGP"]
    both = pd.concat([parse_image_list(csv(t), "list", channels) for t in (one, two)], ignore_index=True)
    assert both["Orig_AGP"].isna().tolist() == [True, True, False, False]
    assert both["Orig_ER"].isna().tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    "data", [b"PAR1 is not all", b"\x1f\x8bbroken", gzip.compress(csv(rows()), mtime=0)[:60], b"\xff\xfe\x00a\n"]
)
def test_a_file_that_is_no_list_says_so(data):
    with pytest.raises(ValueError, match=r"s3://b/list"):
        parse_image_list(data, "s3://b/list", ["DNA"])


def test_a_list_without_wells_says_so():
    with pytest.raises(ValueError, match="has no column Metadata_Well"):
        parse_image_list(csv(rows().drop(columns="Metadata_Well")), "list", ["DNA"])


def test_the_current_layout_is_preferred(tmp_path):
    bucket = open_place(Place(address=str(tmp_path)))
    plate = PlateName("source_3", "CP 59", "0001")
    assert find_image_list(bucket, "cpg0016-jump", plate) is None
    base = "cpg0016-jump/source_3/workspace"
    for folder, name in (
        ("load_data_csv_orig", "load_data_with_illum.parquet"),
        ("load_data_csv", "load_data_with_illum.csv.gz"),
        ("load_data_csv", "load_data_with_illum.csv"),
        ("load_data_csv", "load_data_with_illum.parquet"),
    ):
        path = f"{base}/{folder}/CP 59/0001/{name}"
        bucket.write(path, b"")
        assert find_image_list(bucket, "cpg0016-jump", plate) == path
    bucket.write(f"{base}/load_data_csv/CP 59/0001/load_data.csv", b"")
    assert find_image_list(bucket, "cpg0016-jump", plate) == path


def test_addresses_lead_to_where_the_bucket_is_served(tmp_path):
    folder = open_place(Place(address=str(tmp_path)))
    mirror = open_place(Place(address="s3://mirror/deep", anonymous=True))
    listed = f"{GALLERY}/cpg/a b.tiff"
    assert map_address(listed, GALLERY, folder) == f"{tmp_path}/cpg/a b.tiff"
    assert map_address(listed, GALLERY + "/", mirror) == "s3://mirror/deep/cpg/a b.tiff"
    assert map_address("s3://cellpainting-gallery-2/x", GALLERY, mirror) == "s3://cellpainting-gallery-2/x"
    assert map_address("/data/x.tiff", GALLERY, mirror) == "/data/x.tiff"
    assert map_address("x/y.tiff", GALLERY, mirror) == "s3://mirror/deep/x/y.tiff"
