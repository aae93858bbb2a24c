"""Where a worker computes."""

import pytest
import ray.train.torch
import torch

from coda_ray.config import Train
from coda_ray.training.launch import device_of


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.25, "cuda:0"), (1.0, "cuda:0")])
def test_a_worker_computes_on_the_gpu_that_it_reserved_and_on_no_other(
    gpus: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Ray Train says on a node with a GPU, whether the worker reserved one or not.
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda:0"))
    assert device_of(Train(gpus_per_worker=gpus)) == torch.device(device)
