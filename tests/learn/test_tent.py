"""Tent, driven as the training loop drives it, on a supervised and on a dual model."""

import copy

import pytest
import torch
from torch import Tensor, nn

from coda_ray.learn.dual import DualModel
from coda_ray.learn.heads import init_fan_in
from coda_ray.learn.objectives import SupervisedObjective
from coda_ray.learn.optim import build_optimizer
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.learn.tent import TentObjective
from coda_ray.learn.views import ViewRecipe, evaluation_view
from coda_ray.learn.vit import VitSpec, build_vit

SPEC = VitSpec(name="vit", image_size=16, channels=3, patch=8, width=16, depth=2, heads=2)
RECIPE = ViewRecipe(
    kind="crop",
    tile_crop=24,
    size_global=16,
    size_local=8,
    locals_per_sample=0,
    flip_probability=0.5,
    jitter_probability=0.5,
    jitter_std=0.005,
)
B = 8


def _model(dual: bool) -> SupervisedModel | DualModel:
    torch.manual_seed(0)
    vits = [build_vit(SPEC, drop_path=0.3) for _ in range(2)]
    model = DualModel(*vits, n_classes=4) if dual else SupervisedModel(vits[0], n_classes=4)
    init_fan_in(model)
    return model


def _minibatch(step: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"tile": torch.randint(0, 256, (B, 3, 24, 24), dtype=torch.uint8, generator=generator)}


def _adapt(objective: TentObjective, steps: int) -> list[dict[str, float]]:
    optimizer = build_optimizer(objective.network, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    objective.network.train()
    history = []
    for step in range(steps):
        loss, metrics = objective.loss(objective.network, _minibatch(step % 2), step)
        optimizer.zero_grad()
        loss.backward()
        objective.before_update(step)
        optimizer.step()
        objective.after_update(step)
        history.append({name: value.item() for name, value in metrics.items()})
    return history


@pytest.mark.parametrize("dual", [False, True])
def test_loss_is_the_mean_entropy_of_the_evaluation_views(dual: bool) -> None:
    objective = TentObjective(_model(dual), recipe=RECIPE)
    minibatch = _minibatch()
    loss, metrics = objective.loss(objective.network.train(), minibatch, 0)
    logits, _ = objective.network.eval()(evaluation_view(minibatch["tile"], 16))
    shares = [[x / sum(row) for x in row] for row in logits.exp().tolist()]
    entropies = [-(torch.tensor(row) * torch.tensor(row).log()).sum().item() for row in shares]
    mean = torch.tensor(shares).mean(0)
    assert loss.item() == pytest.approx(sum(entropies) / B, rel=1e-5)
    assert set(metrics) == {"loss", "entropy_of_mean"}
    assert metrics["loss"].item() == loss.item()
    assert metrics["entropy_of_mean"].item() == pytest.approx(-(mean * mean.log()).sum().item(), rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("dual", [False, True])
def test_only_the_affine_parameters_of_norms_move_and_the_entropy_falls(dual: bool) -> None:
    objective = TentObjective(_model(dual), recipe=RECIPE)
    before = copy.deepcopy(objective.network.state_dict())
    history = _adapt(objective, 20)
    moved = {key for key, value in objective.network.state_dict().items() if not torch.equal(value, before[key])}
    norms = {name for name, module in objective.network.named_modules() if isinstance(module, nn.LayerNorm)}
    assert moved == {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")}
    assert len(norms) == (10 if dual else 5)
    assert any(name.startswith("extractor.") for name in norms) is dual
    assert history[-1]["loss"] < history[0]["loss"] - 0.1


def test_a_label_is_not_read() -> None:
    first, second = (TentObjective(_model(dual=True), recipe=RECIPE) for _ in range(2))
    without, _ = first.loss(first.network, _minibatch(), 0)
    labelled, _ = second.loss(second.network, {**_minibatch(), "label": torch.full((B,), 9)}, 0)
    assert torch.equal(without, labelled)


def test_confident_predictions_have_gradients_that_are_numbers() -> None:
    objective = TentObjective(_model(dual=False), recipe=RECIPE)
    objective.network.head.weight.data.mul_(1e4)
    loss, _ = objective.loss(objective.network, _minibatch(), 0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.network.parameters() if p.grad is not None)


def test_state_is_that_of_the_supervised_objective() -> None:
    objective = TentObjective(_model(dual=True), recipe=RECIPE)
    _adapt(objective, 2)
    other = SupervisedObjective(_model(dual=True), recipe=RECIPE, seed=0)
    other.load_state_dict(objective.state_dict())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in objective.state_dict().items())
