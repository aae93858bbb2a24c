import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from coda_ray.jump.simulate import PRESETS, SimulateSettings, simulate_site
from coda_ray.jump.simulate.defects import plan_defects, spoil_file, spoil_list
from coda_ray.jump.simulate.layout import GALLERY, current_layout, draw_plates, image_list, old_layout, wells_of
from coda_ray.jump.simulate.microscope import _blur, _transfer, estimated_illumination, expose, illumination
from coda_ray.jump.simulate.population import Bodies, draw_population
from coda_ray.jump.simulate.render import _nearest, render
from coda_ray.jump.simulate.tables import DMSO, draw_compounds, metadata_files
from coda_ray.jump.simulate.world import NAMES, TRAITS, compound_effects, draw_batch, mechanisms, optics

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def photograph() -> Iterator[Callable[..., np.ndarray[Any, Any]]]:
    """Take one field of a source, with optional changes of trait values and optics."""

    def take(
        source: str = "sim_a", effect: dict[str, float] | None = None, well: str = "B02", side: int = 256, **change: Any
    ) -> Any:
        settings = TINY.model_copy(update={"field_px": side})
        plate = next(p for p in draw_plates(settings) if p.source == source)
        scope = replace(optics(settings, source), **change)
        batch = draw_batch(settings, source, plate.batch)
        shift = np.array([(effect or {}).get(name, 0.0) for name in NAMES])
        return simulate_site(settings, plate, well, 0, shift, scope, batch, illumination(scope, batch, side))

    return take


def test_world_depends_on_seed_and_not_on_what_else_it_holds() -> None:
    few, many = SimulateSettings(sources=["x", "y"]), SimulateSettings(sources=["x", "y", "z"], batches_per_source=2)
    assert optics(few, "y") == optics(many, "y")
    assert draw_batch(few, "x", "SIM01") == draw_batch(many, "x", "SIM01")
    assert optics(few, "x") != optics(few.model_copy(update={"seed": 1}), "x")
    assert np.array_equal(compound_effects(few), compound_effects(many))


def test_compounds_lie_near_their_mechanism_and_mechanisms_far_apart() -> None:
    settings = SimulateSettings()
    shared = mechanisms(settings)
    effects = compound_effects(settings).reshape(settings.moas, settings.compounds_per_moa, -1)
    own = np.linalg.norm(effects - shared[:, None], axis=2)
    apart = np.linalg.norm(shared[:, None] - shared[None], axis=2)[~np.eye(settings.moas, dtype=bool)]
    assert own.max() < apart.min()
    assert own.min() > 0


def test_traits_rise_with_z_and_shares_stay_shares() -> None:
    z = np.linspace(-4, 4, 9)
    for trait in TRAITS.values():
        value = trait.value(z)
        assert np.all(np.diff(value) > 0)
        assert np.all(value > 0)
        assert not trait.share or np.all(value < 1)
        assert value[4] == pytest.approx(trait.base)


def test_population_has_the_density_and_no_stacked_nuclei() -> None:
    rng = np.random.default_rng(0)
    base = np.zeros(len(NAMES))
    counts = [len(draw_population(rng, base, base, 600.0).cells.x) for _ in range(12)]
    expected = TRAITS["cell_density_mm2"].base * 0.66**2
    assert np.mean(counts) == pytest.approx(expected, rel=0.15)
    cells = draw_population(rng, base, base, 600.0).cells
    gaps = np.hypot(cells.x[:, None] - cells.x, cells.y[:, None] - cells.y) + 1e9 * np.eye(len(cells.x))
    assert gaps.min() >= 12.0


def test_nearest_body_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    n = 7
    bodies = Bodies(
        x=rng.uniform(0, 60, n),
        y=rng.uniform(0, 60, n),
        angle=rng.uniform(0, 6, n),
        radius=rng.uniform(8, 14, n),
        stretch=rng.uniform(1, 1.6, n),
        profile=np.ones((n, 256), dtype=np.float32),
    )
    axis = (np.arange(60, dtype=np.float32) + 0.5) * 1.0
    y, x = np.meshgrid(axis, axis, indexing="ij")
    found = _nearest(bodies, x, y, 1.0, 1.3)
    for row in range(0, 60, 3):
        for column in range(0, 60, 3):
            distances = []
            for i in range(n):
                dx, dy = x[row, column] - bodies.x[i], y[row, column] - bodies.y[i]
                u = (np.cos(bodies.angle[i]) * dx + np.sin(bodies.angle[i]) * dy) / bodies.stretch[i]
                v = (np.cos(bodies.angle[i]) * dy - np.sin(bodies.angle[i]) * dx) * bodies.stretch[i]
                distances.append(np.hypot(u, v) / bodies.radius[i])
            if min(distances) < 1:
                assert found.label[row, column] == int(np.argmin(distances))
                assert found.inside[row, column] == pytest.approx(min(distances), abs=1e-4)


def test_blur_equals_direct_convolution_away_from_the_border() -> None:
    scope = replace(optics(TINY, "sim_a"), haze=(0.3,) * 5, haze_um=(2.0, 3.0))
    image = np.zeros((5, 64, 64), dtype=np.float32)
    image[:, 32, 32] = 1
    side = 128
    blurred = _blur(image, _transfer(scope, [0.0, 1.0, -1.0, 2.0, 0.5], side))
    assert np.allclose(blurred.sum((1, 2)), 1, atol=1e-3)
    # Second moment of a point is the mixture's variance: slow, obvious, independent of the transfer function's code.
    axis = (np.arange(64) - 32) * scope.pixel_um
    cone = np.tan(np.arcsin(min(scope.numerical_aperture / 1.38, 0.9))) / 2
    core = (0.21 * 0.525 / scope.numerical_aperture) ** 2 + cone**2 * (scope.depth_um**2 / 4 + 1.0)
    expected = core + 0.3 * (0.7 * 2.0**2 + 0.3 * 3.0**2)
    assert (blurred[1].sum(0) * axis**2).sum() == pytest.approx(expected, rel=0.02)


def test_nothing_between_cells_and_counts_within_the_camera() -> None:
    scope, batch = optics(TINY, "sim_b"), draw_batch(TINY, "sim_b", "b")
    rng = np.random.default_rng(2)
    empty = np.zeros((5, 96, 96), dtype=np.float32)
    dark = expose(rng, empty, scope, batch, illumination(scope, batch, 96), np.ones(5))
    assert dark.dtype == np.uint16
    assert np.all(dark.mean((1, 2)) < 0.03 * scope.full_scale)
    bright = expose(rng, empty + 1e3, scope, batch, illumination(scope, batch, 96), np.ones(5))
    assert bright.max() == scope.full_scale


def test_illumination_divides_out() -> None:
    scope, batch = replace(optics(TINY, "sim_a"), vignetting=0.4), draw_batch(TINY, "sim_a", "b")
    light = illumination(scope, batch, 96)
    supplied = estimated_illumination(np.random.default_rng(3), light)
    flat = expose(np.random.default_rng(4), np.ones((5, 96, 96), dtype=np.float32), scope, batch, light, np.ones(5))
    raw_range = np.ptp([part.mean() for part in np.array_split(flat[1].astype(float), 8)])
    corrected = flat[1] / supplied[1]
    assert np.allclose(supplied.mean((1, 2)), 1, atol=1e-4)
    assert np.ptp([part.mean() for part in np.array_split(corrected, 8)]) < 0.4 * raw_range


def test_a_site_is_a_pure_function_of_its_names(photograph: Callable[..., Any]) -> None:
    assert np.array_equal(photograph(), photograph())
    assert not np.array_equal(photograph(), photograph(well="B03"))


@pytest.mark.parametrize(("trait", "channel"), [("er_level", 1), ("rna_level", 2), ("agp_level", 3), ("mito_level", 4)])
def test_a_trait_shows_in_its_channel(photograph: Callable[..., Any], trait: str, channel: int) -> None:
    more, less = (photograph(effect={trait: z}, bleed=(), gamma=1.0)[channel].astype(float).mean() for z in (2.0, -2.0))
    assert more > 1.3 * less


def test_sources_differ_in_sharpness(photograph: Callable[..., Any]) -> None:
    sharp = photograph(haze=(0.05,) * 5, depth_um=0.5, counts_per_photon=0.1)[0].astype(float)
    hazy = photograph(haze=(0.7,) * 5, depth_um=6.0, counts_per_photon=0.1)[0].astype(float)
    assert np.abs(np.diff(sharp)).mean() / sharp.std() > np.abs(np.diff(hazy)).mean() / hazy.std()


def test_an_empty_field_is_black() -> None:
    people = draw_population(np.random.default_rng(0), np.full(len(NAMES), -30.0), np.zeros(len(NAMES)), 60.0)
    assert len(people.cells.x) == 0
    assert not render(np.random.default_rng(0), people, 64, 1.0, 0.5, [0.0] * 5).any()


def test_plates_of_the_demo() -> None:
    plates = draw_plates(PRESETS["demo"])
    assert len(plates) == len({p.name for p in plates}) == 18
    assert {p.style for p in plates} == {"phenix", "yokogawa", "imagexpress"}
    assert any(" " in p.images for p in plates)
    assert all(p.name in p.images for p in plates)
    orders = {p.batch: p.channel_numbers for p in plates if p.style == "phenix"}
    assert len(set(orders.values())) == len(orders)


def test_both_layouts_name_the_same_files() -> None:
    for plate in draw_plates(TINY):
        rows = image_list(plate, ["A01", "P24"], 2)
        new, old = current_layout(rows, plate, 0.6, 96), old_layout(rows)
        assert old.shape[1] == 25
        assert all(isinstance(value, str) for value in old.iloc[0])
        joined = old["PathName_OrigER"].str.rstrip("/") + "/" + old["FileName_OrigER"]
        assert list(joined) == list(new["URL_OrigER"])
        assert list(old["PathName_IllumER"] + "/" + old["FileName_IllumER"]) == list(new["URL_IllumER"])
        assert new["URL_OrigDNA"].is_unique
        assert new["URL_OrigDNA"].str.startswith(f"{GALLERY}/cpg0016-jump/").all()
        assert rows["Metadata_Site"].min() == ("0" if plate.style == "imagexpress" else "1")


def test_tables_follow_the_moa_rule() -> None:
    settings = SimulateSettings()
    scopes = {source: optics(settings, source) for source in settings.sources}
    wells = {source: wells_of(settings, source) for source in settings.sources}
    files = metadata_files(settings, draw_plates(settings), wells, draw_compounds(settings), scopes, set())
    hub = {"sep": "\t", "comment": "!", "encoding": "latin-1", "quoting": 3, "dtype": str}
    drugs = pd.read_csv(io.BytesIO(files["repurposing_drugs.txt"]), **hub)
    samples = pd.read_csv(io.BytesIO(files["repurposing_samples.txt"]), **hub)
    meta = pd.read_csv(io.BytesIO(files["compound_metadata.tsv"]), sep="\t", dtype=str, keep_default_na=False)
    hub_table = samples.merge(drugs, on="pert_iname").assign(core=lambda t: t["broad_id"].str[:13])
    known = meta.assign(core=meta["broad_sample"].str[:13]).merge(hub_table[["core", "moa"]].drop_duplicates(), on="core")
    assert known["moa"].nunique() == settings.moas
    assert (known.groupby("moa")["core"].nunique() == settings.compounds_per_moa).all()
    assert known["moa"].str.contains("|", regex=False).any()
    assert known["InChIKey"].str.fullmatch("[A-Z]{14}-[A-Z]{10}-[A-Z]").all()
    with pytest.raises(UnicodeDecodeError):
        files["repurposing_drugs.txt"].decode("utf-8")
    layout = pd.read_csv(io.BytesIO(files["well.csv.gz"]), compression="gzip")
    assert len(layout) == 18 * 36
    assert (layout["Metadata_JCP2022"] == DMSO).sum() == 18 * 6
    assert gzip.decompress(files["plate.csv.gz"]).startswith(
        b"Metadata_Source,Metadata_Batch,Metadata_Plate,Metadata_PlateType\n"
    )


def test_every_kind_of_defect_is_planned_and_spoils_what_it_says() -> None:
    settings = TINY.model_copy(update={"defects": True})
    plates = draw_plates(settings)
    wells = {source: wells_of(settings, source) for source in settings.sources}
    planned = plan_defects(settings, plates, wells)
    assert len({d.kind for d in planned}) == len(planned) == 10
    assert not plan_defects(TINY, plates, wells)
    assert any(p.name.isdigit() for p in plates)
    assert not any(p.name.isdigit() for p in draw_plates(TINY))
    for defect in planned:
        plate = next(p for p in plates if p.name == defect.plate)
        clean = image_list(plate, list(wells[plate.source]), 1)
        spoiled = spoil_list(clean, [defect])
        change = {"well_not_listed": -1, "duplicate_rows": 1, "partial_plate": int(len(clean) * 0.4) - len(clean)}
        assert len(spoiled) - len(clean) == change.get(defect.kind, 0)
        assert spoiled.equals(clean) == (defect.kind not in {*change, "wrong_illumination_name"})
    data = bytes(range(1, 100))
    assert spoil_file(data, "zero_filled") == bytes(99)
    assert spoil_file(data, "truncated") == data[:33]
    assert spoil_file(data, "missing_file") is None
    assert spoil_file(data, None) == data


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"moas": 200}, "384"),
        ({"unknown_moas": 117}, "387 wells do not fit a 384-well plate; lower moas, unknown_moas"),
        ({"imbalance": 50.0}, "384"),
        ({"sources": ["a", "a"]}, "distinct"),
        ({"sources": ["a b"]}, "letters"),
        ({"moa": 3}, "Extra"),
        ({"unknown_moas": 1, "unknown_only_in": ["sim_z"]}, "'sim_z': no such source; sources has sim_a, sim_b, sim_c"),
        ({"unknown_only_in": ["sim_b"]}, "give unknown_moas 1 or more"),
        ({"imbalance_by_source": True}, "raise it"),
        ({"imbalance": 0.5}, "greater than or equal to 1"),
        ({"severity": -1}, "greater than or equal to 0"),
        ({"biology_severity": 4}, "less than or equal to 3"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        SimulateSettings(**change)
