"""From ideal fluorescence to camera counts: cross-talk, point spread, staining, non-linearity, illumination, noise."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import fft

from coda_ray.jump.simulate.render import Image
from coda_ray.jump.simulate.world import Batch, Floats, Optics

EMISSION_UM = (0.456, 0.525, 0.600, 0.605, 0.700)
_PAD = 32


@cache
def _frequencies(side: int) -> tuple[Floats, npt.NDArray[np.intp]]:
    """Squared spatial frequencies of a field's transform, each once, and which of them each coefficient has."""
    squared = fft.fftfreq(side)[:, None] ** 2 + fft.rfftfreq(side)[None] ** 2
    values, index = np.unique(squared, return_inverse=True)
    return values, index.reshape(squared.shape)


def _transfer(optics: Optics, focus_um: Sequence[float], side: int) -> Image:
    """Optical transfer function per channel, shape (5, side, side // 2 + 1).

    A diffraction core (Gaussian of 0.21 wavelength / NA; Zhang et al. 2007, doi:10.1364/AO.46.001819), widened by the depth
    of the cells and by defocus, and two wider Gaussians for the light that wide-field optics collect from other planes.
    """
    squared, index = _frequencies(side)
    decay = -2 * np.pi**2 * squared / optics.pixel_um**2
    cone = np.tan(np.arcsin(min(optics.numerical_aperture / 1.38, 0.9))) / 2
    channels = []
    for wavelength, haze, focus in zip(EMISSION_UM, optics.haze, focus_um, strict=True):
        core = (0.21 * wavelength / optics.numerical_aperture) ** 2 + (cone * np.hypot(optics.depth_um / 2, focus)) ** 2
        near, far = (np.exp(decay * (core + width**2)) for width in optics.haze_um)
        channels.append((1 - haze) * np.exp(decay * core) + haze * (0.7 * near + 0.3 * far))
    return np.stack([channel.astype(np.float32).take(index) for channel in channels])


def illumination(optics: Optics, batch: Batch, field_px: int) -> Image:
    """True illumination of a batch, shape (5, field_px, field_px), mean 1 per channel."""
    axis = np.linspace(-1, 1, field_px)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    cx, cy = batch.vignette_centre
    fall = ((x - cx) ** 2 + (y - cy) ** 2) / 2
    tilt = batch.vignette_tilt[0] * x + batch.vignette_tilt[1] * y
    strength = optics.vignetting * np.array([1.15, 1.0, 1.0, 0.95, 0.85])
    field = np.maximum(1 - strength[:, None, None] * fall + tilt, 0.2)
    return np.asarray(field / field.mean((1, 2), keepdims=True), dtype=np.float32)


def estimated_illumination(rng: np.random.Generator, true: Image) -> Image:
    """The function a lab would supply for a plate: the truth with a smooth error of about 1 %."""
    axis = np.linspace(-1, 1, true.shape[1])
    y, x = np.meshgrid(axis, axis, indexing="ij")
    error = rng.normal(0, 0.01, (5, 3))
    bent = 1 + error[:, 0, None, None] * x + error[:, 1, None, None] * y + error[:, 2, None, None] * x * y
    field = true * bent
    return np.asarray(field / field.mean((1, 2), keepdims=True), dtype=np.float32)


def _blur(image: Image, transfer: Image) -> Image:
    """Convolve each channel with its point spread; the field continues as its mirror image."""
    side, pad = transfer.shape[1], _PAD
    end = side - image.shape[1] - pad
    padded = np.pad(image, ((0, 0), (pad, end), (pad, end)), mode="reflect")
    spread = fft.irfft2(fft.rfft2(padded) * transfer, s=(side, side))
    return np.asarray(spread[:, pad : pad + image.shape[1], pad : pad + image.shape[2]], dtype=np.float32)


def expose(
    rng: np.random.Generator, ideal: Image, optics: Optics, batch: Batch, light: Image, stain: Floats
) -> npt.NDArray[np.uint16]:
    """Take the picture.

    Parameters
    ----------
    rng
        The field's own random numbers.
    ideal
        Fluorescence from `render`, shape (5, field_px, field_px).
    optics, batch
        The source and the run.
    light
        Illumination from `illumination`, same shape.
    stain
        Staining of the well relative to its batch, shape (5,).

    Returns
    -------
    ndarray of uint16, same shape
        Camera counts, clipped at the camera's full scale.
    """
    signal = ideal * (np.asarray(batch.stain) * stain).astype(np.float32)[:, None, None]
    mixed = signal.copy()
    for source, target, share in optics.bleed:
        mixed[target] += np.float32(share) * signal[source]
    side = fft.next_fast_len(ideal.shape[1] + 2 * _PAD, real=True)
    focus = np.asarray(batch.focus_um) + rng.normal(0, 0.4)
    seen = np.maximum(_blur(mixed, _transfer(optics, focus.tolist(), side)), 0)
    gain = np.asarray(optics.gain, dtype=np.float32)[:, None, None]
    floor = (np.asarray(optics.offset) * np.asarray(batch.background)).astype(np.float32)[:, None, None]
    camera = np.float32(0.0015 * optics.full_scale)
    counts = light * (gain * seen ** np.float32(optics.gamma) + floor)
    noise = rng.standard_normal(counts.shape, dtype=np.float32)
    counts += noise * np.sqrt(counts * np.float32(optics.counts_per_photon) + np.float32(optics.read_noise) ** 2)
    return np.asarray(np.clip(np.rint(counts + camera), 0, optics.full_scale), dtype=np.uint16)
