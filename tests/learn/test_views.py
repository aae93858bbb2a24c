"""Each view operation against a plain version that handles one image at a time."""

import dataclasses
from statistics import NormalDist

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from coda_ray.draws import uniforms
from coda_ray.learn.views import (
    GLOBAL_STREAM,
    LOCAL_STREAM,
    ViewDraws,
    ViewRecipe,
    cut,
    dino_views,
    draw_views,
    evaluation_view,
    supervised_view,
)

RECIPE = ViewRecipe(
    kind="crop",
    tile_crop=40,
    size_global=24,
    size_local=12,
    locals_per_sample=6,
    flip_probability=0.5,
    jitter_probability=0.5,
    jitter_std=0.05,
)
SAMPLES = np.array([3, 11, 12, 900, 2**40], dtype=np.int64)
SEED = 7


def _tiles(seed: int, height: int = 45, width: int = 51) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (len(SAMPLES), 3, height, width), dtype=torch.uint8, generator=generator)


def _plain_view(tile: NDArray[np.uint8], u: NDArray[np.float64], size: int, jitter: bool) -> NDArray[np.float64]:
    """One view of one tile (C, H, W), step by step, from its uniforms."""
    recipe, (_, height, width) = RECIPE, tile.shape
    margin_top, margin_left = (height - recipe.tile_crop) // 2, (width - recipe.tile_crop) // 2
    crop = tile[:, margin_top : margin_top + recipe.tile_crop, margin_left : margin_left + recipe.tile_crop]
    top, left = int(u[0] * (recipe.tile_crop - size + 1)), int(u[1] * (recipe.tile_crop - size + 1))
    view = crop[:, top : top + size, left : left + size].astype(np.float64) / 255
    if u[2] < recipe.flip_probability:
        view = view[:, ::-1]
    if u[3] < recipe.flip_probability:
        view = view[:, :, ::-1]
    if jitter and u[4] < recipe.jitter_probability:
        normal = NormalDist(0, recipe.jitter_std)
        exponent = min(max(1 + normal.inv_cdf(u[5]), 1 - recipe.jitter_std), 1 + recipe.jitter_std)
        offsets = np.array([normal.inv_cdf(value) for value in u[6:]])
        view = np.clip(np.clip(view + offsets[:, None, None], 0, 1) ** exponent, 0, 1)
    mean, std = view.mean(axis=(1, 2), keepdims=True), view.std(axis=(1, 2), keepdims=True)
    return (view - mean) / (std + 1e-6)


def _plain_group(images: list[Tensor], size: int, jitter: bool, stream: int) -> NDArray[np.float64]:
    """All views of one size, view-major; view v comes from images[v]."""
    per_view = 9 if jitter else 4
    u = uniforms(SEED, SAMPLES, len(images) * per_view, stream).reshape(len(SAMPLES), len(images), per_view)
    return np.stack(
        [_plain_view(image[b].numpy(), u[b, v], size, jitter) for v, image in enumerate(images) for b in range(len(SAMPLES))]
    )


@pytest.mark.parametrize("paired", [False, True])
def test_dino_views_equal_the_plain_version(paired: bool) -> None:
    tiles, partners = _tiles(0), _tiles(1)
    second = partners if paired else tiles
    ours = dino_views(tiles, partners if paired else None, seed=SEED, samples=SAMPLES, recipe=RECIPE)
    plain_global = _plain_group([tiles, second], 24, True, GLOBAL_STREAM)
    plain_local = _plain_group([tiles] * 3 + [second] * 3, 12, False, LOCAL_STREAM)
    np.testing.assert_allclose(ours[0].numpy(), plain_global, atol=2e-5)
    np.testing.assert_allclose(ours[1].numpy(), plain_local, atol=2e-5)
    assert ours[0].dtype is ours[1].dtype is torch.float32


def test_supervised_view_is_the_chain_of_a_global_view() -> None:
    tiles = _tiles(2)
    ours = supervised_view(tiles, seed=SEED, samples=SAMPLES, recipe=RECIPE)
    np.testing.assert_allclose(ours.numpy(), _plain_group([tiles], 24, True, GLOBAL_STREAM), atol=2e-5)


def test_evaluation_view_is_the_normalised_centre() -> None:
    tiles = _tiles(3)
    centre = tiles[:, :, 10:34, 13:37].double() / 255
    expected = (centre - centre.mean((2, 3), keepdim=True)) / (centre.std((2, 3), correction=0, keepdim=True) + 1e-6)
    torch.testing.assert_close(evaluation_view(tiles, 24).double(), expected, atol=2e-5, rtol=0)


def test_tiles_are_left_as_they_were() -> None:
    tiles = _tiles(0)
    before = tiles.clone()
    dino_views(tiles, None, seed=SEED, samples=SAMPLES, recipe=RECIPE)
    evaluation_view(tiles, 24)
    assert torch.equal(tiles, before)


def _draws(samples: NDArray[np.int64], seed: int = SEED) -> ViewDraws:
    return draw_views(seed, samples, stream=5, n_views=2, size=24, tile_shape=(3, 45, 51), recipe=RECIPE, jitter=True)


def test_draws_depend_on_seed_and_sample_alone() -> None:
    together, alone = _draws(SAMPLES), _draws(SAMPLES[3:4])
    for field in ("top", "left", "vertical", "horizontal"):
        assert torch.equal(getattr(together, field)[:, 3:4], getattr(alone, field))
    assert together.jitter is not None
    assert alone.jitter is not None
    for field in ("on", "offset", "exponent"):
        assert torch.equal(getattr(together.jitter, field)[:, 3:4], getattr(alone.jitter, field))
    assert not torch.equal(together.top, _draws(SAMPLES, seed=SEED + 1).top)


def test_draws_cover_what_they_should() -> None:
    n = 20_000
    drawn = _draws(np.arange(n, dtype=np.int64))
    assert (drawn.top.min(), drawn.top.max()) == (2, 2 + 40 - 24)
    assert (drawn.left.min(), drawn.left.max()) == (5, 5 + 40 - 24)
    assert drawn.jitter is not None
    for share in (drawn.vertical, drawn.horizontal, drawn.jitter.on):
        assert abs(share.float().mean().item() - 0.5) < 5 * 0.5 / (2 * n) ** 0.5
    offset = drawn.jitter.offset
    assert abs(offset.mean().item()) < 5 * 0.05 / offset.numel() ** 0.5
    assert abs(offset.std().item() - 0.05) < 0.001
    assert drawn.jitter.exponent.min() == pytest.approx(0.95)
    assert drawn.jitter.exponent.max() == pytest.approx(1.05)


def test_a_certain_and_an_impossible_flip() -> None:
    tiles = _tiles(4)
    for share, flipped in ((0.0, False), (1.0, True)):
        recipe = dataclasses.replace(RECIPE, flip_probability=share, jitter_probability=0.0)
        shape = (3, 45, 51)
        drawn = draw_views(SEED, SAMPLES, stream=5, n_views=1, size=40, tile_shape=shape, recipe=recipe, jitter=False)
        centre = evaluation_view(tiles, 40)
        torch.testing.assert_close(cut(tiles, drawn), centre.flip(-1, -2) if flipped else centre, atol=1e-4, rtol=0)


def test_no_local_views_and_flat_tiles() -> None:
    recipe = dataclasses.replace(RECIPE, locals_per_sample=0)
    tiles = torch.full((len(SAMPLES), 3, 45, 51), 128, dtype=torch.uint8)
    global_views, local_views = dino_views(tiles, tiles, seed=SEED, samples=SAMPLES, recipe=recipe)
    assert local_views.shape == (0, 3, 12, 12)
    assert global_views.abs().max() < 1.0, "a flat view divides rounding by 1e-6, not by zero"


def test_wrong_input_is_named_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"views.tile_crop = 40 px does not fit into tiles of 39 x 51 px; set it to at most 39"):
        supervised_view(_tiles(0, height=39), seed=SEED, samples=SAMPLES, recipe=RECIPE)
    with pytest.raises(ValueError, match=r"views.size_global = 46 px does not fit into tiles of 45 x 51"):
        evaluation_view(_tiles(0), 46)
    with pytest.raises(ValueError, match=r"tiles are torch.float32 .* must be uint8"):
        evaluation_view(_tiles(0).float(), 24)
    with pytest.raises(ValueError, match="the shapes must be equal"):
        dino_views(_tiles(0), _tiles(0, height=46), seed=SEED, samples=SAMPLES, recipe=RECIPE)
    odd = dataclasses.replace(RECIPE, locals_per_sample=5)
    with pytest.raises(ValueError, match="locals_per_sample = 5: pairs need an even number"):
        dino_views(_tiles(0), _tiles(1), seed=SEED, samples=SAMPLES, recipe=odd)
    with pytest.raises(ValueError, match=r"views.size_local = 41: must be 1 to views.tile_crop = 40"):
        dataclasses.replace(RECIPE, size_local=41)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_views_on_cuda_equal_those_on_the_cpu() -> None:
    tiles, partners = _tiles(0), _tiles(1)
    here = dino_views(tiles, partners, seed=SEED, samples=SAMPLES, recipe=RECIPE)
    there = dino_views(tiles.cuda(), partners.cuda(), seed=SEED, samples=SAMPLES, recipe=RECIPE)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b.cpu(), a, atol=2e-5, rtol=0)
