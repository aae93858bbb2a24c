"""Optimizer groups and rates; one step against AdamW written out."""

import pytest
import torch
from torch import nn

from coda_ray.learn.optim import build_optimizer, set_rates

RATES = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.5}


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.LayerNorm(4), nn.Linear(4, 2))


def test_only_tensors_of_two_or_more_dimensions_decay() -> None:
    network = _network()
    network[2].weight.requires_grad_(False)
    optimizer = build_optimizer(network, **RATES)
    decays, spared = optimizer.param_groups
    assert [p.shape for p in decays["params"]] == [network[0].weight.shape]
    assert len(spared["params"]) == 4
    assert (decays["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert decays["fused"]


def test_set_rates_leaves_the_spared_group_without_decay() -> None:
    optimizer = build_optimizer(_network(), **RATES)
    set_rates(optimizer, lr=0.01, weight_decay=0.7)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.01, 0.7), (0.01, 0.0)]


def test_first_step_equals_adamw_written_out() -> None:
    network = _network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = build_optimizer(network, **RATES)
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in network.named_parameters():
        decay = 0.5 if p.ndim > 1 else 0.0
        # Bias correction makes the first moment the gradient and the second its square.
        expected = before[name] * (1 - 0.1 * decay) - 0.1 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, msg=name)


def test_the_state_survives_saving_and_loading() -> None:
    network = _network()
    optimizer = build_optimizer(network, **RATES)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    again = build_optimizer(network, **RATES)
    again.load_state_dict(optimizer.state_dict())
    assert [g["decays"] for g in again.param_groups] == [True, False]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="Sequential has no trainable parameter"):
        build_optimizer(_network().requires_grad_(False), **RATES)
