"""What a simulated bucket holds: sizes, names, seed, and three presets."""

from pydantic import Field, field_validator, model_validator

from coda_ray.config import Section

# Raised whenever a pixel of any bucket changes; results of different versions are not compared.
SIMULATOR_VERSION = 1


class SimulateSettings(Section):
    """Size and seed of one simulated world."""

    seed: int = Field(0, ge=0)
    """The world: mechanisms, compounds, microscopes, batches and every cell follow from it."""
    sources: list[str] = Field(["sim_a", "sim_b", "sim_c"], min_length=1)
    """Names of the labs; each has its own microscope, staining and file layout."""
    batches_per_source: int = Field(4, ge=1)
    """Batches of each source; every second one has two plates."""
    moas: int = Field(10, ge=2)
    """Mechanisms of action."""
    compounds_per_moa: int = Field(3, ge=2)
    """Compounds of each mechanism."""
    wells_per_compound: int = Field(1, ge=1)
    """Wells of each compound on a plate."""
    dmso_wells: int = Field(6, ge=1)
    """Untreated wells on a plate."""
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
    def _fits_a_plate(self) -> "SimulateSettings":
        if self.wells_per_plate > 384:
            raise ValueError(
                f"{self.wells_per_plate} wells do not fit a 384-well plate; "
                "lower moas, compounds_per_moa, wells_per_compound or dmso_wells"
            )
        return self

    @property
    def wells_per_plate(self) -> int:
        """Wells that hold cells."""
        return self.moas * self.compounds_per_moa * self.wells_per_compound + self.dmso_wells


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
