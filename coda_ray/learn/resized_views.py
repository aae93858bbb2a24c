"""DINO's own views: crops of random area and shape, resized, flipped, with colour jitter, blur and solarisation.

Caron et al. (ICCV 2021, section 3.2 and the released augmentation). Photographs have three channels that make a
colour; here every channel has its own brightness and contrast. Resizing, flipping and blurring are linear along
rows and columns, so views are cut by matrix products: all of one size at once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coda_ray.draws import uniforms

ASPECT = (3 / 4, 4 / 3)
COLOUR_PROBABILITY = 0.8
COLOUR_STRENGTH = 0.4
BLUR_SIGMA = (0.1, 2.0)
SOLARIZE_FROM = 0.5


@dataclass(frozen=True)
class Chances:
    """What may happen to each of V views of one size.

    Parameters
    ----------
    area
        Least and largest share of the image's area that a view covers.
    blur, solarize
        Probabilities, one per view.
    """

    area: tuple[float, float]
    blur: tuple[float, ...]
    solarize: tuple[float, ...]


GLOBAL_CHANCES = Chances(area=(0.4, 1.0), blur=(1.0, 0.1), solarize=(0.0, 0.2))
# DINO's two global views differ so that neither blur nor solarisation tells them apart; a lone view needs none.
LONE_CHANCES = Chances(area=(0.4, 1.0), blur=(0.0,), solarize=(0.0,))


def local_chances(n_views: int) -> Chances:
    """What may happen to local views."""
    return Chances(area=(0.05, 0.4), blur=(0.5,) * n_views, solarize=(0.0,) * n_views)


@dataclass(frozen=True)
class ResizedDraws:
    """Everything random about V resized views of B samples, on the host.

    Parameters
    ----------
    size
        Side of the views (px).
    top, left, height, width
        (V, B) int64: the box that becomes a view (px).
    vertical, horizontal
        (V, B) bool: flips.
    brightness, contrast
        (V, B, C) float32 factors, 1 where there is no colour jitter.
    blurred, solarized
        (V, B) bool.
    sigma
        (V, B) float32: standard deviation of the blur (px).
    """

    size: int
    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    vertical: Tensor
    horizontal: Tensor
    brightness: Tensor
    contrast: Tensor
    blurred: Tensor
    sigma: Tensor
    solarized: Tensor


def draw_resized(
    seed: int,
    samples: NDArray[np.int64],
    *,
    stream: int,
    chances: Chances,
    size: int,
    side: int,
    channels: int,
    flip_probability: float,
) -> ResizedDraws:
    """Draw the randomness of one group of views, as a pure function of (seed, sample number, stream).

    Parameters
    ----------
    seed
        Seed of the run.
    samples
        (B,) int64 sample numbers.
    stream
        Separates groups of views of one run.
    chances
        What may happen to each view.
    size
        Side of the views (px).
    side
        Side of the square images (px). A box that would be longer is cut to it, where torchvision draws anew.
    channels
        Channels of the images, C.
    flip_probability
        Of each of the vertical and the horizontal flip.

    Returns
    -------
    ResizedDraws
        Tensors on the host.
    """
    n_views, per_view = len(chances.blur), 10 + 2 * channels
    u = torch.from_numpy(uniforms(seed, samples, n_views * per_view, stream))
    u = u.view(len(samples), n_views, per_view).transpose(0, 1)
    area = _between(u[..., 0], chances.area) * side**2
    aspect = _between(u[..., 1], (np.log(ASPECT[0]), np.log(ASPECT[1]))).exp()
    height, width = ((area * ratio).sqrt().round().long().clamp(1, side) for ratio in (1 / aspect, aspect))
    jittered = (u[..., 6] < COLOUR_PROBABILITY)[..., None]
    factors = torch.where(jittered, _between(u[..., 10:], (1 - COLOUR_STRENGTH, 1 + COLOUR_STRENGTH)), 1.0).float()
    return ResizedDraws(
        size=size,
        top=(u[..., 2] * (side - height + 1)).long(),
        left=(u[..., 3] * (side - width + 1)).long(),
        height=height,
        width=width,
        vertical=u[..., 4] < flip_probability,
        horizontal=u[..., 5] < flip_probability,
        brightness=factors[..., :channels],
        contrast=factors[..., channels:],
        blurred=u[..., 7] < torch.tensor(chances.blur, dtype=u.dtype)[:, None],
        sigma=_between(u[..., 8], BLUR_SIGMA).float(),
        solarized=u[..., 9] < torch.tensor(chances.solarize, dtype=u.dtype)[:, None],
    )


def cut_resized(images: Tensor, draws: ResizedDraws, partners: Tensor | None = None) -> Tensor:
    """Cut views of one size, all at once: resize, flip, brightness, contrast, blur, solarise.

    Parameters
    ----------
    images
        (B, C, T, T) uint8, on the device that the views are wanted on.
    draws
        Randomness of V views.
    partners
        (B, C, T, T) uint8: the second image of each pair. The first half of the views then comes from
        `images`, the second half from `partners`.

    Returns
    -------
    Tensor
        (V * B, C, size, size) float32 in [0, 1], view-major: row v * B + b is view v of sample b.
    """
    # Under autocast the products would round pixels to bfloat16.
    with torch.autocast(images.device.type, enabled=False):
        if partners is None:
            return _colour(_resize(images, draws, slice(None)), draws)
        half = len(draws.top) // 2
        views = [_resize(images, draws, slice(None, half)), _resize(partners, draws, slice(half, None))]
        return _colour(torch.cat(views), draws)


def _between(u: Tensor, ends: tuple[float, float]) -> Tensor:
    """Spread uniform numbers over an interval."""
    return ends[0] + (ends[1] - ends[0]) * u


def _resize(images: Tensor, draws: ResizedDraws, views: slice) -> Tensor:
    """Resize and flip the boxes of some views, float32 (V * B, C, size, size) in [0, 1]."""
    _, channels, side, _ = images.shape

    def there(drawn: Tensor) -> Tensor:
        return drawn[views].to(images.device, non_blocking=True)

    rows = _resizing(there(draws.top), there(draws.height), there(draws.vertical), draws.size, side)
    columns = _resizing(there(draws.left), there(draws.width), there(draws.horizontal), draws.size, side)
    lower = torch.einsum("vbst,bctu->vbcsu", rows, images.float().div_(255.0))
    cut = torch.einsum("vbcsu,vbru->vbcsr", lower, columns)
    return cut.reshape(-1, channels, draws.size, draws.size)


def _resizing(start: Tensor, length: Tensor, flipped: Tensor, size: int, side: int) -> Tensor:
    """Weights (V, B, size, side) with which a row of pixels becomes a resized part of itself: bilinear, anti-aliased.

    A triangle around every new pixel's centre, as wide as the larger of an old and a new pixel, over the part
    alone.
    """
    start, length = start[..., None, None].float(), length[..., None, None].float()
    new = torch.arange(size, device=start.device) + 0.5
    new = torch.where(flipped[..., None, None], size - new[:, None], new[:, None])
    old = torch.arange(side, device=start.device) + 0.5
    scale = length / size
    weights = (1.0 - (old - (start + new * scale)).abs() / scale.clamp(min=1.0)).clamp_(min=0.0)
    weights = torch.where((old > start) & (old < start + length), weights, 0.0)
    return weights / weights.sum(-1, keepdim=True)


def _colour(views: Tensor, draws: ResizedDraws) -> Tensor:
    """Change brightness and contrast of every channel, blur and solarise the views that are to be."""
    if not len(views):  # a recipe without local views
        return views
    brightness, contrast = (
        factor.flatten(0, 1).to(views.device, non_blocking=True)[:, :, None, None]
        for factor in (draws.brightness, draws.contrast)
    )
    views = (views * brightness).clamp_(0.0, 1.0)
    mean = views.mean(dim=(-2, -1), keepdim=True)
    views = torch.lerp(mean, views, contrast).clamp_(0.0, 1.0)
    # The draws are on the host, so choosing views costs no synchronisation.
    blurred, solarized = (chosen.flatten().nonzero()[:, 0] for chosen in (draws.blurred, draws.solarized))
    sigma = draws.sigma.flatten()[blurred].to(views.device, non_blocking=True)
    blurred, solarized = (chosen.to(views.device, non_blocking=True) for chosen in (blurred, solarized))
    kernel = _blurring(sigma, draws.size)
    views[blurred] = kernel[:, None] @ views[blurred] @ kernel.mT[:, None]
    bright = views[solarized]
    views[solarized] = torch.where(bright < SOLARIZE_FROM, bright, 1.0 - bright)
    return views


def _blurring(sigma: Tensor, size: int) -> Tensor:
    """Weights (N, size, size) that blur a row of pixels by Gaussians of N widths, mirrored at its first and last pixel."""
    place = torch.arange(size, device=sigma.device)
    here, there = place[:, None], place[None, :]
    mirrored = (here + there, 2 * (size - 1) - here - there)
    inner = (there > 0, there < size - 1)
    weights = _gaussian(here - there, sigma)
    for distance, counts in zip(mirrored, inner, strict=True):
        weights = weights + _gaussian(distance, sigma) * counts
    return weights / weights.sum(-1, keepdim=True)


def _gaussian(distance: Tensor, sigma: Tensor) -> Tensor:
    """Evaluate Gaussians of N widths at distances (S, S); (N, S, S)."""
    return torch.exp(-0.5 * (distance / sigma[:, None, None]).square())
