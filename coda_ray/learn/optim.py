"""AdamW with two parameter groups: weight decay, and none on biases and 1-D tensors."""

import torch
from torch import nn

_FUSED_ON = frozenset({"cpu", "cuda", "mps", "xpu"})


def build_optimizer(
    network: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter, ICLR 2019) over the trainable parameters of a network.

    Parameters
    ----------
    network
        Already on its device; parameters that need no gradient are left out.
    lr, betas, eps, weight_decay
        AdamW's settings. The decay applies to tensors of two or more dimensions.

    Returns
    -------
    torch.optim.AdamW
        The fused implementation where the device has one. Group 0 decays, group 1 does not.

    Raises
    ------
    ValueError
        When nothing in the network is trainable.
    """
    trainable = [p for p in network.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(network).__name__} has no trainable parameter; nothing to optimise")
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay, "decays": True},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0, "decays": False},
    ]
    fused = all(p.device.type in _FUSED_ON and p.is_floating_point() for p in trainable)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set the learning rate of every group, and the weight decay of the group that decays."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decays"]:
            group["weight_decay"] = weight_decay
