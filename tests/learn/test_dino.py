"""DINO's loss against the double loop over view pairs; centring, KoLeo, entropy and the collapse guard."""

import logging
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import one_hot

from coda_ray.learn.dino import CollapseError, CollapseGuard, DinoLoss, koleo, sinkhorn, teacher_entropy

B, K = 5, 32


def _criterion(centering: str = "mean", dtype: torch.dtype = torch.float64) -> DinoLoss:
    criterion = DinoLoss(K, student_temperature=0.1, centre_momentum=0.9, centering=centering)  # type: ignore[arg-type]
    criterion.centre.normal_(generator=torch.Generator().manual_seed(1))
    return criterion.to(dtype)


def _logits(views: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views * B, K, dtype=torch.float64, generator=generator).to(dtype)


def _double_loop(student: Tensor, targets: Tensor, student_temperature: float) -> Tensor:
    """Sum over teacher views, student views and samples, one pair of rows at a time."""
    n_views, terms = len(student) // B, []
    for t in range(2):
        for v in range(n_views):
            if t == v:
                continue
            for b in range(B):
                log_p = torch.log_softmax(student[v * B + b] / student_temperature, dim=-1)
                terms.append(-(targets[t * B + b] * log_p).sum())
    assert len(terms) == (2 * n_views - 2) * B
    return torch.stack(terms).mean()


@pytest.mark.parametrize("n_views", [2, 4, 8])
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_loss_and_gradient_equal_the_double_loop(n_views: int, centering: str) -> None:
    criterion = _criterion(centering)
    teacher = _logits(2, seed=1)
    fast, slow = (_logits(n_views).requires_grad_() for _ in range(2))
    loss = criterion(fast, teacher, 0.5)
    expected = _double_loop(slow, criterion.targets(teacher, 0.5), 0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-10, atol=1e-12)


def test_there_are_fourteen_terms_of_equal_weight() -> None:
    # With one-hot targets and a student that is uniform in one view only, every term is known by hand.
    student = torch.zeros(8, 1, K, dtype=torch.float64)
    student[:, :, 0] = 50.0
    criterion = DinoLoss(K, student_temperature=1.0, centre_momentum=0.9, centering="mean").double()
    teacher = student[:2].clone().view(2, K)
    for view, terms in [(0, 1), (1, 1), (2, 2), (7, 2)]:
        case = student.clone()
        case[view] = 0.0
        loss = criterion(case.view(8, K), teacher, 1.0)
        assert loss.item() == pytest.approx(terms * math.log(K) / 14, abs=1e-9)


def test_targets_of_the_mean_are_a_centred_sharpened_softmax() -> None:
    criterion = _criterion()
    teacher = _logits(2)
    expected = torch.softmax((teacher - criterion.centre) / 0.04, dim=-1)
    torch.testing.assert_close(criterion.targets(teacher, 0.04), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_float32_and_close_in_lower_precision(dtype: torch.dtype) -> None:
    exact = _criterion()(_logits(8), _logits(2, seed=1), 0.5)
    loss = _criterion(dtype=torch.float32)(_logits(8, dtype), _logits(2, dtype, seed=1), 0.5)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=0)


def test_centre_is_a_moving_mean_of_the_teacher() -> None:
    criterion = _criterion()
    before, teacher = criterion.centre.clone(), _logits(2)
    criterion.update_centre(teacher)
    torch.testing.assert_close(criterion.centre, 0.9 * before + 0.1 * teacher.mean(0))
    assert list(criterion.state_dict()) == ["centre"]


def _plain_sinkhorn(teacher: Tensor, temperature: float) -> Tensor:
    """Alternate row and column normalisation of exp(logits / temperature), transposed as in DINOv2."""
    q = torch.exp(teacher / temperature).T
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def test_sinkhorn_equals_the_plain_one_and_balances_prototypes() -> None:
    teacher = _logits(2) + 3 * torch.arange(K, dtype=torch.float64) / K
    ours = sinkhorn(teacher, 0.5)
    torch.testing.assert_close(ours, _plain_sinkhorn(teacher, 0.5))
    torch.testing.assert_close(ours.sum(1), torch.ones(2 * B, dtype=torch.float64))
    before, after = torch.softmax(teacher / 0.5, -1).mean(0), ours.mean(0)
    assert torch.special.entr(after).sum() > torch.special.entr(before).sum()


def test_sinkhorn_survives_logits_that_would_underflow() -> None:
    teacher = torch.zeros(4, K)
    teacher[:, 0] = 1.0
    assert torch.isfinite(sinkhorn(teacher, 0.005)).all()


def _on_rank(rank: int, meeting: str, results: str) -> None:
    """Give each of two ranks half of the samples, and keep what it finds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    criterion, teacher = _criterion(), _logits(4)
    mine = teacher[rank * 2 * B : (rank + 1) * 2 * B]
    criterion.update_centre(mine)
    torch.save({"centre": criterion.centre, "sinkhorn": sinkhorn(mine, 0.5)}, f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    mp.spawn(_on_rank, args=(str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    criterion, teacher = _criterion(), _logits(4)
    criterion.update_centre(teacher)
    for found in ranks:
        torch.testing.assert_close(found["centre"], criterion.centre)
    torch.testing.assert_close(torch.cat([found["sinkhorn"] for found in ranks]), sinkhorn(teacher, 0.5))


def test_koleo_equals_a_loop_over_neighbours() -> None:
    cls = _logits(1).requires_grad_()
    unit = cls / cls.norm(dim=1, keepdim=True)
    nearest = [min((unit[i] - unit[j]).norm() for j in range(B) if j != i) for i in range(B)]
    expected = -torch.stack(nearest).log().mean()
    torch.testing.assert_close(koleo(cls), expected, rtol=1e-6, atol=1e-6)
    koleo(cls).backward()
    assert cls.grad is not None
    assert torch.isfinite(cls.grad).all()


def test_koleo_of_identical_tokens_is_finite_and_of_one_is_refused() -> None:
    same = torch.ones(3, 4, requires_grad=True)
    koleo(same).backward()
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()
    with pytest.raises(ValueError, match="2 samples or more"):
        koleo(torch.ones(1, 4))


def test_entropy_tells_both_collapses_from_a_healthy_teacher() -> None:
    ln_k = math.log(K)
    uniform = torch.full((K, K), 1 / K)
    one_prototype = torch.eye(K)[torch.zeros(K, dtype=torch.long)]
    healthy = torch.eye(K)
    for targets, per_sample, of_mean in [(uniform, ln_k, ln_k), (one_prototype, 0, 0), (healthy, 0, ln_k)]:
        found = teacher_entropy(targets)
        assert found[0].item() == pytest.approx(per_sample, abs=1e-5)
        assert found[1].item() == pytest.approx(of_mean, abs=1e-5)


def test_loss_less_entropy_is_the_divergence_from_the_student() -> None:
    criterion, teacher = _criterion(), _logits(2, seed=1)
    student = _logits(8)
    targets = criterion.targets(teacher, 0.5)
    log_p = torch.log_softmax(student / 0.1, -1).view(8, B, K)
    q = targets.view(2, B, K)
    divergences = [(q[t] * (q[t].log() - log_p[v])).sum(-1).mean() for t in range(2) for v in range(8) if t != v]
    kl = criterion.cross_entropy(student, targets) - teacher_entropy(targets)[0]
    torch.testing.assert_close(kl, torch.stack(divergences).mean())


def _guard(action: str, ceiling: float = 0.99) -> CollapseGuard:
    return CollapseGuard(K, kinds=12, floor=0.7, ceiling=ceiling, patience=3, action=action)  # type: ignore[arg-type]


HEALTHY = (0.5, 3.0, B)
ONE_PROTOTYPE = (0.01, 0.02, B)
UNIFORM = (math.log(K), math.log(K), B)


@pytest.mark.parametrize(
    ("point", "said"),
    [
        (ONE_PROTOTYPE, "few prototypes"),
        (UNIFORM, "outputs are uniform"),
        ((math.nan, math.nan, B), "lower the learning rate"),
    ],
)
def test_guard_stops_after_its_patience(point: tuple[float, float, int], said: str) -> None:
    guard = _guard("stop")
    guard.watch(0, *point)
    guard.watch(1, *point)
    with pytest.raises(CollapseError, match=f"step 2: the teacher collapsed: .*{said}.*at 3 log points"):
        guard.watch(2, *point)


@pytest.mark.parametrize("point", [ONE_PROTOTYPE, UNIFORM])
def test_the_advice_names_the_section_that_is_used(point: tuple[float, float, int]) -> None:
    guard = CollapseGuard(K, kinds=12, floor=0.7, ceiling=0.99, patience=1, action="stop", section="adapt.dino")
    with pytest.raises(CollapseError, match=r" adapt\.dino\.teacher_temperature"):
        guard.watch(0, *point)


@pytest.mark.parametrize(
    ("prototypes", "samples", "kinds", "acts"),
    [
        # The paper: 4096 prototypes, 135 compounds or, with the controls, 302; mini-batches of 128, or 64 for a batch or a plate.
        (1, 128, 302, True),
        (2, 128, 302, True),
        (4, 128, 302, True),
        (16, 128, 302, True),
        (16, 128, 135, True),
        (12, 64, 135, True),
        (54, 128, 135, False),  # one for each mechanism
        (54, 64, 135, False),
        (135, 128, 135, False),
        # The demo: 31 compounds of 10 mechanisms.
        (4, 32, 31, True),
        (20, 32, 31, False),
        # Nothing is known of what the images are.
        (1, 128, 0, True),
        (2, 128, 0, False),
    ],
)
def test_guard_sees_samples_that_fall_on_few_of_4096_prototypes(prototypes: int, samples: int, kinds: int, acts: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    # Each image falls on one of them, its two views alike.
    fallen = torch.randint(prototypes, (samples,), generator=generator).repeat(2)
    per_sample, of_mean = map(float, teacher_entropy(one_hot(fallen, 4096).float()))
    guard = CollapseGuard(4096, kinds=kinds, floor=0.6, ceiling=0.999, patience=1, action="stop")
    if not acts:
        guard.watch(0, per_sample, of_mean, samples)
        return
    with pytest.raises(CollapseError, match="few prototypes"):
        guard.watch(0, per_sample, of_mean, samples)


def test_a_healthy_point_ends_the_spell() -> None:
    guard = _guard("stop")
    for step, point in enumerate([UNIFORM, UNIFORM, HEALTHY, UNIFORM, UNIFORM, HEALTHY]):
        guard.watch(step, *point)


def test_guard_warns_once_per_spell(caplog: pytest.LogCaptureFixture) -> None:
    guard = _guard("warn")
    with caplog.at_level(logging.WARNING):
        for step, point in enumerate([ONE_PROTOTYPE] * 6 + [HEALTHY] + [ONE_PROTOTYPE] * 4):
            guard.watch(step, *point)
    assert [record.message[:7] for record in caplog.records] == ["step 2:", "step 9:"]


def test_guard_can_be_off_and_its_ceiling_too(caplog: pytest.LogCaptureFixture) -> None:
    off, no_ceiling = _guard("off"), _guard("stop", ceiling=1.0)
    for step in range(10):
        off.watch(step, *ONE_PROTOTYPE)
        no_ceiling.watch(step, math.log(K) * (1 + 1e-6), math.log(K), B)
    assert not caplog.records


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dino\.centering = 'median': choose mean or sinkhorn"):
        _criterion("median")
    with pytest.raises(ValueError, match=r"dino\.collapse = 'pray': choose stop, warn or off"):
        _guard("pray")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_loss_on_cuda_equals_that_on_the_cpu(centering: str) -> None:
    student, teacher = _logits(8, torch.float32), _logits(2, torch.float32, seed=1)
    here = _criterion(centering, torch.float32)(student, teacher, 0.5)
    criterion = _criterion(centering, torch.float32).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        there = criterion(student.cuda(), teacher.cuda(), 0.5)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-5)
