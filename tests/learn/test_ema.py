"""EMA against a loop over parameters."""

import copy

import pytest
import torch
from torch import nn

from coda_ray.learn.ema import frozen, update_ema


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.996, 1.0])
def test_update_equals_a_loop(momentum: float) -> None:
    teacher, student = _network(0), _network(1)
    student[1].running_mean.fill_(3.0)
    expected = [
        momentum * old.detach() + (1 - momentum) * new.detach()
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    before = copy.deepcopy(student.state_dict())
    update_ema(teacher, student, momentum)
    torch.testing.assert_close(list(teacher.parameters()), expected)
    assert torch.equal(teacher[1].running_mean, torch.full((7,), 3.0))
    for key, value in student.state_dict().items():
        assert torch.equal(value, before[key])


def test_momentum_one_changes_no_bit() -> None:
    teacher, student = _network(0), _network(1)
    before = [p.clone() for p in teacher.parameters()]
    update_ema(teacher, student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_networks_of_other_structure_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differ in \['2\.bias', '2\.weight'\]"):
        update_ema(_network(0), nn.Sequential(*list(_network(1).children())[:2]), 0.9)


def test_frozen_switches_gradients_and_training_off() -> None:
    network = frozen(_network(0).train())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
