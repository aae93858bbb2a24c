"""An exported model is what was packed, to the bit; and nothing else is taken for one."""

import hashlib
import json

import pytest
import timm
import torch

from coda_ray.learn.dual import DualModel
from coda_ray.learn.exported import ADAPTATION, DESCRIPTION, WEIGHTS, ModelError, Start, pack, read_model, unpack, unpack_start
from coda_ray.learn.heads import DinoHead
from coda_ray.learn.moments import Moments
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.learn.views import evaluation_view
from coda_ray.learn.vit import VitSpec, build_vit, spec_of, timm_arguments

SPEC = VitSpec("vit", image_size=16, channels=2, patch=8, width=16, depth=2, heads=2)
PREPARATION = {"version": 1, "channels": ["ER", "DNA"], "scale": 0.5, "clip_percentiles": [0.05, 99.95]}
FACTS = {
    "channels": ["ER", "DNA"],
    "classes": ["a", "b", "c"],
    "preparation": PREPARATION,
    "view": {"tile_crop": 20, "size": 16},
}


def network(kind):
    torch.manual_seed(0)
    vits = [build_vit(SPEC, drop_path=0.1) for _ in range(2 if kind == "dual" else 1)]
    return (DualModel if kind == "dual" else SupervisedModel)(*vits, 3)


def files(kind="dual", **facts):
    return pack(network(kind), SPEC, FACTS | facts)


@pytest.fixture
def tiles():
    return torch.randint(0, 255, (3, 2, 27, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["dual", "supervised"])
def test_a_round_trip_changes_no_bit(kind, tiles, tmp_path):
    for name, data in files(kind).items():
        (tmp_path / name).write_bytes(data)
    model, before = read_model(tmp_path), network(kind).eval()
    views = evaluation_view(tiles[:, :, 3:23, 2:22], 16)
    with torch.no_grad():
        logits, cls = before(views)
    assert torch.equal(model.views(tiles), views)
    with torch.no_grad():
        assert torch.equal(model.network(views)[0], logits)
    found = model.predict(tiles)
    assert torch.equal(found.probabilities, logits.softmax(1))
    assert torch.equal(found.embedding, cls)
    assert (model.classes, model.channels, model.tile_crop) == (["a", "b", "c"], ["ER", "DNA"], 20)
    assert files(kind) == files(kind)


def test_the_key_is_of_weights_and_description():
    keys = {json.loads(made[DESCRIPTION])["sha256"][DESCRIPTION] for made in (files(), files("supervised"), files(unit="b"))}
    assert len(keys) == 3


def test_plain_timm_builds_the_same_network():
    for spec in (SPEC, VitSpec("deit_tiny_patch16_224", None, 3)):
        arguments = timm_arguments(spec)
        assert spec_of(json.loads(json.dumps(arguments))) == spec
        own, theirs = build_vit(spec, drop_path=0.0), timm.create_model(**arguments)
        theirs.load_state_dict(own.state_dict())
        side = 16 if spec is SPEC else 32
        images = torch.randn(2, spec.channels, side, side)
        with torch.no_grad():
            assert torch.equal(own.eval().forward_features(images), theirs.eval().forward_features(images))


def changed(made, **changes):
    """The files with another description, whose own hash is right."""
    told = json.loads(made[DESCRIPTION]) | changes
    told["sha256"] = {WEIGHTS: told["sha256"][WEIGHTS]}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    told["sha256"][DESCRIPTION] = hashlib.sha256(text.encode()).hexdigest()
    return made | {DESCRIPTION: json.dumps(told).encode()}


def tampered(made):
    weights = bytearray(made[WEIGHTS])
    weights[-1] ^= 1
    return made | {WEIGHTS: bytes(weights)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (tampered, "there/model.safetensors: SHA-256 is"),
        (lambda made: made | {WEIGHTS: made[WEIGHTS][:-5]}, "there/model.safetensors: SHA-256 is"),
        (lambda made: made | {WEIGHTS: files("supervised")[WEIGHTS]}, "there/model.safetensors: SHA-256 is"),
        (
            lambda made: made | {DESCRIPTION: made[DESCRIPTION].replace(b'"scale": 0.5', b'"scale": 0.6')},
            "model.json: SHA-256 is",
        ),
        (lambda made: made | {DESCRIPTION: made[DESCRIPTION][:90]}, "there/model.json: not the description of a model"),
        (lambda made: made | {DESCRIPTION: b"[]"}, "there/model.json: not the description of a model"),
        (lambda made: changed(made, format=2), "format = 2, known here is 1"),
        (lambda made: changed(made, kind="triple"), "kind 'triple'"),
        (lambda made: changed(made, classes=["a"]), "shape"),
        (lambda made: changed(made, timm={**timm_arguments(SPEC), "checkpoint_path": "x.pth"}), "not those of a plain vision"),
        (lambda made: changed(made, timm={**timm_arguments(VitSpec("hf-hub:x/y", None, 2))}), "not those of a plain vision"),
    ],
)
def test_a_folder_that_was_changed_is_refused(change, told):
    made = change(files())
    with pytest.raises(ModelError, match=told):
        unpack(made[DESCRIPTION], made[WEIGHTS], "there")


@pytest.mark.parametrize(
    ("channels", "preparation", "told"),
    [
        (("DNA", "ER"), PREPARATION, r"ingest.channels = \['DNA', 'ER'\], the model wants \['ER', 'DNA'\]"),
        (("ER", "DNA"), {**PREPARATION, "scale": 1.0}, "there/tiles: .* ingest.scale = 1.0, the model wants 0.5; ingest them"),
        (("ER", "DNA"), {**PREPARATION, "pixel_size_um": 0.5}, "ingest.pixel_size_um = 0.5, the model wants None"),
    ],
)
def test_tiles_that_are_made_otherwise_are_refused(channels, preparation, told):
    made = files()
    model = unpack(made[DESCRIPTION], made[WEIGHTS], "here")
    model.require(("ER", "DNA"), {**PREPARATION, "clip_percentiles": (0.05, 99.95)}, "there/tiles")
    with pytest.raises(ModelError, match=told):
        model.require(channels, preparation, "there/tiles")


def test_tiles_with_other_channels_or_too_small_are_refused(tiles):
    made = files()
    model = unpack(made[DESCRIPTION], made[WEIGHTS], "here")
    with pytest.raises(ModelError, match="tiles have 3 channels, the model reads ER, DNA"):
        model.predict(torch.cat([tiles, tiles[:, :1]], 1))
    with pytest.raises(ValueError, match=r"view.tile_crop = 20 px does not fit"):
        model.predict(tiles[:, :, :19])


def start(moments=True, classes=3):
    """As a pre-training leaves it: student and teacher with their heads."""
    torch.manual_seed(1)
    parts = {who: build_vit(SPEC, drop_path=0.0) for who in ("student", "teacher")}
    parts |= {f"{who}_head": DinoHead(16, hidden=12, bottleneck=6, out_dim=9) for who in ("student", "teacher")}
    dino = {f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()}
    return Start(dino, Moments(torch.randn(2, 16), torch.rand(2, 16)) if moments else None, torch.rand(classes).softmax(0))


@pytest.mark.parametrize("moments", [True, False])
def test_what_an_adaptation_starts_from_comes_back_to_the_bit(moments):
    wanted = start(moments)
    made = pack(network("dual"), SPEC, FACTS, wanted)
    model = unpack(made[DESCRIPTION], made[WEIGHTS], "there")
    found = unpack_start(model, made[ADAPTATION])
    assert found.dino.keys() == wanted.dino.keys()
    assert all(torch.equal(found.dino[name], value) for name, value in wanted.dino.items())
    assert torch.equal(found.prior, wanted.prior)
    if moments:
        assert torch.equal(found.moments.mean, wanted.moments.mean)
        assert torch.equal(found.moments.std, wanted.moments.std)
    else:
        assert found.moments is None
    DinoHead(16, **found.head).load_state_dict(
        {name.removeprefix("teacher_head."): value for name, value in found.dino.items() if name.startswith("teacher_head.")}
    )
    assert made[WEIGHTS] == files()[WEIGHTS], "prediction reads the same file as without"


def test_a_start_that_is_missing_changed_or_of_another_model_is_refused():
    without, made = files(), pack(network("dual"), SPEC, FACTS, start())
    assert json.loads(without[DESCRIPTION])["sha256"].keys() == {WEIGHTS, DESCRIPTION}
    with pytest.raises(ModelError, match=r"there/model.json: the model has no adapt.safetensors; export it again"):
        unpack_start(unpack(without[DESCRIPTION], without[WEIGHTS], "there"), made[ADAPTATION])
    model = unpack(made[DESCRIPTION], made[WEIGHTS], "there")
    with pytest.raises(ModelError, match=r"there/adapt.safetensors: SHA-256 is"):
        unpack_start(model, made[ADAPTATION][:-1])
    made = pack(network("dual"), SPEC, FACTS, start(classes=4))
    with pytest.raises(ModelError, match=r"there/adapt.safetensors: prior is \(4,\), the model wants \(3,\)"):
        unpack_start(unpack(made[DESCRIPTION], made[WEIGHTS], "there"), made[ADAPTATION])
