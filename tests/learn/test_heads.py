"""DINO's head against weight normalisation as torch has it."""

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrizations import weight_norm

from coda_ray.learn.heads import DinoHead


def _head() -> DinoHead:
    torch.manual_seed(0)
    return DinoHead(12, hidden=20, bottleneck=8, out_dim=16)


def test_structure_and_initial_values() -> None:
    head = DinoHead(64, hidden=256, bottleneck=128, out_dim=512)
    kinds = [type(layer) for layer in head.mlp]
    assert kinds == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert [tuple(layer.weight.shape) for layer in head.mlp[::2]] == [(256, 64), (256, 256), (128, 256)]
    assert all((layer.bias == 0).all() for layer in head.mlp[::2])
    assert head.last.weight.shape == (512, 128)
    assert head.last.bias is None
    for layer in [*head.mlp[::2], head.last]:
        assert abs(layer.weight.std().item() - 0.02) < 0.002


def test_forward_and_gradient_equal_weight_norm_with_fixed_gain() -> None:
    head = _head()
    oracle = weight_norm(nn.Linear(8, 16, bias=False))
    gain, direction = oracle.parametrizations.weight.original0, oracle.parametrizations.weight.original1
    gain.data.fill_(1.0)
    gain.requires_grad_(False)
    direction.data.copy_(head.last.weight.data)
    cls = torch.randn(5, 12)
    target = torch.randn(5, 16)
    ours = head(cls)
    theirs = oracle(normalize(head.mlp(cls), dim=-1))
    torch.testing.assert_close(ours, theirs)
    (ours * target).sum().backward()
    (theirs * target).sum().backward()
    torch.testing.assert_close(head.last.weight.grad, direction.grad)


def test_logits_are_cosines_and_stay_float32_in_bf16() -> None:
    head = _head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(100 * torch.randn(50, 12))
    assert logits.dtype is torch.float32
    assert logits.abs().max() <= 1 + 1e-6
