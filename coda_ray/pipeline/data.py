"""The tiles of each stage: training and held-out plates of a source, units of a target, and their cross-batch partners."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coda_ray.config import Config, ConfigError, Granularity, Ingest, Place, labs_of
from coda_ray.jump.prepare import preparation_of
from coda_ray.jump.tables import CONTROL, NEGATIVE_CONTROL
from coda_ray.storage import open_place
from coda_ray.tiles.plan import Partners, SamplePlan
from coda_ray.tiles.reader import TileSource
from coda_ray.tiles.store import COMPOUND, KEPT_SELECTIONS, LABEL, UNIT_COLUMNS, TileIndex, TileStore, forget_selections

# Of the tiles that are drawn for a figure.
DRAW_SEED = 0


class DataError(ConfigError):
    """Tiles that a stage cannot use as configured; the text names them and the remedy."""


def load_tiles(config: Config, source: str) -> TileIndex:
    """Load the index of one source, a lab or a pool of labs, from the tile store, once per process.

    Raises
    ------
    FileNotFoundError
        When the source has no finished plate.
    DataError
        When its tiles are smaller than `views.tile_crop`.
    """
    for lab in labs_of(source):
        _large_enough(config, lab, stored_tiles(config, lab))
    return stored_tiles(config, source)


def stored_tiles(config: Config, source: str) -> TileIndex:
    """Load the index of one source as `load_tiles` does, whatever the size of its tiles.

    Raises
    ------
    FileNotFoundError
        When the source has no finished plate.
    """
    return _load(config.tiles.model_dump_json(), config.ingest.model_dump_json(), source)


def _large_enough(config: Config, source: str, index: TileIndex) -> TileIndex:
    """Refuse tiles that are smaller than the crop of every view."""
    smallest = index.smallest_side
    if smallest < config.views.tile_crop:
        raise DataError(
            f"views.tile_crop = {config.views.tile_crop}: {source} has tiles of {smallest} px; lower it, or ingest with a larger "
            "ingest.scale or a smaller ingest.pixel_size_um"
        )
    return index


@lru_cache(maxsize=16)
def _load(tiles: str, ingest: str, source: str) -> TileIndex:
    """Load by value, because configurations are no dictionary keys."""
    config = Config(tiles=Place.model_validate_json(tiles), ingest=Ingest.model_validate_json(ingest))
    return TileStore.open(open_place(config.tiles), preparation_of(config)).index(labs_of(source))


def held_out_plates(config: Config, source: str) -> dict[str, str]:
    """Name the plate of each lab of a source that no training sees.

    Returns
    -------
    dict
        Lab to plate; two labs may have plates of the same name.

    Raises
    ------
    DataError
        When the configured plate is not there, or the lab has a single plate.
    """
    return {lab: _held_out_plate(config, lab) for lab in labs_of(source)}


def _held_out_plate(config: Config, lab: str) -> str:
    """Name the plate of one lab that no training sees."""
    names = _plates(load_tiles(config, lab))
    chosen = config.held_out.get(lab, names[-1])
    if chosen not in names:
        raise DataError(f"held_out.{lab} = {chosen!r}: no such plate; {lab} has {', '.join(names)}")
    if len(names) == 1:
        raise DataError(
            f"{lab} has the single plate {chosen!r}, which is held out: nothing is left to train on; ingest more plates"
        )
    return chosen


def held_out_compounds(config: Config, source: str) -> tuple[str, ...]:
    """Name the compounds that no training on a source sees, and that alone are scored; none with split=plate.

    Chosen by the hash of their names within each MoA of the source, so that every source with the same compounds, and every
    seed, holds out the same ones; a pool, of the compounds of all its labs. No label of a target takes part.
    """
    if config.split == "plate":
        return ()
    return _held_out_compounds(load_tiles(config, source), config.held_out_compounds)


@lru_cache(maxsize=KEPT_SELECTIONS)
def _held_out_compounds(index: TileIndex, share: float) -> tuple[str, ...]:
    """Choose a share of each MoA's compounds."""
    named = index.labelled().frame[[COMPOUND, LABEL]].drop_duplicates()
    chosen: list[str] = []
    for _, compounds in named.groupby(LABEL)[COMPOUND]:
        ranked = sorted(compounds, key=lambda name: hashlib.sha256(name.encode()).digest())
        wanted = max(1, round(share * len(ranked)))
        chosen += ranked[: min(wanted, len(ranked) - 1)]
    return tuple(sorted(chosen))


def seen(config: Config, source: str, index: TileIndex) -> TileIndex:
    """Keep the tiles that training on a source may use."""
    held_out = held_out_compounds(config, source)
    return _without(index, held_out) if held_out else index


def had(config: Config, source: str, index: TileIndex) -> TileIndex:
    """Keep the tiles of a target that adaptation from a source, whatever is fitted there, and the choice among models may use.

    With split=new-compounds a lab has the images of the compounds that are scored, and no label of theirs.
    """
    return index if config.split == "new-compounds" else seen(config, source, index)


def unseen(config: Config, source: str, index: TileIndex) -> TileIndex:
    """Keep the tiles that features are measured on: all; where compounds are held out, these and the controls."""
    if config.split == "plate":
        return index
    of_interest = index.frame[COMPOUND].isin(held_out_compounds(config, source))
    return index.where(of_interest | (index.frame[CONTROL] == NEGATIVE_CONTROL))


def scored(config: Config, source: str, index: TileIndex, classes: Sequence[str]) -> TileIndex:
    """Keep the tiles that a classifier of a source is scored on: MoA labels it knows; of compounds held out, where there are."""
    asked = unseen(config, source, index)
    return asked.where(asked.frame[LABEL].isin(classes))


def training_tiles(config: Config, source: str) -> TileIndex:
    """Tiles of a source without its held-out plates and compounds."""
    return seen(config, source, _divided(config, source, held_out=False))


def pretraining_tiles(config: Config, source: str) -> TileIndex:
    """Tiles of a source that pre-training learns from: its training tiles, by `learn_from`.

    Raises
    ------
    DataError
        When none is left.
    """
    return _learnt(config, source, source, training_tiles(config, source))


def known_compounds(config: Config, source: str) -> tuple[str, ...]:
    """Name the compounds that have a MoA label anywhere in a source, held-out compounds left out; their labels are not told."""
    return _known_compounds(seen(config, source, load_tiles(config, source)))


@lru_cache(maxsize=KEPT_SELECTIONS)
def _known_compounds(index: TileIndex) -> tuple[str, ...]:
    """Name the labelled compounds."""
    return tuple(sorted(index.labelled().frame[COMPOUND].dropna().unique()))


def _learnt(config: Config, source: str, of: str, index: TileIndex) -> TileIndex:
    """Keep the tiles, of a source or of a target, that are learnt from without labels."""
    if config.learn_from == "all":
        return index
    kept = _with(index, known_compounds(config, source))
    if not len(kept):
        raise DataError(
            f"learn_from = known-compounds: no tile of {of} has a compound with a MoA label in {source}; give the compound and "
            "MoA tables to jobs/ingest.py, or learn_from all"
        )
    return kept


@lru_cache(maxsize=KEPT_SELECTIONS)
def _with(index: TileIndex, compounds: tuple[str, ...]) -> TileIndex:
    """Keep some compounds."""
    return index.where(index.frame[COMPOUND].isin(compounds))


def _divided(config: Config, source: str, *, held_out: bool) -> TileIndex:
    """Keep the held-out plates of a source, or all others."""
    return _on_plates(load_tiles(config, source), tuple(held_out_plates(config, source).items()), held_out)


@lru_cache(maxsize=KEPT_SELECTIONS)
def _on_plates(index: TileIndex, plates: tuple[tuple[str, str], ...], inside: bool) -> TileIndex:
    """Keep some plates, each named with its lab, or all others."""
    named = pd.MultiIndex.from_frame(index.frame[[UNIT_COLUMNS["source"], UNIT_COLUMNS["plate"]]])
    return index.where(named.isin(plates) == inside)


@lru_cache(maxsize=KEPT_SELECTIONS)
def _without(index: TileIndex, compounds: tuple[str, ...]) -> TileIndex:
    """Drop some compounds."""
    return index.where(~index.frame[COMPOUND].isin(compounds))


@lru_cache(maxsize=KEPT_SELECTIONS)
def _plates(index: TileIndex) -> list[str]:
    """Names of plates, by batch and name."""
    plates = index.frame[["Metadata_Batch", "Metadata_Plate"]].drop_duplicates()
    names: list[str] = plates.sort_values(["Metadata_Batch", "Metadata_Plate"])["Metadata_Plate"].tolist()
    return names


def held_out_tiles(config: Config, source: str) -> TileIndex:
    """Tiles of a source's held-out plate; of a pool, those of each of its labs."""
    return _divided(config, source, held_out=True)


def labelled_held_out(config: Config, source: str) -> TileIndex:
    """Tiles of a source's held-out plates, of compounds that training may know, that have a MoA label.

    Raises
    ------
    DataError
        When none has.
    """
    index = seen(config, source, held_out_tiles(config, source)).labelled()
    if not len(index):
        told = " and ".join(f"held_out.{lab} = {plate!r}" for lab, plate in held_out_plates(config, source).items())
        raise DataError(
            f"{told}: none of its tiles has a MoA label to score by; hold out another plate, and with train.knn_every also give "
            "labels"
        )
    return index


def classes_of(config: Config, source: str) -> list[str]:
    """Sorted MoA labels of a source's training tiles.

    Raises
    ------
    DataError
        When fewer than two are there.
    """
    names = sorted(training_tiles(config, source).labelled().frame[LABEL].unique())
    if len(names) < 2:
        raise DataError(f"{source}: its training tiles carry {len(names)} MoA label(s); give the MoA tables to jobs/ingest.py")
    return names


def drawn(index: TileIndex, most: int) -> TileIndex:
    """Draw tiles by chance, in an order by chance, without their labels; all where there are no more."""
    rows = np.random.default_rng(DRAW_SEED).permutation(len(index))[:most]
    return TileIndex(index.frame.iloc[rows].reset_index(drop=True), index.folder, index.channels).without_labels()


def label_codes(index: TileIndex, classes: list[str]) -> NDArray[np.int64]:
    """Class of each tile, -1 where it has none of these labels."""
    return pd.Categorical(index.frame[LABEL], categories=classes).codes.astype(np.int64)


@dataclass(frozen=True, eq=False)
class UnlabelledTiles:
    """What self-supervision sees: anchors, and the pool that their partners come from; no labels.

    Parameters
    ----------
    pool
        Tiles without the label column.
    anchors
        (A,) int64 rows of the pool that samples start from.
    """

    pool: TileIndex
    anchors: NDArray[np.int64]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the anchors and of the pool."""
        return {"anchors": self.anchored().fingerprint, "pool": self.pool.fingerprint}

    def anchored(self) -> TileIndex:
        """Keep the anchors alone."""
        return _anchored(self)

    def partners(self, across: Granularity) -> Partners:
        """Index the pool by compound and batch, or plate; those of two labs are two, whatever their names."""
        compounds = pd.factorize(self.pool.frame[COMPOUND])[0].astype(np.int64)
        return Partners.build(compounds, self.pool.codes(across))

    def source(self, *, seed: int, crop: int, pairs: Granularity | None) -> TileSource:
        """Describe the stream: single tiles, or pairs across batches or plates."""
        partners = self.partners(pairs) if pairs else None
        return TileSource(self.pool, SamplePlan(seed, self.anchors, partners), crop)

    def check_partners(self, config: Config, what: str, *, adapting: bool) -> str | None:
        """Report compounds that have no tile in another batch (or plate, by `dino.pairs`).

        Parameters
        ----------
        config
            Settings; of an adaptation, with its own section `dino`.
        what
            What would train, for people.
        adapting
            Whether it is an adaptation, which has remedies of its own.

        Returns
        -------
        str or None
            A sentence for the log where the configuration lets such tiles be their own partner.

        Raises
        ------
        DataError
            Where it does not.
        """
        across = config.dino.pairs
        lonely = self.anchors[self.partners(across).count(self.anchors) == 0]
        if not len(lonely):
            return None
        compounds = self.pool.frame[COMPOUND].iloc[lonely]
        names, unknown, why = sorted(map(str, compounds.dropna().unique())), int(compounds.isna().sum()), []
        if names:
            some = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            why.append(f"{len(names)} compound(s) have no tile in another {across}: {some}")
        if unknown:
            why.append(f"of {unknown} no compound is known, which well and compound table give to jobs/ingest.py")
        told = f"{what}: {len(lonely)} of {len(self.anchors)} tiles have no partner, because {', and '.join(why)}"
        if config.adapt.no_partner == "error":
            remedies = ["--adapt.no-partner same-image (views of one image)", *self._remedies(config, lonely, adapting)]
            raise DataError(f"{told}; remedies: {', '.join(remedies)}, or method oda")
        return f"{told}; each is its own partner"

    def _remedies(self, config: Config, lonely: NDArray[np.int64], adapting: bool) -> list[str]:
        """Name the options that give every lonely tile a partner, as far as these tiles tell."""
        found = []
        if config.dino.pairs == "batch" and (self.partners("plate").count(lonely) > 0).all():
            option = "--adapt.dino.pairs" if adapting else "--dino.pairs"
            found.append(f"{option} plate (partners from other plates of the same batch)")
        if adapting and config.adapt.partner_pool == "unit":
            found.append("--adapt.partner-pool source (partners from the whole target)")
        return found


@lru_cache(maxsize=KEPT_SELECTIONS)
def _anchored(tiles: UnlabelledTiles) -> TileIndex:
    """Keep the anchors alone."""
    mask = np.zeros(len(tiles.pool), bool)
    mask[tiles.anchors] = True
    return tiles.pool.where(mask)


@lru_cache(maxsize=KEPT_SELECTIONS)
def unlabelled(index: TileIndex) -> UnlabelledTiles:
    """Every tile is an anchor and a possible partner."""
    return UnlabelledTiles(index.without_labels(), np.arange(len(index), dtype=np.int64))


def target_tiles(config: Config, source: str, target: str) -> TileIndex:
    """Tiles of a target that a model of a source may adapt to."""
    return had(config, source, load_tiles(config, target))


def known_tiles(config: Config, source: str, target: str) -> TileIndex:
    """Tiles of a target that an adaptation learns from: of `target_tiles` those of `adapt.plates`, by `learn_from`.

    Raises
    ------
    DataError
        When the target has no such plate, or none of these compounds.
    """
    names = config.adapt.plates
    if not names:
        return _learnt(config, source, target, target_tiles(config, source, target))
    index = stored_tiles(config, target)
    missing = sorted(set(names) - set(index.units("plate")))
    if missing:
        raise DataError(f"adapt.plates = {missing[0]!r}: {target} has no such finished plate; ingest it, or correct it")
    return _learnt(config, source, target, had(config, source, _large_enough(config, target, _only(index, tuple(names)))))


@lru_cache(maxsize=KEPT_SELECTIONS)
def _only(index: TileIndex, plates: tuple[str, ...]) -> TileIndex:
    """Keep some plates."""
    return index.where(index.frame[UNIT_COLUMNS["plate"]].isin(plates))


def forget() -> None:
    """Load indices anew from now on: plates were added to the store."""
    for kept in (_load, _only, _on_plates, _with, _without, _plates, _anchored, unlabelled, _adaptation_tiles):
        kept.cache_clear()
    for named in (_held_out_compounds, _known_compounds):
        named.cache_clear()
    forget_selections()


def units_of(config: Config, target: str, granularity: Granularity, seed: int) -> list[str]:
    """Choose the units of a target that are adapted to, by `adapt.unit`.

    Raises
    ------
    DataError
        When the target has no unit of that name.
    """
    units, wanted = load_tiles(config, target).units(granularity), config.adapt.unit
    if wanted == "all" or granularity == "source":
        return units
    if wanted == "random":
        return [units[np.random.default_rng(seed).integers(len(units))]]
    if wanted not in units:
        raise DataError(f"adapt.unit = {wanted!r}: {target} has no such {granularity}; it has {', '.join(units)}")
    return [wanted]


def adaptation_tiles(config: Config, source: str, target: str, granularity: Granularity, unit: str) -> UnlabelledTiles:
    """Tiles of one unit of a target that a model of a source may adapt to, with partners from `adapt.partner_pool`.

    Raises
    ------
    DataError
        When the target has no such unit.
    """
    return _adaptation_tiles(known_tiles(config, source, target), target, granularity, unit, config.adapt.partner_pool)


@lru_cache(maxsize=KEPT_SELECTIONS)
def _adaptation_tiles(
    index: TileIndex, target: str, granularity: Granularity, unit: str, partner_pool: Literal["source", "unit"]
) -> UnlabelledTiles:
    """Choose anchors and pool."""
    whole = index.without_labels()
    inside = (whole.frame[UNIT_COLUMNS[granularity]] == unit).to_numpy()
    if not inside.any():
        known = ", ".join(whole.units(granularity))
        raise DataError(f"{target}: no {granularity} {unit!r} is known, but {known}; see adapt.plates, adapt.unit, learn_from")
    if partner_pool == "unit":
        return unlabelled(whole.where(inside))
    return UnlabelledTiles(whole, np.flatnonzero(inside).astype(np.int64))
