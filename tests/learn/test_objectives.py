"""Objectives, driven as the training loop drives them, on a small transformer."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from coda_ray.learn.dino import DinoLoss, koleo
from coda_ray.learn.dual import DualModel
from coda_ray.learn.heads import DinoHead
from coda_ray.learn.objectives import DinoObjective, DinoSchedule, Objective, SupervisedObjective
from coda_ray.learn.optim import build_optimizer
from coda_ray.learn.precision import choose_precision
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.learn.views import ViewRecipe, dino_views, supervised_view
from coda_ray.learn.vit import VitSpec, build_vit

SPEC = VitSpec(name="vit", image_size=16, channels=3, patch=8, width=16, depth=2, heads=2)
RECIPE = ViewRecipe(
    kind="crop",
    tile_crop=24,
    size_global=16,
    size_local=8,
    locals_per_sample=6,
    flip_probability=0.5,
    jitter_probability=0.5,
    jitter_std=0.005,
)
SCHEDULE = DinoSchedule(
    steps=10,
    ema_start=0.9,
    ema_end=1.0,
    teacher_temperature_start=0.04,
    teacher_temperature=0.08,
    teacher_temperature_ramp=4,
    freeze_last_layer=2,
)
B, K = 4, 24
CPU = torch.device("cpu")


def _dino(seed: int = 0, koleo_weight: float = 0.0, drop_path: float = 0.1, centering: str = "mean") -> DinoObjective:
    torch.manual_seed(seed)
    return DinoObjective(
        build_vit(SPEC, drop_path=drop_path),
        DinoHead(16, hidden=20, bottleneck=8, out_dim=K),
        DinoLoss(K, student_temperature=0.1, centre_momentum=0.9, centering=centering),  # type: ignore[arg-type]
        schedule=SCHEDULE,
        recipe=RECIPE,
        koleo_weight=koleo_weight,
        seed=7,
    )


def _minibatch(step: int = 0, paired: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (2, B, 3, 24, 24), dtype=torch.uint8, generator=generator)
    minibatch = {
        "tile": images[0],
        "sample": torch.arange(step * B, (step + 1) * B),
        "label": torch.arange(B) % 3,
    }
    return {**minibatch, "partner": images[1]} if paired else minibatch


def _train(
    objective: Objective, optimizer: torch.optim.Optimizer, steps: range, precision: str = "fp32"
) -> list[dict[str, float]]:
    """Run the loop that every objective is made for."""
    history = []
    objective.network.train()
    for step in steps:
        torch.manual_seed(step)
        with choose_precision(CPU, precision).autocast():
            loss, metrics = objective.loss(objective.network, _minibatch(step), step)
        optimizer.zero_grad()
        loss.backward()
        objective.before_update(step)
        optimizer.step()
        objective.after_update(step)
        history.append({name: value.item() for name, value in metrics.items()})
    return history


def _adamw(objective: Objective) -> torch.optim.AdamW:
    return build_optimizer(objective.network, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)


@pytest.mark.parametrize("paired", [False, True])
def test_dino_loss_equals_one_forward_pass_per_view(paired: bool) -> None:
    objective, plain = (_dino(drop_path=0.0) for _ in range(2))
    for each in (objective, plain):
        each.criterion.centre.copy_(torch.linspace(-1, 1, K))
    minibatch = _minibatch(paired=paired)
    loss, metrics = objective.loss(objective.network, minibatch, step=2)
    global_views, local_views = dino_views(
        minibatch["tile"], minibatch.get("partner"), seed=7, samples=np.arange(B), recipe=RECIPE
    )
    views = [*global_views.split(1), *local_views.split(1)]
    student = torch.cat([plain.student(view)[0] for view in views])
    teacher = torch.cat([plain.teacher(view)[0] for view in views[: 2 * B]])
    torch.testing.assert_close(loss, plain.criterion(student, teacher, 0.06), rtol=1e-5, atol=1e-5)
    assert metrics["kl"].item() == pytest.approx(metrics["loss"].item() - metrics["entropy"].item())
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert set(metrics) == {"loss", "entropy", "entropy_of_mean", "kl"}


def test_koleo_is_added_once_per_global_view() -> None:
    plain, spread = _dino(drop_path=0.0), _dino(koleo_weight=0.3, drop_path=0.0)
    minibatch = _minibatch()
    without, _ = plain.loss(plain.network, minibatch, 0)
    loss, metrics = spread.loss(spread.network, minibatch, 0)
    global_views, _ = dino_views(minibatch["tile"], minibatch["partner"], seed=7, samples=np.arange(B), recipe=RECIPE)
    _, cls = plain.student(global_views)
    expected = koleo(cls[:B]) + koleo(cls[B:])
    torch.testing.assert_close(metrics["koleo"], expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, without + 0.3 * expected, rtol=1e-4, atol=1e-4)


def test_teacher_is_an_ema_without_gradients_or_stochastic_depth() -> None:
    objective = _dino(drop_path=0.5)
    teacher = copy.deepcopy(objective.teacher.state_dict())
    _train(objective, _adamw(objective), range(1))
    for key, value in objective.teacher.state_dict().items():
        expected = 0.9 * teacher[key] + 0.1 * objective.student.state_dict()[key]
        torch.testing.assert_close(value, expected, msg=key)
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    views = torch.randn(3, 3, 16, 16)
    assert torch.equal(objective.teacher(views)[0], objective.teacher(views)[0])


def test_last_layer_moves_only_after_its_freeze() -> None:
    objective = _dino()
    optimizer = _adamw(objective)
    before = objective.student.head.last.weight.detach().clone()
    _train(objective, optimizer, range(2))
    assert torch.equal(objective.student.head.last.weight, before)
    _train(objective, optimizer, range(2, 3))
    assert not torch.equal(objective.student.head.last.weight, before)


def test_centre_follows_the_teacher_of_the_same_step() -> None:
    objective = _dino(drop_path=0.0)
    minibatch = _minibatch()
    objective.loss(objective.network, minibatch, 0)
    global_views, _ = dino_views(minibatch["tile"], minibatch["partner"], seed=7, samples=np.arange(B), recipe=RECIPE)
    torch.testing.assert_close(objective.criterion.centre, 0.1 * objective.teacher(global_views)[0].mean(0))
    balanced = _dino(centering="sinkhorn")
    balanced.loss(balanced.network, minibatch, 0)
    assert (balanced.criterion.centre == 0).all()


def _joined(minibatches: list[dict[str, Tensor]], sizes: list[int]) -> list[dict[str, Tensor]]:
    """The same samples in mini-batches of other sizes."""
    whole = {key: torch.cat([minibatch[key] for minibatch in minibatches]) for key in minibatches[0]}
    parts = {key: value.split(sizes) for key, value in whole.items()}
    return [{key: values[i] for key, values in parts.items()} for i in range(len(sizes))]


@pytest.mark.parametrize("paired", [False, True])
def test_held_out_loss_is_the_mean_over_samples_and_pairs_of_views(paired: bool) -> None:
    objective, plain = _dino(drop_path=0.5, koleo_weight=0.3), _dino(drop_path=0.0)
    objective.criterion.centre.copy_(torch.linspace(-1, 1, K))
    minibatches = [_minibatch(step, paired) for step in range(2)]
    terms = []
    for minibatch in minibatches:
        for b, sample in enumerate(minibatch["sample"].tolist()):
            images = [minibatch[key][[b]] if key in minibatch else None for key in ("tile", "partner")]
            views = dino_views(*images, seed=7, samples=np.array([sample]), recipe=RECIPE)
            every = [*views[0].split(1), *views[1].split(1)]
            with torch.no_grad():
                student = [torch.log_softmax(plain.student(view)[0][0] / 0.1, 0) for view in every]
                teacher = [torch.softmax((plain.teacher(view)[0][0] - torch.linspace(-1, 1, K)) / 0.08, 0) for view in every[:2]]
            terms += [-(t * s).sum() for i, t in enumerate(teacher) for j, s in enumerate(student) if i != j]
    assert len(terms) == 2 * B * 14
    assert objective.held_out_loss(minibatches) == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_held_out_loss_does_not_depend_on_the_size_of_minibatches(centering: str) -> None:
    objective = _dino(centering=centering)
    minibatches = [_minibatch(step) for step in range(2)]
    expected = objective.held_out_loss(minibatches)
    for sizes in ([8], [5, 3], [1] * 8):
        assert objective.held_out_loss(_joined(minibatches, sizes)) == pytest.approx(expected, rel=1e-5)


def test_held_out_loss_changes_nothing() -> None:
    objective = _dino(drop_path=0.5)
    _train(objective, _adamw(objective), range(1))
    objective.network.zero_grad()
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    first, again = (objective.held_out_loss([_minibatch(9)]) for _ in range(2))
    assert first == again
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    assert objective.student.training
    assert all(p.grad is None for p in objective.student.parameters())


def test_a_resumed_run_is_identical_to_the_bit() -> None:
    through = _dino()
    optimizer = _adamw(through)
    _train(through, optimizer, range(3))
    saved = {key: value.clone() for key, value in through.state_dict().items()}
    saved_optimizer = copy.deepcopy(optimizer.state_dict())
    rest = _train(through, optimizer, range(3, 6))

    resumed = _dino(seed=5)
    resumed.load_state_dict(saved)
    optimizer = _adamw(resumed)
    optimizer.load_state_dict(saved_optimizer)
    assert _train(resumed, optimizer, range(3, 6)) == rest
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, through.state_dict()[key]), key


def test_state_names_and_warm_start() -> None:
    objective, other = _dino(seed=0), _dino(seed=1)
    objective.criterion.centre.fill_(3.0)
    state = objective.state_dict()
    prefixes = {key.partition(".")[0] for key in state}
    assert prefixes == {"student", "student_head", "teacher", "teacher_head", "centre"}
    build_vit(SPEC, drop_path=0.0).load_state_dict(
        {key.removeprefix("teacher."): value for key, value in state.items() if key.startswith("teacher.")}
    )
    other.warm_start(state)
    assert (other.criterion.centre == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(objective.student.parameters(), other.student.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(objective.teacher.parameters(), other.teacher.parameters(), strict=True))


def test_states_that_do_not_fit_are_refused() -> None:
    objective = _dino()
    state = objective.state_dict()
    without = {key: value for key, value in state.items() if key != "centre"}
    with pytest.raises(ValueError, match=r"the saved centre does not fit DinoLoss: it lacks centre"):
        objective.load_state_dict(without)
    without = {key: value for key, value in state.items() if key != "teacher_head.last.weight"}
    with pytest.raises(ValueError, match=r"the saved teacher_head does not fit DinoHead: it lacks last.weight"):
        objective.load_state_dict(without)
    with pytest.raises(ValueError, match=r"not DINO's: it has model.x"):
        objective.load_state_dict({**state, "model.x": torch.zeros(1)})


def test_labels_do_not_touch_the_adaptation() -> None:
    first, second = _dino(), _dino()
    minibatch = _minibatch()
    loss, _ = first.loss(first.network.eval(), minibatch, 0)
    del minibatch["label"]
    without, _ = second.loss(second.network.eval(), minibatch, 0)
    assert torch.equal(loss, without)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_student_learns_what_a_fixed_teacher_says(precision: str) -> None:
    objective = _dino(drop_path=0.0)
    optimizer = _adamw(objective)
    minibatch = _minibatch()
    views = dino_views(minibatch["tile"], minibatch["partner"], seed=7, samples=np.arange(B), recipe=RECIPE)
    with torch.no_grad():
        logits, _ = objective.teacher(views[0])
        objective.criterion.centre.copy_(logits.mean(0))
    targets = objective.criterion.targets(logits, 0.04)
    losses = []
    for _ in range(30):
        with choose_precision(CPU, precision).autocast():
            loss = objective.criterion.cross_entropy(objective.network(*views)[0], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_bf16_training_stays_close_to_float32() -> None:
    exact, lower = (_dino(drop_path=0.0) for _ in range(2))
    in_fp32 = _train(exact, _adamw(exact), range(3), "fp32")
    in_bf16 = _train(lower, _adamw(lower), range(3), "bf16")
    assert [m["loss"] for m in in_bf16] == pytest.approx([m["loss"] for m in in_fp32], rel=0.05)
    assert all(p.dtype is torch.float32 for p in lower.student.parameters())


def _supervised(dual: bool, seed: int = 0) -> SupervisedObjective:
    torch.manual_seed(seed)
    vits = [build_vit(SPEC, drop_path=0.0) for _ in range(2)]
    model = DualModel(*vits, n_classes=3) if dual else SupervisedModel(vits[0], n_classes=3)
    return SupervisedObjective(model, recipe=RECIPE, seed=7)


@pytest.mark.parametrize("dual", [False, True])
def test_supervised_loss_and_accuracy(dual: bool) -> None:
    objective = _supervised(dual)
    minibatch = _minibatch()
    loss, metrics = objective.loss(objective.network, minibatch, 0)
    views = supervised_view(minibatch["tile"], seed=7, samples=np.arange(B), recipe=RECIPE)
    logits, _ = objective.network(views)
    log_p = torch.log_softmax(logits, -1)
    expected = -torch.stack([log_p[i, label] for i, label in enumerate(minibatch["label"].tolist())]).mean()
    torch.testing.assert_close(loss, expected)
    hits = [int(logits[i].argmax()) == label for i, label in enumerate(minibatch["label"].tolist())]
    assert metrics["accuracy"].item() == pytest.approx(sum(hits) / B)
    assert objective.find_unused is dual


@pytest.mark.parametrize("dual", [False, True])
def test_supervised_training_restores_from_its_state(dual: bool) -> None:
    objective, other = _supervised(dual), _supervised(dual, seed=1)
    optimizer = _adamw(objective)
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    history = _train(objective, optimizer, range(4))
    assert set(history[0]) == {"loss", "accuracy"}
    moved = {key for key, value in objective.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert not any(key.startswith("model.extractor.") for key in moved)
    other.load_state_dict(objective.state_dict())
    views = torch.randn(2, 3, 16, 16)
    assert torch.equal(objective.network.eval()(views)[0], other.network.eval()(views)[0])
    with pytest.raises(ValueError, match="not a classifier's: it has centre"):
        other.load_state_dict({"centre": torch.zeros(1)})


def _on_rank(rank: int, meeting: str, results: str) -> None:
    """Give each of two ranks half of every mini-batch, and keep the gradients of the first step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for name, objective in (("dino", _dino(drop_path=0.0)), ("dual", _supervised(dual=True))):
        wrapped = DistributedDataParallel(objective.network, find_unused_parameters=objective.find_unused)
        optimizer = _adamw(objective)
        for step in range(3):
            mine = {key: value[rank * B // 2 : (rank + 1) * B // 2] for key, value in _minibatch(step).items()}
            loss, _ = objective.loss(wrapped, mine, step)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                torch.save(_found(objective), f"{results}/{name}{rank}.pt")
            objective.before_update(step)
            optimizer.step()
            objective.after_update(step)
        torch.save(objective.state_dict(), f"{results}/{name}{rank}-after.pt")
    dist.destroy_process_group()


def _found(objective: Objective) -> dict[str, Tensor]:
    """Gradients, and the centre where there is one."""
    found = {name: p.grad for name, p in objective.network.named_parameters() if p.grad is not None}
    return {**found, "centre": objective.criterion.centre} if isinstance(objective, DinoObjective) else found


@pytest.mark.slow
def test_two_ranks_find_the_gradients_that_one_finds(tmp_path: Path) -> None:
    mp.spawn(_on_rank, args=(str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    for name, objective in (("dino", _dino(drop_path=0.0)), ("dual", _supervised(dual=True))):
        loss, _ = objective.loss(objective.network, _minibatch(), 0)
        loss.backward()
        expected = _found(objective)
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=f"{name} {key}")
        states = [torch.load(tmp_path / f"{name}{rank}-after.pt", weights_only=True) for rank in range(2)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()), "ranks drift apart"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 5e-2)])
def test_a_dino_step_on_cuda_is_close_to_one_on_the_cpu(precision: str, tolerance: float) -> None:
    here, there = _dino(drop_path=0.0), _dino(drop_path=0.0)
    there.to(torch.device("cuda"))
    expected, _ = here.loss(here.network, _minibatch(), 0)
    with choose_precision(torch.device("cuda"), precision).autocast():
        loss, _ = there.loss(there.network, _minibatch(), 0)
    loss.backward()
    torch.testing.assert_close(loss.cpu(), expected, rtol=tolerance, atol=tolerance)
