"""Models as things: from finished stages to a folder that stands alone, and from an address to a model."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from pydantic import ValidationError

from coda_ray.config import REGISTRY, Config, ConfigError, Granularity
from coda_ray.jump.prepare import preparation_of
from coda_ray.learn.exported import DESCRIPTION, WEIGHTS, ExportedModel, ModelError, Start, pack, unpack
from coda_ray.methods import Method, model_with, trained_by
from coda_ray.pipeline import networks
from coda_ray.pipeline.methods.shot import shares_of
from coda_ray.pipeline.moments import moments_of_all
from coda_ray.pipeline.stage import Stage, check_made_of, not_run
from coda_ray.pipeline.train_stages import lineage, load_model, loss_of, objective_of, root_of, stage_tensors
from coda_ray.storage import Folder, open_place
from coda_ray.tracking.card import CARD, model_card
from coda_ray.tracking.records import READS_AT_A_TIME, read_records
from coda_ray.tracking.registry import fetch

# Scores of a model that its card shows.
CARD_SCORES = ("accuracy", "macro_f1", "well_accuracy", "well_macro_f1")
_WITHOUT_SEED = ("source", "target", "method", "granularity", "unit", "scope", "split")


@dataclass(frozen=True)
class Origin:
    """What a model is: the row of a result matrix that it belongs to."""

    method: Method
    source: str
    target: str
    granularity: Granularity
    unit: str
    seed: int

    @property
    def text(self) -> str:
        """For people."""
        where = "" if self.target == self.source else f" to {self.target} {self.granularity} {self.unit}"
        return f"{self.method} {self.source}{where}, seed {self.seed}"


@dataclass(frozen=True)
class StoredModel:
    """A model that finished stages hold.

    Parameters
    ----------
    classifier
        The labelled stage.
    adapted
        The adaptation that stands on the same feature extractor; None for the model as the source gave it.
    """

    classifier: Stage
    adapted: Stage | None

    @property
    def last(self) -> Stage:
        """The stage that made it."""
        return self.adapted or self.classifier

    @property
    def stages(self) -> list[Stage]:
        """Every stage that trained a part of it: pre-training, classifier, adaptations in their order."""
        return [*self.classifier.needs, self.classifier, *(lineage(self.adapted)[1:] if self.adapted else [])]

    @property
    def origin(self) -> Origin:
        """What it is."""
        known = self.classifier.inputs
        if self.adapted is None:
            loss = loss_of(self.classifier.needs[0]) if self.classifier.needs else None
            return Origin(model_with(loss).name, known["source"], known["source"], "source", known["source"], known["seed"])
        own = self.adapted.inputs
        return Origin(
            trained_by(objective_of(self.adapted)).name,
            known["source"],
            own["target"],
            own["granularity"],
            own["unit"],
            own["seed"],
        )


@dataclass(frozen=True)
class Export:
    """What an export wrote.

    Parameters
    ----------
    model
        The model, as it is read back from the files.
    files
        Name to content: weights, description and card.
    origin
        What it is.
    """

    model: ExportedModel
    files: dict[str, bytes]
    origin: Origin

    def write(self, out: Folder) -> bool:
        """Write the folder: whole, because a folder without its description is no model.

        Parameters
        ----------
        out
            The folder.

        Returns
        -------
        bool
            False where the same model was there already; its card is written anew.

        Raises
        ------
        ConfigError
            When another model is there.
        """
        try:
            before = out.read(DESCRIPTION)
        except FileNotFoundError:
            before = None
        if before not in (None, self.files[DESCRIPTION]):
            raise ConfigError(f"{out.address(DESCRIPTION)}: another model is there; give another folder, or delete that one")
        for name in sorted(self.files, key=lambda name: name == DESCRIPTION):
            out.write(name, self.files[name])
        return before is None


def stored_models(results: Folder) -> list[StoredModel]:
    """List the models of a results folder: the finished labelled stages of its jobs, as they are and under the adaptations.

    Trials of a sweep are no job's; the winner is, once it was run.
    """
    of_jobs = {path for job in read_records(results, "jobs") for path in job["stages"]}
    classifiers, adaptations = (
        [stage for stage in _finished(results, kind) if stage.path in of_jobs] for kind in ("classify", "adapt")
    )
    models = [StoredModel(classifier, None) for classifier in classifiers]
    return models + [StoredModel(classifier, adapted) for adapted in adaptations for classifier in _under(adapted, classifiers)]


def choose(models: Sequence[StoredModel], results: Folder, **wanted: Any) -> StoredModel:
    """Choose one model by what it is.

    Parameters
    ----------
    models
        From `stored_models`.
    results
        Where they are, for messages.
    **wanted
        Fields of `Origin`, `stage` and `classifier` (ends of the addresses of their folders); None takes any.

    Raises
    ------
    ConfigError
        When none or several are such; lists them.
    """
    asked = {name: value for name, value in wanted.items() if value is not None}
    found = [model for model in models if _fits(model, asked)]
    if len(found) == 1:
        return found[0]
    told = ", ".join(f"{name} = {value!r}" for name, value in asked.items()) or "no choice"
    listed = "\n".join(
        f"  {results.address(model.last.path)}  {model.origin.text}  (classifier {model.classifier.key})"
        for model in sorted(found or models, key=lambda model: model.origin.text)
    )
    if found:
        raise ConfigError(
            f"{told}: {len(found)} models are such; say more, or give jobs/export.py --stage and --classifier of one of\n{listed}"
        )
    missing = f"; there are\n{listed}" if models else "; there is none yet: run jobs/adapt.py or jobs/matrix.py first"
    raise ConfigError(f"{told}: no finished model in {results.address()} is such{missing}")


def export_of(config: Config, stored: StoredModel) -> Export:
    """Bring the model of finished stages into the form that stands alone.

    Parameters
    ----------
    config
        Where results and tiles are now; the settings come from the job that trained the model.
    stored
        The model.

    Raises
    ------
    ConfigError
        When no job of these results tells how its tiles were prepared.
    DamagedFileError
        When its weights are not those that the stage wrote, or what it was made of was trained again.
    """
    results = open_place(config.results)
    jobs = [job for job in read_records(results, "jobs") if stored.last.path in job["stages"]]
    own = _config_of(config, results, stored, jobs)
    channels, origin = list(own.ingest.channels), stored.origin
    check_made_of(stored.stages, results)
    network = load_model(own, stored.classifier, stored.adapted, len(channels))
    facts = {
        "channels": channels,
        "classes": list(stored.classifier.inputs["classes"]),
        "preparation": preparation_of(own),
        "view": {"tile_crop": own.views.tile_crop, "size": own.views.size_global},
        "origin": asdict(origin),
        "initial_weights": _initial_weights(stored),
        "trained_on": [_training(stage, results) for stage in stored.stages],
    }
    files = pack(network, networks.vit_spec(own, len(channels)), facts, _start(own, results, stored))
    model = unpack(files[DESCRIPTION], files[WEIGHTS], results.address(stored.last.path))
    files[CARD] = model_card(model.description, model.key, scores_of(results, stored, jobs), CARD_SCORES).encode()
    return Export(model, files, origin)


def find_model(config: Config, address: str) -> ExportedModel:
    """Find a model by its address.

    Parameters
    ----------
    config
        Settings; S3 is reached as results are, the registry is that of `tracking`.
    address
        An exported folder; the folder of a finished `classify` or `adapt` stage; or `models:/NAME/VERSION` and
        `models:/NAME@ALIAS` of MLflow's registry.

    Raises
    ------
    ConfigError
        When there is no model.
    ModelError
        When it is damaged.
    RegistryError
        When the registry does not give it.
    """
    if address.startswith(REGISTRY):
        files = fetch(config, address)
        return unpack(files[DESCRIPTION], files[WEIGHTS], address)
    folder = open_place(config.results.model_copy(update={"address": address}))
    try:
        description = folder.read(DESCRIPTION)
    except FileNotFoundError:
        return _of_stage(config, folder)
    try:
        return unpack(description, folder.read(WEIGHTS), folder.address())
    except FileNotFoundError:
        raise ModelError(f"{folder.address(WEIGHTS)}: the file is not there; export or copy the whole folder again") from None


def scores_of(results: Folder, stored: StoredModel, jobs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Tabulate the scores of a model, with mean and standard deviation over the seeds of the jobs that trained it.

    Parameters
    ----------
    results
        The results folder.
    stored
        The model.
    jobs
        Records of those jobs.

    Returns
    -------
    DataFrame
        One row per target and scope: identity, counts, accuracy with its interval, the other scores, and of each score
        `<score>_mean`, `<score>_std` (NaN with one seed), `seeds`.
    """
    keys, origin = {key for job in jobs for key in job["transfers"]}, stored.origin
    frame = pd.DataFrame([record for record in read_records(results, "transfers") if record["key"] in keys])
    if frame.empty:
        return frame
    if stored.adapted:
        own = frame["history"] == stored.adapted.path
    else:
        whole = (frame["scope"] == "whole") | (frame["source"] == frame["target"])
        own = whole & (frame[["source", "method", "seed"]] == [origin.source, origin.method, origin.seed]).all(axis=1)
    groups = frame.groupby(list(_WITHOUT_SEED))[list(CARD_SCORES)]
    spread = groups.mean().add_suffix("_mean").join(groups.std().add_suffix("_std")).join(groups.size().rename("seeds"))
    return frame[own].join(spread, on=list(_WITHOUT_SEED)).sort_values(["split", "target", "scope"], ignore_index=True)


def _finished(results: Folder, kind: str) -> list[Stage]:
    """Read the finished stages of a kind, many at a time; those of a release that makes keys otherwise are left out."""
    with ThreadPoolExecutor(READS_AT_A_TIME) as pool:
        found = pool.map(partial(_stage_or_none, results), [f"{kind}/{name}" for name in results.names(kind)])
        return [stage for stage in found if stage is not None]


def _stage_or_none(results: Folder, path: str) -> Stage | None:
    """Read a finished stage."""
    try:
        return read_stage(results, path)
    except ConfigError:
        return None


def read_stage(results: Folder, path: str) -> Stage:
    """Read a finished stage and those that it stands on; none of them can be run.

    Parameters
    ----------
    results
        The results folder.
    path
        `<kind>/<key>`.

    Raises
    ------
    ConfigError
        When one is not there, not finished, or not what its folder is named by.
    """
    try:
        note = json.loads(results.read(f"{path}/stage.json"))
        needs = tuple(read_stage(results, need) for need in note["needs"])
        stage = Stage(note["stage"], note["title"], note["inputs"], not_run, needs)
    except FileNotFoundError:
        raise ConfigError(f"{results.address(path)}: there is no stage; correct the address") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{results.address(path)}/stage.json: cannot be read ({error}); run its job again") from None
    if stage.path != path:
        raise ConfigError(
            f"{results.address(path)}/stage.json: its content has the key {stage.key}; it was changed, or another "
            "release wrote it; run its job again"
        )
    if stage.facts(results) is None:
        raise ConfigError(f"{results.address(path)}: {stage.title} is not finished; run its job again")
    return stage


def _under(adapted: Stage, classifiers: Sequence[Stage]) -> list[Stage]:
    """List the classifiers that an adaptation fits: that through which it was trained, else all on its pre-training."""
    base, through = root_of(adapted), {need.key for need in adapted.needs if need.kind == "classify"}
    if base.kind == "classify":
        return [base]
    under = [classifier for classifier in classifiers if [need.key for need in classifier.needs] == [base.key]]
    return [classifier for classifier in under if classifier.key in through] if through else under


def _fits(model: StoredModel, asked: Mapping[str, Any]) -> bool:
    """Whether a model is what is asked for."""
    known = {
        **asdict(model.origin),
        "stage": model.last.path,
        "classifier": model.classifier.path,
    }
    paths = ("stage", "classifier")
    return all(
        known[name].endswith(str(value).rstrip("/").rsplit("/", 1)[-1]) if name in paths else known[name] == value
        for name, value in asked.items()
    )


def _of_stage(config: Config, folder: Folder) -> ExportedModel:
    """Build the model of a stage's folder."""
    root, _, path = folder.root.rpartition("/")
    root, _, kind = root.rpartition("/")
    if kind not in ("classify", "adapt") or not folder.exists("stage.json"):
        raise ConfigError(
            f"{folder.address()}: there is no model; give an exported folder, the folder of a finished classify or adapt stage "
            "of the results, or models:/NAME/VERSION"
        )
    results = Folder(folder.fs, root)
    last = read_stage(results, f"{kind}/{path}")
    models = (
        [StoredModel(last, None)]
        if kind == "classify"
        else [StoredModel(classifier, last) for classifier in _under(last, _finished(results, "classify"))]
    )
    place = config.results.model_copy(update={"address": results.address()})
    return export_of(config.model_copy(update={"results": place}), choose(models, results, stage=path)).model


def _config_of(config: Config, results: Folder, stored: StoredModel, jobs: Sequence[Mapping[str, Any]]) -> Config:
    """Take the settings of a job that trained a model, with results and tiles where they are now."""
    of_both = [job for job in jobs if stored.classifier.path in job["stages"]]
    if not of_both:
        raise ConfigError(
            f"{results.address(stored.last.path)}: no job of these results tells how its tiles were prepared; run jobs/adapt.py "
            "with its configuration, which looks up what is there"
        )
    known = {name: value for name, value in of_both[-1]["config"].items() if name in Config.model_fields}
    try:
        own = Config.model_validate(known)
    except ValidationError as error:
        raise ConfigError(
            f"{results.address('jobs')}/{of_both[-1]['key']}.json: its configuration is not of this release: "
            f"{error.errors()[0]['msg']}; run its job again"
        ) from None
    return own.model_copy(update={"results": config.results, "tiles": config.tiles})


def _start(config: Config, results: Folder, stored: StoredModel) -> Start | None:
    """Collect what an adaptation elsewhere starts from: of dual models by DINO, as their source gave them."""
    needs = stored.classifier.needs
    if stored.adapted or not needs or loss_of(needs[0]) not in ("dino", "dino-cb"):
        return None
    (pretrained,) = needs
    dino = {name: value for name, value in stage_tensors(config, pretrained).items() if name != "centre"}
    seen = pretrained.inputs["tiles"]["anchors"]
    anchors = [
        stage
        for stage in _finished(results, "moments")
        if [need.key for need in stage.needs] == [stored.classifier.key] and stage.inputs["tiles"] == seen
    ]
    try:  # the index alone, and where the source's tiles are not at hand the model ships without
        prior = torch.tensor(shares_of(config, stored.classifier.inputs["source"], stored.classifier.inputs["classes"]))
    except FileNotFoundError:
        prior = None
    return Start(dino, moments_of_all(config, anchors[0]) if anchors else None, prior)


def _initial_weights(stored: StoredModel) -> str:
    """Name what the first stage began with; a file by its hash, never by its path."""
    inputs = stored.stages[0].inputs
    if "weights" in inputs:
        shipped = inputs["model"].get("init") == "simulated"
        what = "the small backbone that coda_ray ships, trained on simulated labs" if shipped else "a file of weights"
        return f"{what}, SHA-256 {inputs['weights']['sha256']}"
    return str(inputs["model"].get("init", Config().model.init))


def _training(stage: Stage, results: Folder) -> dict[str, Any]:
    """Tell of one stage what it was trained on."""
    facts = stage.facts(results) or {}
    return {
        "stage": stage.path,
        "title": stage.title,
        "tiles": stage.inputs["tiles"],
        "steps": facts.get("steps"),
        "labels": stage.kind == "classify",
    }
