"""Projection head of DINO, and the initialisation that all heads share."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize


def init_linear(layer: nn.Linear) -> nn.Linear:
    """Draw truncated normal weights (std 0.02), set the bias to zero, and return the layer."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def init_fan_in(network: nn.Module) -> None:
    """Redraw the weights of all linear layers with a std of 1 / sqrt(inputs), in place; biases become zero.

    LeCun et al., "Efficient BackProp" (1998), section 4.6. With the std of 0.02, made for hundreds of dimensions, the
    signal of a network a hundred wide sinks below the first updates of its biases, and DINO's output is uniform at once.

    Parameters
    ----------
    network
        Any module.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class DinoHead(nn.Module):
    """Three linear layers, an L2-normalised bottleneck and weight-normalised prototypes.

    DINO (Caron et al., ICCV 2021, section 3.1 and appendix C), without batch normalisation. Weight
    normalisation with its gain fixed at 1 is the same as normalising the rows of the last layer, so a logit
    is the cosine of bottleneck and prototype.

    Parameters
    ----------
    width
        Dimensions of the CLS token.
    hidden, bottleneck, out_dim
        Dimensions of the hidden layers, of the bottleneck and of the output (prototypes).
    """

    def __init__(self, width: int, *, hidden: int, bottleneck: int, out_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            init_linear(nn.Linear(width, hidden)),
            nn.GELU(),
            init_linear(nn.Linear(hidden, hidden)),
            nn.GELU(),
            init_linear(nn.Linear(hidden, bottleneck)),
        )
        self.last = init_linear(nn.Linear(bottleneck, out_dim, bias=False))

    def forward(self, cls: Tensor) -> Tensor:
        """Map CLS tokens (N, width) to logits (N, out_dim), float32, each in [-1, 1]."""
        bottleneck = self.mlp(cls)
        # Logits are divided by temperatures near 0.05: two digits of bfloat16 would not do.
        with torch.autocast(cls.device.type, enabled=False):
            prototypes = normalize(self.last.weight, dim=-1)
            return linear(normalize(bottleneck.to(prototypes.dtype), dim=-1), prototypes)
