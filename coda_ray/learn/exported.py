"""An exported model: weights and a description of everything that decides its input, read with plain torch.

`model.safetensors` has the tensors, `model.json` says which network they belong to, how its input is made, and what it was
trained on. A model that can be adapted without its source also has `adapt.safetensors`, which prediction does not read. All are
hashed in `model.json`, so that what was changed or mixed up is refused; nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from coda_ray.learn.dual import DualModel
from coda_ray.learn.moments import Moments
from coda_ray.learn.precision import Precision
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.learn.views import centre_crop, evaluation_view
from coda_ray.learn.vit import VitSpec, build_vit, load_exactly, spec_of, timm_arguments

FORMAT = 1
WEIGHTS = "model.safetensors"
ADAPTATION = "adapt.safetensors"
DESCRIPTION = "model.json"
NORMALISATION = "each channel of each view: / 255, - its mean, / (its standard deviation + 1e-6)"
KEY_LENGTH = 16


class ModelError(ValueError):
    """A model that cannot be used; the text names the file, the value and the remedy."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of N images.

    Parameters
    ----------
    probabilities
        (N, K) float32 softmax, classes in the model's order.
    embedding
        (N, D) float32 CLS tokens of the feature extractor.
    """

    probabilities: Tensor
    embedding: Tensor


@dataclass(frozen=True, eq=False)
class Start:
    """What an adaptation starts from beside the model; no image of the source.

    Parameters
    ----------
    dino
        Student, teacher and their heads, named as by `DinoObjective.state_dict`, without the centre.
    moments
        Of the feature extractor's tokens on the source, (2, D); None where they were not measured.
    prior
        (K,) float32 share of each class among the source's images, in the model's order; None where it is not known.
    """

    dino: Mapping[str, Tensor]
    moments: Moments | None = None
    prior: Tensor | None = None

    @property
    def head(self) -> dict[str, int]:
        """Sizes of DINO's heads, as `DinoHead` takes them."""
        hidden, bottleneck = (len(self.dino[f"student_head.mlp.{layer}.weight"]) for layer in (0, 4))
        return {"hidden": hidden, "bottleneck": bottleneck, "out_dim": len(self.dino["student_head.last.weight"])}


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """A model that was read and checked.

    Parameters
    ----------
    description
        Content of `model.json`.
    network
        The network, in evaluation mode.
    where
        Address of the folder, for messages.
    """

    description: Mapping[str, Any]
    network: SupervisedModel | DualModel
    where: str

    @property
    def key(self) -> str:
        """Names the model: the start of its description's hash, which covers the weights' hash."""
        return str(self.description["sha256"][DESCRIPTION])[:KEY_LENGTH]

    @property
    def classes(self) -> list[str]:
        """MoA labels, in the order of the probabilities."""
        return list(self.description["classes"])

    @property
    def channels(self) -> list[str]:
        """Channels of a tile, in order."""
        return list(self.description["channels"])

    @property
    def tile_crop(self) -> int:
        """Side of the centre crop of the tile that views come from (px)."""
        return int(self.description["view"]["tile_crop"])

    def views(self, tiles: Tensor) -> Tensor:
        """Cut and normalise what the network sees.

        Parameters
        ----------
        tiles
            (N, C, H, W) uint8, prepared as the description says; H and W at least `tile_crop`.

        Returns
        -------
        Tensor
            (N, C, size, size) float32.

        Raises
        ------
        ModelError
            When the tiles have another number of channels.
        ValueError
            When they are too small, or not uint8.
        """
        if tiles.ndim == 4 and tiles.shape[1] != len(self.channels):
            raise ModelError(
                f"{self.where}: tiles have {tiles.shape[1]} channels, the model reads {', '.join(self.channels)}; "
                "give these, in order"
            )
        view = self.description["view"]
        return evaluation_view(centre_crop(tiles, view["tile_crop"], "view.tile_crop"), view["size"])

    def predict(self, tiles: Tensor, precision: Precision | None = None) -> Prediction:
        """Predict, as the evaluation of a stage does.

        Parameters
        ----------
        tiles
            As for `views`, on the network's device.
        precision
            What the network computes in; None is float32.
        """
        autocast = (precision or Precision(tiles.device.type, torch.float32, "float32")).autocast()
        with torch.no_grad(), autocast:
            logits, cls = self.network(self.views(tiles))
        return Prediction(logits.float().softmax(1), cls.float())

    def require(self, channels: Sequence[str], preparation: Mapping[str, Any], where: str) -> None:
        """Refuse tiles that are not made as this model's were.

        Parameters
        ----------
        channels
            Channels of the tiles, in order.
        preparation
            Settings that decide a tile's pixels.
        where
            Address of the tiles, for the message.

        Raises
        ------
        ModelError
            Names each setting that differs, with both values.
        """
        wanted = {**self.description["preparation"], "channels": self.channels}
        given = json.loads(json.dumps({**preparation, "channels": list(channels)}))
        faults = [
            f"ingest.{name} = {given.get(name)!r}, the model wants {wanted.get(name)!r}"
            for name in sorted(wanted.keys() | given.keys())
            if wanted.get(name) != given.get(name)
        ]
        if faults:
            raise ModelError(
                f"{where}: these tiles are prepared otherwise than those of {self.where}/{DESCRIPTION}: {'; '.join(faults)}; "
                "ingest them with the model's settings, and give these here too"
            )


def pack(
    network: SupervisedModel | DualModel, spec: VitSpec, facts: Mapping[str, Any], start: Start | None = None
) -> dict[str, bytes]:
    """Write a model down.

    Parameters
    ----------
    network
        The model.
    spec
        Of its transformer, or of both.
    facts
        JSON: `classes` and `channels` in order, `preparation`, `view` (`tile_crop`, `size`), and whatever else is to be known.
    start
        For models that can be adapted.

    Returns
    -------
    dict
        Name to content of `model.safetensors`, `model.json` and, with a start, `adapt.safetensors`; the same for the same model,
        facts and start.
    """
    files = {WEIGHTS: _saved(network.state_dict())}
    if start is not None:
        own = {"moments.mean": start.moments.mean, "moments.std": start.moments.std} if start.moments else {}
        own |= {} if start.prior is None else {"prior": start.prior}
        files[ADAPTATION] = _saved({**start.dino, **own})
    description = {
        "format": FORMAT,
        "kind": "dual" if isinstance(network, DualModel) else "supervised",
        "timm": timm_arguments(spec),
        **facts,
        "view": {**facts["view"], "normalisation": NORMALISATION},
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    hashes[DESCRIPTION] = _own_hash({**description, "sha256": hashes})
    text = json.dumps({**description, "sha256": hashes}, indent=1, ensure_ascii=False)
    return {**files, DESCRIPTION: text.encode()}


def unpack(description: bytes, weights: bytes, where: str) -> ExportedModel:
    """Read a model, and check that it is whole.

    Parameters
    ----------
    description, weights
        Content of `model.json` and `model.safetensors`.
    where
        Address of their folder, for messages.

    Returns
    -------
    ExportedModel
        On the CPU, in evaluation mode.

    Raises
    ------
    ModelError
        When a file was changed or cut short, is of another format, or the weights do not fit.
    """
    told = _checked(description, f"{where}/{DESCRIPTION}")
    _check_hash(weights, told["sha256"][WEIGHTS], f"{where}/{WEIGHTS}")
    try:
        spec, classes = spec_of(told["timm"]), len(told["classes"])
        if told["kind"] not in ("dual", "supervised") or told["view"]["normalisation"] != NORMALISATION:
            raise ValueError(f"kind {told['kind']!r} or normalisation {told['view']['normalisation']!r} is not known here")
        first = build_vit(spec, drop_path=0.0)
        dual = told["kind"] == "dual"
        network = DualModel(first, build_vit(spec, drop_path=0.0), classes) if dual else SupervisedModel(first, classes)
        load_exactly(network, safetensors.torch.load(weights), f"{where}/{WEIGHTS}")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{where}/{DESCRIPTION}: {error}; export the model again with this release") from error
    return ExportedModel(told, network.eval(), where)


def unpack_start(model: ExportedModel, data: bytes) -> Start:
    """Read what an adaptation of a model starts from.

    Parameters
    ----------
    model
        The model.
    data
        Content of its `adapt.safetensors`.

    Raises
    ------
    ModelError
        When the model was exported without one, the file was changed or cut short, or it does not fit the model.
    """
    file, wanted = f"{model.where}/{ADAPTATION}", model.description["sha256"].get(ADAPTATION)
    if wanted is None:
        raise ModelError(f"{model.where}/{DESCRIPTION}: the model has no {ADAPTATION}; export it again, to be adapted")
    _check_hash(data, wanted, file)
    tensors = safetensors.torch.load(data)
    shapes = {"moments.mean": (2, model.network.width), "moments.std": (2, model.network.width), "prior": (len(model.classes),)}
    own = {name: tensors.pop(name) for name in shapes if name in tensors}
    for name, value in own.items():
        if value.shape != shapes[name]:
            raise ModelError(f"{file}: {name} is {tuple(value.shape)}, the model wants {shapes[name]}; export the model again")
    moments = Moments(own["moments.mean"], own["moments.std"]) if "moments.mean" in own else None
    return Start(tensors, moments, own.get("prior"))


def read_model(folder: str | Path) -> ExportedModel:
    """Read the model of a folder on this machine.

    Raises
    ------
    ModelError
        As `unpack`.
    FileNotFoundError
        When a file is not there.
    """
    path = Path(folder)
    return unpack((path / DESCRIPTION).read_bytes(), (path / WEIGHTS).read_bytes(), str(path))


def _checked(data: bytes, where: str) -> dict[str, Any]:
    """Parse a description and check its own hash."""
    try:
        told = json.loads(data)
        wanted, found = told["sha256"][DESCRIPTION], _own_hash(told)
        form = told["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{where}: not the description of a model ({type(error).__name__}: {error}); export it again") from None
    if form != FORMAT:
        raise ModelError(f"{where}: format = {form!r}, known here is {FORMAT}; export the model again with this release")
    if wanted != found:
        raise ModelError(_changed(where, found, wanted))
    return dict(told)


def _saved(tensors: Mapping[str, Tensor]) -> bytes:
    """Write tensors down."""
    return safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def _check_hash(data: bytes, wanted: str, file: str) -> None:
    """Refuse a file that is not the one that was exported."""
    found = hashlib.sha256(data).hexdigest()
    if found != wanted:
        raise ModelError(_changed(file, found, wanted))


def _own_hash(description: Mapping[str, Any]) -> str:
    """SHA-256 of a description but for this hash itself, whatever the order and the layout of its text."""
    hashes = {name: value for name, value in description["sha256"].items() if name != DESCRIPTION}
    text = json.dumps({**description, "sha256": hashes}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _changed(file: str, found: str, wanted: str) -> str:
    """Tell that a file is not the one that was exported."""
    return (
        f"{file}: SHA-256 is {found[:12]}..., expected {wanted[:12]}...; the file was changed, cut short, or belongs to another "
        "model; export or copy the whole folder again"
    )
