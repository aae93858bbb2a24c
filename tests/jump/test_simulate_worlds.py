"""What the settings of a world do, counted in what is written; and that a world without them is the one it always was."""

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from coda_ray.config import Place
from coda_ray.jump.simulate import PRESETS, SimulateSettings, simulate_site
from coda_ray.jump.simulate.layout import Plate, draw_plates, draw_wells, image_list, wells_of
from coda_ray.jump.simulate.microscope import illumination
from coda_ray.jump.simulate.tables import DMSO, draw_compounds, metadata_files
from coda_ray.jump.simulate.world import (
    NAMES,
    TRAITS,
    _draw_batch,
    _draw_optics,
    compound_effects,
    draw_batch,
    mechanisms,
    optics,
)
from coda_ray.jump.tables import annotate, read_tables
from coda_ray.storage import open_place
from coda_ray.tiles.store import COMPOUND, LABEL

# SHA-256 of the unpacked tables and lists of images of the tiny world, and mean and standard deviation over pixels (counts)
# of its first treated well in each lab, all by version 1. Pixels themselves may differ by a count between processors.
TABLES = {
    "plate.csv.gz": "732b2216fc566ea8",
    "well.csv.gz": "7081ecdc53aaeeb1",
    "compound.csv.gz": "f947f35470474b61",
    "perturbation_control.csv": "9cd210018cd248dc",
    "microscope_config.csv": "0203ebaa5c668680",
    "compound_metadata.tsv": "28b687eee16d95b7",
    "compound_platemap.tsv": "c7e5163fb56f58a7",
    "repurposing_drugs.txt": "c5d6a0c5a8076811",
    "repurposing_samples.txt": "75d7f0bb09138820",
    "lists": "6c8bf75b8ec16122",
}
PIXELS = {
    "sim_a": [
        [1697.035, 25016.697, 24205.312, 6455.553, 21664.366],
        [1302.159, 9335.725, 7809.931, 1588.745, 4831.361],
    ],
    "sim_b": [[59.511, 796.689, 215.575, 155.051, 330.66], [124.096, 1160.441, 253.647, 151.528, 362.426]],
    "sim_c": [
        [3043.055, 29009.742, 27072.317, 9016.779, 13972.228],
        [2652.171, 13702.395, 11057.661, 3667.213, 6369.651],
    ],
}
BOTH = {"unknown_moas": 2, "imbalance": 4.0}


def world(**changes: Any) -> SimulateSettings:
    """A world of the tiny preset's size."""
    return SimulateSettings.model_validate({**PRESETS["tiny"].model_dump(), **changes})


def files_of(settings: SimulateSettings) -> dict[str, bytes]:
    """The tables of a world, unpacked."""
    scopes = {source: optics(settings, source) for source in settings.sources}
    wells = {source: wells_of(settings, source) for source in settings.sources}
    files = metadata_files(settings, draw_plates(settings), wells, draw_compounds(settings), scopes, set())
    return {name: gzip.decompress(data) if name.endswith(".gz") else data for name, data in files.items()}


def site(settings: SimulateSettings, plate: Plate, well: str, content: int) -> Any:
    """One field."""
    scope, batch = optics(settings, plate.source), draw_batch(settings, plate.source, plate.batch)
    light = illumination(scope, batch, settings.field_px)
    effect = compound_effects(settings)[content] if content >= 0 else np.zeros(len(NAMES))
    return simulate_site(settings, plate, well, 0, effect, scope, batch, light)


def first_plates(settings: SimulateSettings) -> Mapping[str, Plate]:
    """The first plate of each source."""
    return {plate.source: plate for plate in reversed(draw_plates(settings))}


@pytest.fixture
def labelled(tmp_path: Path) -> Any:
    """Write the tables of a world and read them as ingest does: one row per well of the first plate of each source."""

    def read(settings: SimulateSettings) -> pd.DataFrame:
        folder = open_place(Place(address=str(tmp_path / "metadata")))
        for name, data in files_of(settings).items():
            folder.write(name.removesuffix(".gz"), data)
        tables = read_tables(folder)
        plates = first_plates(settings).values()
        return pd.concat([annotate(image_list(plate, list(wells_of(settings, plate.source)), 1), tables) for plate in plates])

    return read


def test_a_world_of_the_defaults_is_that_of_version_1() -> None:
    settings = PRESETS["tiny"]
    lists = [image_list(p, list(wells_of(settings, p.source)), 1).to_csv(index=False) for p in draw_plates(settings)]
    written = {**files_of(settings), "lists": "".join(lists).encode()}
    assert {name: hashlib.sha256(data).hexdigest()[:16] for name, data in written.items()} == TABLES
    well, content = next((well, c) for well, c in draw_wells(settings).items() if c >= 0)
    for source, plate in first_plates(settings).items():
        pixels = site(settings, plate, well, content).astype(float)
        assert np.allclose([pixels.mean((1, 2)), pixels.std((1, 2))], PIXELS[source], rtol=1e-4)


def test_severities_of_1_leave_every_draw_as_it_is() -> None:
    for seed in range(40):
        settings = world(seed=seed)
        for source in settings.sources:
            assert optics(settings, source) == _draw_optics(settings, source)
            assert draw_batch(settings, source, "b") == _draw_batch(settings, source, "b")


@pytest.mark.parametrize("more", [{"unknown_moas": 3}, {"imbalance": 4.0}, {**BOTH, "imbalance_by_source": True}])
def test_a_larger_world_holds_the_smaller_one(more: dict[str, Any]) -> None:
    small, large = world(), world(**more)
    assert np.array_equal(mechanisms(large)[: small.moas], mechanisms(small))
    assert np.array_equal(compound_effects(large)[: small.known_compounds], compound_effects(small))
    assert draw_compounds(large)[: small.known_compounds] == draw_compounds(small)
    assert draw_wells(large).items() > draw_wells(small).items()
    assert list(draw_wells(large)) == sorted(draw_wells(large))
    for source in large.sources:
        assert draw_wells(large).items() >= wells_of(large, source).items() > wells_of(small, source).items()
    well, content = next(iter(draw_wells(small).items()))
    plate = draw_plates(small)[0]
    assert np.array_equal(site(large, plate, well, content), site(small, plate, well, content))


def test_one_batch_is_the_first_of_several() -> None:
    one, two = world(batches_per_source=1), world(batches_per_source=2)
    assert [(p.source, p.run) for p in draw_plates(one)] == [(source, 0) for source in one.sources]
    assert draw_plates(one) == [p for p in draw_plates(two) if p.run == 0]


def test_no_table_gives_a_mechanism_to_the_unknown_compounds(labelled: Any) -> None:
    settings = world(unknown_moas=3, wells_per_compound=2)
    table = labelled(settings)
    compounds = draw_compounds(settings)
    known, unknown = ({c.jcp: c for c in compounds if c.known is told} for told in (True, False))
    assert (len(known), len(unknown)) == (6, 6)
    for names in ({c.name for c in compounds}, {c.inchikey for c in compounds}, {c.broad_core for c in compounds}):
        assert len(names) == 12
    for _, here in table.groupby("Metadata_Source"):
        wells = here[COMPOUND].value_counts()
        assert dict(wells) == {**dict.fromkeys([*known, *unknown], 2), DMSO: settings.dmso_wells}
        named = here.dropna(subset=LABEL)
        assert dict(zip(named[COMPOUND], named[LABEL], strict=True)) == {c.jcp: c.moa for c in known.values()}
    everything = b"".join(files_of(settings).values()).decode("latin-1")
    assert all(c.jcp in everything and c.name in everything for c in unknown.values())
    assert not any(c.moa in everything for c in unknown.values())
    effects = mechanisms(settings)
    apart = np.linalg.norm(effects[:, None] - effects, axis=2) + 1e9 * np.eye(len(effects))
    own = np.linalg.norm(compound_effects(settings) - np.repeat(effects, settings.compounds_per_moa, axis=0), axis=1)
    assert own.max() < apart.min()


def test_unknown_compounds_are_where_they_are_asked_for(labelled: Any) -> None:
    settings = world(unknown_moas=2, unknown_only_in=["sim_b"])
    unknown = {c.jcp for c in draw_compounds(settings) if not c.known}
    held = {source: set(here[COMPOUND]) for source, here in labelled(settings).groupby("Metadata_Source")}
    assert held["sim_b"] > unknown
    assert held["sim_a"] == held["sim_c"] == held["sim_b"] - unknown


@pytest.mark.parametrize("by_source", [False, True])
def test_classes_are_as_unbalanced_as_asked(labelled: Any, by_source: bool) -> None:
    settings = world(imbalance=4.0, imbalance_by_source=by_source, unknown_moas=1, wells_per_compound=2)
    table = labelled(settings)
    priors = {source: here[LABEL].value_counts().to_dict() for source, here in table.groupby("Metadata_Source")}
    for source, prior in priors.items():
        here = table[table["Metadata_Source"] == source]
        assert sorted(prior.values()) == [2 * 2, 2 * 4, 2 * 8]
        assert (here[COMPOUND] == DMSO).sum() == settings.dmso_wells
        assert here[LABEL].isna().sum() == settings.dmso_wells + 2 * 2
        per_compound = here.dropna(subset=LABEL).groupby(LABEL)[COMPOUND].value_counts()
        assert all(count == prior[moa] / 2 for (moa, _), count in per_compound.items())
    assert len({tuple(sorted(prior.items())) for prior in priors.values()}) == (3 if by_source else 1)


def test_a_layout_takes_no_more_wells_than_its_settings_say() -> None:
    for seed in range(20):
        shared = world(seed=seed, **BOTH)
        assert len(draw_wells(shared)) == shared.wells_per_plate
        own = world(seed=seed, **BOTH, imbalance_by_source=True)
        assert len(draw_wells(shared)) <= len(draw_wells(own)) <= own.wells_per_plate
    orders = {tuple(wells_of(world(seed=seed, imbalance=4.0), "sim_a").values()).count(0) for seed in range(20)}
    assert orders == {1, 2, 4}  # which mechanism is frequent is drawn


def test_labs_that_fit_a_plate_one_by_one_may_not_fit_it_together() -> None:
    size = {"moas": 20, "compounds_per_moa": 3, "imbalance": 10.0}
    SimulateSettings.model_validate(size)
    with pytest.raises(ValueError, match=r"\d+ wells do not fit a 384-well plate"):
        SimulateSettings.model_validate({**size, "imbalance_by_source": True})


GROWN = [name for name, trait in TRAITS.items() if trait.group in ("culture", "nucleus", "shape")]
NAMED = {"microscope", "confocal", "excitation", "full_scale"}


def drawn(settings: SimulateSettings, source: str) -> dict[str, Any]:
    """What is drawn of a lab and of its first batch, one number per key; the camera's in shares of its full scale."""
    values: dict[str, Any] = {**asdict(optics(settings, source)), **asdict(draw_batch(settings, source, "b"))}
    for name in ("gain", "offset", "counts_per_photon", "read_noise"):
        values[name] = np.asarray(values[name]) / values["full_scale"]
    values["bleed"] = [share for *_, share in values["bleed"]]
    flat = {(name, i): v for name in values.keys() - NAMED for i, v in enumerate(np.ravel(values[name]))}
    return {(name, NAMES[i]) if name in ("habit", "response", "passage") else (name, i): v for (name, i), v in flat.items()}


def is_biology(key: tuple[str, Any]) -> bool:
    """Whether a number is of the cells and not of optics or stains."""
    return key[0] in ("response", "passage") or (key[0] == "habit" and key[1] in GROWN)


def test_each_severity_moves_its_own_draws_and_no_others() -> None:
    for field, of_it in (("severity", lambda key: not is_biology(key)), ("biology_severity", is_biology)):
        far = {by: [drawn(world(seed=seed, **{field: by}), "sim_b") for seed in range(8)] for by in (0.0, 0.5, 1.0)}
        for key in far[1.0][0]:
            zero, half, one = (np.array([lab[key] for lab in far[by]]) for by in (0.0, 0.5, 1.0))
            if not of_it(key):
                assert np.array_equal(zero, one), key
                continue
            assert np.allclose(zero, zero[0], rtol=1e-9, atol=1e-12), key
            log = key[0] in ("gain", "gamma", "counts_per_photon", "read_noise", "response", "stain")
            zero, half, one = (np.log(v) if log else v for v in (zero, half, one))
            assert np.allclose(half - zero, (one - zero) / 2, rtol=1e-6, atol=1e-9), key


def test_the_mean_that_labs_move_away_from_is_that_of_the_draws() -> None:
    """By more labs than anyone simulates; so that a severity of 0 is the middle of today's labs and not a place beside them."""
    many = [drawn(world(seed=seed), source) for seed in range(300) for source in ("sim_a", "sim_b", "sim_c")]
    middle = drawn(world(severity=0.0, biology_severity=0.0), "sim_a")
    for key, value in middle.items():
        seen = np.array([lab[key] for lab in many])
        if key[0] in ("gain", "gamma", "counts_per_photon", "read_noise", "response", "stain"):
            seen, value = np.log(seen), np.log(value)
        assert abs(seen.mean() - value) < 0.12 * seen.std() + 1e-9, key


def test_severe_labs_stay_physical() -> None:
    for seed in range(40):
        settings = world(seed=seed, severity=3.0, biology_severity=3.0)
        for source in settings.sources:
            lab = drawn(settings, source)
            of_shares = ("haze", "bleed", "golgi_share", "unspecific", "vignetting")
            shares = [value for (name, _), value in lab.items() if name in of_shares]
            assert 0 <= min(shares) <= max(shares) <= 1
            assert all(lab[key] <= 0.8 for key in lab if key[0] in ("haze", "bleed"))
            positive = ("numerical_aperture", "pixel_um", "depth_um", "haze_um", "gamma", "offset", "background", "response")
            assert min(value for (name, _), value in lab.items() if name in positive) > 0


def test_labs_look_further_apart_where_they_are_more_severe() -> None:
    apart = []
    for by in (0.0, 1.0, 2.0):
        # Cells are alike in all labs, so that what differs is how they look.
        settings = world(severity=by, biology_severity=0.0, sources=[f"lab_{i}" for i in range(9)], field_px=160)
        means = []
        for source, plate in first_plates(settings).items():
            fields = [site(settings, plate, well, -1).mean((1, 2)) for well in ("B02", "B03")]
            means.append(np.log(np.mean(fields, axis=0) / optics(settings, source).full_scale))
        apart.append(np.std(means, axis=0))
    alike, today, twice = apart
    assert np.all(1.2 * alike < today)
    assert np.all(1.2 * today < twice)
