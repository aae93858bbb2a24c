"""Test-time training of many images at once against one image after the other with torch's own SGD."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from coda_ray.draws import uniforms
from coda_ray.learn.dual import DualModel
from coda_ray.learn.mae import DecoderSpec, MaskedAutoencoder
from coda_ray.learn.ttt import TTT_STREAM, TttRecipe, adapt_each, adapted_parameters
from coda_ray.learn.vit import VitSpec, build_vit, tokens

SPEC = VitSpec(name="vit", image_size=32, channels=3, patch=8, width=24, depth=2, heads=2)
RECIPE = TttRecipe(steps=3, masks=5, lr=0.05, momentum=0.9, weight_decay=0.2)
WHOLE = replace(RECIPE, trains="all")
SAMPLES = np.array([4, 77, 2**40], dtype=np.int64)
SEED, N = 7, 16


def _mae(drop_path: float = 0.0) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(build_vit(SPEC, drop_path=drop_path), DecoderSpec(width=16, depth=1, heads=2)).double()


def _views() -> Tensor:
    return torch.randn(len(SAMPLES), 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _one_by_one(
    model: MaskedAutoencoder, views: Tensor, samples: NDArray[np.int64], *, whole: bool = False
) -> list[MaskedAutoencoder]:
    """Copy the model for every image, and train the copy on as many copies of the image as there are masks."""
    adapted = []
    for image, sample in zip(views, samples, strict=True):
        own = copy.deepcopy(model).eval()
        sgd = torch.optim.SGD(
            [p for p in (own if whole else own.encoder).parameters() if p.requires_grad],
            lr=RECIPE.lr,
            momentum=RECIPE.momentum,
            weight_decay=RECIPE.weight_decay,
        )
        for step in range(RECIPE.steps):
            drawn = uniforms(SEED, np.array([sample]), RECIPE.masks * N, TTT_STREAM + step)
            sgd.zero_grad()
            own(image.repeat(RECIPE.masks, 1, 1, 1), torch.from_numpy(drawn).float().view(RECIPE.masks, N)).backward()
            sgd.step()
        adapted.append(own)
    return adapted


def test_adapting_does_not_follow_a_surrounding_autocast() -> None:
    model, views = _mae().float(), _views().float()
    alone = adapted_parameters(model, views, SAMPLES, seed=SEED, recipe=RECIPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapted_parameters(model, views, SAMPLES, seed=SEED, recipe=RECIPE)
    assert all(torch.equal(inside[name], value) for name, value in alone.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_adapting_on_cuda_inside_autocast_is_close_to_that_on_the_cpu() -> None:
    model, views = _mae().float(), _views().float()
    here = adapted_parameters(model, views, SAMPLES, seed=SEED, recipe=RECIPE)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        there = adapted_parameters(model.cuda(), views.cuda(), SAMPLES, seed=SEED, recipe=RECIPE)
    for name, value in here.items():
        torch.testing.assert_close(there[name].cpu(), value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("recipe", "parts"), [(RECIPE, {"encoder"}), (WHOLE, {"encoder", "decoder"})])
def test_weights_equal_those_of_one_image_after_the_other(recipe: TttRecipe, parts: set[str]) -> None:
    model, views = _mae(), _views()
    ours = adapted_parameters(model, views, SAMPLES, seed=SEED, recipe=recipe)
    for b, own in enumerate(_one_by_one(model, views, SAMPLES, whole=recipe.trains == "all")):
        for name, value in own.named_parameters():
            adapted = ours[name][b] if name in ours else model.state_dict()[name]
            torch.testing.assert_close(adapted, value.detach(), rtol=1e-7, atol=1e-9, msg=f"{b} {name}")
    moved = [name for name, value in model.named_parameters() if name in ours and not torch.equal(ours[name][0], value)]
    assert {name.partition(".")[0] for name in moved} == {name.partition(".")[0] for name in ours} == parts
    assert not torch.equal(ours["encoder.pos_embed"][0], ours["encoder.pos_embed"][1])


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_a_dual_model_reads_the_adapted_encoder(at_once: int) -> None:
    model, views = _mae(drop_path=0.5), _views()
    before = copy.deepcopy(model.state_dict())
    dual = DualModel(copy.deepcopy(model.encoder), build_vit(SPEC, drop_path=0.0).double(), n_classes=5).double().eval()
    ours = adapt_each(
        model.train(),
        views,
        SAMPLES,
        seed=SEED,
        recipe=RECIPE,
        images_at_once=at_once,
        readout=lambda encoder, view: dual.classify(tokens(encoder, view)),
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not ours.requires_grad
    for b, own in enumerate(_one_by_one(model, views, SAMPLES)):
        dual.replace_extractor(own.encoder.state_dict())
        torch.testing.assert_close(ours[b], dual(views[b : b + 1])[0][0].detach(), rtol=1e-7, atol=1e-9)


def test_what_is_frozen_stays() -> None:
    model, views = _mae(), _views()
    model.encoder.pos_embed.requires_grad_(False)
    ours = adapted_parameters(model, views, SAMPLES, seed=SEED, recipe=RECIPE)
    assert "encoder.pos_embed" not in ours
    for b, own in enumerate(_one_by_one(model, views, SAMPLES)):
        torch.testing.assert_close(ours["encoder.norm.weight"][b], own.encoder.norm.weight.detach(), rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="no parameter of the masked autoencoder is trainable"):
        adapted_parameters(model.requires_grad_(False), views, SAMPLES, seed=SEED, recipe=RECIPE)


def test_adapting_lowers_the_loss_of_the_image() -> None:
    model, views = _mae(), _views()
    # A decoder with random weights passes little on to the encoder alone.
    recipe = TttRecipe(steps=20, masks=16, trains="all")
    assert (recipe.lr, recipe.momentum, recipe.weight_decay) == (5e-3, 0.9, 0.0)
    ours = adapted_parameters(model, views, SAMPLES, seed=SEED, recipe=recipe)
    noise = torch.rand(64, N, generator=torch.Generator().manual_seed(3))
    for b in range(len(SAMPLES)):
        own = {name: value[b] for name, value in ours.items()}
        adapted = torch.func.functional_call(model, own, (views[b : b + 1], noise))
        assert adapted < model(views[b : b + 1], noise) - 0.01
