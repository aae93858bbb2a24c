"""Moments of tokens, plate by plate, and tokens moved from a plate's moments to the source's."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# A spread below this share of the mean is what float32 rounds.
CONSTANT = 1e-3


def token_sums(features: Tensor) -> Tensor:
    """Reduce each image's tokens to what moments are made of.

    Parameters
    ----------
    features
        (B, 1 + N, D): the CLS token, then N patch tokens.

    Returns
    -------
    Tensor
        (B, 2, 2, D) float32: first of the values, then of their squares, the CLS token's and the mean over the patch tokens.
    """
    features = features.float()
    cls, patches = features[:, 0], features[:, 1:]
    firsts = torch.stack([cls, patches.mean(1)], 1)
    return torch.stack([firsts, torch.stack([cls.square(), patches.square().mean(1)], 1)], 1)


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of every feature, of the CLS tokens and of the patch tokens.

    Parameters
    ----------
    mean, std
        (..., 2, D) float32: CLS, patches.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, sums: Tensor, count: Tensor) -> Self:
        """Take moments of sums over images.

        Parameters
        ----------
        sums
            (..., 2, 2, D) float64 sums of `token_sums`.
        count
            (...) images in each.
        """
        mean, square = (sums / count[..., None, None, None]).unbind(-3)
        return cls(mean.float(), (square - mean.square()).clamp(min=0).sqrt().float())

    def rows(self, chosen: Tensor) -> "Moments":
        """Keep some of the first axis."""
        return Moments(self.mean[chosen], self.std[chosen])

    def to(self, device: torch.device) -> "Moments":
        """Move to a device."""
        return Moments(self.mean.to(device), self.std.to(device))


def align(features: Tensor, own: Moments, wanted: Moments) -> Tensor:
    """Standardise tokens by their own plate's moments, and give them those that a frozen classifier was trained on.

    The usual first step of Cell Painting profiles (Caicedo et al., Nature Methods 2017, "Data-analysis strategies for
    image-based cell profiling", normalization), on tokens: zero mean and unit standard deviation within the plate; the
    classifier expects the source's instead, which is the same map for every plate.

    Parameters
    ----------
    features
        (B, 1 + N, D) tokens.
    own
        Moments of each image's plate, (B, 2, D).
    wanted
        Moments of the source, (2, D).

    Returns
    -------
    Tensor
        (B, 1 + N, D) float32. A feature that is constant on a plate becomes the source's mean.

    Raises
    ------
    ValueError
        When shapes disagree.
    """
    features = features.float()
    samples, length, width = features.shape
    if own.mean.shape != (samples, 2, width) or wanted.mean.shape != (2, width):
        raise ValueError(
            f"tokens {tuple(features.shape)}, moments {tuple(own.mean.shape)} of their plates and {tuple(wanted.mean.shape)} "
            "of the source must be (B, 1 + N, D), (B, 2, D) and (2, D)"
        )
    varies = own.std > CONSTANT * own.mean.abs()
    gain = torch.where(varies, wanted.std / own.std, 0)
    offset = wanted.mean - own.mean * gain
    kinds = torch.tensor([0] + [1] * (length - 1), device=features.device)
    return features * gain[:, kinds] + offset[:, kinds]
