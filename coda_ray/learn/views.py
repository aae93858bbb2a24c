"""Views of tiles, cut on the training device: all of one size at once, each a function of (seed, sample).

Order per view, as in the released CODA configuration: centre crop of the tile, random crop without rescaling,
vertical and horizontal flip, intensity jitter (global views only), self-normalisation. The other recipe, DINO's
own, is in `resized_views`; it too starts from the centre crop and ends with self-normalisation.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coda_ray.draws import uniforms
from coda_ray.learn.resized_views import GLOBAL_CHANCES, LONE_CHANCES, Chances, cut_resized, draw_resized, local_chances

Kind = Literal["crop", "resized"]
GLOBAL_STREAM = 101
LOCAL_STREAM = 102


@dataclass(frozen=True)
class ViewRecipe:
    """How views are cut.

    Parameters
    ----------
    kind
        `crop`: random crops without rescaling (CODA). `resized`: crops of random area and shape, resized, with
        colour jitter, blur and solarisation (DINO).
    tile_crop
        Side of the centre crop of the tile that views come from (px).
    size_global, size_local
        Sides of the views (px).
    locals_per_sample
        Local views per sample.
    flip_probability
        Of each of the vertical and the horizontal flip.
    jitter_probability
        Of the intensity jitter, on global views of kind `crop`.
    jitter_std
        Standard deviation of the jitter's offset per channel and of its exponent, on intensities in [0, 1];
        the exponent stays within one standard deviation of 1.
    """

    kind: Kind
    tile_crop: int
    size_global: int
    size_local: int
    locals_per_sample: int
    flip_probability: float
    jitter_probability: float
    jitter_std: float

    def __post_init__(self) -> None:
        """Check the kind, and that views fit into the crop."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"views.kind = {self.kind!r}: choose {' or '.join(get_args(Kind))}")
        for name in ("size_global", "size_local"):
            if not 0 < getattr(self, name) <= self.tile_crop:
                raise ValueError(f"views.{name} = {getattr(self, name)}: must be 1 to views.tile_crop = {self.tile_crop}")


@dataclass(frozen=True)
class Jitter:
    """Intensity jitter of V views of B samples, on the host.

    Parameters
    ----------
    on
        (V, B) bool: whether a view is jittered at all.
    offset
        (V, B, C) float32, added to intensities in [0, 1].
    exponent
        (V, B) float32, the power that follows.
    """

    on: Tensor
    offset: Tensor
    exponent: Tensor


@dataclass(frozen=True)
class ViewDraws:
    """Everything random about V views of one size of B samples, on the host.

    Parameters
    ----------
    size
        Side of the views (px).
    top, left
        (V, B) int64: corner of the crop within the tile.
    vertical, horizontal
        (V, B) bool: flips.
    jitter
        Intensity jitter, or None for views without.
    """

    size: int
    top: Tensor
    left: Tensor
    vertical: Tensor
    horizontal: Tensor
    jitter: Jitter | None


def draw_views(
    seed: int,
    samples: NDArray[np.int64],
    *,
    stream: int,
    n_views: int,
    size: int,
    tile_shape: tuple[int, int, int],
    recipe: ViewRecipe,
    jitter: bool,
) -> ViewDraws:
    """Draw the randomness of one group of views, as a pure function of (seed, sample number, stream).

    Parameters
    ----------
    seed
        Seed of the run.
    samples
        (B,) int64 sample numbers.
    stream
        Separates groups of views of one run.
    n_views
        Views per sample, V.
    size
        Side of the views (px).
    tile_shape
        (C, H, W) of a tile.
    recipe
        Probabilities and sizes.
    jitter
        Whether this group is jittered.

    Returns
    -------
    ViewDraws
        Tensors on the host.

    Raises
    ------
    ValueError
        When a tile is smaller than the recipe's centre crop.
    """
    channels = tile_shape[0]
    margin_top, margin_left = _centre(tile_shape, recipe.tile_crop, "views.tile_crop")
    per_view = 6 + channels if jitter else 4
    u = torch.from_numpy(uniforms(seed, samples, n_views * per_view, stream))
    u = u.view(len(samples), n_views, per_view).transpose(0, 1)
    places = recipe.tile_crop - size + 1
    return ViewDraws(
        size=size,
        top=margin_top + (u[..., 0] * places).long(),
        left=margin_left + (u[..., 1] * places).long(),
        vertical=u[..., 2] < recipe.flip_probability,
        horizontal=u[..., 3] < recipe.flip_probability,
        jitter=_draw_jitter(u[..., 4:], recipe) if jitter else None,
    )


def cut(tiles: Tensor, draws: ViewDraws, partners: Tensor | None = None) -> Tensor:
    """Cut, flip, jitter and normalise views of one size, all at once.

    Parameters
    ----------
    tiles
        (B, C, H, W) uint8, on the device that the views are wanted on.
    draws
        Randomness of V views.
    partners
        (B, C, H, W) uint8: the second image of each pair. The first half of the views then comes from
        `tiles`, the second half from `partners`.

    Returns
    -------
    Tensor
        (V * B, C, size, size) float32, view-major: row v * B + b is view v of sample b.
    """
    if partners is None:
        return _finish(_gather(tiles, draws, slice(None)), draws.jitter)
    half = len(draws.top) // 2
    crops = [_gather(tiles, draws, slice(None, half)), _gather(partners, draws, slice(half, None))]
    return _finish(torch.cat(crops), draws.jitter)


def dino_views(
    tiles: Tensor, partners: Tensor | None, *, seed: int, samples: NDArray[np.int64], recipe: ViewRecipe
) -> tuple[Tensor, Tensor]:
    """Cut the views of one DINO step.

    Parameters
    ----------
    tiles
        (B, C, H, W) uint8 anchors.
    partners
        (B, C, H, W) uint8: same compound, other batch; each image then gives one global and half of the local
        views (CODA, section 3). None: all views come from the anchor.
    seed
        Seed of the run.
    samples
        (B,) int64 sample numbers.
    recipe
        Sizes and probabilities.

    Returns
    -------
    globals
        (2 * B, C, size_global, size_global) float32, view-major.
    locals
        (locals_per_sample * B, C, size_local, size_local) float32, view-major.

    Raises
    ------
    ValueError
        When a tile is smaller than the recipe's centre crop, or an odd number of local views is to be shared
        by a pair.
    """
    if partners is not None and partners.shape != tiles.shape:
        raise ValueError(f"partners are {tuple(partners.shape)}, tiles {tuple(tiles.shape)}; the shapes must be equal")
    if partners is not None and recipe.locals_per_sample % 2:
        raise ValueError(f"views.locals_per_sample = {recipe.locals_per_sample}: pairs need an even number")
    chances = local_chances(recipe.locals_per_sample)
    return (
        _group(tiles, partners, seed, samples, recipe, GLOBAL_STREAM, GLOBAL_CHANCES),
        _group(tiles, partners, seed, samples, recipe, LOCAL_STREAM, chances),
    )


def supervised_view(tiles: Tensor, *, seed: int, samples: NDArray[np.int64], recipe: ViewRecipe) -> Tensor:
    """Cut one training view per tile: the chain of a global view, of kind `resized` without blur and solarisation.

    Parameters
    ----------
    tiles
        (B, C, H, W) uint8.
    seed
        Seed of the run.
    samples
        (B,) int64 sample numbers.
    recipe
        Sizes and probabilities.

    Returns
    -------
    Tensor
        (B, C, size_global, size_global) float32.

    Raises
    ------
    ValueError
        When a tile is smaller than the recipe's centre crop.
    """
    return _group(tiles, None, seed, samples, recipe, GLOBAL_STREAM, LONE_CHANCES)


def evaluation_view(tiles: Tensor, size: int) -> Tensor:
    """Cut the centre of each tile and self-normalise it.

    Parameters
    ----------
    tiles
        (B, C, H, W) uint8.
    size
        Side of the view (px).

    Returns
    -------
    Tensor
        (B, C, size, size) float32.

    Raises
    ------
    ValueError
        When a tile is smaller than `size`.
    """
    return _finish(centre_crop(tiles, size, "views.size_global"), None)


def centre_crop(tiles: Tensor, side: int, field: str) -> Tensor:
    """Cut the centre (B, C, side, side) of tiles (B, C, H, W) uint8; `field` names the side where they are too small."""
    top, left = _centre(_shape(tiles), side, field)
    return tiles[:, :, top : top + side, left : left + side]


def _group(
    tiles: Tensor,
    partners: Tensor | None,
    seed: int,
    samples: NDArray[np.int64],
    recipe: ViewRecipe,
    stream: int,
    chances: Chances,
) -> Tensor:
    """Cut the global or the local views, as many as `chances` has, by the recipe's kind."""
    size = recipe.size_global if stream == GLOBAL_STREAM else recipe.size_local
    shape = _shape(tiles)
    if recipe.kind == "resized":
        draws_resized = draw_resized(
            seed,
            samples,
            stream=stream,
            chances=chances,
            size=size,
            side=recipe.tile_crop,
            channels=shape[0],
            flip_probability=recipe.flip_probability,
        )
        top, left = _centre(shape, recipe.tile_crop, "views.tile_crop")
        centre = (..., slice(top, top + recipe.tile_crop), slice(left, left + recipe.tile_crop))
        return _normalise(cut_resized(tiles[centre], draws_resized, None if partners is None else partners[centre]))
    draws = draw_views(
        seed,
        samples,
        stream=stream,
        n_views=len(chances.blur),
        size=size,
        tile_shape=shape,
        recipe=recipe,
        jitter=stream == GLOBAL_STREAM,
    )
    return cut(tiles, draws, partners)


def _shape(tiles: Tensor) -> tuple[int, int, int]:
    """Check what tiles must be, and return (C, H, W)."""
    if tiles.ndim != 4 or tiles.dtype != torch.uint8:
        raise ValueError(f"tiles are {tiles.dtype} {tuple(tiles.shape)}; they must be uint8 (B, C, H, W)")
    _, channels, height, width = tiles.shape
    return channels, height, width


def _centre(tile_shape: tuple[int, int, int], side: int, field: str) -> tuple[int, int]:
    """Corner of the centre crop of a tile."""
    _, height, width = tile_shape
    if min(height, width) < side:
        raise ValueError(
            f"{field} = {side} px does not fit into tiles of {height} x {width} px; "
            f"set it to at most {min(height, width)}, or ingest larger tiles"
        )
    return (height - side) // 2, (width - side) // 2


def _draw_jitter(u: Tensor, recipe: ViewRecipe) -> Jitter:
    """Turn (V, B, 2 + C) uniforms into jitter, normals by the inverse of their distribution function."""
    std = recipe.jitter_std
    normals = torch.special.ndtri(u[..., 1:].clamp(min=2.0**-54))
    return Jitter(
        on=u[..., 0] < recipe.jitter_probability,
        offset=(std * normals[..., 1:]).float(),
        exponent=(1.0 + std * normals[..., 0]).clamp(1.0 - std, 1.0 + std).float(),
    )


def _gather(tiles: Tensor, draws: ViewDraws, views: slice) -> Tensor:
    """Copy the crops of some views out of the tiles, flipped, uint8 (V * B, C, size, size)."""
    top, left, vertical, horizontal = (
        drawn[views].flatten().to(tiles.device, non_blocking=True)
        for drawn in (draws.top, draws.left, draws.vertical, draws.horizontal)
    )
    n_views = len(draws.top[views])
    sample = torch.arange(len(tiles), device=tiles.device).repeat(n_views)
    # Every possible crop, as strides over the tiles' own memory; only the chosen ones are copied.
    crops = tiles.unfold(2, draws.size, 1).unfold(3, draws.size, 1)[sample, :, top, left]
    crops = torch.where(vertical[:, None, None, None], crops.flip(-2), crops)
    return torch.where(horizontal[:, None, None, None], crops.flip(-1), crops)


def _finish(crops: Tensor, jitter: Jitter | None) -> Tensor:
    """Turn uint8 crops (N, C, S, S) into jittered, self-normalised float32."""
    images = crops.float().div_(255.0)
    if jitter is not None:
        # The draws are on the host, so choosing the jittered half costs no synchronisation.
        on = jitter.on.flatten().nonzero()[:, 0]
        where = on.to(images.device, non_blocking=True)
        offset = jitter.offset.flatten(0, 1)[on].to(images.device, non_blocking=True)
        exponent = jitter.exponent.flatten()[on].to(images.device, non_blocking=True)
        shifted = (images[where] + offset[:, :, None, None]).clamp_(0.0, 1.0)
        images[where] = shifted.pow_(exponent[:, None, None, None]).clamp_(0.0, 1.0)
    return _normalise(images)


def _normalise(images: Tensor) -> Tensor:
    """Self-normalise every channel of float images (N, C, S, S), in place."""
    if not len(images):  # a recipe without local views
        return images
    std, mean = torch.std_mean(images, dim=(-2, -1), correction=0, keepdim=True)
    return images.sub_(mean).div_(std.add_(1e-6))
