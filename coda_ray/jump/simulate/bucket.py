"""Write a simulated bucket: images and illumination by Ray tasks, then lists, tables and a record of the world."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import tifffile

from coda_ray.config import CHANNELS, Place
from coda_ray.jump.simulate.defects import FILE_KINDS, Defect, plan_defects, spoil_file, spoil_list
from coda_ray.jump.simulate.layout import Plate, current_layout, draw_plates, image_list, old_layout, wells_of
from coda_ray.jump.simulate.microscope import estimated_illumination, expose, illumination
from coda_ray.jump.simulate.population import draw_population
from coda_ray.jump.simulate.render import Image, render
from coda_ray.jump.simulate.settings import SIMULATOR_VERSION, SimulateSettings
from coda_ray.jump.simulate.tables import Compound, draw_compounds, metadata_files
from coda_ray.jump.simulate.world import (
    NAMES,
    Batch,
    Floats,
    Optics,
    compound_effects,
    describe,
    draw_batch,
    generator,
    mechanisms,
    optics,
)
from coda_ray.storage import Folder, open_place

_WELLS_PER_TASK = 6
_TASKS_IN_FLIGHT = 64


def simulate_site(
    settings: SimulateSettings,
    plate: Plate,
    well: str,
    site: int,
    effect: Floats,
    scope: Optics,
    batch: Batch,
    light: Image,
) -> npt.NDArray[np.uint16]:
    """Draw, render and photograph one field of view: a pure function of the world's seed and the site's names.

    Parameters
    ----------
    settings
        The world.
    plate, well, site
        Where; sites count from 0.
    effect
        Shift of the well's compound in trait units, shape (traits,).
    scope, batch, light
        The source's `optics`, the batch's `draw_batch`, and its `illumination`.

    Returns
    -------
    ndarray of uint16, shape (5, field_px, field_px)
        Camera counts of DNA, ER, RNA, AGP, Mito.
    """
    names = (plate.source, plate.batch, plate.name)
    plate_rng = generator(settings.seed, "plate", *names)
    well_rng = generator(settings.seed, "well", *names, well)
    rng = generator(settings.seed, "site", *names, well, site)
    base = np.asarray(scope.habit) + np.asarray(batch.passage)
    base = base + plate_rng.normal(0, 0.08, len(NAMES)) + well_rng.normal(0, 0.12, len(NAMES))
    stain = np.exp(plate_rng.normal(0, 0.05, 5) + well_rng.normal(0, 0.10, 5))
    people = draw_population(rng, base, effect * np.asarray(scope.response), settings.field_px * scope.pixel_um)
    ideal = render(rng, people, settings.field_px, scope.pixel_um, scope.golgi_share, scope.unspecific)
    return expose(rng, ideal, scope, batch, light, stain)


def _tiff(pixels: npt.NDArray[np.uint16], compression: str | None) -> bytes:
    """One page, one strip, as the microscopes write it."""
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, pixels, compression=compression, photometric="minisblack", metadata=None, rowsperstrip=pixels.shape[0]
    )
    return buffer.getvalue()


def _npy(values: Image) -> bytes:
    """An array file."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _write_wells(
    settings: SimulateSettings, plate: Plate, wells: Mapping[str, int], defects: Sequence[Defect], out: Folder
) -> tuple[int, int]:
    """Write the images of some wells of a plate; return how many sites and bytes."""
    scope, batch = optics(settings, plate.source), draw_batch(settings, plate.source, plate.batch)
    light = illumination(scope, batch, settings.field_px)
    effects = compound_effects(settings)
    spoiled = {(d.well, d.site, d.channel): d.kind for d in defects if d.kind in FILE_KINDS}
    written = 0
    for well, content in wells.items():
        effect = effects[content] if content >= 0 else np.zeros(len(NAMES))
        for site in range(settings.sites_per_well):
            counts = simulate_site(settings, plate, well, site, effect, scope, batch, light)
            for k, channel in enumerate(CHANNELS):
                kind = spoiled.get((well, str(plate.site_number(site)), channel))
                data = spoil_file(_tiff(counts[k], plate.compression), kind)
                if data is not None:
                    out.write(f"{plate.images}/{plate.image_name(well, site, k)}", data)
                    written += len(data)
    return len(wells) * settings.sites_per_well, written


def _write_plate(
    settings: SimulateSettings, plate: Plate, wells: Mapping[str, int], defects: Sequence[Defect], out: Folder
) -> None:
    """Write a plate's illumination functions and image lists."""
    scope = optics(settings, plate.source)
    if not any(d.kind == "no_illumination" for d in defects):
        true = illumination(scope, draw_batch(settings, plate.source, plate.batch), settings.field_px)
        supplied = estimated_illumination(generator(settings.seed, "illumination", plate.name), true)
        for k in range(len(CHANNELS)):
            out.write(f"{plate.illumination}/{plate.illumination_name(k)}", _npy(supplied[k]))
    rows = spoil_list(image_list(plate, list(wells), settings.sites_per_well), defects)
    for path in plate.lists:
        if path.endswith(".parquet"):
            buffer = io.BytesIO()
            old_layout(rows).to_parquet(buffer, index=False)
            out.write(path, buffer.getvalue())
        else:
            table = current_layout(rows, plate, scope.pixel_um, settings.field_px)
            packing = {"method": "gzip", "mtime": 0} if path.endswith(".gz") else None
            buffer = io.BytesIO()
            table.to_csv(buffer, index=False, compression=packing)
            out.write(path, buffer.getvalue())


def _render_all(
    settings: SimulateSettings,
    plates: Sequence[Plate],
    wells: Mapping[str, Mapping[str, int]],
    defects: Mapping[str, Sequence[Defect]],
    out: Folder,
    progress: Callable[[int, int], None],
) -> tuple[int, int]:
    """Render every plate in Ray tasks of a few wells each; return how many sites and bytes were written."""
    task = ray.remote(num_cpus=1)(_write_wells)
    waiting = []
    for plate in plates:
        here = list(wells[plate.source].items())
        waiting += [(plate, dict(here[i : i + _WELLS_PER_TASK])) for i in range(0, len(here), _WELLS_PER_TASK)]
    total = sum(len(part) for _, part in waiting) * settings.sites_per_well
    running: list[Any] = []
    done = written = 0
    progress(0, total)
    while waiting or running:
        while waiting and len(running) < _TASKS_IN_FLIGHT:
            plate, part = waiting.pop(0)
            running.append(task.remote(settings, plate, part, defects.get(plate.name, ()), out))
        finished, running = ray.wait(running)
        for sites, size in ray.get(finished):
            done, written = done + sites, written + size
        progress(done, total)
    return done, written


def _record(
    settings: SimulateSettings,
    plates: Sequence[Plate],
    wells: Mapping[str, Mapping[str, int]],
    compounds: Sequence[Compound],
    scopes: Mapping[str, Optics],
) -> dict[str, Any]:
    """Everything that was drawn, for simulation.json."""
    sources: dict[str, Any] = {}
    for source, scope in scopes.items():
        batches: dict[str, Any] = {}
        for plate in (p for p in plates if p.source == source):
            drawn = batches.setdefault(plate.batch, {**describe(draw_batch(settings, source, plate.batch)), "plates": []})
            drawn["plates"].append(plate.name)
        style = next(p.style for p in plates if p.source == source)
        held = dict(Counter(compounds[c].moa for c in wells[source].values() if c >= 0))
        sources[source] = {"style": style, "optics": describe(scope), "batches": batches, "moa_wells": held}
    effects, shared = compound_effects(settings), mechanisms(settings)
    moas: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for i, compound in enumerate(compounds):
        effect = _named(shared[i // settings.compounds_per_moa])
        moa = moas[compound.known].setdefault(compound.moa, {"effect": effect, "compounds": {}})
        moa["compounds"][compound.name] = {"jcp2022": compound.jcp, "effect": _named(effects[i])}
    return {
        "version": SIMULATOR_VERSION,
        "settings": settings.model_dump(),
        "sources": sources,
        "moas": moas[True],
        "unknown_moas": moas[False],
    }


def _named(effect: Floats) -> dict[str, float]:
    """Traits that an effect shifts, by name."""
    return {name: round(float(z), 4) for name, z in zip(NAMES, effect, strict=True) if z}


def write_bucket(settings: SimulateSettings, out: Place, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Write a bucket in the layout of the Cell Painting Gallery; Ray must be running.

    Parameters
    ----------
    settings
        The world; the same settings give the same bytes whatever the cluster.
    out
        Where: holds `cpg0016-jump/`, `metadata/`, `simulation.json` and, with defects, `defects.json` afterwards.
    progress
        Called with the number of sites done and their total.

    Returns
    -------
    dict
        `version`, `plates`, `sites`, `bytes` of the images, `defects`.

    Raises
    ------
    OSError
        When the place cannot be written.
    """
    folder = open_place(out)
    plates, compounds = draw_plates(settings), draw_compounds(settings)
    wells = {source: wells_of(settings, source) for source in settings.sources}
    scopes = {source: optics(settings, source) for source in settings.sources}
    defects = plan_defects(settings, plates, wells)
    by_plate: dict[str, list[Defect]] = defaultdict(list)
    for defect in defects:
        by_plate[defect.plate].append(defect)
    for name in ("simulation.json", "defects.json"):  # of a bucket that was here before
        folder.delete(name)
    sites, written = _render_all(settings, plates, wells, by_plate, folder, progress)
    for plate in plates:
        _write_plate(settings, plate, wells[plate.source], by_plate[plate.name], folder)
    as_dmso = {(d.plate, d.well) for d in defects if d.kind == "recorded_as_dmso"}
    for name, data in metadata_files(settings, plates, wells, compounds, scopes, as_dmso).items():
        folder.write(f"metadata/{name}", data)
    if defects:
        folder.write("defects.json", _json([asdict(defect) for defect in defects]))
    # Last, so that its presence means a whole bucket.
    folder.write("simulation.json", _json(_record(settings, plates, wells, compounds, scopes)))
    return {"version": SIMULATOR_VERSION, "plates": len(plates), "sites": sites, "bytes": written, "defects": len(defects)}


def _json(values: object) -> bytes:
    """Readable JSON."""
    return (json.dumps(values, indent=1) + "\n").encode()
