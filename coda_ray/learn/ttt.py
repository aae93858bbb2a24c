"""Test-time training: the masked autoencoder learns one test image at a time, many images side by side."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from coda_ray.draws import uniforms
from coda_ray.learn.mae import MaskedAutoencoder

TTT_STREAM = 1000
# Begins the names of the encoder's parameters in a masked autoencoder.
ENCODER = "encoder."


@dataclass(frozen=True)
class TttRecipe:
    """How long and how fast one image is learnt.

    The defaults are those of the code that Gandelsman et al. released; their paper (NeurIPS 2022, appendix)
    states a weight decay of 0.2.

    Parameters
    ----------
    steps
        Optimisation steps per image.
    masks
        Random masks of the image per step.
    lr, momentum, weight_decay
        Settings of SGD; the decay applies to every parameter that is trained.
    trains
        What learns the image: the `encoder` alone (the released code), or `all` of the autoencoder.
    """

    steps: int = 20
    masks: int = 128
    lr: float = 5e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    trains: Literal["encoder", "all"] = "encoder"


def adapt_each(
    model: MaskedAutoencoder,
    views: Tensor,
    samples: NDArray[np.int64],
    *,
    seed: int,
    recipe: TttRecipe,
    images_at_once: int,
    readout: Callable[[VisionTransformer, Tensor], Tensor],
) -> Tensor:
    """Adapt to each image by itself, from the same trained weights, and read out the adapted encoder.

    Test-time training with masked autoencoders (Gandelsman et al., NeurIPS 2022, section 3).

    Parameters
    ----------
    model
        Trained masked autoencoder; put into evaluation mode (no stochastic depth), otherwise left as it is.
    views
        (B, C, S, S) float evaluation views, on the device of `model`. Adapting computes in their dtype, whatever autocast
        surrounds it; `readout` follows the autocast.
    samples
        (B,) int64 sample numbers.
    seed
        Seed of the masks.
    recipe
        Steps and rates.
    images_at_once
        Images that are adapted side by side. Each has its own parameters, gradients and momenta, so memory
        grows with this number times three times the parameters, and the activations of `recipe.masks` images.
    readout
        Maps the encoder adapted to an image, and its view (1, C, S, S), to what is wanted, (1, ...); of a dual
        model: `lambda encoder, view: dual.classify(tokens(encoder, view))`. Called without gradients.

    Returns
    -------
    Tensor
        (B, ...) what `readout` said of each image.

    Raises
    ------
    ValueError
        When no parameter of the model is trainable.
    """
    encoder = copy.deepcopy(model.encoder).eval()
    said = []
    for first in range(0, len(views), images_at_once):
        chunk = slice(first, first + images_at_once)
        adapted = adapted_parameters(model, views[chunk], samples[chunk], seed=seed, recipe=recipe)
        with torch.no_grad():
            for row, view in enumerate(views[chunk]):
                for name, value in encoder.named_parameters():
                    if f"{ENCODER}{name}" in adapted:
                        value.copy_(adapted[f"{ENCODER}{name}"][row])
                said.append(readout(encoder, view[None]))
    return torch.cat(said)


def adapted_parameters(
    model: MaskedAutoencoder, views: Tensor, samples: NDArray[np.int64], *, seed: int, recipe: TttRecipe
) -> dict[str, Tensor]:
    """Train one copy of the trainable parameters (of all, or of the encoder's) per image, all copies at once.

    Parameters
    ----------
    model
        As in `adapt_each`.
    views
        (B, C, S, S) float.
    samples
        (B,) int64 sample numbers; masks are a pure function of (seed, sample number, step).
    seed
        Seed of the masks.
    recipe
        Steps and rates.

    Returns
    -------
    dict
        Of the name in `model` of every parameter that was trained: (B, *shape), the values adapted to each image.

    Raises
    ------
    ValueError
        When no such parameter is trainable.
    """
    model.eval()
    values = {
        name: value.detach().expand(len(views), *value.shape).clone()
        for name, value in model.named_parameters()
        if value.requires_grad and (recipe.trains == "all" or name.startswith(ENCODER))
    }
    if not values:
        raise ValueError("no parameter of the masked autoencoder is trainable; it must not be frozen before it adapts")

    def loss(own: dict[str, Tensor], view: Tensor, noise: Tensor) -> Tensor:
        said: Tensor = functional_call(model, own, (view[None], noise))
        return said

    gradients = vmap(grad(loss))
    momenta = {name: torch.zeros_like(value) for name, value in values.items()}
    patches = model.patches(views.shape[-1])
    for step in range(recipe.steps):
        drawn = torch.from_numpy(uniforms(seed, samples, recipe.masks * patches, TTT_STREAM + step)).float()
        noise = drawn.view(len(views), recipe.masks, patches).to(views.device, non_blocking=True)
        # The fused kernels of attention lack rules for many networks side by side, and would run one by one. Inside autocast the
        # plain one fails on CUDA: the backward pass of its softmax refuses that values and gradients differ in dtype.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(views.device.type, enabled=False):
            found = gradients(values, views, noise)
        _sgd(values, found, momenta, recipe)
    return values


def _sgd(values: dict[str, Tensor], gradients: dict[str, Tensor], momenta: dict[str, Tensor], recipe: TttRecipe) -> None:
    """Do what torch's SGD does, on all copies of all parameters at once, in place."""
    weights, velocities, slopes = list(values.values()), list(momenta.values()), [gradients[name] for name in values]
    # The gradients are only read: some of them share memory.
    torch._foreach_mul_(velocities, recipe.momentum)
    torch._foreach_add_(velocities, slopes)
    torch._foreach_add_(velocities, weights, alpha=recipe.weight_decay)
    torch._foreach_add_(weights, velocities, alpha=-recipe.lr)
