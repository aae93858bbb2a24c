"""The DINO loss, its centring, the KoLeo term, and what the teacher's entropy says about collapse."""

import logging
import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize, pairwise_distance

Centering = Literal["mean", "sinkhorn"]
SINKHORN_ITERATIONS = 3

log = logging.getLogger(__name__)


class DinoLoss(nn.Module):
    """Cross-entropy of every student view with every other view's teacher output.

    DINO (Caron et al., ICCV 2021, section 3.1 and algorithm 1). The teacher sees views 0 and 1, the student
    all V views; the terms in which both saw the same view are left out, which leaves 2 V - 2 terms of equal
    weight (14 for 2 + 6 views).

    Parameters
    ----------
    out_dim
        Prototypes, K.
    student_temperature
        Divides the student's logits.
    centre_momentum
        Of the moving mean of the teacher's logits.
    centering
        `mean`: subtract the moving mean (DINO). `sinkhorn`: balance the mini-batch over prototypes by
        Sinkhorn-Knopp (Caron et al., NeurIPS 2020; used so in DINOv2, Oquab et al. 2023, section 4).
    """

    centre: Tensor

    def __init__(self, out_dim: int, *, student_temperature: float, centre_momentum: float, centering: Centering) -> None:
        super().__init__()
        if centering not in ("mean", "sinkhorn"):
            raise ValueError(f"dino.centering = {centering!r}: choose mean or sinkhorn")
        self.student_temperature = student_temperature
        self.centre_momentum = centre_momentum
        self.centering = centering
        self.register_buffer("centre", torch.zeros(out_dim))

    def forward(self, student: Tensor, teacher: Tensor, teacher_temperature: float) -> Tensor:
        """Compute the loss of a mini-batch of B samples.

        Parameters
        ----------
        student
            (V * B, K) logits, view-major.
        teacher
            (2 * B, K) logits of views 0 and 1, view-major.
        teacher_temperature
            Divides the centred teacher logits.

        Returns
        -------
        Tensor
            0-d, the mean over terms and samples.
        """
        return self.cross_entropy(student, self.targets(teacher, teacher_temperature))

    @torch.no_grad()
    def targets(self, teacher: Tensor, teacher_temperature: float) -> Tensor:
        """Turn teacher logits (2 * B, K) into probabilities of the same shape, at least float32."""
        teacher = _at_least_float32(teacher)
        if self.centering == "sinkhorn":
            return sinkhorn(teacher, teacher_temperature)
        return torch.softmax((teacher - self.centre) / teacher_temperature, dim=-1)

    def cross_entropy(self, student: Tensor, targets: Tensor) -> Tensor:
        """Average the cross-entropy of student logits (V * B, K) and targets (2 * B, K) over all terms.

        The sum over pairs of views factors: a pair's term is linear in the teacher's probabilities and, but
        for the normaliser, in the student's logits. So all pairs come from two sums over views, less the
        pairs of one view.
        """
        samples = len(targets) // 2
        logits = _at_least_float32(student).view(-1, samples, student.shape[-1]) / self.student_temperature
        probabilities = targets.view(2, samples, -1)
        normaliser = torch.logsumexp(logits, dim=-1)
        every = 2 * normaliser.sum(0) - (probabilities.sum(0) * logits.sum(0)).sum(-1)
        same = (normaliser[:2] - (probabilities * logits[:2]).sum(-1)).sum(0)
        return (every - same).mean() / (2 * len(logits) - 2)

    @torch.no_grad()
    def update_centre(self, teacher: Tensor) -> None:
        """Move the centre towards the mean of the teacher logits (2 * B, K) of all ranks, after the loss."""
        teacher = _at_least_float32(teacher)
        total = torch.cat([teacher.sum(0), teacher.new_full((1,), len(teacher))])
        _all_reduce(total, "sum")
        self.centre.lerp_((total[:-1] / total[-1]).to(self.centre.dtype), 1.0 - self.centre_momentum)


@torch.no_grad()
def sinkhorn(teacher: Tensor, temperature: float) -> Tensor:
    """Assign samples to prototypes so that all prototypes of the mini-batch, over all ranks, weigh alike.

    Parameters
    ----------
    teacher
        (N, K) logits of this rank.
    temperature
        Divides the logits.

    Returns
    -------
    Tensor
        (N, K) probabilities; each row sums to 1. Computed in logarithms, so that no prototype underflows.
    """
    score = teacher / temperature
    for _ in range(SINKHORN_ITERATIONS):
        score = score - _logsumexp_over_ranks(score)
        score = score - torch.logsumexp(score, dim=1, keepdim=True)
    return score.exp()


def koleo(cls: Tensor) -> Tensor:
    """Spread CLS tokens evenly: minus the mean log distance to the nearest other sample.

    Kozachenko-Leonenko term (Sablayrolles et al., ICLR 2019), as in DINOv2 (Oquab et al. 2023, section 4).

    Parameters
    ----------
    cls
        (B, D) CLS tokens of one view, B of 2 or more.

    Returns
    -------
    Tensor
        0-d.

    Raises
    ------
    ValueError
        When there is only one sample.
    """
    if len(cls) < 2:
        raise ValueError("dino.koleo_weight: the KoLeo term needs 2 samples or more per worker and step")
    with torch.autocast(cls.device.type, enabled=False):
        unit = normalize(_at_least_float32(cls), dim=-1)
        with torch.no_grad():
            nearest = (unit @ unit.T).fill_diagonal_(-1.0).argmax(dim=1)
        return -(pairwise_distance(unit, unit[nearest], eps=1e-8) + 1e-8).log().mean()


@torch.no_grad()
def teacher_entropy(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Measure both ways in which a teacher collapses.

    Parameters
    ----------
    targets
        (N, K) teacher probabilities.

    Returns
    -------
    per_sample
        0-d, mean entropy of the rows (nats): ln K where every output is uniform. The loss less this is the
        mean Kullback-Leibler divergence of student and teacher (DINO, section 5.3).
    of_mean
        0-d, entropy of the mean row (nats): 0 where all samples fall on one prototype.
    """
    return torch.special.entr(targets).sum(-1).mean(), torch.special.entr(targets.mean(0)).sum()


class CollapseError(RuntimeError):
    """The teacher's outputs carry no information any more."""


class CollapseGuard:
    """Watch the teacher's entropy at log points, and stop or warn when it stays out of bounds.

    Parameters
    ----------
    out_dim
        Prototypes, K.
    kinds
        How many kinds of images the samples are known to come from (compounds); 2 at least are taken for granted.
    floor
        Collapsed to few prototypes: entropy of the mean output below this share of ln N, where N is the least of kinds, samples
        of a step and K. A teacher that told each kind from the others would reach ln N, and with soft outputs more.
    ceiling
        Collapsed to the uniform output: mean entropy per sample above this share of ln K. Small networks
        start there and may stay for hundreds of steps, hence `patience`; 1 or more turns this check off.
    patience
        Consecutive log points out of bounds before the guard acts.
    action
        `stop` raises, `warn` logs once per spell out of bounds, `off` does nothing.
    section
        Section of the configuration that its advice names.
    """

    def __init__(
        self,
        out_dim: int,
        *,
        kinds: int,
        floor: float,
        ceiling: float,
        patience: int,
        action: Literal["stop", "warn", "off"],
        section: str = "dino",
    ) -> None:
        if action not in ("stop", "warn", "off"):
            raise ValueError(f"dino.collapse = {action!r}: choose stop, warn or off")
        self.out_dim = out_dim
        self.kinds = max(2, kinds)
        self.floor = floor
        self.ceiling = ceiling
        self.patience = patience
        self.action = action
        self.section = section
        self.spell = 0

    def watch(self, step: int, per_sample: float, of_mean: float, samples: int) -> None:
        """Take the two entropies of `teacher_entropy` (nats) at a step, and the number of samples that they are of.

        Raises
        ------
        CollapseError
            With action `stop`, after `patience` points out of bounds in a row.
        """
        fault = self._fault(per_sample, of_mean, samples)
        self.spell = self.spell + 1 if fault else 0
        if fault is None or self.spell < self.patience or self.action == "off":
            return
        message = f"step {step}: the teacher collapsed: {fault}, at {self.spell} log points in a row"
        if self.action == "stop":
            raise CollapseError(message)
        if self.spell == self.patience:
            log.warning(message)

    def _fault(self, per_sample: float, of_mean: float, samples: int) -> str | None:
        """Name what is out of bounds, with a remedy."""
        if not (math.isfinite(per_sample) and math.isfinite(of_mean)):
            return f"its entropy is {per_sample} (of the mean output {of_mean}); lower the learning rate"
        floor = self.floor * math.log(min(self.kinds, samples, self.out_dim))
        if of_mean < floor:
            return (
                f"all samples fall on few prototypes (entropy of the mean output {of_mean:.4f} nats, floor {floor:.4f}); "
                f"raise {self.section}.teacher_temperature, or take Sinkhorn centering"
            )
        ceiling = self.ceiling * math.log(self.out_dim)
        if self.ceiling < 1 and per_sample > ceiling:
            return (
                f"its outputs are uniform ({per_sample:.4f} nats, ceiling {ceiling:.4f}); "
                f"lower {self.section}.teacher_temperature or raise the learning rate"
            )
        return None


def _at_least_float32(x: Tensor) -> Tensor:
    """Widen half-precision numbers; float32 and float64 pass."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _all_reduce(x: Tensor, how: Literal["sum", "max"]) -> None:
    """Combine a tensor over all ranks in place; alone, leave it."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)


def _logsumexp_over_ranks(score: Tensor) -> Tensor:
    """Log of the sum of exp(score) over the samples of all ranks, (1, K)."""
    peak = score.max(dim=0, keepdim=True).values
    _all_reduce(peak, "max")
    total = (score - peak).exp().sum(dim=0, keepdim=True)
    _all_reduce(total, "sum")
    return peak + total.log()
