"""Export a finished model: a folder of weights, a description and a card that stands alone; or into MLflow's registry.

The options below choose among the models of the results; what they leave open is listed. Nothing is trained, and no tile is read.
"""

import sys

from pydantic import AliasChoices, Field

from coda_ray.config import Address, Config, Granularity, SourceName, parse_job, told_in_one_line
from coda_ray.methods import Method


class ExportJob(Config):
    """Configuration of jobs/export.py."""

    out: Address | None = None
    """Folder or `s3://` address (reached as results are) to write to; unset only with register."""
    # pydantic's classes have a `register` of their own.
    register_as: str | None = Field(None, pattern=r"^[\w. -]+$", validation_alias=AliasChoices("register", "register_as"))
    """Name in MLflow's model registry (MLFLOW_TRACKING_URI, else that of the results): a new version, with the alias `source`
    or `adapted-<target>-<unit>`."""
    source: SourceName | None = None
    """Source that the model was trained on; a pool of labs as sim_a+sim_b."""
    target: SourceName | None = None
    """Target that it was adapted to; the source itself for an unadapted model."""
    method: Method | None = None
    """What it is, such as supervised, dual-cb, coda."""
    granularity: Granularity | None = None
    """Unit of adaptation."""
    unit: str | None = None
    """The source, batch or plate that it was adapted to."""
    seed: int | None = Field(None, ge=0)
    """Its seed."""
    stage: str | None = None
    """Address, or key, of the folder of the stage in the results (`adapt/...`, `classify/...`)."""
    classifier: str | None = None
    """The same of its classifier, where an adaptation fits several."""


def main() -> int:
    """Run the job."""
    job = parse_job(ExportJob, prog="jobs/export.py", description=__doc__ or "")
    from coda_ray.config import ConfigError
    from coda_ray.pipeline.models import choose, export_of, stored_models
    from coda_ray.storage import open_place
    from coda_ray.tracking.registry import RegistryError, register
    from coda_ray.training.checkpoints import DamagedFileError

    with told_in_one_line("jobs/export.py", DamagedFileError, RegistryError):
        if not job.out and not job.register_as:
            raise ConfigError("out and register are unset; give --out FOLDER, --register NAME, or both")
        results, chosen = open_place(job.results), set(ExportJob.model_fields) - set(Config.model_fields) - {"out", "register_as"}
        export = export_of(job, choose(stored_models(results), results, **job.model_dump(include=chosen)))
        print(f"{export.origin.text}: key {export.model.key}")
        if job.out:
            out = open_place(job.results.model_copy(update={"address": job.out}))
            print(f"{'exported' if export.write(out) else 'there already'}: {out.address()}")
        if job.register_as:
            made = register(job, job.register_as, export.files, export.model.key, export.model.description["origin"])
            print(f"{'registered' if made.fresh else 'registered already'}: {made.address}, alias {made.alias}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
