"""The simulated world: what a mechanism does to a cell, and what a lab, a batch and a microscope do to its image.

Everything is drawn from the world's seed and a name, so that a source keeps its microscope and a compound its effect
whatever else the world holds.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from coda_ray.config import CHANNELS
from coda_ray.jump.simulate.settings import SimulateSettings

Floats = npt.NDArray[np.float64]


def generator(seed: int, *names: object) -> np.random.Generator:
    """Random numbers that depend on the world and on a name, and on nothing else."""
    digest = hashlib.sha256("/".join(str(name) for name in (seed, *names)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


@dataclass(frozen=True)
class Trait:
    """One axis of the morphology space.

    A cell's value is `base · exp(step · z)`, or the logistic counterpart where the value is a share.
    """

    group: str
    base: float
    step: float
    share: bool = False
    cell_sd: float = 0.35

    def value(self, z: Floats) -> Floats:
        """Physical value at z units from an untreated cell."""
        if self.share:
            odds = self.base / (1 - self.base) * np.exp(self.step * z)
            return np.asarray(odds / (1 + odds))
        return np.asarray(self.base * np.exp(self.step * z))


# Untreated values: cell and nucleus sizes and density are calibrated to real fields, see docs/simulator.md.
TRAITS: dict[str, Trait] = {
    "cell_density_mm2": Trait("culture", 700.0, 0.32, cell_sd=0.0),
    "rounded_share": Trait("culture", 0.025, 1.1, share=True, cell_sd=0.0),
    "nucleus_diameter_um": Trait("nucleus", 16.4, 0.15, cell_sd=0.7),
    "nucleus_elongation": Trait("nucleus", 0.36, 0.50, cell_sd=0.8),
    "nucleus_lobing": Trait("nucleus", 0.045, 0.85, share=True, cell_sd=0.6),
    "chromatin_contrast": Trait("nucleus", 0.20, 0.90, share=True),
    "chromatin_scale_um": Trait("nucleus", 3.0, 0.35),
    "dna_content": Trait("nucleus", 1.0, 0.22, cell_sd=1.0),
    "multinucleation": Trait("nucleus", 0.04, 1.3, share=True, cell_sd=0.0),
    "nucleoli_count": Trait("nucleolus", 2.6, 0.40),
    "nucleoli_level": Trait("nucleolus", 0.8, 0.45),
    "cell_radius_um": Trait("shape", 33.0, 0.20, cell_sd=0.5),
    "cell_elongation": Trait("shape", 0.90, 0.55, cell_sd=0.6),
    "protrusion": Trait("shape", 0.12, 0.80, share=True),
    "flatness": Trait("shape", 0.60, 0.85, share=True),
    "vacuoles": Trait("shape", 0.02, 1.25, share=True),
    "er_level": Trait("er", 1.0, 0.38, cell_sd=0.45),
    "er_perinuclear": Trait("er", 0.40, 0.95, share=True),
    "er_contrast": Trait("er", 0.17, 0.80, share=True),
    "er_scale_um": Trait("er", 3.0, 0.35),
    "rna_level": Trait("rna", 1.0, 0.35, cell_sd=0.45),
    "rna_nuclear": Trait("rna", 0.35, 0.85, share=True),
    "agp_level": Trait("agp", 1.0, 0.35, cell_sd=0.45),
    "actin_fibres": Trait("agp", 0.38, 0.95, share=True),
    "actin_cortex": Trait("agp", 0.38, 0.95, share=True),
    "golgi_level": Trait("agp", 1.0, 0.45),
    "golgi_spread_um": Trait("agp", 3.5, 0.45),
    "mito_level": Trait("mito", 1.0, 0.38, cell_sd=0.45),
    "mito_network": Trait("mito", 0.60, 1.1, share=True),
    "mito_perinuclear": Trait("mito", 0.42, 1.0, share=True),
    "mito_scale_um": Trait("mito", 4.5, 0.30),
}
NAMES = tuple(TRAITS)
GROUPS = tuple(dict.fromkeys(trait.group for trait in TRAITS.values()))


def _mechanism(rng: np.random.Generator) -> Floats:
    """Draw one effect: two traits in each of four groups, of which at least two groups show in DNA, ER or Mito."""
    effect = np.zeros(len(NAMES))
    seen = rng.choice(["nucleus", "shape", "er", "mito"], 2, replace=False)
    rest = rng.choice([group for group in GROUPS if group not in seen], 2, replace=False)
    for group in (*seen, *rest):
        members = [i for i, name in enumerate(NAMES) if TRAITS[name].group == group]
        chosen = rng.choice(members, min(2, len(members)), replace=False)
        effect[chosen] = rng.choice([-1.0, 1.0], len(chosen)) * rng.uniform(1.6, 2.8, len(chosen))
    return effect


def mechanisms(settings: SimulateSettings) -> Floats:
    """Effects of all mechanisms, chosen one after another to lie far apart.

    Returns
    -------
    ndarray of float64, shape (moas + unknown_moas, traits)
        Shifts in units of each trait's step; the unknown ones come last and change none of the others.
    """
    chosen: list[Floats] = []
    for name, count in (("mechanisms", settings.moas), ("unknown mechanisms", settings.unknown_moas)):
        rng = generator(settings.seed, name)
        for _ in range(count):
            candidates = [_mechanism(rng) for _ in range(16 if chosen else 1)]
            gaps = [min((float(np.linalg.norm(c - other)) for other in chosen), default=0.0) for c in candidates]
            chosen.append(candidates[int(np.argmax(gaps))])
    return np.stack(chosen)


def compound_effects(settings: SimulateSettings) -> Floats:
    """Effects of all compounds: the mechanism's, with a strength and a side effect of the compound's own.

    Returns
    -------
    ndarray of float64, shape ((moas + unknown_moas) * compounds_per_moa, traits)
        Compounds of one mechanism stand together, those of unknown mechanisms last.
    """
    rows = []
    for m, effect in enumerate(mechanisms(settings)):
        name = ("compound", m) if m < settings.moas else ("unknown compound", m - settings.moas)
        for c in range(settings.compounds_per_moa):
            rng = generator(settings.seed, *name, c)
            side = rng.normal(size=len(NAMES)) * (rng.random(len(NAMES)) < 0.3)
            rows.append(rng.uniform(0.8, 1.2) * effect + 0.4 * side)
    return np.stack(rows)


@dataclass(frozen=True)
class Optics:
    """A source: its microscope, camera and staining, how its cells look untreated and how strongly they respond.

    Tuples over channels are in the order DNA, ER, RNA, AGP, Mito.
    """

    microscope: str
    confocal: bool
    excitation: str
    numerical_aperture: float
    pixel_um: float
    depth_um: float
    haze: tuple[float, ...]
    haze_um: tuple[float, float]
    gain: tuple[float, ...]
    gamma: float
    offset: tuple[float, ...]
    bleed: tuple[tuple[int, int, float], ...]
    counts_per_photon: float
    read_noise: float
    full_scale: int
    vignetting: float
    golgi_share: float
    unspecific: tuple[float, ...]
    habit: tuple[float, ...]
    response: tuple[float, ...]


@dataclass(frozen=True)
class Batch:
    """What differs between two runs of one lab."""

    stain: tuple[float, ...]
    background: tuple[float, ...]
    focus_um: tuple[float, ...]
    vignette_centre: tuple[float, float]
    vignette_tilt: tuple[float, ...]
    passage: tuple[float, ...]


# Microscope, confocal, light source, numerical apertures and pixel sizes found among the sources of JUMP
# (jump-cellpainting/datasets, metadata/microscope_config.csv).
_INSTRUMENTS: tuple[tuple[str, bool, str, tuple[float, ...], tuple[float, float]], ...] = (
    ("Opera Phenix", False, "Laser", (0.8, 1.0), (0.597976, 0.597976)),
    ("CV8000", True, "Laser", (0.75, 1.0), (0.646, 0.652)),
    ("ImageXpress Micro Confocal", True, "LED", (0.75,), (0.695, 0.7032)),
)


# Labs differ in how their stains look more than in the shapes and numbers of their cells. How bright a stain is in a lab
# is its gain: exposure is set so that untreated cells use the camera's range.
_EXPOSED = ("er_level", "rna_level", "agp_level", "mito_level")
_GROUP_SD = {"culture": 0.45, "nucleus": 0.5, "shape": 0.6}
_HABIT_SD = np.array([0.0 if name in _EXPOSED else _GROUP_SD.get(trait.group, 1.6) for name, trait in TRAITS.items()])


@dataclass(frozen=True)
class Spread:
    """Where the draws of a field lie: their mean over all labs, and the limits of what is physical.

    Attributes
    ----------
    mean, low, high
        One number for all values of the field, or one for each.
    log
        Whether labs differ by factors instead of by amounts.
    """

    mean: float | tuple[float, ...]
    low: float | tuple[float, ...]
    high: float | tuple[float, ...]
    log: bool = False

    def scaled(self, drawn: npt.ArrayLike, by: float | Floats, unit: float = 1.0) -> Floats:
        """Move what was drawn to `by` times its distance from the mean, within the limits or where it was; 1 moves nothing.

        Mean and limits are in `unit`.
        """
        values, mean = np.asarray(drawn, dtype=np.float64), unit * np.asarray(self.mean)
        # Of the forms that 1 leaves exactly as they are.
        far = values * np.exp((by - 1) * np.log(values / mean)) if self.log else values + (by - 1) * (values - mean)
        low, high = unit * np.asarray(self.low), unit * np.asarray(self.high)
        return np.asarray(np.clip(far, np.minimum(values, low), np.maximum(values, high)))


# Means of the draws of `_draw_optics` over the three instruments and of `_draw_batch`.
_GAIN = (0.070, 0.24, 0.19, 0.11, 0.20)
_OPTICS = {
    "numerical_aperture": Spread(float(np.mean([np.mean(apertures) for *_, apertures, _ in _INSTRUMENTS])), 0.4, 1.2),
    "pixel_um": Spread(float(np.mean([sizes for *_, sizes in _INSTRUMENTS])), 0.3, 1.3),
    "depth_um": Spread(1.87, 0.3, 8.0),
    "haze": Spread((0.20, 0.33, 0.33, 0.30, 0.33), 0.0, 0.8),
    "haze_um": Spread((4.0, 15.0), (1.5, 6.0), (8.0, 30.0)),
    "gamma": Spread(float(np.exp(0.05)), 0.4, 2.5, log=True),
    "vignetting": Spread(0.25, 0.0, 0.6),
    "golgi_share": Spread(0.5, 0.0, 1.0),
    "unspecific": Spread((0.02, 0.30, 0.25, 0.25, 0.30), 0.0, 0.9),
}
# In units of the camera's full scale.
_CAMERA = {
    "gain": Spread(_GAIN, tuple(g / 4 for g in _GAIN), tuple(g * 4 for g in _GAIN), log=True),
    "offset": Spread(0.0075, 0.0005, 0.05),
    "counts_per_photon": Spread(1 / 68_600, 1e-6, 2e-4, log=True),
    "read_noise": Spread(0.00028, 0.00002, 0.005, log=True),
}
_BLEED = Spread((0.20, 0.25, 0.225, 0.30, 0.30, 0.02), 0.0, 0.8)
_BATCH = {
    "stain": Spread(1.0, 0.3, 3.0, log=True),
    "background": Spread(1.1, 0.1, 3.0),
    "focus_um": Spread(0.0, -5.0, 5.0),
    "vignette_centre": Spread(0.0, -0.5, 0.5),
    "vignette_tilt": Spread(0.0, -0.25, 0.25),
}
# How a lab grows its cells is biology, how its stains look is staining.
_GROWN = np.array([trait.group in _GROUP_SD for trait in TRAITS.values()])
_HABIT = Spread(0.0, tuple(np.where(_GROWN, -2.5, -4.0)), tuple(np.where(_GROWN, 2.5, 4.0)))
_PASSAGE = Spread(0.0, -3.0, 3.0)
_RESPONSE = Spread(1.0, 0.2, 3.0, log=True)


def _stretched(record: Optics | Batch, spreads: Mapping[str, Spread], by: float | Floats, unit: float = 1.0) -> dict[str, Any]:
    """Fields of a draw at `by` times their distance from the mean: floats, and tuples of floats."""
    fields: dict[str, Any] = {}
    for name, spread in spreads.items():
        far = spread.scaled(getattr(record, name), by, unit)
        fields[name] = tuple(float(value) for value in far) if far.ndim else float(far)
    return fields


def optics(settings: SimulateSettings, source: str) -> Optics:
    """Draw a source's microscope and staining, as far from the mean of all labs as the settings ask.

    What names an instrument stays: microscope, light source, whether it is confocal, and the bits of its camera.
    """
    drawn = _draw_optics(settings, source)
    by, biology = settings.severity, settings.biology_severity
    bleed = _BLEED.scaled([share for *_, share in drawn.bleed], by)
    return replace(
        drawn,
        **_stretched(drawn, _OPTICS, by),
        **_stretched(drawn, _CAMERA, by, drawn.full_scale),
        **_stretched(drawn, {"habit": _HABIT}, np.where(_GROWN, biology, by)),
        **_stretched(drawn, {"response": _RESPONSE}, biology),
        bleed=tuple((a, b, float(share)) for (a, b, _), share in zip(drawn.bleed, bleed, strict=True)),
    )


def _draw_optics(settings: SimulateSettings, source: str) -> Optics:
    """Draw a source's microscope and staining as they were calibrated."""
    rng = generator(settings.seed, "optics", source)
    index = settings.sources.index(source)
    name, confocal, light, apertures, sizes = _INSTRUMENTS[index % len(_INSTRUMENTS)]
    haze = rng.uniform(0.05, 0.40) if confocal else rng.uniform(0.45, 0.62)
    full_scale = int(rng.choice([4095, 65535])) if confocal else 65535
    gains = np.array(_GAIN) * np.exp(rng.normal(0, 0.25, 5)) * full_scale
    # RNA and AGP dyes overlap most, then ER into RNA: their filters are close or, in some labs, the same.
    bleed: tuple[tuple[int, int, float], ...]
    bleed = ((2, 3, rng.uniform(0.05, 0.35)), (3, 2, rng.uniform(0.05, 0.45)), (1, 2, rng.uniform(0.05, 0.40)))
    bleed += ((2, 1, rng.uniform(0.0, 0.60)), (3, 4, rng.uniform(0.0, 0.60)), (1, 0, rng.uniform(0.0, 0.04)))
    return Optics(
        microscope=name,
        confocal=confocal,
        excitation=light,
        numerical_aperture=float(rng.choice(apertures)),
        pixel_um=float(rng.uniform(*sizes)),
        depth_um=float(rng.uniform(0.6, 2.0) if confocal else rng.uniform(2.0, 4.0)),
        haze=tuple(float(v) for v in np.clip(haze * np.array([0.6, 1, 1, 0.9, 1]) * rng.uniform(0.85, 1.15, 5), 0, 0.8)),
        haze_um=(float(rng.uniform(3.0, 5.0)), float(rng.uniform(10.0, 20.0))),
        gain=tuple(float(v) for v in gains),
        gamma=float(np.exp(rng.uniform(-0.35, 0.45))),
        offset=tuple(float(v) for v in full_scale * rng.uniform(0.003, 0.012, 5)),
        bleed=tuple((a, b, float(v)) for a, b, v in bleed),
        counts_per_photon=full_scale / float(np.exp(rng.uniform(*np.log((20_000, 120_000) if confocal else (60_000, 300_000))))),
        read_noise=full_scale * float(np.exp(rng.uniform(np.log(0.0001), np.log(0.0008)))),
        full_scale=full_scale,
        vignetting=float(rng.uniform(0.10, 0.40)),
        golgi_share=float(rng.uniform(0.1, 0.9)),
        unspecific=tuple(float(v) for v in rng.uniform(0, [0.04, 0.6, 0.5, 0.5, 0.6])),
        habit=tuple(float(v) for v in rng.normal(0, 1, len(NAMES)) * _HABIT_SD),
        response=tuple(float(v) for v in np.exp(rng.normal(0, 0.4, len(NAMES)))),
    )


def draw_batch(settings: SimulateSettings, source: str, batch: str) -> Batch:
    """Draw a batch's staining, background, focus, illumination and passage of cells, as far from the mean as the settings ask."""
    drawn = _draw_batch(settings, source, batch)
    optical = _stretched(drawn, _BATCH, settings.severity)
    return replace(drawn, **optical, **_stretched(drawn, {"passage": _PASSAGE}, settings.biology_severity))


def _draw_batch(settings: SimulateSettings, source: str, batch: str) -> Batch:
    """Draw a batch as it was calibrated."""
    rng = generator(settings.seed, "batch", source, batch)
    common = rng.normal(0, 0.12)
    passage = rng.normal(0, 0.15, len(NAMES))
    passage[NAMES.index("cell_density_mm2")] += rng.normal(0, 0.6)
    return Batch(
        stain=tuple(float(v) for v in np.exp(common + rng.normal(0, 0.16, 5))),
        background=tuple(float(v) for v in rng.uniform(0.7, 1.5, 5)),
        focus_um=tuple(float(v) for v in rng.normal(0, 1.2) + rng.normal(0, 0.5, 5)),
        vignette_centre=(float(rng.normal(0, 0.15)), float(rng.normal(0, 0.15))),
        vignette_tilt=tuple(float(v) for v in rng.normal(0, 0.06, 2)),
        passage=tuple(float(v) for v in passage),
    )


def describe(record: Optics | Batch) -> dict[str, Any]:
    """A draw as plain values for simulation.json, channels and traits by name."""
    values = asdict(record)
    for key, value in values.items():
        if key in ("habit", "passage", "response"):
            values[key] = dict(zip(NAMES, value, strict=True))
        elif key == "bleed":
            values[key] = {f"{CHANNELS[a]}->{CHANNELS[b]}": share for a, b, share in value}
        elif isinstance(value, tuple) and len(value) == len(CHANNELS):
            values[key] = dict(zip(CHANNELS, value, strict=True))
    return values
