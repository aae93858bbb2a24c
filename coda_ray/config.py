"""The typed configuration: every field, unit and default of every job, checked whole before anything starts.

A job reads a YAML file (`--config`), then dotted overrides (`--adapt.lr 3e-4`). This file is the only place of defaults;
they are the settings of the CODA paper (WACV 2024, arXiv 2311.12623) wherever the paper or its released code states one.
"""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from coda_ray.methods import AdaptingMethod, Method, TrainedMethod, UnadaptedMethod

CHANNELS = ("DNA", "ER", "RNA", "AGP", "Mito")
Channel = Literal["DNA", "ER", "RNA", "AGP", "Mito"]
Granularity = Literal["source", "batch", "plate"]
Split = Literal["plate", "compounds", "new-compounds"]
Strategy = Literal["none", "plate", "batch", "continue", "reuse"]
# Ray's job supervisor sets it for the driver of a submitted job, and for nothing else.
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, attribute docstrings become the help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


def _absolute(folder: str, info: ValidationInfo) -> str:
    """Make a folder absolute where a job's configuration is built, because other processes stand in other folders."""
    if not info.context:
        return folder
    path = Path(folder).expanduser()
    if not path.is_absolute() and SUBMITTED in os.environ:
        raise ValueError(
            "a submitted job runs in a copy of the working directory that Ray deletes; give an absolute folder "
            "(for tiles and results one that every node reaches) or an s3:// address"
        )
    return str(path.absolute())


def _check_folder(value: str, info: ValidationInfo) -> str:
    """Accept a folder."""
    if "://" in value:
        raise ValueError("give a folder")
    return _absolute(value, info)


def _check_keyless(value: str) -> str:
    """Accept a text that holds no user and no password."""
    scheme, separator, rest = value.partition("://")
    # A secret key may hold slashes.
    if separator and scheme != "file" and re.match(r"[^/]*(@|:.*@)", rest):
        raise _keys_found()
    return value


def _check_address(value: str, info: ValidationInfo) -> str:
    """Accept what `storage.open_place` opens."""
    scheme, separator, rest = _check_keyless(value).partition("://")
    if not separator or scheme == "file":
        return _absolute(rest if separator else value, info)
    if scheme != "s3":
        raise ValueError("only s3://bucket/prefix and folders are known; correct the scheme")
    return value


def _check_endpoint(value: str) -> str:
    """Accept a URL without a user."""
    if "@" in value:
        raise _keys_found()
    return value


# Type of the error whose message does not repeat the value: what is refused must not be shown either.
_KEYS = "keys"
# What pydantic adds to the name of a field that may have several types.
_TYPE = re.compile(r"int|str|(constrained-)?float|literal\[.*")


def _keys_found() -> PydanticCustomError:
    """Configurations are stored and shown, so keys have no place in them."""
    return PydanticCustomError(
        _KEYS, "there is a user or a password before '@'; keys come from the environment (AWS_ACCESS_KEY_ID, ...)"
    )


Address = Annotated[str, Field(min_length=1), AfterValidator(_check_address)]
Keyless = Annotated[str, AfterValidator(_check_keyless)]
LocalFolder = Annotated[str, Field(min_length=1), AfterValidator(_check_folder)]
EndpointUrl = Annotated[str, AfterValidator(_check_endpoint)]
Beta = Annotated[float, Field(ge=0, lt=1)]
REGISTRY = "models:/"


def _check_model(value: str, info: ValidationInfo) -> str:
    """Accept an address, or a name in MLflow's registry."""
    return value if value.startswith(REGISTRY) else _check_address(value, info)


ModelAddress = Annotated[str, Field(min_length=1), AfterValidator(_check_model)]
# Between the names of the labs that are one source together.
POOL = "+"


def labs_of(source: str) -> list[str]:
    """Name the labs that a source is made of: itself, or those of a pool."""
    return source.split(POOL)


def pool_of(labs: Iterable[str]) -> str:
    """Name the source that some labs are together; a single one is itself."""
    return POOL.join(sorted(labs))


def _check_source(value: Any) -> Any:
    """Give a pool, a list of labs or their names with + between, its one spelling."""
    parts = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(part, str) for part in parts) or value == "":  # for the field to refuse
        return value
    labs = [lab.strip() for part in parts for lab in labs_of(part)]
    if not labs or "" in labs:
        raise ValueError("a lab of the pool has no name; give names with + between, such as sim_a+sim_b")
    double = next((lab for lab in labs if labs.count(lab) > 1), None)
    if double is not None:
        raise ValueError(f"{double} is in the pool twice; name each lab once")
    return pool_of(labs)


def _check_target(value: str) -> str:
    """Accept one lab."""
    if POOL in value:
        raise ValueError(f"a pool of labs can be a source alone; give one lab, or each by itself: {', '.join(labs_of(value))}")
    return value


SourceName = Annotated[str, BeforeValidator(_check_source)]
TargetName = Annotated[str, AfterValidator(_check_target)]


def check_pair(source: str, target: str) -> None:
    """Refuse a target that no model of a source is adapted to; a source that is its own target is scored on what it holds out.

    Raises
    ------
    ConfigError
        When the target is a pool, or a lab of the source's pool.
    """
    if target == source:
        return
    if POOL in target:
        raise ConfigError(f"target {target}: a pool of labs can be a source alone; give one lab")
    if target in labs_of(source):
        raise ConfigError(f"target {target}: source {source} was trained on it; leave it out of the pool, or give another lab")


class Place(Section):
    """An address in storage. Keys come from the environment (AWS_ACCESS_KEY_ID, ...), never from here."""

    address: Address
    """`s3://bucket/prefix` or a folder."""
    endpoint_url: EndpointUrl | None = None
    """URL of an S3-compatible server; unset means AWS itself."""
    anonymous: bool = False
    """Send unsigned requests (public buckets)."""
    region: str | None = None
    """AWS region, such as us-east-1."""


def _check_duration(value: int | str) -> int | str:
    """Accept steps (`400`) or epochs (`"300 epochs"`)."""
    if isinstance(value, int):
        if value < 0:
            raise ValueError("a number of steps is at least 0")
        return value
    number, _, unit = value.strip().partition(" ")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    in_steps = unit in ("", "step", "steps")
    if not (0 <= amount < math.inf) or not (amount.is_integer() if in_steps else unit in ("epoch", "epochs")):
        raise ValueError("give a number of steps (400) or of epochs ('300 epochs')")
    return int(amount) if in_steps else value.strip()


def _check_interval(value: int | str) -> int | str:
    """Spell never, which is 0, in one way."""
    return value if float(str(value).split()[0]) else 0


Duration = Annotated[int | str, AfterValidator(_check_duration)]
Interval = Annotated[Duration, AfterValidator(_check_interval)]


def steps_of(duration: int | str, steps_per_epoch: int) -> int:
    """Resolve a duration to steps.

    Parameters
    ----------
    duration
        Steps as an integer, or `"N epochs"`.
    steps_per_epoch
        How many steps one pass over the tiles takes.

    Returns
    -------
    int
        Optimisation steps.
    """
    if isinstance(duration, int):
        return duration
    return round(float(duration.split()[0]) * steps_per_epoch)


class Ingest(Section):
    """From raw images to tiles."""

    dataset: str = "cpg0016-jump"
    """Folder of the data set inside the bucket."""
    listed_as: Keyless = "s3://cellpainting-gallery"
    """Prefix that image lists write for the bucket; it is replaced by bucket.address, so that mirrors work."""
    image_list: Keyless | None = None
    """One image list of your own (.csv, .csv.gz or .parquet) instead of the data set's lists."""
    sources: list[str] = []
    """Sources to ingest, such as source_3; empty means every source with a listed plate."""
    plate_types: list[str] = ["TARGET2"]
    """Plate types to take from the plate table."""
    plates: list[str] = []
    """Only these plates; empty means all."""
    channels: list[Channel] = Field(["DNA", "ER", "Mito"], min_length=1)
    """Channels to prepare, in the order in which tiles hold them."""
    scale: float = Field(0.5, gt=0, le=1)
    """Anti-aliased down-scaling of the raw image."""
    pixel_size_um: float | None = Field(None, gt=0)
    """Resample every source to this size of a tile's pixel (µm), by the microscope table; unset keeps each source's own."""
    clip_percentiles: tuple[float, float] = (0.05, 99.95)
    """Intensity percentiles of the image that become 0 and 255."""
    plate_percentile: float = Field(99.99, gt=0, le=100)
    """Percentile of the plate that caps the upper bound of each of its images."""
    plate_sample: int = Field(64, ge=1)
    """Sites read per plate for its statistics and for an illumination estimate where no file is supplied."""
    tiles_per_shard: int = Field(64, ge=1)
    """Tiles in one shard file; also the work of one task."""
    max_bad_share: float = Field(0.05, ge=0, le=1)
    """Stop above this share of quarantined sites."""
    cpus_per_task: float = Field(0.5, gt=0)
    """CPUs that Ray reserves for one task."""
    threads: int = Field(8, ge=1)
    """Files that one task reads at a time."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.clip_percentiles
        if not 0 <= low < high <= 100:
            raise ValueError("ingest.clip_percentiles: give two rising percentages between 0 and 100, such as 0.05,99.95")
        if len(set(self.channels)) < len(self.channels):
            raise ValueError("ingest.channels: name each channel once")
        return self


class Stream(Section):
    """How tiles reach the workers through Ray Data."""

    rows_per_task: int = Field(64, ge=1)
    """Samples that one read task fetches."""
    tasks: int = Field(2, ge=1)
    """Read tasks of one worker at a time; they wait for storage and reserve no CPU."""
    prefetch: int = Field(2, ge=0)
    """Mini-batches held ready per worker."""
    cache: LocalFolder | None = None
    """Folder on each node's own disk where shards are kept once read; it grows to the size of the tiles used. Unset asks
    storage for every tile."""
    segment_steps: int = Field(2000, ge=1)
    """Steps that one Ray Data execution serves before the next is planned; bounds the memory of the plan."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Stop when more than this share of the tiles read so far could not be read and had to be replaced."""


class Model(Section):
    """The network of feature extractor and classifier."""

    arch: str = "deit_small_patch16_224"
    """A timm vision transformer, or `vit` for one of the sizes below."""
    patch: int = Field(8, ge=1)
    """With arch=vit: side of a patch (px)."""
    width: int = Field(128, ge=8)
    """With arch=vit: embedding dimensions."""
    depth: int = Field(4, ge=1)
    """With arch=vit: blocks."""
    heads: int = Field(4, ge=1)
    """With arch=vit: attention heads."""
    init: str = "imagenet"
    """Initial weights: `imagenet` (timm, by name), `simulated` (a small backbone that comes with this package, trained on
    simulated labs: arch vit, patch 16, width 96, depth 4, heads 4, three channels), `random` (linear layers of std 0.02, as
    DeiT's), `fan-in` (random, of std 1 / sqrt(inputs), in the heads too: for small networks), or a local .safetensors file."""

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        if self.arch == "vit" and self.width % self.heads:
            raise ValueError(f"model.width = {self.width} is no multiple of model.heads = {self.heads}")
        return self

    @model_validator(mode="after")
    def _known_weights(self) -> Self:
        if self.init not in ("imagenet", "simulated", "random", "fan-in") and not self.init.endswith(".safetensors"):
            raise ValueError(f"model.init = {self.init!r}: give imagenet, simulated, random, fan-in or a local .safetensors file")
        if self.arch == "vit" and self.init == "imagenet":
            raise ValueError("model.arch = vit has no imagenet weights, for its sizes are its own: give model.init fan-in")
        sizes = (self.arch, self.patch, self.width, self.depth, self.heads)
        if self.init == "simulated" and sizes != ("vit", 16, 96, 4, 4):
            raise ValueError(
                "model.init = simulated: these weights are of arch vit, patch 16, width 96, depth 4, heads 4; give these sizes, "
                "or model.init fan-in"
            )
        return self


class Views(Section):
    """Views cut from tiles, in the order of the released CODA configuration, or DINO's own."""

    kind: Literal["crop", "resized"] = "crop"
    """Random crops without rescaling (CODA), or resized ones with colour jitter, blur and solarisation (DINO)."""
    tile_crop: int = Field(448, ge=8)
    """Centre crop of the tile before any view (px)."""
    size_global: int = Field(224, ge=8)
    """Side of a global view, and of the supervised and evaluation view (px)."""
    size_local: int = Field(96, ge=8)
    """Side of a local view (px)."""
    locals_per_sample: int = Field(6, ge=0, multiple_of=2)
    """Local views per sample; half from each image of a pair."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Probability of each of the vertical and the horizontal flip."""
    jitter_probability: float = Field(0.5, ge=0, le=1)
    """Probability of the intensity jitter, on global views of kind crop only."""
    jitter_std: float = Field(0.005, ge=0)
    """Standard deviation of the jitter's offset and exponent."""

    @model_validator(mode="after")
    def _nested(self) -> Self:
        if not self.size_local <= self.size_global <= self.tile_crop:
            sizes = f"{self.size_local}, {self.size_global}, {self.tile_crop}"
            raise ValueError(f"views: size_local <= size_global <= tile_crop is wanted, and they are {sizes}")
        return self


class Dino(Section):
    """The DINO objective (Caron et al. 2021) with CODA's settings."""

    head_hidden: int = Field(2048, ge=1)
    """Width of the head's hidden layers."""
    head_bottleneck: int = Field(256, ge=1)
    """Width of the head's bottleneck."""
    out_dim: int = Field(4096, ge=2)
    """Prototypes."""
    student_temperature: float = Field(0.1, gt=0)
    """Temperature of the student's softmax."""
    teacher_temperature: float = Field(0.07, gt=0)
    """Temperature of the teacher's softmax after its ramp."""
    teacher_temperature_start: float = Field(0.04, gt=0)
    """Temperature of the teacher's softmax at step 0."""
    teacher_temperature_ramp: Duration = "30 epochs"
    """Length of the linear ramp of the teacher's temperature."""
    centering: Literal["mean", "sinkhorn"] = "mean"
    """How teacher outputs are balanced: moving mean (DINO) or Sinkhorn-Knopp (DINOv2)."""
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the moving mean."""
    koleo_weight: float = Field(0.0, ge=0)
    """Weight of the KoLeo term (DINOv2) on the student's global CLS tokens."""
    ema_start: float = Field(0.996, ge=0, le=1)
    """Teacher momentum at step 0; cosine to ema_end."""
    ema_end: float = Field(1.0, ge=0, le=1)
    """Teacher momentum at the last step."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the student, rising linearly over its blocks."""
    pairs: Literal["batch", "plate"] = "batch"
    """Cross-batch partners: the same compound from another batch (the paper's text), or from another plate, of the same batch
    too (its released code)."""
    extractor: Literal["teacher", "student"] = "teacher"
    """Which network becomes the feature extractor."""
    freeze_last_layer: Duration = "1 epochs"
    """How long the head's last layer stays frozen."""
    collapse: Literal["stop", "warn", "off"] = "warn"
    """What the collapse guard does when the teacher's outputs lose their entropy."""
    collapse_floor: float = Field(0.6, ge=0, le=1)
    """Collapsed: entropy of the mean teacher output below this share of ln(N): all samples fall on few prototypes. N is the least
    of the number of compounds, of a worker's samples in a step, and of out_dim; no label takes part."""
    collapse_ceiling: float = Field(0.999, ge=0, le=1)
    """Collapsed: mean entropy per sample above this share of ln(out_dim)."""
    collapse_patience: int = Field(10, ge=1)
    """Consecutive log points outside the bounds before the guard acts."""


class Mae(Section):
    """The masked autoencoder (He et al., CVPR 2022)."""

    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of patches that are masked."""
    decoder_width: int = Field(256, ge=4, multiple_of=4)
    """Decoder: embedding dimensions."""
    decoder_depth: int = Field(4, ge=1)
    """Decoder: blocks."""
    decoder_heads: int = Field(8, ge=1)
    """Decoder: attention heads."""

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"mae.decoder_width = {self.decoder_width} is no multiple of mae.decoder_heads = {self.decoder_heads}"
            )
        return self


class Optimisation(Section):
    """AdamW and its schedule, in steps: the budget is the same whatever the number of tiles."""

    steps: Duration = "300 epochs"
    """Length of the stage: steps, or `N epochs`."""
    minibatch: int = Field(128, ge=1)
    """Samples per step over all workers (a sample of a pair has two tiles)."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    lr_start: float = Field(1e-8, ge=0)
    """Learning rate at step 0."""
    lr_end: float = Field(1e-6, ge=0)
    """Learning rate at the last step (cosine)."""
    warmup: Duration = "10 epochs"
    """Linear warm-up."""
    weight_decay: float = Field(1e-5, ge=0)
    """Weight decay at step 0; none on biases and 1-D tensors."""
    weight_decay_end: float = Field(1e-4, ge=0)
    """Weight decay at the last step (cosine)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    clip: float = Field(1.0, gt=0)
    """Largest global norm of the gradient."""


class Pretrain(Optimisation):
    """The label-free stage on the source: the feature extractor learns."""

    select: Literal["last", "best-knn"] = "last"
    """Which weights are kept: the last, or (released code) those of the best k-NN score of the source's held-out plate, which
    train.knn_every asks for; source labels choose then."""


class Classify(Optimisation):
    """The labelled stage on the source: the supervised model, or the classifier of a dual model."""

    steps: Duration = "50 epochs"
    """Length of the stage: steps, or `N epochs`."""
    warmup: Duration = "3 epochs"
    """Linear warm-up."""
    lr_end: float = Field(1e-4, ge=0)
    """Learning rate at the last step; equal to lr it stays constant, as in the released configuration."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """After the warm-up: cosine from lr to lr_end; or plateau, the paper's text: lr, lowered by ten whenever loss and accuracy on
    the source's held-out plate both stand still (lr_end is not read)."""
    plateau_patience: int = Field(2, ge=0)
    """With schedule=plateau: how many scores on the held-out plate in a row may bring neither a better loss nor accuracy;
    one more lowers the rate."""
    weight_decay_end: float = Field(1e-5, ge=0)
    """Weight decay at the last step (cosine)."""
    select: Literal["best", "last"] = "best"
    """Which weights are kept: best accuracy on the source's held-out plate, or the last."""
    validate_every: Interval = 200
    """Between scores on the held-out plate: steps, or `N epochs`."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth of the network that is trained."""

    @model_validator(mode="after")
    def _validated(self) -> Self:
        if not self.validate_every:
            raise ValueError("classify.validate_every = 0: give a number of steps, or of epochs, between scores")
        return self


class AdaptDino(Section):
    """What DINO does differently while it adapts; unset, as in section dino, by which it was pre-trained."""

    pairs: Literal["batch", "plate"] | None = None
    """Cross-batch partners: from another batch, or from another plate, of the same batch too."""
    student_temperature: float | None = Field(None, gt=0)
    """Temperature of the student's softmax."""
    teacher_temperature: float | None = Field(None, gt=0)
    """Temperature of the teacher's softmax after its ramp."""
    teacher_temperature_start: float | None = Field(None, gt=0)
    """Temperature of the teacher's softmax at step 0."""
    teacher_temperature_ramp: Duration | None = None
    """Length of the linear ramp of the teacher's temperature."""
    centering: Literal["mean", "sinkhorn"] | None = None
    """How teacher outputs are balanced."""
    centre_momentum: float | None = Field(None, ge=0, lt=1)
    """Momentum of the moving mean."""
    koleo_weight: float | None = Field(None, ge=0)
    """Weight of the KoLeo term."""
    ema_start: float | None = Field(None, ge=0, le=1)
    """Teacher momentum at step 0."""
    ema_end: float | None = Field(None, ge=0, le=1)
    """Teacher momentum at the last step."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Stochastic depth of the student."""
    freeze_last_layer: Duration | None = None
    """How long the head's last layer stays frozen."""


class Adapt(Optimisation):
    """The label-free stage on the target: DINO continues on the feature extractor alone."""

    dino: AdaptDino = AdaptDino()
    """Settings of DINO of its own."""
    minibatch_unit: int | None = Field(None, ge=1)
    """Samples per step when a batch or a plate is adapted to (64 in the paper); unset: as minibatch. The number of steps is
    counted by minibatch at every granularity."""
    unit: str = Field("all", min_length=1)
    """Which batches or plates are adapted to, one after the other: `all`, `random` (one, drawn by the seed), or one by its name.
    Each is scored on itself and on the whole target."""
    plates: list[str] = []
    """Plates of the target that an adaptation knows of, as anchors, as partners, and in the length of an epoch; empty: all. What
    is scored stays the same."""
    no_partner: Literal["error", "same-image"] = "error"
    """A compound that has no tile in another batch: stop before training, or pair the tile with itself."""
    standardise: Literal["never", "after"] = "never"
    """after: once adapted, the tokens of each plate are moved to the mean and spread that the source's had before adaptation
    (of every method that trains on the target). It is part of the score, not of the model: an exported model goes without, and a
    watcher refuses it."""
    partner_pool: Literal["source", "unit"] = "source"
    """Where partners come from: the other batches of the whole target source, or only those of the unit itself."""


class Ttt(Section):
    """Test-time training, one image at a time by SGD (Gandelsman et al., NeurIPS 2022, as their code was released)."""

    steps: int = Field(20, ge=1)
    """Optimisation steps per image."""
    masks: int = Field(128, ge=1)
    """Random masks of the image per step."""
    lr: float = Field(5e-3, gt=0)
    """Learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay, on every parameter that is trained (the paper states 0.2, the released code has none)."""
    trains: Literal["encoder", "all"] = "encoder"
    """What learns the image: the encoder alone, as released, or all of the autoencoder, its decoder too."""
    images_at_once: int = Field(8, ge=1)
    """Images adapted side by side, each with its own weights; changes memory and speed, not the result."""


class Tent(Optimisation):
    """Tent (Wang et al., ICLR 2021): entropy of the predictions over the affine parameters of the normalisation layers."""

    steps: Duration = "1 epochs"
    """Length of the stage: steps, or `N epochs` over the target."""
    minibatch: int = Field(64, ge=1)
    """Images per step over all workers."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate."""
    lr_start: float = Field(1e-3, ge=0)
    """Learning rate at step 0."""
    lr_end: float = Field(1e-3, ge=0)
    """Learning rate at the last step."""
    warmup: Duration = 0
    """Linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay at step 0."""
    weight_decay_end: float = Field(0.0, ge=0)
    """Weight decay at the last step."""


class Shot(Section):
    """Adaptation through the frozen classifier, without the source's images (methods coda-shot, oda-shot, shot, moments).

    The loss is a sum of terms; a term that a method does not use has weight 0 for it. Section adapt gives steps and rates.
    """

    dino: float = Field(1.0, ge=0)
    """Weight of DINO's loss (coda-shot: of cross-batch pairs; oda-shot: of single images)."""
    entropy: float = Field(1.0, ge=0)
    """Weight of the mean entropy of the predictions: each prediction is to be sure."""
    diversity: float = Field(1.0, ge=0)
    """Weight of the divergence of the mean prediction from the prior: predictions are to be diverse."""
    consistency: float = Field(1.0, ge=0)
    """Weight of the cross-entropy between the predictions of the two images of a pair, or of two views of one image."""
    moments: float = Field(1.0, ge=0)
    """Weight of the anchor: mean and spread of the tokens are to be those of the source."""
    prior: Literal["uniform", "source"] = "uniform"
    """Class shares that the diversity draws to: all alike, or those of the source's training images."""
    margin: float = Field(1.0, gt=0, le=1)
    """Predictions whose entropy is above this share of its maximum count in neither entropy nor diversity; 1 counts all. 0.5 did
    harm where a target has compounds of unknown classes (docs/lab-notes.md): there set learn_from to known-compounds."""
    extractor: Literal["student", "teacher"] = "student"
    """Which network becomes the feature extractor."""


class Baselines(Section):
    """What trains nothing, or next to nothing, on the target: probe, standardise, sphering, coral, harmony, tent."""

    model: UnadaptedMethod = "dual-cb"
    """The unadapted model that they start from."""
    zscore: Literal["all", "dmso", "none"] = "all"
    """sphering: features are first brought to mean 0 and standard deviation 1, plate by plate, of all its images or of those of
    its DMSO wells."""
    sphering: Literal["joint", "apart"] = "joint"
    """One whitening, fitted on the DMSO wells of source and unit together, or one for each."""
    sphering_epsilon: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Added to each eigenvalue of the controls' covariance, as a share of the mean eigenvalue. `auto`: that of six, from 0.001 to
    100, by which wells of source and unit retrieve their compound in other batches best; it reads the plate map, no label."""


class Train(Section):
    """Where and how a stage runs."""

    workers: str = Field("0", pattern=r"^\d+(-\d+)?$")
    """Ray Train workers of one stage: `0` runs it inside one warm Ray task (small units), `4` on four workers, `1-4` elastic."""
    cpus_per_worker: float = Field(0.75, gt=0)
    """CPUs reserved per worker."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs reserved per worker; a fraction packs several small units on one GPU."""
    threads: int = Field(1, ge=1)
    """Torch threads per worker on the CPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device has it in hardware, fp32 elsewhere."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints."""
    log_every: int = Field(20, ge=1)
    """Steps between log points."""
    knn_every: Interval = 0
    """Between k-NN scores of the teacher in pre-training (source labels): steps, or `N epochs`; 0 turns them off."""
    max_failures: int = Field(3, ge=0)
    """How often a group of workers starts again, from its newest checkpoint, after one of them was lost or failed."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """Least and most workers of a stage; both 0 inside one Ray task."""
        low, _, high = self.workers.partition("-")
        return int(low), int(high or low)

    @model_validator(mode="after")
    def _rising_workers(self) -> Self:
        low, high = self.worker_range
        if low > high or low == 0 < high:
            raise ValueError(f"train.workers = {self.workers!r}: give 0, a number, or a rising range from 1, such as 1-4")
        return self

    @model_validator(mode="after")
    def _gpus_are_whole_where_they_must(self) -> Self:
        gpus, most = self.gpus_per_worker, self.worker_range[1]
        if gpus % 1 and gpus > 1:
            raise ValueError(f"train.gpus_per_worker = {gpus:g}: Ray shares out one GPU, or whole ones; give 1, or less than 1")
        if gpus % 1 and most > 1:
            raise ValueError(
                f"train.gpus_per_worker = {gpus:g} with train.workers = {self.workers!r}: workers of one stage cannot share a "
                "GPU; give --train.gpus-per-worker 1, or --train.workers 0, which packs several stages on a GPU"
            )
        return self


class Evaluate(Section):
    """Scoring and embedding."""

    minibatch: int = Field(256, ge=1)
    """Tiles per forward pass and worker."""
    profiles: bool = True
    """Also average the embeddings of each well (profiles.parquet), and measure on the whole target how replicates and mechanisms
    are retrieved and how batches mix."""


class Criteria(Section):
    """Label-free criteria of an adapted model."""

    tiles: int = Field(1024, ge=4)
    """Most tiles of the held-out loss, and of the CKA of features before and after adaptation; drawn by chance where there are
    more."""


class Tracking(Section):
    """MLflow. The address comes from MLFLOW_TRACKING_URI, else it is `mlflow.db` in the results folder."""

    enabled: bool = True
    """Log to MLflow at all; results are complete without it."""
    experiment: str = "coda_ray"
    """MLflow experiment."""
    system_metrics: bool = True
    """Also show processor, memory, disk and network of the machine that the job's driver runs on, on the job's run."""


class Matrix(Section):
    """What jobs/matrix.py runs: every source x target x method x granularity x seed."""

    sources: list[SourceName] = []
    """Sources to train on; several labs together, a pool, as sim_a+sim_b, or as a list in the list: [sim_c, [sim_a, sim_b]]."""
    targets: list[TargetName] = []
    """Targets to adapt to, each lab but those of the source; the source itself is scored on its held-out plates."""
    methods: list[Method] = ["supervised", "dual-cb", "oda", "coda"]
    """Rows of the result matrix."""
    granularities: list[Granularity] = ["source"]
    """Units of adaptation."""
    splits: list[Split] = ["plate"]
    """What is held out; see split."""
    seeds: list[Annotated[int, Field(ge=0)]] = [0]
    """Seeds; the matrix shows mean and standard deviation over them."""


class Estimate(Section):
    """What a dry run of the matrix counts with while the truth is not known; no result depends on it."""

    sites_per_well: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Fields of view per well of each source (source=number), for plates that are not ingested yet."""
    image_px: dict[str, tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]] = {}
    """Height and width (px) of each source's raw images (source=[height,width]), for plates that are not ingested yet."""
    dino_per_s: float | None = Field(None, gt=0)
    """Samples per second (all views of one image, or of one pair) that one GPU trains DINO on, until a finished stage of the
    same matrix tells. Unset, and nothing finished: no GPU hours."""
    mae_per_s: float | None = Field(None, gt=0)
    """The same for the masked autoencoder."""
    supervised_per_s: float | None = Field(None, gt=0)
    """The same for labelled training; a dual model's is the slower one."""
    shot_per_s: float | None = Field(None, gt=0)
    """The same for coda-shot, oda-shot, shot and moments."""
    tent_per_s: float | None = Field(None, gt=0)
    """The same for tent."""
    inference_per_s: float | None = Field(None, gt=0)
    """Tiles per second that one GPU predicts and embeds."""
    ttt_per_s: float | None = Field(None, gt=0)
    """Tiles per second that one GPU adapts to, one by one, by test-time training."""


class Report(Section):
    """What jobs/report.py shows beside the tables. Maps (UMAP) and comparisons of layers (CKA): of the first split and seed."""

    pairs: list[tuple[SourceName, TargetName]] = []
    """Source and target of the maps and of the comparisons of layers, such as [["source_3", "source_7"]]; empty takes the first
    of the matrix."""
    method: AdaptingMethod | None = None
    """The adaptation that they show; unset takes the last of matrix.methods that adapts a feature extractor."""
    example_tiles: int = Field(4, ge=1)
    """Example tiles of each source."""
    map_tiles: int = Field(3000, ge=8)
    """Most tiles of a map; drawn by chance where there are more."""
    layer_tiles: int = Field(1024, ge=4)
    """Most tiles of a comparison of layers; drawn by chance where there are more."""


class Predict(Section):
    """What jobs/predict.py predicts, and with which model. No label is read."""

    model: ModelAddress | None = None
    """An exported folder; the folder of a finished stage in the results (`adapt/...`, `classify/...`); or MLflow's
    `models:/NAME/VERSION` or `models:/NAME@ALIAS`. An `s3://` address is reached as results are."""
    sources: list[str] = []
    """Sources whose plates are predicted; empty means every source of the tile store."""
    plates: list[str] = []
    """Only these plates; empty means all."""
    ingest: bool = False
    """First prepare the tiles of plates that are not in the tile store, from raw images, as jobs/ingest.py does; sources and
    plates that are named here choose there too."""
    out: Address | None = None
    """Folder or `s3://` address (reached as results are) for the tables, below it a folder per model; unset: predictions in the
    results."""
    workers: int = Field(0, ge=0)
    """Most processes that hold the model, each with train.cpus_per_worker and train.gpus_per_worker; 0: as many as the cluster
    has room for."""


class Watch(Section):
    """What jobs/watch.py does with plates as they arrive. No label of theirs is read."""

    source: SourceName | None = None
    """Source that the model is trained on; a pool of labs as sim_a+sim_b."""
    targets: list[TargetName] = []
    """Sources whose new plates are taken; empty means every other source of the bucket."""
    method: AdaptingMethod = "coda"
    """What is adapted by."""
    seed: int = Field(0, ge=0)
    """Seed of the models."""
    policy: Literal["nearest", "plate", "batch"] = "nearest"
    """Which model predicts a plate: `nearest`, that of the source or of the finished unit that it is least distant from, and one
    adapted to the plate itself where all are further than the threshold; `plate`, always one adapted to the plate; `batch`, one
    adapted to the batch, once the batch is complete."""
    drift_threshold: float | None = Field(None, gt=0)
    """Distance (standard deviations of the source's DMSO images) above which no model fits; unset: measured among the plates of
    the source (docs/online.md)."""
    events: Address | None = None
    """Folder of S3 event notifications (JSON), reached as the bucket is; plates are then looked up where these name an image
    list, and the bucket is not listed."""
    poll_s: float = Field(60.0, gt=0)
    """Seconds between looks at the bucket."""
    settle_s: float = Field(300.0, ge=0)
    """A plate counts when all images of its list are there and neither has changed for so long (s)."""
    incomplete_after_s: float | None = Field(None, gt=0)
    """A plate that lacks images of its list is taken as it is when nothing has changed for so long (s); unset: it waits."""
    min_wells: float = Field(0.5, ge=0, le=1)
    """Least share of a plate's wells that must have a tile."""
    tries: int = Field(3, ge=1)
    """How often a plate is tried before it is set aside for good."""
    retry_after_s: float = Field(600.0, ge=0)
    """Seconds between tries of one plate."""
    lease_s: float = Field(60.0, gt=0)
    """A watcher that gives no sign of life for so long (s) is taken for dead, and the next one goes on."""
    register_as: str | None = Field(None, pattern=r"^[\w. -]+$")
    """Name in MLflow's model registry for the models that predict; unset: they are not registered."""
    out: Address | None = None
    """Folder or `s3://` address (reached as results are) of the ledger and the report; unset: watch in the results."""

    @model_validator(mode="after")
    def _source_is_no_target(self) -> Self:
        double = sorted(set(labs_of(self.source or "")) & set(self.targets))
        if double:
            raise ValueError(f"watch.targets = {self.targets}: {double[0]!r} is watch.source, or a lab of it; leave it out")
        return self


class Online(Section):
    """What jobs/online.py compares: strategies that predict the plates of a target as they arrive, one by one."""

    source: SourceName | None = None
    """Source that the model is trained on; a pool of labs as sim_a+sim_b."""
    target: TargetName | None = None
    """Source whose plates arrive, by batch and name."""
    method: AdaptingMethod = "coda"
    """What is adapted by."""
    strategies: list[Strategy] = ["none", "plate", "batch", "continue", "reuse"]
    """`none`: the source's model; `plate`: adapted to each plate; `batch`: to each batch once its last plate is there;
    `continue`: to each plate, from where the plate before left the model; `reuse`: to the first plate, and used for all."""
    seeds: list[Annotated[int, Field(ge=0)]] = [0]
    """Seeds; the table shows mean and standard deviation over them."""


class Range(Section):
    """Numbers between two ends."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    log: bool = False
    """Spread evenly over orders of magnitude."""
    whole: bool = False
    """Whole numbers only."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low = {self.low:g}, high = {self.high:g}: low must be below high, and above 0 with log: true")
        return self


class Tune(Section):
    """What jobs/tune.py searches: one trial is one adaptation of every pair and seed with the same hyperparameters."""

    pairs: list[tuple[SourceName, TargetName]] = []
    """Source and target of the adaptations, such as [["source_3", "source_7"]], a pool of labs as source_3+source_5; a trial's
    score is the mean over them."""
    method: TrainedMethod = "coda"
    """What is adapted by, where the space does not search it, or jobs/adapt.py is not told."""
    granularity: Granularity = "source"
    """Unit of adaptation, as for method. With batch or plate every unit gets a model of its own, which reads that unit; a trial
    is scored on all of them together."""
    seeds: list[Annotated[int, Field(ge=0)]] = [0]
    """Seeds of each adaptation; with several, a trial's score has a standard deviation."""
    space: dict[str, list[bool | int | float | str] | Range] = {}
    """What is searched: `method`, `granularity`, or a field of section adapt or tent, such as adapt.lr, adapt.steps or
    adapt.dino.ema_start; to a list of values, or to low, high, log, whole."""
    search: Literal["grid", "random", "optuna"] = "random"
    """grid: every combination of lists; random: drawn at random; optuna: drawn where earlier trials scored well (TPE)."""
    samples: int = Field(16, ge=1)
    """Trials of random and optuna. Raise it and start again, and the same sweep goes on."""
    seed: int = Field(0, ge=0)
    """Seed of random and optuna."""
    objective: str = "replicate_map"
    """What is maximised or minimised: a criterion that needs no label of the target (docs/selection.md), or `oracle_accuracy`,
    which reads them all: for research only, and marked as such in every output."""
    score_every: int = Field(0, ge=0)
    """Steps of adaptation between scores; 0 scores the end alone."""
    stop_early: bool = False
    """End trials that score badly at these steps (ASHA, Li et al., MLSys 2020); needs score_every."""
    reduction: float = Field(3.0, gt=1)
    """Of the trials that reach a rung one in so many goes on."""
    at_once: int = Field(0, ge=0)
    """Most trials side by side; 0: as many as the cluster has room for."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.stop_early and not self.score_every:
            raise ValueError("tune.stop_early needs tune.score_every: give the steps between scores")
        ranges = sorted(name for name, domain in self.space.items() if isinstance(domain, Range))
        if self.search == "grid" and ranges:
            raise ValueError(f"tune.space.{ranges[0]} is a range, which a grid cannot list; give values, or search: random")
        empty = sorted(name for name, domain in self.space.items() if domain == [])
        if empty:
            raise ValueError(f"tune.space.{empty[0]} is empty; give values, or low and high")
        itself = [target for source, target in self.pairs if target in labs_of(source)]
        if itself:
            raise ValueError(
                f"tune.pairs = {self.pairs}: {itself[0]!r} is adapted to itself: it is the source, or a lab of it; give another "
                "target, or leave it out"
            )
        return self


class Config(Section):
    """Everything that decides a result, and where things are."""

    bucket: Place = Place(address="s3://cellpainting-gallery", anonymous=True, region="us-east-1")
    """Raw images and image lists."""
    metadata: Place = Place(address="metadata")
    """Plate, well, compound, microscope and MoA tables."""
    tiles: Place = Place(address="tiles")
    """The tile store."""
    results: Place = Place(address="results")
    """Results: a folder per stage, and transfers.parquet."""
    ingest: Ingest = Ingest()
    """Ingest."""
    stream: Stream = Stream()
    """Stream."""
    model: Model = Model()
    """Network."""
    views: Views = Views()
    """Views."""
    dino: Dino = Dino()
    """DINO."""
    mae: Mae = Mae()
    """Masked autoencoder (methods dual-mae, oda-mae, ttt)."""
    pretrain: Pretrain = Pretrain()
    """Self-supervised pre-training on the source."""
    classify: Classify = Classify()
    """Labelled training on the source."""
    adapt: Adapt = Adapt()
    """Adaptation on the target."""
    ttt: Ttt = Ttt()
    """Test-time training (method ttt)."""
    tent: Tent = Tent()
    """Entropy minimisation on the target (method tent)."""
    shot: Shot = Shot()
    """Adaptation through the frozen classifier."""
    baselines: Baselines = Baselines()
    """Corrections of features, and tent."""
    evaluate: Evaluate = Evaluate()
    """Evaluation."""
    criteria: Criteria = Criteria()
    """Label-free criteria."""
    train: Train = Train()
    """Workers, precision, checkpoints."""
    split: Split = "plate"
    """What is held out: `plate` (the paper's: one plate per source; every compound is trained on); `compounds` (also a share of
    each MoA's compounds, in no training and nothing that is fitted to the target, which alone is scored); or `new-compounds` (the
    same compounds, but their unlabelled images of the target are in the adaptation, as a lab has them)."""
    learn_from: Literal["all", "known-compounds"] = "all"
    """What pre-training and adaptation see: all wells, or (the paper) those of compounds that have a MoA label in the source, no
    controls. Which compounds these are is all that is told of a label."""
    held_out_compounds: float = Field(0.34, gt=0, lt=1)
    """With split=compounds and new-compounds: share of each MoA's compounds that is held out; one at least, of two or more."""
    held_out: dict[str, str] = {}
    """Held-out plate of each source (source=plate); the last plate by batch and name where a source is not named."""
    tracking: Tracking = Tracking()
    """MLflow."""
    matrix: Matrix = Matrix()
    """The result matrix."""
    estimate: Estimate = Estimate()
    """Dry run."""
    report: Report = Report()
    """The report of a matrix."""
    tune: Tune = Tune()
    """The sweep of jobs/tune.py."""
    predict: Predict = Predict()
    """Predictions of jobs/predict.py."""
    watch: Watch = Watch()
    """Plates as they arrive, of jobs/watch.py."""
    online: Online = Online()
    """Plates as they arrive, simulated: the comparison of jobs/online.py."""

    @property
    def adapting(self) -> Dino:
        """Settings of DINO while it adapts."""
        return self.dino.model_copy(update=self.adapt.dino.model_dump(exclude_none=True))

    @model_validator(mode="after")
    def _views_are_whole_patches(self) -> Self:
        named = re.search(r"patch(\d+)", self.model.arch)
        patch = self.model.patch if self.model.arch == "vit" else int(named[1]) if named else 1
        for name in ("size_global", "size_local"):
            if getattr(self.views, name) % patch:
                raise ValueError(f"views.{name} = {getattr(self.views, name)} is no multiple of the model's patch of {patch} px")
        return self

    @model_validator(mode="after")
    def _scores_to_select_by(self) -> Self:
        if self.pretrain.select == "best-knn" and not self.train.knn_every:
            raise ValueError("pretrain.select = best-knn needs train.knn_every: give the steps, or epochs, between k-NN scores")
        return self

    @model_validator(mode="after")
    def _samples_for_every_worker(self) -> Self:
        most = max(1, self.train.worker_range[1])
        for stage, field in (
            ("pretrain", "minibatch"),
            ("classify", "minibatch"),
            ("adapt", "minibatch"),
            ("adapt", "minibatch_unit"),
            ("tent", "minibatch"),
        ):
            koleo = {"pretrain": self.dino.koleo_weight, "adapt": self.adapting.koleo_weight}.get(stage, 0) > 0
            least, given = (2 if koleo else 1) * most, getattr(getattr(self, stage), field)
            if given is not None and given < least:
                its = "adapt.dino" if stage == "adapt" and self.adapt.dino.koleo_weight is not None else "dino"
                why = f"{most} worker(s) of train.workers" + (f" and 2 samples for each, by {its}.koleo_weight," if koleo else "")
                raise ValueError(f"{stage}.{field} = {given}: {why} need {least} or more")
        return self


C = TypeVar("C", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be run; its text names field, value and remedy."""


@contextmanager
def told_in_one_line(prog: str, *more: type[Exception]) -> Iterator[None]:
    """End the process with one message, instead of a traceback, after an error that a person can mend, and after Ctrl-C.

    Parameters
    ----------
    prog
        Name of the job.
    more
        Exceptions with such a text, besides ValueError and OSError.

    Raises
    ------
    SystemExit
        With code 2 after a ConfigError, 130 after Ctrl-C, else with code 1.
    """
    expected: tuple[type[Exception], ...] = (ValueError, OSError, *more)
    try:
        yield
    except expected as error:
        # An error inside a Ray task carries the remote traceback in its text; its cause does not.
        print(f"{prog}: {getattr(error, 'cause', None) or error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def parse_job(model: type[C], argv: Sequence[str] | None = None, *, prog: str, description: str) -> C:
    """Read a job's configuration from the command line, or end the process.

    Parameters
    ----------
    model
        The pydantic model of the job's whole configuration.
    argv
        Command line without the program's name; by default the process's own.
    prog, description
        Shown by `--help`.

    Returns
    -------
    BaseModel
        The checked configuration.

    Raises
    ------
    SystemExit
        With code 0 after `--help` and `--print-config`, with code 2 and one message after a wrong value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config", metavar="FILE.yaml", help="configuration file; the options below override it")
    own.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    known, overrides = own.parse_known_args(argv)
    try:
        config = build_config(model, known.config, overrides, prog=prog, description=description, parents=[own])
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if known.print_config:
        print(dump_config(config), end="")
        raise SystemExit(0)
    return config


def build_config(
    model: type[C],
    file: str | None,
    overrides: Sequence[str] = (),
    *,
    prog: str = "coda_ray",
    description: str = "",
    parents: Sequence[argparse.ArgumentParser] = (),
) -> C:
    """Build a checked configuration from a YAML file and dotted overrides.

    Relative folders become absolute here, against the current directory, once and for every process of the job.

    Raises
    ------
    ConfigError
        When the file cannot be read or a value is wrong: names the field, the value and the remedy.
    """

    class Job(BaseSettings, model):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(
            frozen=True, extra="forbid", use_attribute_docstrings=True, cli_kebab_case=True, protected_namespaces=()
        )

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: Any, init_settings: Any, env_settings: Any, dotenv_settings: Any, file_secret_settings: Any
        ) -> tuple[Any, ...]:
            # The environment decides where keys come from, never what is computed.
            return (init_settings,)

    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [-h] [--config FILE.yaml] [--print-config] [--section.field VALUE ...]",
        description=description,
        parents=list(parents),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    values = _read_yaml(file)
    given: dict[str, Any] = {}

    def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
        namespace, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise ConfigError(_explain_unknown(unknown, list(parser._option_string_actions)))
        given.update(vars(namespace))
        return namespace

    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            Job, root_parser=parser, cli_parse_args=_dashed(overrides), parse_args_method=parse
        )
        _drop_replaced(values, given, model)
        job = Job(_cli_settings_source=source, **values)
        return model.model_validate(job.model_dump(), context={"job": True})
    except ValidationError as error:
        raise ConfigError(_explain(error, model)) from None
    except SettingsError as error:
        raise ConfigError(_explain_unread(error, given, model)) from None


def _drop_replaced(values: dict[str, Any], given: Mapping[str, Any], model: type[BaseModel]) -> None:
    """Drop the mappings of the file that an option gives: it stands in their place, as with lists, and is not mixed with them."""
    for name in given:
        *path, field = name.split(".")
        section: Any = values
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(field), dict) and not _fields_at(model, [*path, field]):
            del section[field]


def _dashed(arguments: Sequence[str]) -> list[str]:
    """Spell names of options with dashes, so that the names of the YAML file work as well."""
    return [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), argument) for argument in arguments]


def dump_config(config: BaseModel) -> str:
    """Write a configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(file: str | None) -> dict[str, Any]:
    """Read a YAML mapping; no file is an empty one."""
    if file is None:
        return {}
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file}: not YAML: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"--config {file}: holds a {type(values).__name__}; it must be a mapping of sections")
    return values or {}


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per wrong field: name, value, what is expected, how to give it."""
    lines = []
    for problem in error.errors(include_url=False):
        # A field of several types has a line for each; which one it was is no part of its name.
        path = [part for part in problem["loc"] if isinstance(part, str) and not _TYPE.fullmatch(part)]
        name = ".".join(path) or "config"
        option = f"--{name.replace('_', '-')}"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "default_factory_not_called":  # for another field is wrong, which has a line of its own
            continue
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path[-1], _fields_at(model, path[:-1]), n=1)
            message = f"there is no such field{f'; did you mean {near[0]!r}?' if near else ''}"
        elif problem["type"] == "missing":
            lines.append(f"{name} is missing; remedy: give {option}, or {name} in the configuration file")
            continue
        elif problem["type"] == "value_error" and isinstance(problem["input"], (dict, BaseModel)):
            # A rule about several fields; its text names them.
            lines.append(f"{message}; remedy: correct the option or the configuration file (see --help)")
            continue
        elif fields := _fields_at(model, path):
            lines.append(_explain_section(name, fields))
            continue
        shown = "" if problem["type"] in (_KEYS, "extra_forbidden") else _shown(problem["input"])
        lines.append(f"{name}{shown}: {message}; remedy: correct {option} or the configuration file (see --help)")
    return "\n".join(lines)


def _explain_unknown(arguments: Sequence[str], options: Sequence[str]) -> str:
    """One line per option that does not exist, with the nearest that does; values may hold secrets and stay out."""
    names = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    lines = []
    for name in names:
        near = difflib.get_close_matches(name, options, n=1)
        lines.append(f"{name}: there is no such option; remedy: {f'did you mean {near[0]}?' if near else 'see --help'}")
    return "\n".join(lines) or f"{arguments[0]!r} belongs to no option; remedy: write --section.field VALUE (see --help)"


def _explain_section(name: str, fields: Sequence[str]) -> str:
    """One line for a section that was given a value of its own, which may be an address with keys and stays out."""
    option = f"--{name}.{fields[0]}".replace("_", "-")
    return f"{name}: this is a section; remedy: give its fields, as {option} VALUE or {name}: {{{fields[0]}: VALUE}} (see --help)"


def _shown(value: Any) -> str:
    """Repeat a value that was given, unless it is long or may hold keys, which stand before an @."""
    return "" if isinstance(value, dict) or "@" in str(value) else f" = {value!r}"


def _explain_unread(error: SettingsError, given: dict[str, Any], model: type[BaseModel]) -> str:
    """One line for an option whose text is no list, mapping or section."""
    named = re.search(r'(?:encountered for |value for field ")([\w.]+)', str(error))
    if not named:
        return str(error)
    if fields := _fields_at(model, named[1].split(".")):
        return _explain_section(named[1], fields)
    value = given.get(named[1])
    shown = _shown(" ".join(value) if isinstance(value, list) else value)
    return (
        f"{named[1]}{shown}: cannot be read; remedy: give --{named[1].replace('_', '-')} a list as a,b or [a,b], "
        "a mapping as name=value (see --help)"
    )


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the fields that stand at a dotted path."""
    for part in path:
        field = model.model_fields.get(part)
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        model = kind
    return list(model.model_fields)
