"""What the one training loop drives: a network, its loss, and what happens around an optimizer step.

One step of the loop:  loss → backward → before_update → clip → optimizer.step → after_update.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from coda_ray.learn.dino import DinoLoss, koleo, teacher_entropy
from coda_ray.learn.dual import DualModel
from coda_ray.learn.ema import frozen, update_ema
from coda_ray.learn.heads import DinoHead
from coda_ray.learn.schedules import cosine, linear_then_constant
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.learn.views import ViewRecipe, dino_views, supervised_view
from coda_ray.learn.vit import load_exactly, tokens


class Objective(Protocol):
    """The contract between a training loop and what it trains.

    Attributes
    ----------
    network
        What the optimizer trains and data parallelism wraps; every forward pass with gradients goes through
        the wrapped one.
    find_unused
        Whether data parallelism must look for parameters that get no gradient.
    """

    network: nn.Module
    find_unused: bool

    def to(self, device: torch.device) -> None:
        """Move everything to a device; before the optimizer is built."""

    def loss(self, network: nn.Module, minibatch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one mini-batch, and metrics as detached 0-d tensors, without a host sync."""

    def before_update(self, step: int) -> None:
        """Edit gradients between the backward pass and the optimizer."""

    def after_update(self, step: int) -> None:
        """Follow the optimizer's step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Name everything that a resumed run needs; the tensors are live, so copy before the next step."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` named, to the last key and shape."""


class Student(nn.Module):
    """Backbone and head of DINO in one module, so that one wrapped forward pass covers views of both sizes.

    Parameters
    ----------
    backbone
        Transformer.
    head
        Projection head.
    """

    def __init__(self, backbone: VisionTransformer, head: DinoHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, *groups: Tensor) -> tuple[Tensor, Tensor]:
        """Map groups of same-size views, each (N_i, C, S_i, S_i), to logits (N, K) and CLS tokens (N, D)."""
        cls = torch.cat([tokens(self.backbone, views)[:, 0] for views in groups if len(views)])
        return cast(Tensor, self.head(cls)), cls


@dataclass(frozen=True)
class DinoSchedule:
    """What changes over a DINO run, in optimisation steps.

    Parameters
    ----------
    steps
        Length of the run.
    ema_start, ema_end
        Teacher momentum at step 0 and at the last step (cosine).
    teacher_temperature_start, teacher_temperature
        At step 0 and after the ramp.
    teacher_temperature_ramp
        Length of the linear ramp.
    freeze_last_layer
        Steps during which the head's last layer stays as it is.
    """

    steps: int
    ema_start: float
    ema_end: float
    teacher_temperature_start: float
    teacher_temperature: float
    teacher_temperature_ramp: int
    freeze_last_layer: int


class DinoObjective:
    """DINO, and with a `partner` in the mini-batch its cross-batch form (CODA, section 3).

    Mini-batches hold `tile` (B, C, H, W) uint8, optionally `partner` alike, and `sample` (B,) int64 sample
    numbers, which are best left on the host.

    Parameters
    ----------
    backbone, head
        The student; the teacher starts as its copy, without stochastic depth.
    criterion
        DINO's loss with its centre.
    schedule
        What changes over the run.
    recipe
        How views are cut.
    koleo_weight
        Weight of the KoLeo term, summed over the student's two global views; 0 leaves it out.
    seed
        Seed of the views.
    """

    network: nn.Module
    find_unused = False

    def __init__(
        self,
        backbone: VisionTransformer,
        head: DinoHead,
        criterion: DinoLoss,
        *,
        schedule: DinoSchedule,
        recipe: ViewRecipe,
        koleo_weight: float,
        seed: int,
    ) -> None:
        self.student = Student(backbone, head)
        self.teacher = cast(Student, frozen(copy.deepcopy(self.student)))
        self.network = self.student
        self.criterion = criterion
        self.schedule = schedule
        self.recipe = recipe
        self.koleo_weight = koleo_weight
        self.seed = seed

    def to(self, device: torch.device) -> None:
        """Move student, teacher and centre to a device; before the optimizer is built."""
        for module in (self.student, self.teacher, self.criterion):
            module.to(device)

    def teacher_temperature(self, step: int) -> float:
        """Return the teacher's temperature at a step."""
        plan = self.schedule
        return linear_then_constant(step, plan.teacher_temperature_ramp, plan.teacher_temperature_start, plan.teacher_temperature)

    def momentum(self, step: int) -> float:
        """Return the share of the old teacher that an update at this step keeps."""
        return cosine(step, self.schedule.steps, self.schedule.ema_start, self.schedule.ema_end)

    def loss(self, network: nn.Module, minibatch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss, then move the centre.

        Parameters
        ----------
        network
            The student as the loop wrapped it.
        minibatch
            See the class.
        step
            Optimisation step, from 0.

        Returns
        -------
        loss
            0-d, with its graph.
        metrics
            In nats: `loss` (of DINO alone), `entropy` (per sample), `entropy_of_mean` (of the mean output) and
            `kl`; with the KoLeo term also `koleo`.
        """
        global_views, local_views = self.views(minibatch)
        student_logits, cls = network(global_views, local_views)
        return self.loss_of(student_logits, cls, global_views, step)

    def loss_of(self, student_logits: Tensor, cls: Tensor, global_views: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of what the student made of the views, then move the centre.

        Parameters
        ----------
        student_logits, cls
            (V * B, K) and (V * B, D), as `Student` gives them.
        global_views
            (2 * B, C, S, S), for the teacher.
        step
            Optimisation step, from 0.

        Returns
        -------
        tuple
            As `loss`.
        """
        with torch.no_grad():
            teacher_logits, _ = self.teacher(global_views)
            targets = self.criterion.targets(teacher_logits, self.teacher_temperature(step))
            entropy, entropy_of_mean = teacher_entropy(targets)
        loss = self.criterion.cross_entropy(student_logits, targets)
        metrics = {"loss": loss.detach(), "entropy": entropy, "entropy_of_mean": entropy_of_mean}
        metrics["kl"] = metrics["loss"] - entropy
        if self.koleo_weight > 0:
            first, second = cls[: len(global_views)].chunk(2)
            spread = koleo(first) + koleo(second)
            loss = loss + self.koleo_weight * spread
            metrics["koleo"] = spread.detach()
        if self.criterion.centering == "mean":
            self.criterion.update_centre(teacher_logits)
        return loss, metrics

    @torch.no_grad()
    def held_out_loss(self, minibatches: Iterable[dict[str, Tensor]]) -> float:
        """Average DINO's loss over samples that train nothing: weights and centre stay as they are.

        Without stochastic depth and KoLeo term, at the teacher's last temperature. The logits of all samples are held at once,
        because Sinkhorn-Knopp balances them together, so the result does not depend on the size of the mini-batches. Under data
        parallelism, give every rank the same samples.

        Parameters
        ----------
        minibatches
            See the class; one or more.

        Returns
        -------
        float
            Nats.
        """
        training = self.student.training
        self.student.eval()
        student, teacher = [], []
        for minibatch in minibatches:
            views, samples = self.views(minibatch), len(minibatch["tile"])
            student.append(self.student(*views)[0].unflatten(0, (-1, samples)))
            teacher.append(self.teacher(views[0])[0].unflatten(0, (-1, samples)))
        self.student.train(training)
        of_student, of_teacher = (torch.cat(side, dim=1).flatten(0, 1) for side in (student, teacher))
        return float(self.criterion(of_student, of_teacher, self.schedule.teacher_temperature))

    def before_update(self, step: int) -> None:
        """Drop the gradient of the head's last layer while it is frozen; that spares it the decay too."""
        if step < self.schedule.freeze_last_layer:
            self.student.head.last.weight.grad = None

    def after_update(self, step: int) -> None:
        """Let the teacher follow the student."""
        update_ema(self.teacher, self.student, self.momentum(step))

    def state_dict(self) -> dict[str, Tensor]:
        """Name student, teacher, both heads and the centre; the tensors are live."""
        state = {f"{part}.{key}": value for part, module in self._parts().items() for key, value in module.state_dict().items()}
        return {**state, "centre": self.criterion.centre}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a run in the middle.

        Raises
        ------
        ValueError
            When a key or a shape does not fit; names it.
        """
        self.warm_start({key: value for key, value in state.items() if key != "centre"})
        centre = {key: value for key, value in state.items() if key == "centre"}
        load_exactly(self.criterion, centre, "the saved centre")

    def warm_start(self, state: Mapping[str, Tensor]) -> None:
        """Begin a new run from the weights of another: student, teacher and both heads, not the centre.

        Parameters
        ----------
        state
            As made by `state_dict`; a `centre` in it is ignored.

        Raises
        ------
        ValueError
            When a key or a shape does not fit; names it.
        """
        parts = self._parts()
        stray = [key for key in state if key != "centre" and key.partition(".")[0] not in parts]
        if stray:
            raise ValueError(f"the saved state is not DINO's: it has {', '.join(sorted(stray)[:4])}")
        for part, module in parts.items():
            own = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{part}.")}
            load_exactly(module, own, f"the saved {part}")

    def views(self, minibatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cut the global and local views of a mini-batch, on the device of the networks."""
        device = self.criterion.centre.device
        partner = minibatch.get("partner")
        return dino_views(
            minibatch["tile"].to(device, non_blocking=True),
            None if partner is None else partner.to(device, non_blocking=True),
            seed=self.seed,
            samples=minibatch["sample"].cpu().numpy(),
            recipe=self.recipe,
        )

    def _parts(self) -> dict[str, nn.Module]:
        """Modules by their prefix in the state."""
        return {
            "student": self.student.backbone,
            "student_head": self.student.head,
            "teacher": self.teacher.backbone,
            "teacher_head": self.teacher.head,
        }


class ClassifierObjective:
    """What objectives that train a classifying model share: where it lives, and its state.

    Parameters
    ----------
    model
        What is trained.
    recipe
        How views are cut.
    """

    network: nn.Module

    def __init__(self, model: SupervisedModel | DualModel, *, recipe: ViewRecipe) -> None:
        self.network = model
        self.recipe = recipe

    def to(self, device: torch.device) -> None:
        """Move the model to a device; before the optimizer is built."""
        self.network.to(device)

    def before_update(self, step: int) -> None:
        """Leave the gradients as they are."""

    def after_update(self, step: int) -> None:
        """Nothing follows the optimizer's step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Name the model's parameters, prefixed `model.`; the tensors are live."""
        return {f"model.{key}": value for key, value in self.network.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the model.

        Raises
        ------
        ValueError
            When a key or a shape does not fit; names it.
        """
        stray = [key for key in state if not key.startswith("model.")]
        if stray:
            raise ValueError(f"the saved state is not a classifier's: it has {', '.join(sorted(stray)[:4])}")
        own = {key.removeprefix("model."): value for key, value in state.items()}
        load_exactly(self.network, own, "the saved model")


class SupervisedObjective(ClassifierObjective):
    """Cross-entropy with labels, for the supervised model and for the classifier of a dual model.

    Mini-batches hold `tile` (B, C, H, W) uint8, `sample` (B,) int64 sample numbers, best left on the host,
    and `label` (B,) int64 classes.

    Parameters
    ----------
    model
        What is trained.
    recipe
        How the training view is cut.
    seed
        Seed of the views.
    """

    def __init__(self, model: SupervisedModel | DualModel, *, recipe: ViewRecipe, seed: int) -> None:
        super().__init__(model, recipe=recipe)
        # The classifier of a dual model has embeddings that nothing flows through.
        self.find_unused = isinstance(model, DualModel)
        self.seed = seed

    def loss(self, network: nn.Module, minibatch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the cross-entropy of one mini-batch; metrics are `loss` and `accuracy`."""
        device = next(self.network.parameters()).device
        views = supervised_view(
            minibatch["tile"].to(device, non_blocking=True),
            seed=self.seed,
            samples=minibatch["sample"].cpu().numpy(),
            recipe=self.recipe,
        )
        labels = minibatch["label"].to(device, non_blocking=True)
        logits, _ = network(views)
        loss = cross_entropy(logits.float(), labels)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": accuracy}
