"""The cells of one field of view: where they lie, how they differ from each other, their nuclei."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coda_ray.jump.simulate.world import NAMES, TRAITS, Floats

# Cells whose centre lies this far outside still reach into the field.
MARGIN_UM = 30.0
SMALLEST_GAP_UM = 12.0
# Share of cells that respond to a compound at all.
PENETRANCE = 0.92
ANGLES = 256


@dataclass(frozen=True)
class Bodies:
    """Closed outlines: centre (µm), orientation (rad), mean radius (µm), stretch, and radius by angle.

    Attributes
    ----------
    x, y, angle, radius, stretch
        float64, shape (n,). An outline is `stretch` times longer and `1 / stretch` times as wide.
    profile
        float32, shape (n, 256): radius relative to the mean, by angle in the body's own frame.
    """

    x: Floats
    y: Floats
    angle: Floats
    radius: Floats
    stretch: Floats
    profile: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Population:
    """All cells in and around one field.

    Attributes
    ----------
    cells, nuclei
        Outlines; a cell has one nucleus or more.
    owner
        int64, shape (nuclei,): the cell of each nucleus.
    traits
        Physical value of each trait, float64, shape (cells,).
    rounded
        bool, shape (cells,): mitotic or dying cells, round and thick.
    """

    cells: Bodies
    nuclei: Bodies
    owner: npt.NDArray[np.int64]
    traits: dict[str, Floats]
    rounded: npt.NDArray[np.bool_]


def _profiles(rng: np.random.Generator, amplitude: Floats, orders: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Radius by angle: a circle with random low harmonics of the given amplitude."""
    theta = np.linspace(-np.pi, np.pi, ANGLES, endpoint=False)
    profile = np.ones((len(amplitude), ANGLES))
    for order in orders:
        phase = rng.uniform(0, 2 * np.pi, (len(amplitude), 1))
        weight = amplitude[:, None] * rng.normal(0, 1, (len(amplitude), 1)) * 2 / order
        profile += weight * np.cos(order * theta + phase)
    return np.clip(profile, 0.45, 1.9).astype(np.float32)


def _positions(rng: np.random.Generator, per_mm2: float, field_um: float) -> tuple[Floats, Floats]:
    """Scatter centres with local crowding and voids; nuclei do not stack.

    The density is a log-Gaussian field made of a few plane waves of 150 to 500 µm (a Cox process), thinned by dart throwing.
    """
    side = field_um + 2 * MARGIN_UM
    waves = 2 * np.pi / rng.uniform(150, 500, 6)
    heading, phase = rng.uniform(0, 2 * np.pi, 6), rng.uniform(0, 2 * np.pi, 6)
    wanted = int(rng.poisson(per_mm2 * rng.lognormal(-0.02, 0.2) * side**2 * 1e-6))
    tries = rng.uniform(-MARGIN_UM, field_um + MARGIN_UM, (12 * wanted + 24, 2))
    along = tries @ np.stack([np.cos(heading), np.sin(heading)])
    crowding = np.exp(0.8 * np.cos(along * waves + phase).sum(1) / np.sqrt(3))
    tries = tries[rng.random(len(tries)) < crowding / 4]
    kept = np.empty((wanted, 2))
    count = 0
    for point in tries:
        if count == wanted:
            break
        if count == 0 or np.min(np.sum((kept[:count] - point) ** 2, axis=1)) > SMALLEST_GAP_UM**2:
            kept[count] = point
            count += 1
    return kept[:count, 0], kept[:count, 1]


def _nuclei(
    rng: np.random.Generator, cells: Bodies, traits: dict[str, Floats], many: float, rounded: npt.NDArray[np.bool_]
) -> tuple[Bodies, npt.NDArray[np.int64]]:
    """One nucleus for most cells, two or three smaller ones for some; rounded cells have a condensed one."""
    count = 1 + ((rng.random(len(cells.x)) < many) & ~rounded) * rng.integers(1, 3, len(cells.x))
    owner = np.repeat(np.arange(len(cells.x)), count)
    n, several = len(owner), count[owner] > 1
    rank = np.arange(n) - np.repeat(np.cumsum(count) - count, count)
    radius = traits["nucleus_diameter_um"][owner] / 2 * np.where(several, rng.uniform(0.68, 0.86, n), 1.0)
    radius = np.where(rounded[owner], np.minimum(radius, 5.2), radius)
    # Nuclei of one cell sit around its centre; a single one lies a little off it.
    around = 2 * np.pi * rank / count[owner] + rng.uniform(0, 2 * np.pi, len(cells.x))[owner]
    away = np.where(several, 1.05 * radius, rng.uniform(0, 0.12, n) * cells.radius[owner])
    nuclei = Bodies(
        x=cells.x[owner] + away * np.cos(around),
        y=cells.y[owner] + away * np.sin(around),
        angle=cells.angle[owner] + rng.normal(0, 0.35, n),
        radius=radius,
        stretch=np.sqrt(1 + np.where(rounded[owner], 0.1, traits["nucleus_elongation"][owner])),
        profile=_profiles(rng, traits["nucleus_lobing"][owner] * np.where(rounded[owner], 0.4, 1.0), (2, 3, 4)),
    )
    return nuclei, owner


def draw_population(rng: np.random.Generator, base: Floats, effect: Floats, field_um: float) -> Population:
    """Draw the cells of one field.

    Parameters
    ----------
    rng
        The field's own random numbers.
    base
        Where untreated cells of this lab, batch and well lie, in trait units, shape (traits,).
    effect
        The compound's shift, shape (traits,); cells follow it to different degrees, some not at all.
    field_um
        Side of the field (µm).

    Returns
    -------
    Population
    """
    whole = {name: float(TRAITS[name].value(z)) for name, z in zip(NAMES, base + effect, strict=True)}
    x, y = _positions(rng, whole["cell_density_mm2"], field_um)
    n = len(x)
    response = (rng.random(n) < PENETRANCE) * np.clip(rng.normal(1, 0.2, n), 0.2, 1.8)
    own = rng.normal(size=(n, len(NAMES))) * np.array([TRAITS[name].cell_sd for name in NAMES])
    z = base + response[:, None] * effect + own
    traits = {name: TRAITS[name].value(z[:, i]) for i, name in enumerate(NAMES)}
    rounded = rng.random(n) < whole["rounded_share"]
    cells = Bodies(
        x=x,
        y=y,
        angle=rng.uniform(0, 2 * np.pi, n),
        radius=np.where(rounded, rng.uniform(7.5, 10.0, n), traits["cell_radius_um"]),
        stretch=np.where(rounded, 1.0, np.sqrt(1 + traits["cell_elongation"])),
        profile=_profiles(rng, np.where(rounded, 0.02, traits["protrusion"]), (2, 3, 4, 5)),
    )
    nuclei, owner = _nuclei(rng, cells, traits, whole["multinucleation"], rounded)
    return Population(cells, nuclei, owner, traits, rounded)
