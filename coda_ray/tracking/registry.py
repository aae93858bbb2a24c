"""MLflow's model registry: exported folders under a name, with versions and aliases."""

import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coda_ray
from coda_ray.config import REGISTRY, Config, ConfigError
from coda_ray.learn.exported import DESCRIPTION, WEIGHTS
from coda_ray.storage import open_place
from coda_ray.tracking.outbox import one_line, without_password
from coda_ray.tracking.store import RunStore

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# What a server needs beside the code of `learn/`, which travels with the model; by name, never by address.
REQUIREMENTS = ("mlflow", "numpy", "pandas", "safetensors", "timm", "torch", "torchvision")
ALIAS_LENGTH = 255


class RegistryError(RuntimeError):
    """MLflow did not do what was asked for; the text says what and what to do."""


@dataclass(frozen=True)
class Registered:
    """One version of a registered model.

    Parameters
    ----------
    name, version, alias
        As MLflow has them.
    fresh
        Whether this version was made now; the same model is registered once.
    """

    name: str
    version: str
    alias: str
    fresh: bool

    @property
    def address(self) -> str:
        """How the version is asked for."""
        return f"{REGISTRY}{self.name}/{self.version}"


def alias_of(origin: Mapping[str, Any]) -> str:
    """Name what a model is for: `source`, or `adapted-<target>-<unit>`, in the letters that MLflow allows.

    Parameters
    ----------
    origin
        As in `model.json`.
    """
    if origin["target"] == origin["source"]:
        return "source"
    return re.sub(r"[^\w-]", "_", f"adapted-{origin['target']}-{origin['unit']}", flags=re.ASCII)[:ALIAS_LENGTH]


def register(config: Config, name: str, files: Mapping[str, bytes], key: str, origin: Mapping[str, Any]) -> Registered:
    """Log an exported model, and give it the alias of its kind, unless a newer version has that.

    Parameters
    ----------
    config
        `tracking` and `results` say where MLflow is.
    name
        Name in the registry.
    files
        The exported folder.
    key
        Key of the model.
    origin
        As in `model.json`; becomes tags.

    Raises
    ------
    ConfigError
        When nothing is sent to MLflow.
    RegistryError
        When it refuses.
    """
    store = _store(config)
    alias = alias_of(origin)
    try:
        client = store.client
        # A version whose tags a process that was killed did not come to write is known by its run.
        logged = client.search_runs([store.experiment_id], f"tags.kind = 'model' and tags.key = '{key}'")
        runs = {run.info.run_id for run in logged}
        versions = client.search_model_versions(f"name = '{name}'")
        before = [known for known in versions if known.tags.get("key") == key or known.run_id in runs]
        with warnings.catch_warnings():
            # MLflow warns of type hints of its own classes, and wants an example of the input.
            warnings.simplefilter("ignore", UserWarning)
            number = str(before[0].version) if before else _log(store, name, files, key)
        have = before[0].tags if before else {}
        for tag, value in {"key": key, **origin}.items():
            if have.get(tag) != str(value):
                client.set_model_version_tag(name, number, tag, str(value))
        # An alias never goes back to a version before the one that has it.
        if int(number) > int(client.get_registered_model(name).aliases.get(alias, 0)):
            client.set_registered_model_alias(name, alias, number)
    except Exception as error:  # MLflow's client, and those of its stores, each raise their own kind
        raise RegistryError(
            f"{without_password(store.address)}: {name!r} was not registered: {type(error).__name__}: {one_line(error)}; "
            "correct MLFLOW_TRACKING_URI or the name, then run this again"
        ) from error
    return Registered(name, number, alias, not before)


def fetch(config: Config, address: str) -> dict[str, bytes]:
    """Read the files of a registered model.

    Parameters
    ----------
    config
        `tracking` and `results` say where MLflow is.
    address
        `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Raises
    ------
    ConfigError
        When nothing is sent to MLflow.
    RegistryError
        When there is no such model, or it is none of ours.
    """
    store = _store(config)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _client(store)
            import mlflow

            mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=folder)
        except Exception as error:
            raise RegistryError(
                f"{address}: {without_password(store.address)} does not give it: {type(error).__name__}: {one_line(error)}; "
                "correct the name, the version or alias, or MLFLOW_TRACKING_URI"
            ) from error
        found = [path.parent for path in Path(folder).rglob(DESCRIPTION) if (path.parent / WEIGHTS).exists()]
        if len(found) != 1:
            raise RegistryError(f"{address}: holds no exported model of coda_ray; register one with jobs/export.py --register")
        return {name: (found[0] / name).read_bytes() for name in (DESCRIPTION, WEIGHTS)}


def _store(config: Config) -> RunStore:
    """Find MLflow."""
    store = RunStore.open(config.tracking, open_place(config.results))
    if store is None:
        raise ConfigError(
            "MLflow's registry is asked for, but nothing is sent to MLflow; set MLFLOW_TRACKING_URI and tracking.enabled"
        )
    return store


def _client(store: RunStore) -> "MlflowClient":
    """Point MLflow's global functions, which alone log and fetch models, at the store."""
    client = store.client
    import mlflow

    mlflow.set_tracking_uri(store.address)
    return client


def _log(store: RunStore, name: str, files: Mapping[str, bytes], key: str) -> str:
    """Log a model under a run of its own, and register it: code as files, never as pickles."""
    _client(store)
    import mlflow

    from coda_ray.tracking import served

    with tempfile.TemporaryDirectory() as folder:
        model, code = Path(folder) / "exported", Path(folder) / "coda_ray"
        model.mkdir()
        for file, data in files.items():
            (model / file).write_bytes(data)
        _copy_learn(code)
        own = {"kind": "model", "key": key}
        with mlflow.start_run(experiment_id=store.experiment_id, run_name=f"{name} {key}", tags=own):
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=served.__file__,
                artifacts={"model": str(model)},
                code_paths=[str(code)],
                signature=served.signature(files[DESCRIPTION]),
                pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in REQUIREMENTS],
                registered_model_name=name,
            )
    return str(logged.registered_model_version)


def _copy_learn(code: Path) -> None:
    """Copy the plain torch part of this package, by which a server reads the model, and the numbers that it draws."""
    package = Path(coda_ray.__file__).parent
    code.mkdir()
    for file in ("__init__.py", "draws.py"):
        shutil.copy(package / file, code / file)
    shutil.copytree(package / "learn", code / "learn", ignore=shutil.ignore_patterns("__pycache__"))
