import gzip

import pandas as pd
import pytest

from coda_ray.config import Place
from coda_ray.jump.tables import annotate, choose_plates, read_tables, well_notes
from coda_ray.storage import open_place

WELLS = [f"{row}{column:02d}" for row in "ABCDEFGHIJKLMNOP" for column in range(1, 25)]


@pytest.fixture(scope="module")
def real_tables(jump_metadata):
    return read_tables(open_place(Place(address=str(jump_metadata))))


def listed(source, batch, plate, wells=WELLS):
    names = {"Metadata_Source": source, "Metadata_Batch": batch, "Metadata_Plate": plate}
    return pd.DataFrame({**names, "Metadata_Well": wells, "Metadata_Site": "1"})


def plate_of(tables, source):
    return choose_plates(tables.plates, [source], ["TARGET2"], [])[0]


@pytest.mark.parametrize(
    "content", [gzip.compress(b"x" * 999)[:-9], b"\x1f\x8b" + bytes(99), gzip.compress(b"x")[:10] + b"\xff" * 30]
)
def test_a_damaged_table_is_named(tmp_path, content):
    (tmp_path / "plate.csv.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"plate\.csv\.gz: cannot be unpacked \(.*\); copy it again"):
        read_tables(open_place(Place(address=str(tmp_path))))


def test_real_tables_hold_141_target2_plates_with_pixel_sizes(real_tables):
    plates = choose_plates(real_tables.plates, [], ["TARGET2"], [])
    assert len(plates) == len(set(plates)) == 141
    assert {plate.source for plate in plates} <= set(real_tables.pixel_sizes)
    assert real_tables.pixel_sizes["source_10"] == pytest.approx(0.6516944)
    assert real_tables.dmso == "JCP2022_033924"
    assert real_tables.notes == ()


def test_a_plate_gets_140_labels_64_dmso_wells_and_every_compound(real_tables):
    sites = listed(*plate_of(real_tables, "source_3"))
    got = annotate(sites, real_tables)
    assert got.index.equals(sites.index)
    assert got["Metadata_MoA"].notna().sum() == 140
    assert got["Metadata_MoA"].nunique() == 54
    assert (got["Metadata_Control"] == "negcon").sum() == 64
    assert got["Metadata_JCP2022"].nunique() == 302
    assert got["Metadata_InChIKey"].notna().all()
    assert well_notes(sites, got, real_tables) == []


def test_the_layout_stands_in_for_a_source_without_wells(real_tables):
    assert "source_7" not in set(real_tables.wells["Metadata_Source"])
    sites = [annotate(listed(*plate_of(real_tables, source)), real_tables) for source in ("source_7", "source_3")]
    columns = ["Metadata_Well", "Metadata_JCP2022", "Metadata_InChIKey", "Metadata_Control", "Metadata_MoA"]
    pd.testing.assert_frame_equal(sites[0][columns], sites[1][columns])


def test_a_well_recorded_as_dmso_is_dmso_without_a_label(real_tables):
    sites = listed(*plate_of(real_tables, "source_2"))
    got = annotate(sites, real_tables).set_index("Metadata_Well")
    ours = annotate(listed(*plate_of(real_tables, "source_3")), real_tables).set_index("Metadata_Well")
    assert got.loc["P03", "Metadata_JCP2022"] == "JCP2022_033924" != ours.loc["P03", "Metadata_JCP2022"]
    assert got.loc["P03", "Metadata_Control"] == "negcon"
    assert pd.isna(got.loc["P03", "Metadata_MoA"])
    rest = got.index != "P03"
    assert got.loc[rest, "Metadata_MoA"].equals(ours.loc[rest, "Metadata_MoA"])
    (note,) = well_notes(sites, got.reset_index(), real_tables)
    assert "recorded as untreated" in note
    assert "P03" in note


def test_another_plate_type_gets_no_label(real_tables):
    plate = choose_plates(real_tables.plates, ["source_1"], ["COMPOUND"], [])[0]
    got = annotate(listed(*plate), real_tables)
    assert got[["Metadata_MoA", "Metadata_JCP2022"]].isna().all(axis=None)


def test_absent_wells_and_sites_are_named(real_tables):
    plate = plate_of(real_tables, "source_3")
    sites = pd.concat([listed(*plate, WELLS[2:]), listed(*plate, WELLS[3:]).assign(Metadata_Site="2")], ignore_index=True)
    notes = well_notes(sites, annotate(sites, real_tables), real_tables)
    assert notes == ["2 of 384 wells are not in the image list (A01, A02)", "1 wells list fewer than 2 sites (A03)"]


def test_a_list_of_ones_own_may_bring_its_labels_and_needs_no_table(tmp_path):
    tables = read_tables(open_place(Place(address=str(tmp_path / "nothing"))))
    assert "no MoA labels" in tables.notes[0]
    sites = listed("lab", "b", "p", ["A01", "A02"]).assign(Metadata_MoA=["x", None], Metadata_JCP2022=["one", None])
    got = annotate(sites, tables)
    assert got["Metadata_MoA"].isna().tolist() == [False, True]
    assert got.loc[0, ["Metadata_MoA", "Metadata_JCP2022"]].tolist() == ["x", "one"]
    assert got[["Metadata_InChIKey", "Metadata_Control"]].isna().all(axis=None)


def test_two_rows_that_disagree_are_refused_and_equal_ones_are_not(tmp_path):
    header = "Metadata_Source,Metadata_Plate,Metadata_Well,Metadata_JCP2022\n"
    (tmp_path / "well.csv").write_text(header + "s,001,A01,JCP1\ns,001,A01,JCP1\n")
    wells = read_tables(open_place(Place(address=str(tmp_path)))).wells
    assert wells.to_numpy().tolist() == [["s", "001", "A01", "JCP1"]]
    (tmp_path / "well.csv").write_text(header + "s,001,A01,JCP1\ns,001,A01,JCP2\n")
    with pytest.raises(ValueError, match=r"well.csv: s, 001, A01 has two rows that disagree"):
        read_tables(open_place(Place(address=str(tmp_path))))


def test_a_table_without_its_column_is_refused(tmp_path):
    (tmp_path / "plate.csv").write_text("Metadata_Source,Metadata_Plate\ns,1\n")
    with pytest.raises(ValueError, match=r"plate.csv: has no column Metadata_Batch"):
        read_tables(open_place(Place(address=str(tmp_path))))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ((["source_33"], [], []), "ingest.sources = 'source_33'"),
        (([], ["TARGET3"], []), "ingest.plate_types = 'TARGET3'.*TARGET2"),
        ((["source_3"], ["TARGET2"], ["nowhere"]), "ingest.plates = 'nowhere'"),
    ],
)
def test_a_choice_that_is_not_there_names_the_option(real_tables, choice, message):
    with pytest.raises(ValueError, match=message):
        choose_plates(real_tables.plates, *choice)


def test_no_plate_table_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"metadata\.address"):
        choose_plates(read_tables(open_place(Place(address=str(tmp_path)))).plates, [], [], [])
