"""What a simulated bucket holds: sizes, names, seed, and three presets."""

from pydantic import Field, field_validator, model_validator

from coda_ray.config import Section

# Raised whenever a pixel of any bucket or a field of its record changes; results of different versions are not compared.
# Version 2 draws what version 1 drew wherever its new settings keep their defaults.
SIMULATOR_VERSION = 2


class SimulateSettings(Section):
    """Size and seed of one simulated world."""

    seed: int = Field(0, ge=0)
    """The world: mechanisms, compounds, microscopes, batches and every cell follow from it."""
    sources: list[str] = Field(["sim_a", "sim_b", "sim_c"], min_length=1)
    """Names of the labs; each has its own microscope, staining and file layout."""
    batches_per_source: int = Field(4, ge=1)
    """Batches of each source; every second one has two plates."""
    moas: int = Field(10, ge=2)
    """Mechanisms of action that the tables name."""
    compounds_per_moa: int = Field(3, ge=2)
    """Compounds of each mechanism."""
    wells_per_compound: int = Field(1, ge=1)
    """Wells of each compound on a plate."""
    dmso_wells: int = Field(6, ge=1)
    """Untreated wells on a plate."""
    unknown_moas: int = Field(0, ge=0)
    """Further mechanisms, of compounds_per_moa compounds each, that no table names: their wells are recorded and get no label."""
    unknown_only_in: list[str] = Field([])
    """Sources whose plates hold the compounds of unknown mechanisms; empty means all."""
    imbalance: float = Field(1.0, ge=1, le=100)
    """Wells of the most frequent of the named mechanisms for each well of the rarest, which keeps wells_per_compound; the others
    lie between them in equal ratios."""
    imbalance_by_source: bool = False
    """Give each source its own order of frequent and rare mechanisms, instead of one order for all."""
    severity: float = Field(1.0, ge=0, le=3)
    """How far the optics and stains of labs and batches lie from their common mean: 0 alike, 1 as calibrated, 2 twice as far."""
    biology_severity: float = Field(1.0, ge=0, le=3)
    """The same for the cells of labs and batches: shape and number when untreated, and how strongly each trait responds."""
    sites_per_well: int = Field(2, ge=1)
    """Fields of view per well."""
    field_px: int = Field(256, ge=32)
    """Side of a raw image (px of about 0.65 µm)."""
    defects: bool = False
    """Plant the defects of real buckets and list them in defects.json."""

    @field_validator("sources")
    @classmethod
    def _plain_names(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
            raise ValueError("give distinct names of letters, digits and underscores, such as sim_a,sim_b")
        return names

    @model_validator(mode="after")
    def _asks_for_something(self) -> "SimulateSettings":
        strangers = [name for name in self.unknown_only_in if name not in self.sources]
        if strangers:
            raise ValueError(f"unknown_only_in = {strangers[0]!r}: no such source; sources has {', '.join(self.sources)}")
        if self.unknown_only_in and not self.unknown_moas:
            raise ValueError("unknown_only_in says where unknown mechanisms are, and there are none; give unknown_moas 1 or more")
        if self.imbalance_by_source and self.imbalance == 1:
            raise ValueError("imbalance_by_source orders frequent and rare mechanisms, and imbalance = 1 has none; raise it")
        return self

    @model_validator(mode="after")
    def _fits_a_plate(self) -> "SimulateSettings":
        if self.wells_per_plate > 384:
            raise ValueError(
                f"{self.wells_per_plate} wells do not fit a 384-well plate; "
                "lower moas, unknown_moas, compounds_per_moa, wells_per_compound, imbalance or dmso_wells"
            )
        return self

    @property
    def known_compounds(self) -> int:
        """Compounds whose mechanism the tables name."""
        return self.moas * self.compounds_per_moa

    @property
    def unknown_compounds(self) -> int:
        """Compounds whose mechanism no table names."""
        return self.unknown_moas * self.compounds_per_moa

    @property
    def wells_by_rank(self) -> list[int]:
        """Wells of a compound on a plate, from the most frequent of the named mechanisms to the rarest."""
        shares = (1 - rank / (self.moas - 1) for rank in range(self.moas))
        return [round(self.wells_per_compound * self.imbalance**share) for share in shares]

    @property
    def wells_per_plate(self) -> int:
        """Wells of the plate layout; where each source has an order of its own, the most that it may take."""
        # At worst no mechanism has the same rank in two sources.
        orders = len(self.sources) if self.imbalance_by_source else 1
        known = sum(self.wells_by_rank[place // orders] for place in range(self.moas)) * self.compounds_per_moa
        return known + self.unknown_compounds * self.wells_per_compound + self.dmso_wells


PRESETS: dict[str, SimulateSettings] = {
    "tiny": SimulateSettings(
        sources=["sim_a", "sim_b", "sim_c"],
        batches_per_source=2,
        moas=3,
        compounds_per_moa=2,
        dmso_wells=2,
        sites_per_well=1,
        field_px=96,
    ),
    "demo": SimulateSettings(),
    "bench": SimulateSettings(batches_per_source=2, compounds_per_moa=2, sites_per_well=1, field_px=1080),
}
