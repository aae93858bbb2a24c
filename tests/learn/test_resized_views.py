"""DINO's own views against torchvision's functions, one view of one image at a time."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from coda_ray.draws import uniforms
from coda_ray.learn.resized_views import GLOBAL_CHANCES, LONE_CHANCES, Chances, ResizedDraws, draw_resized, local_chances
from coda_ray.learn.views import GLOBAL_STREAM, LOCAL_STREAM, ViewRecipe, dino_views, supervised_view

RECIPE = ViewRecipe(
    kind="resized",
    tile_crop=40,
    size_global=24,
    size_local=12,
    locals_per_sample=6,
    flip_probability=0.5,
    jitter_probability=0.5,
    jitter_std=0.05,
)
SAMPLES = np.array([3, 4, 9, 18, 35, 41, 900, 2**40], dtype=np.int64)
SEED, C = 7, 5


def _tiles(seed: int, height: int = 45, width: int = 51) -> Tensor:
    """Tiles of noise over a slope, so that a mean is not everywhere the same."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(SAMPLES), C, height, width, generator=generator)
    return ((0.6 * noise + 0.4 * torch.linspace(0, 1, width)) * 255).to(torch.uint8)


def _plain_view(tile: Tensor, u: NDArray[np.float64], size: int, blur: float, solarize: float) -> Tensor:
    """One view of one tile (C, H, W), step by step, from its uniforms."""
    side, (_, height, width) = RECIPE.tile_crop, tile.shape
    low, high = GLOBAL_CHANCES.area if size == RECIPE.size_global else local_chances(1).area
    area = (low + (high - low) * u[0]) * side**2
    aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[1])
    h, w = min(round(math.sqrt(area / aspect)), side), min(round(math.sqrt(area * aspect)), side)
    top = (height - side) // 2 + int(u[2] * (side - h + 1))
    left = (width - side) // 2 + int(u[3] * (side - w + 1))
    view = tv.resized_crop(tile.float() / 255, top, left, h, w, [size, size], antialias=True)
    if u[4] < 0.5:
        view = tv.vertical_flip(view)
    if u[5] < 0.5:
        view = tv.horizontal_flip(view)
    if u[6] < 0.8:
        for c in range(C):
            view[c] = tv.adjust_brightness(view[c : c + 1], 0.6 + 0.8 * u[10 + c])[0]
            view[c] = tv.adjust_contrast(view[c : c + 1], 0.6 + 0.8 * u[10 + C + c])[0]
    if u[7] < blur:
        view = tv.gaussian_blur(view, [2 * size - 1, 2 * size - 1], 0.1 + 1.9 * u[8])
    if u[9] < solarize:
        view = tv.solarize(view, 0.5)
    std, mean = torch.std_mean(view, dim=(1, 2), correction=0, keepdim=True)
    return (view - mean) / (std + 1e-6)


def _plain_group(images: list[Tensor], size: int, stream: int, blur: list[float], solarize: list[float]) -> Tensor:
    """All views of one size, view-major; view v comes from images[v]."""
    per_view = 10 + 2 * C
    u = uniforms(SEED, SAMPLES, len(images) * per_view, stream).reshape(len(SAMPLES), len(images), per_view)
    views = [
        _plain_view(image[b], u[b, v], size, blur[v], solarize[v]) for v, image in enumerate(images) for b in range(len(SAMPLES))
    ]
    return torch.stack(views)


@pytest.mark.parametrize("paired", [False, True])
def test_dino_views_equal_the_plain_version(paired: bool) -> None:
    tiles, partners = _tiles(0), _tiles(1)
    second = partners if paired else tiles
    ours = dino_views(tiles, partners if paired else None, seed=SEED, samples=SAMPLES, recipe=RECIPE)
    plain_global = _plain_group([tiles, second], 24, GLOBAL_STREAM, [1.0, 0.1], [0.0, 0.2])
    plain_local = _plain_group([tiles] * 3 + [second] * 3, 12, LOCAL_STREAM, [0.5] * 6, [0.0] * 6)
    torch.testing.assert_close(ours[0], plain_global, atol=2e-4, rtol=0)
    torch.testing.assert_close(ours[1], plain_local, atol=2e-4, rtol=0)


def test_supervised_view_is_neither_blurred_nor_solarized() -> None:
    tiles = _tiles(2)
    ours = supervised_view(tiles, seed=SEED, samples=SAMPLES, recipe=RECIPE)
    torch.testing.assert_close(ours, _plain_group([tiles], 24, GLOBAL_STREAM, [0.0], [0.0]), atol=2e-4, rtol=0)


def test_autocast_does_not_round_pixels() -> None:
    tiles = _tiles(3)
    exact = dino_views(tiles, None, seed=SEED, samples=SAMPLES, recipe=RECIPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = dino_views(tiles, None, seed=SEED, samples=SAMPLES, recipe=RECIPE)
    assert all(torch.equal(a, b) for a, b in zip(exact, within, strict=True))


def _draws(samples: NDArray[np.int64], chances: Chances, seed: int = SEED) -> ResizedDraws:
    return draw_resized(seed, samples, stream=5, chances=chances, size=24, side=400, channels=C, flip_probability=0.5)


def test_draws_depend_on_seed_and_sample_alone() -> None:
    together, alone = _draws(SAMPLES, GLOBAL_CHANCES), _draws(SAMPLES[3:4], GLOBAL_CHANCES)
    for field in dataclasses.fields(ResizedDraws):
        drawn, again = getattr(together, field.name), getattr(alone, field.name)
        assert drawn == again if field.name == "size" else torch.equal(drawn[:, 3:4], again), field.name
    assert not torch.equal(together.top, _draws(SAMPLES, GLOBAL_CHANCES, seed=SEED + 1).top)


def test_the_samples_of_these_tests_meet_every_chance() -> None:
    drawn = draw_resized(
        SEED, SAMPLES, stream=GLOBAL_STREAM, chances=GLOBAL_CHANCES, size=24, side=40, channels=C, flip_probability=0.5
    )
    for chosen in (drawn.blurred[1], drawn.solarized[1], drawn.vertical[0], drawn.horizontal[0]):
        assert 0 < chosen.sum() < len(SAMPLES)


def test_draws_cover_what_they_should() -> None:
    n = 20_000
    drawn = _draws(np.arange(n, dtype=np.int64), GLOBAL_CHANCES)
    for v, (blur, solarize) in enumerate(((1.0, 0.0), (0.1, 0.2))):
        assert abs(drawn.blurred[v].float().mean().item() - blur) < 0.01
        assert abs(drawn.solarized[v].float().mean().item() - solarize) < 0.015
    assert drawn.top.min() == drawn.left.min() == 0
    assert (drawn.top + drawn.height).max() == (drawn.left + drawn.width).max() == 400
    share = drawn.height * drawn.width / 400**2
    assert 0.39 < share.min() < 0.41
    assert 0.98 < share.max() <= 1.0
    aspect = drawn.width / drawn.height
    assert 0.74 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.35
    assert 0.1 <= drawn.sigma.min() < 0.11 < 1.99 < drawn.sigma.max() <= 2.0
    untouched = (drawn.brightness == 1).all(-1) & (drawn.contrast == 1).all(-1)
    assert abs(untouched.float().mean().item() - 0.2) < 0.01
    assert 0.6 <= drawn.brightness.min() < 0.61 < 1.39 < drawn.brightness.max() <= 1.4
    lone, local = _draws(SAMPLES, LONE_CHANCES), _draws(np.arange(n, dtype=np.int64), local_chances(1))
    assert not lone.blurred.any()
    assert not lone.solarized.any()
    assert abs(local.blurred.float().mean().item() - 0.5) < 0.02
    assert ((local.height * local.width).float().mean() / 400**2).item() == pytest.approx(0.225, abs=0.005)


def test_no_local_views_and_tiles_left_as_they_were() -> None:
    tiles = _tiles(0)
    before = tiles.clone()
    recipe = dataclasses.replace(RECIPE, locals_per_sample=0)
    _, local_views = dino_views(tiles, tiles, seed=SEED, samples=SAMPLES, recipe=recipe)
    assert local_views.shape == (0, C, 12, 12)
    assert torch.equal(tiles, before)


def test_wrong_input_is_named_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"views.kind = 'zoom': choose crop or resized"):
        dataclasses.replace(RECIPE, kind="zoom")
    with pytest.raises(ValueError, match=r"views.tile_crop = 40 px does not fit into tiles of 39 x 51 px"):
        supervised_view(_tiles(0, height=39), seed=SEED, samples=SAMPLES, recipe=RECIPE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_views_on_cuda_equal_those_on_the_cpu() -> None:
    tiles, partners = _tiles(0), _tiles(1)
    here = dino_views(tiles, partners, seed=SEED, samples=SAMPLES, recipe=RECIPE)
    there = dino_views(tiles.cuda(), partners.cuda(), seed=SEED, samples=SAMPLES, recipe=RECIPE)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b.cpu(), a, atol=2e-4, rtol=0)
