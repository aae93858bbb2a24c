"""The teacher as an exponential moving average of the student."""

import torch
from torch import nn


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set teacher = momentum * teacher + (1 - momentum) * student, in place; buffers are copied.

    Mean teacher of Tarvainen and Valpola (NeurIPS 2017), as in DINO (Caron et al., ICCV 2021, section 3.1).

    Parameters
    ----------
    teacher, student
        Modules of the same structure, on the same device.
    momentum
        Share of the old teacher that stays, in [0, 1].

    Raises
    ------
    ValueError
        When the parameters of the two differ in name.
    """
    old, new = dict(teacher.named_parameters()), dict(student.named_parameters())
    if old.keys() != new.keys():
        raise ValueError(f"teacher and student differ in {sorted(old.keys() ^ new.keys())}; build both from one spec")
    torch._foreach_lerp_(list(old.values()), list(new.values()), 1.0 - momentum)
    for kept, fresh in zip(teacher.buffers(), student.buffers(), strict=True):
        kept.copy_(fresh)


def frozen(module: nn.Module) -> nn.Module:
    """Switch off gradients, dropout and stochastic depth of a module for good, and return it."""
    return module.requires_grad_(False).eval()
