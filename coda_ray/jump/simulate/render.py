"""Ideal fluorescence of a field: what perfect optics would see of the cells, five channels, in units of a typical signal.

Each pixel learns its cell, its place in that cell's own frame and its distance to the nearest nucleus; every stain is then a
formula over those maps, evaluated for the whole field at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

from coda_ray.jump.simulate.population import ANGLES, Bodies, Population
from coda_ray.jump.simulate.world import Floats, generator

Image = npt.NDArray[np.float32]
Floating = npt.NDArray[np.floating[Any]]
_TILE, _PERIOD = 1024, 40.0


@cache
def _noise() -> Image:
    """Gaussian noise over about an octave that tiles the plane: period 40 px, unit variance. The same in every world."""
    white = fft.rfft2(generator(0, "texture").normal(size=(_TILE, _TILE)))
    cycles = np.hypot(fft.fftfreq(_TILE)[:, None], fft.rfftfreq(_TILE)[None]) * _PERIOD
    octaves = np.log2(np.maximum(cycles, 1e-3))
    # Equal power per octave asks for amplitude 1 / frequency in the plane.
    band = fft.irfft2(white * np.exp(-(octaves**2) / (2 * 0.8**2)) / np.maximum(cycles, 1e-3), s=(_TILE, _TILE))
    return np.asarray(band / band.std(), dtype=np.float32)


def _texture(u: Floating, v: Floating, scale_um: Floating | float, offset: Floating) -> Image:
    """Look the noise up at a scale of its own for every pixel; the offset gives each cell its own piece.

    The nearest of the table's fine samples serves: a step is a fortieth of the texture's period.
    """
    stretch = np.float32(_PERIOD) / scale_um
    row = (u * stretch + offset).astype(np.int32) & (_TILE - 1)
    column = (v * stretch + np.float32(1.7) * offset).astype(np.int32) & (_TILE - 1)
    return np.asarray(_noise().take(row * _TILE + column))


@dataclass(frozen=True)
class Nearest:
    """For each pixel the body it belongs to.

    Attributes
    ----------
    label
        int32; -1 where no body is near.
    inside
        float32: distance from the centre, 1 on the outline.
    second
        The same for the next body.
    """

    label: npt.NDArray[np.int32]
    inside: Image
    second: Image


def _nearest(bodies: Bodies, x: Image, y: Image, pixel_um: float, reach: float | Floats) -> Nearest:
    """Assign pixels to bodies by distance relative to each outline, up to `reach`; bodies that meet share a border."""
    shape = x.shape
    label = np.full(shape, -1, dtype=np.int32)
    first, second = np.full(shape, 9.0, dtype=np.float32), np.full(shape, 9.0, dtype=np.float32)
    half = reach * bodies.radius * bodies.stretch * bodies.profile.max(1)
    low = np.floor((np.stack([bodies.y, bodies.x]) - half) / pixel_um).astype(int).clip(0)
    high = np.ceil((np.stack([bodies.y, bodies.x]) + half) / pixel_um).astype(int) + 1
    to_index = np.float32(ANGLES / (2 * np.pi))
    for i in range(len(bodies.x)):
        window = (slice(low[0, i], max(high[0, i], 0)), slice(low[1, i], max(high[1, i], 0)))
        dx, dy = x[window] - np.float32(bodies.x[i]), y[window] - np.float32(bodies.y[i])
        if dx.size == 0:
            continue
        c, s, stretch = (np.float32(f) for f in (np.cos(bodies.angle[i]), np.sin(bodies.angle[i]), bodies.stretch[i]))
        u, v = (c * dx + s * dy) / stretch, (c * dy - s * dx) * stretch
        index = ((np.arctan2(v, u) + np.float32(np.pi)) * to_index).astype(np.int32)
        outline = np.float32(bodies.radius[i]) * bodies.profile[i]
        distance = np.hypot(u, v) / outline.take(index, mode="wrap")
        nearest = first[window]
        np.copyto(label[window], np.int32(i), where=distance < nearest)
        np.minimum(second[window], np.maximum(nearest, distance), out=second[window])
        np.minimum(nearest, distance, out=nearest)
    return Nearest(label, first, second)


def _keep_nuclei_whole(cell: Nearest, core: Nearest, owner: npt.NDArray[np.int64]) -> Nearest:
    """Give the pixels of a nucleus to its own cell where a neighbour's outline claimed them."""
    stray = (core.inside < 1.12) & (owner[core.label.clip(0)] != cell.label)
    return Nearest(
        label=np.where(stray, owner[core.label.clip(0)], cell.label).astype(np.int32),
        inside=np.where(stray, np.float32(0.5), cell.inside),
        second=np.where(stray, np.float32(0.9), cell.second),
    )


def _spots(x: Floats, y: Floats, weight: Floats, sigma_um: float, shape: tuple[int, int], pixel_um: float) -> Image:
    """Gaussian spots of the given peak height."""
    canvas = np.zeros(shape, dtype=np.float32)
    row, column = np.rint(y / pixel_um).astype(int), np.rint(x / pixel_um).astype(int)
    seen = (row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1])
    np.add.at(canvas, (row[seen], column[seen]), weight[seen].astype(np.float32))
    sigma = sigma_um / pixel_um
    return np.asarray(ndimage.gaussian_filter(canvas, sigma, truncate=3) * np.float32(2 * np.pi * sigma**2), dtype=np.float32)


@dataclass(frozen=True)
class _Maps:
    """What every stain needs to know about each pixel; all float32, shape (field_px, field_px)."""

    body: Image
    nucleus: Image
    to_nucleus_um: Image
    to_edge_um: Image
    height: Image
    u: Image
    v: Image
    offset: Image
    golgi: Image
    nucleoli: Image
    vacuoles: Image
    rounded: Image
    content: Image
    trait: dict[str, Image]


# The traits that stains ask for pixel by pixel.
_SPREAD = (
    "chromatin_scale_um", "chromatin_contrast", "er_level", "er_perinuclear", "er_contrast", "er_scale_um",
    "rna_level", "rna_nuclear", "nucleoli_level", "agp_level", "actin_fibres", "actin_cortex",
    "mito_level", "mito_network", "mito_perinuclear", "mito_scale_um",
)  # fmt: skip


def _organelles(
    rng: np.random.Generator, people: Population, shape: tuple[int, int], pixel_um: float
) -> tuple[Image, Image, Image]:
    """Golgi stacks beside the nucleus, nucleoli in it, vacuoles around it."""
    cells, nuclei, traits = people.cells, people.nuclei, people.traits
    n = len(cells.x)
    side, per_cell = rng.uniform(0, 2 * np.pi, n), 7
    owner = np.repeat(np.arange(n), per_cell)
    away = traits["nucleus_diameter_um"][owner] / 2 + 1.5
    spread = traits["golgi_spread_um"][owner]
    golgi = _spots(
        cells.x[owner] + away * np.cos(side[owner]) + spread * rng.normal(0, 0.7, n * per_cell),
        cells.y[owner] + away * np.sin(side[owner]) + spread * rng.normal(0, 0.7, n * per_cell),
        0.55 * traits["golgi_level"][owner] * ~people.rounded[owner],
        1.3,
        shape,
        pixel_um,
    )
    count = rng.poisson(traits["nucleoli_count"][people.owner])
    home = np.repeat(np.arange(len(count)), count)
    turn, far = rng.uniform(0, 2 * np.pi, len(home)), 0.62 * np.sqrt(rng.random(len(home))) * nuclei.radius[home]
    nucleoli = _spots(
        nuclei.x[home] + far * np.cos(turn),
        nuclei.y[home] + far * np.sin(turn),
        rng.uniform(0.6, 1.2, len(home)) * ~people.rounded[people.owner[home]],
        1.2,
        shape,
        pixel_um,
    )
    count = rng.poisson(25 * traits["vacuoles"] * ~people.rounded)
    home = np.repeat(np.arange(n), count)
    turn, far = rng.uniform(0, 2 * np.pi, len(home)), rng.uniform(0.35, 0.75, len(home)) * cells.radius[home]
    holes = rng.uniform(0.7, 1.6, len(home))
    vacuoles = _spots(cells.x[home] + far * np.cos(turn), cells.y[home] + far * np.sin(turn), holes, 1.6, shape, pixel_um)
    return golgi, nucleoli, vacuoles


def _maps(rng: np.random.Generator, people: Population, field_px: int, pixel_um: float) -> _Maps:
    """Draw outlines and organelles, and spread each cell's traits over its pixels."""
    axis = (np.arange(field_px, dtype=np.float32) + 0.5) * np.float32(pixel_um)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    shift = np.full_like(x, rng.uniform(0, _TILE))
    # Outlines are irregular: the plane is bent before distances are taken.
    bent_x = x + 1.4 * _texture(x, y, 30.0, shift)
    bent_y = y + 1.4 * _texture(x, y, 30.0, shift + 190)
    cells, nuclei = people.cells, people.nuclei
    core = _nearest(nuclei, x, y, pixel_um, 1 + 26 / nuclei.radius)
    on = core.label.clip(0).astype(np.intp)
    cell = _keep_nuclei_whole(_nearest(cells, bent_x, bent_y, pixel_um, 1.25), core, people.owner)
    at = cell.label.clip(0).astype(np.intp)

    def spread(values: npt.ArrayLike) -> Image:
        return np.asarray(values, dtype=np.float32).take(at)

    radius, rounded = spread(cells.radius), spread(people.rounded)
    to_edge = np.minimum((1 - cell.inside) * radius, 0.5 * (cell.second - cell.inside) * radius)
    to_nucleus = (core.inside - 1) * np.asarray(nuclei.radius, dtype=np.float32).take(on)
    c, s = spread(np.cos(cells.angle)), spread(np.sin(cells.angle))
    dx, dy = bent_x - spread(cells.x), bent_y - spread(cells.y)
    flat = spread(people.traits["flatness"])
    dome = np.maximum(1 - cell.inside**2, 0) ** (0.15 + 1.6 * (1 - flat))
    bulge = 0.9 * (1 - flat) * np.exp(-np.maximum(to_nucleus, 0) / 5)
    height = (dome + bulge) * (33 / radius) ** 0.6 * (1 - 0.45 * np.exp(-np.maximum(to_edge, 0) / 1.5))
    height = np.where(rounded > 0, 4.5 * np.sqrt(np.maximum(1 - cell.inside**2, 0)), height)
    body = np.where(cell.label < 0, 0, np.clip((1 - cell.inside) * radius / 1.5 + 0.5, 0, 1))
    nucleus = np.clip(0.5 - to_nucleus / 0.9, 0, 1) * (core.label >= 0)
    content = np.asarray(people.traits["dna_content"][people.owner], dtype=np.float32).take(on)
    content = content * (8.4 / np.asarray(nuclei.radius, dtype=np.float32).take(on)) ** 1.4
    golgi, nucleoli, vacuoles = _organelles(rng, people, x.shape, pixel_um)
    return _Maps(
        body=body.astype(np.float32),
        nucleus=nucleus.astype(np.float32),
        to_nucleus_um=np.where(core.label < 0, 99, np.maximum(to_nucleus, 0)).astype(np.float32),
        to_edge_um=np.maximum(to_edge, 0),
        height=height.astype(np.float32),
        u=c * dx + s * dy,
        v=c * dy - s * dx,
        offset=spread(rng.uniform(0, _TILE, len(cells.x))),
        golgi=golgi,
        nucleoli=np.minimum(nucleoli, 1.3) * nucleus.astype(np.float32),
        vacuoles=(1 / (1 + 2.5 * vacuoles)).astype(np.float32),
        rounded=rounded,
        content=content,
        trait={name: spread(people.traits[name]) for name in _SPREAD},
    )


def _dna(m: _Maps) -> Floating:
    """Chromatin: grainy, dark at nucleoli, the same content in a small or a large nucleus."""
    grain = _texture(m.u, m.v, m.trait["chromatin_scale_um"], m.offset + 31)
    chromatin = np.clip(1 + 1.1 * m.trait["chromatin_contrast"] * grain, 0.2, 3) * (1 - 0.30 * m.nucleoli)
    stain: Floating = m.nucleus * m.content * chromatin * (1 + 0.9 * m.rounded) + 0.02 * m.body * m.height
    return stain


def _er(m: _Maps) -> Floating:
    """Endoplasmic reticulum: a net that thickens towards the nucleus and rims it."""
    t = m.trait
    near = np.exp(-m.to_nucleus_um / 7)
    place = (1 - t["er_perinuclear"]) * 0.9 + 1.6 * t["er_perinuclear"] * near
    net = np.clip(1 + 1.2 * t["er_contrast"] * _texture(m.u, m.v, t["er_scale_um"], m.offset + 97), 0.15, 4)
    rim = 0.25 * np.exp(-((m.to_nucleus_um / 1.1) ** 2)) * (1 - m.nucleus)
    stain: Floating = t["er_level"] * m.body * m.height * m.vacuoles * (place * net * (1 - 0.35 * m.nucleus) + rim)
    return stain


def _rna(m: _Maps) -> Floating:
    """RNA: diffuse cytoplasm, paler nucleoplasm, bright nucleoli."""
    t = m.trait
    near = np.exp(-m.to_nucleus_um / 8)
    grain = np.clip(1 + 0.15 * _texture(m.u, m.v, 3.0, m.offset + 211), 0.3, 2)
    cytoplasm = (0.55 + 0.75 * near) * grain * (1 - m.nucleus) * m.vacuoles
    nucleus = m.nucleus * 2.2 * t["rna_nuclear"] * (1 + 1.3 * t["nucleoli_level"] * m.nucleoli)
    stain: Floating = t["rna_level"] * m.body * m.height * (cytoplasm + nucleus)
    return stain


def _agp(m: _Maps, golgi_share: float) -> Floating:
    """Actin (phalloidin) and Golgi with plasma membrane (WGA), mixed as the lab stains them."""
    t = m.trait
    lines = np.exp(-((_texture(m.u / 7, m.v, 5.0, m.offset + 317) / 0.30) ** 2))
    bundles = np.clip(0.5 + 0.6 * _texture(m.u / 2, m.v, 18.0, m.offset + 401), 0, 2)
    rim = np.exp(-((m.to_edge_um / 1.7) ** 2))
    thin = np.sqrt(m.height)
    actin = 0.35 * m.height + thin * (1.9 * t["actin_fibres"] * lines * bundles + 1.7 * t["actin_cortex"] * rim)
    puncta = np.clip(_texture(m.u, m.v, 2.5, m.offset + 53) - 1.2, 0, 2)
    membrane = m.height * (0.35 + 0.5 * np.exp(-m.to_nucleus_um / 7) + 0.25 * puncta) + 1.5 * m.golgi
    mixed = 1.3 * (1 - golgi_share) * actin + 1.3 * golgi_share * membrane
    stain: Floating = t["agp_level"] * m.body * mixed * (1 - 0.25 * m.nucleus) * (0.4 + 0.6 * m.vacuoles)
    return stain


def _mito(m: _Maps) -> Floating:
    """Mitochondria: a network of tubes or fragments, gathered around the nucleus or spread out."""
    t = m.trait
    noise = _texture(m.u / 1.6, m.v, t["mito_scale_um"], m.offset + 149)
    tubes = np.exp(-((noise / 0.40) ** 2))
    fragments = 1.7 / (1 + np.exp(-5 * (noise - 0.9)))
    network = t["mito_network"]
    tissue = 0.45 + 1.0 * (network * tubes + (1 - network) * fragments)
    gathered = np.exp(-m.to_nucleus_um / 6) * np.clip(1 + 0.45 * _texture(m.u, m.v, 24.0, m.offset + 449), 0.1, 2)
    place = (1 - t["mito_perinuclear"]) * 0.85 + 2.0 * t["mito_perinuclear"] * gathered
    stain: Floating = t["mito_level"] * m.body * m.height**0.8 * m.vacuoles * (1 - 0.55 * m.nucleus) * tissue * place
    return stain


def render(
    rng: np.random.Generator,
    people: Population,
    field_px: int,
    pixel_um: float,
    golgi_share: float,
    unspecific: Sequence[float],
) -> Image:
    """Draw a population in five stains.

    Parameters
    ----------
    rng
        The field's own random numbers.
    people
        The cells.
    field_px, pixel_um
        Side of the field (px) and of a pixel (µm).
    golgi_share
        Share of the Golgi and membrane stain in AGP, 0 to 1; the rest is actin.
    unspecific
        Share of each stain, 0 to 1, that colours the whole cell by its thickness, five values.

    Returns
    -------
    ndarray of float32, shape (5, field_px, field_px)
        DNA, ER, RNA, AGP, Mito; about 1 where an untreated cell is typical, 0 between cells.
    """
    if len(people.cells.x) == 0:
        return np.zeros((5, field_px, field_px), dtype=np.float32)
    maps = _maps(rng, people, field_px, pixel_um)
    specific = [_dna(maps), _er(maps), _rna(maps), _agp(maps, golgi_share), _mito(maps)]
    bulk = maps.body * maps.height**1.3 * maps.vacuoles
    levels = [np.ones_like(bulk), *(maps.trait[f"{stain}_level"] for stain in ("er", "rna", "agp", "mito"))]
    stains = [(1 - u) * own + u * level * bulk for own, level, u in zip(specific, levels, unspecific, strict=True)]
    return np.stack(stains).astype(np.float32)
