"""Source-free adaptation of a feature extractor through its frozen classifier: what the predictions and the tokens must be like.

Beside DINO's loss on the target: sure and diverse predictions (information maximisation; SHOT, Liang et al., ICML 2020,
arXiv 2002.08546), the same prediction for two views, or for two images of one compound, and tokens with the mean and spread
that they have on the source (feature restoration; Eastwood et al., ICLR 2022, arXiv 2107.05539). No label, and no image of
the source.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coda_ray.learn.dual import DualModel
from coda_ray.learn.ema import frozen
from coda_ray.learn.moments import Moments, token_sums
from coda_ray.learn.objectives import DinoObjective, Student
from coda_ray.learn.vit import tokens

# Of a variance, as a share of the mean one: a feature that is constant on the source must not rule the rest.
LEAST_VARIANCE = 1e-2


@dataclass(frozen=True)
class Terms:
    """Weights of the loss; a term of weight 0 is not computed.

    Parameters
    ----------
    dino
        DINO's loss, of single images or of cross-batch pairs.
    entropy
        Mean entropy of the predictions: each is to be sure.
    diversity
        Divergence of the mean prediction from the prior: all of them are to be diverse.
    consistency
        Cross-entropy between the predictions of two views, each the other's fixed target.
    moments
        Distance of mean and standard deviation of the tokens from the source's.
    margin
        Predictions whose entropy is above this share of ln(classes) count in neither entropy nor diversity: images of a class
        that the classifier does not know should not be pressed into one that it does (reliable samples, as in EATA; Niu et
        al., ICML 2022). 1 counts all.
    """

    dino: float = 1.0
    entropy: float = 1.0
    diversity: float = 1.0
    consistency: float = 1.0
    moments: float = 1.0
    margin: float = 1.0

    def __post_init__(self) -> None:
        """Check that there is something to learn."""
        if not (self.reads or self.dino > 0 or self.moments > 0):
            raise ValueError("shot: every term of the method has weight 0; give one of them more")

    @property
    def reads(self) -> bool:
        """Whether the classifier is asked at all."""
        return self.entropy > 0 or self.diversity > 0 or self.consistency > 0


class TokenStudent(nn.Module):
    """DINO's student that also returns the tokens of the global views, so that one wrapped forward pass serves every term.

    Parameters
    ----------
    student
        Backbone and head.
    with_head
        Whether the head is used; else it is no part of this module, and nothing trains it.
    """

    def __init__(self, student: Student, *, with_head: bool) -> None:
        super().__init__()
        self.backbone = student.backbone
        self.head = student.head if with_head else None

    def forward(self, global_views: Tensor, local_views: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Map views (2 B, C, S, S) and (L B, C, s, s) to tokens (2 B, 1 + N, D); with a head, also to logits and CLS tokens."""
        features = tokens(self.backbone, global_views)
        if self.head is None:
            return features, None, None
        cls = features[:, 0]
        if len(local_views):
            cls = torch.cat([cls, tokens(self.backbone, local_views)[:, 0]])
        return features, self.head(cls), cls


class SourceFreeObjective:
    """Adapts the feature extractor of a dual model; its classifier stays as it is, to the bit.

    Mini-batches as for `DinoObjective`. With a `partner`, the two global views are of two images of one compound.

    Parameters
    ----------
    dino
        Student, teacher, heads and DINO's loss, from the pre-training. The teacher follows the student whatever the terms.
    model
        The dual model whose classifier reads the student's tokens; its extractor is not used.
    terms
        Weights.
    source
        Moments of the tokens on the source, (2, D); needed by the term `moments`.
    prior
        (K,) shares of the classes that the mean prediction is drawn to; None: all alike.

    Raises
    ------
    ValueError
        When a term lacks what it needs.
    """

    network: nn.Module
    find_unused = False

    def __init__(
        self, dino: DinoObjective, model: DualModel, terms: Terms, *, source: Moments | None, prior: Tensor | None
    ) -> None:
        if terms.moments > 0 and source is None:
            raise ValueError("the term moments needs the moments of the tokens on the source")
        if terms.dino == 0:
            dino.recipe = replace(dino.recipe, locals_per_sample=0)
        self.dino = dino
        self.model = cast(DualModel, frozen(model))
        self.terms = terms
        self.source = source
        self.log_prior = None if prior is None else prior.clamp(min=1e-6).log()
        self.network = TokenStudent(dino.student, with_head=terms.dino > 0)

    def to(self, device: torch.device) -> None:
        """Move everything to a device; before the optimizer is built."""
        self.dino.to(device)
        self.model.to(device)
        self.source = self.source and self.source.to(device)
        self.log_prior = None if self.log_prior is None else self.log_prior.to(device)

    def loss(self, network: nn.Module, minibatch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up the terms of one mini-batch; over several ranks, means and moments are those of all of them.

        Parameters
        ----------
        network
            The student as the loop wrapped it.
        minibatch
            As for `DinoObjective`.
        step
            Optimisation step, from 0.

        Returns
        -------
        loss
            0-d, with its graph.
        metrics
            `loss` and each term that has a weight: in nats `dino`, `prediction_entropy`, `prediction_diversity` (divergence from
            the prior, 0 where they agree), `consistency`; `moments`. With DINO its `entropy`, `entropy_of_mean` and `kl` too.
        """
        global_views, local_views = self.dino.views(minibatch)
        features, logits, cls = network(global_views, local_views)
        parts, metrics = dict[str, tuple[float, Tensor]](), dict[str, Tensor]()
        if logits is not None:
            of_dino, metrics = self.dino.loss_of(logits, cast(Tensor, cls), global_views, step)
            parts["dino"] = self.terms.dino, of_dino
        if self.terms.reads:
            parts |= self._of_predictions(self.model.classify(features).float())
        if self.terms.moments > 0:
            parts["moments"] = self.terms.moments, moment_distance(features, cast(Moments, self.source))
        loss = torch.stack([weight * value for weight, value in parts.values()]).sum()
        return loss, {**metrics, **{name: value.detach() for name, (_, value) in parts.items()}, "loss": loss.detach()}

    def _of_predictions(self, logits: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Compute the terms of the predictions (2 B, K) that have a weight."""
        terms, parts = self.terms, {}
        log_p = logits.log_softmax(-1)
        if terms.entropy > 0 or terms.diversity > 0:
            entropy, mean = sureness(log_p, terms.margin)
            if terms.entropy > 0:
                parts["prediction_entropy"] = terms.entropy, entropy
            if terms.diversity > 0:
                parts["prediction_diversity"] = terms.diversity, divergence(mean, self.log_prior)
        if terms.consistency > 0:
            first, second = log_p.chunk(2)
            crossed = first.detach().exp() * second + second.detach().exp() * first
            parts["consistency"] = terms.consistency, -crossed.sum(-1).mean() / 2
        return parts

    def before_update(self, step: int) -> None:
        """As DINO, where its head is trained."""
        if self.terms.dino > 0:
            self.dino.before_update(step)

    def after_update(self, step: int) -> None:
        """Let the teacher follow the student."""
        self.dino.after_update(step)

    def state_dict(self) -> dict[str, Tensor]:
        """Name DINO's state, in which the adapted extractor is; the tensors are live."""
        return self.dino.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a run in the middle.

        Raises
        ------
        ValueError
            When a key or a shape does not fit; names it.
        """
        self.dino.load_state_dict(state)


def sureness(log_p: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Average entropy and prediction over the predictions of all ranks that count.

    Parameters
    ----------
    log_p
        (N, K) logarithms of this rank's predictions.
    margin
        As in `Terms`.

    Returns
    -------
    entropy
        0-d, mean entropy (nats), with its graph; 0 where no prediction counts.
    mean
        (K,) mean prediction, with its graph; zeros where none counts.
    """
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    counted = torch.ones_like(entropy)
    if margin < 1:
        counted = (entropy.detach() <= margin * math.log(log_p.shape[-1])).to(p.dtype)
    # Not as a matrix product, which autocast would compute in half precision.
    sums = (torch.cat([entropy[:, None], p], 1) * counted[:, None]).sum(0)
    total = _over_ranks(torch.cat([sums, counted.sum()[None]]))
    means = total[:-1] / total[-1].clamp(min=1)
    return means[0], means[1:]


def divergence(mean: Tensor, log_prior: Tensor | None) -> Tensor:
    """Measure how far a mean prediction is from a prior.

    Parameters
    ----------
    mean
        (K,) mean prediction.
    log_prior
        (K,); None is uniform.

    Returns
    -------
    Tensor
        0-d, Kullback-Leibler divergence KL(mean prediction || prior) in nats, with its graph.
    """
    mean = mean.clamp(min=1e-12)
    log_wanted = -math.log(len(mean)) if log_prior is None else log_prior
    return (mean * (mean.log() - log_wanted)).sum()


def moment_distance(features: Tensor, source: Moments) -> Tensor:
    """Measure how far mean and spread of a mini-batch's tokens are from the source's.

    Parameters
    ----------
    features
        (N, 1 + P, D) tokens of this rank; those of all ranks count.
    source
        Moments of CLS and patch tokens on the source, (2, D).

    Returns
    -------
    Tensor
        0-d: squared differences of means and of standard deviations over the source's variance, averaged over features and
        over the two kinds of tokens.
    """
    sums = token_sums(features).sum(0)
    total = _over_ranks(torch.cat([sums.flatten(), sums.new_full((1,), len(features))]))
    mean, square = (total[:-1] / total[-1]).view_as(sums)
    variance = source.std.square()
    least = LEAST_VARIANCE * variance.mean()
    std = (square - mean.square()).clamp(min=1e-12).sqrt()
    distance: Tensor = ((mean - source.mean).square() + (std - source.std).square()) / variance.clamp(min=least)
    return distance.mean()


class _SumOverRanks(torch.autograd.Function):
    """Sum over all ranks; each rank's input gets the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Add up."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Add up what reaches the sum on every rank."""
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _over_ranks(x: Tensor) -> Tensor:
    """Add up a tensor over all ranks, with gradients; alone, leave it."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    total: Tensor = _SumOverRanks.apply(x)
    return total
