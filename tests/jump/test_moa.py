import gzip
from pathlib import Path

import pandas as pd
import pytest

from coda_ray.jump.moa import labels_by_well, read_hub_table

METADATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "jump-metadata"
needs_real_tables = pytest.mark.skipif(not METADATA.exists(), reason=f"{METADATA} is not there")


def real_labels(samples="JUMP-Target-2_compound_metadata.tsv"):
    def table(name):
        return pd.read_csv(METADATA / name, sep="\t", dtype="str")

    return labels_by_well(
        table("JUMP-Target-2_compound_platemap.tsv"),
        table(samples),
        read_hub_table((METADATA / "repurposing_drugs_20200324.txt").read_bytes()),
        read_hub_table(gzip.decompress((METADATA / "repurposing_samples_20200324.txt.gz").read_bytes())),
    )


@needs_real_tables
def test_the_rule_gives_the_papers_classes_and_compounds():
    labels = real_labels()
    labelled = labels.dropna(subset="Metadata_MoA")
    assert len(labels) == labels["Metadata_Well"].nunique() == 384
    assert labelled["Metadata_MoA"].nunique() == 54
    assert labelled["InChIKey"].nunique() == 135
    assert len(labelled) == 140
    plates = pd.read_csv(METADATA / "plate.csv.gz", dtype="str")
    assert (plates["Metadata_PlateType"] == "TARGET2").sum() == 141


@needs_real_tables
def test_the_rule_gives_the_derived_table_well_by_well():
    derived = pd.read_csv(METADATA / "target2_moa_labels_derived.csv")
    kept = derived[derived["in_54_classes"]]
    expected = {well: moa for wells, moa in zip(kept["wells"], kept["moa"], strict=True) for well in wells.split(";")}
    labelled = real_labels().dropna(subset="Metadata_MoA")
    assert dict(zip(labelled["Metadata_Well"], labelled["Metadata_MoA"], strict=True)) == expected


@needs_real_tables
def test_the_samples_of_2021_give_the_same_labels():
    old = real_labels("JUMP-Target-2_compound_metadata_1affbe8_2021-05-03.tsv")
    pd.testing.assert_frame_equal(old.drop(columns="InChIKey"), real_labels().drop(columns="InChIKey"))


def test_a_cell_may_hold_what_python_takes_for_the_end_of_a_line():
    table = read_hub_table("!note\r\nbroad_id\tname\r\nBRD-K1\ta\x0bb\x85c\r\n".encode("latin-1"))
    assert table.to_dict("list") == {"broad_id": ["BRD-K1"], "name": ["a\x0bb\x85c"]}


@needs_real_tables
def test_every_sample_of_the_hub_has_a_broad_id():
    samples = read_hub_table(gzip.decompress((METADATA / "repurposing_samples_20200324.txt.gz").read_bytes()))
    assert samples["broad_id"].str.match("BRD-").all()


def small(**changes):
    """Two samples of one mechanism, one alone in its own, one without, one DMSO well."""
    cores = ["BRD-K00000001", "BRD-K00000002", "BRD-K00000003", "BRD-K00000004"]
    tables = {
        "platemap": pd.DataFrame(
            {
                "well_position": ["A01", "A02", "A03", "A04", "A05", "B01"],
                "broad_sample": [*(f"{c}-001-01-9" for c in cores), None, f"{cores[0]}-001-01-9"],
            }
        ),
        "samples": pd.DataFrame({"broad_sample": [f"{c}-001-01-9" for c in cores], "InChIKey": ["K1", "K2", "K3", "K4"]}),
        "hub_drugs": pd.DataFrame(
            {"pert_iname": ["a", "b", "c", "d"], "moa": ["x inhibitor|y agonist", "x inhibitor|y agonist", "alone", None]}
        ),
        "hub_samples": pd.DataFrame(
            {"broad_id": [f"{c}-003-07-2" for c in cores] + ["BRD-K00000001-001-02-2"], "pert_iname": ["a", "b", "c", "d", "a"]}
        ),
    }
    return labels_by_well(**{**tables, **changes})


def test_a_label_is_the_whole_cell_and_needs_two_samples():
    got = small().set_index("Metadata_Well")
    assert got["Metadata_MoA"].dropna().to_dict() == dict.fromkeys(["A01", "A02", "B01"], "x inhibitor|y agonist")
    assert got["InChIKey"].dropna().to_dict() == {"A01": "K1", "A02": "K2", "A03": "K3", "A04": "K4", "B01": "K1"}


def test_two_wells_of_one_sample_are_not_two_samples():
    drugs = pd.DataFrame({"pert_iname": ["a", "b"], "moa": ["alone", "other"]})
    assert small(hub_drugs=drugs)["Metadata_MoA"].isna().all()


def test_a_sample_with_two_mechanisms_is_refused():
    hub = pd.DataFrame({"broad_id": ["BRD-K00000001-001-02-2"] * 2, "pert_iname": ["a", "c"]})
    with pytest.raises(ValueError, match=r"two mechanisms for one sample.*BRD-K00000001"):
        small(hub_samples=hub)


def test_a_well_listed_twice_is_refused():
    twice = pd.DataFrame({"well_position": ["A01", "A01"], "broad_sample": [None, None]})
    with pytest.raises(ValueError, match="plate layout: well_position = 'A01'"):
        small(platemap=twice)


def test_hub_files_are_read_without_quoting_in_latin_1():
    text = '!Source\t"x"\n!Note\t\npert_iname\tmoa\n5" d\xe9j\xe0\tx inhibitor\n"b\t\n'
    got = read_hub_table(text.encode("latin-1"))
    assert got["pert_iname"].tolist() == ['5" d\xe9j\xe0', '"b']
    assert got["moa"].isna().tolist() == [False, True]
