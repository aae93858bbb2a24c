"""Measure the fast parts of coda_ray.learn beside their plain versions, in one run, on a CPU or a GPU.

views: batched view cutting against torchvision, one view of one image at a time
loss:  the factored DINO loss against the double loop over view pairs, forward and backward
step:  a whole DINO step with views grouped by size against one forward pass per view and the double loop

Both sides get the same random numbers and must end with the same checksum; a difference is an error (exit code 1).
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from coda_ray.learn.dino import DinoLoss
from coda_ray.learn.heads import DinoHead
from coda_ray.learn.objectives import DinoObjective, DinoSchedule
from coda_ray.learn.optim import build_optimizer
from coda_ray.learn.precision import Precision, choose_precision
from coda_ray.learn.views import GLOBAL_STREAM, LOCAL_STREAM, ViewDraws, ViewRecipe, dino_views, draw_views
from coda_ray.learn.vit import VitSpec, build_vit

SEED = 0
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
Work = Callable[[], float]


@dataclass(frozen=True)
class Sizes:
    """Network, views, tile side (px) and head of one benchmark."""

    spec: VitSpec
    recipe: ViewRecipe
    side: int
    hidden: int
    bottleneck: int
    out_dim: int


ARCHITECTURES = {
    "deit-s": Sizes(
        VitSpec("deit_small_patch16_224", None, 3), ViewRecipe("crop", 448, 224, 96, 6, 0.5, 0.5, 0.005), 540, 2048, 256, 4096
    ),
    "small": Sizes(
        VitSpec("vit", 64, 3, patch=8, width=128, depth=4, heads=4),
        ViewRecipe("crop", 96, 64, 32, 6, 0.5, 0.5, 0.005),
        96,
        512,
        64,
        64,
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run the chosen comparisons and print one line each."""
    options = _parse(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    precision = choose_precision(device, options.precision)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {chip}, {options.threads} CPU thread(s)")
    print(f"{options.arch}, {options.samples} samples per step, {options.repeats} repeats, {precision.reason}")
    build = {"views": compare_views, "loss": compare_loss, "step": compare_step}
    equal = True
    for name in options.what:
        plain, fast, dtype = build[name](options, device, precision)
        equal &= report(name, plain, fast, dtype, options.repeats, device)
    return 0 if equal else 1


def compare_views(options: argparse.Namespace, device: torch.device, _: Precision) -> tuple[Work, Work, torch.dtype]:
    """Cut all views of one step."""
    sizes = ARCHITECTURES[options.arch]
    recipe = sizes.recipe
    tiles, samples = make_tiles(options.samples, sizes.side, device), np.arange(options.samples)

    def plain() -> float:
        return sum(view_checksum(views) for views in plain_views(tiles, samples, recipe))

    def fast() -> float:
        return sum(view_checksum(views) for views in dino_views(tiles, None, seed=SEED, samples=samples, recipe=recipe))

    return plain, fast, torch.float32


def compare_loss(options: argparse.Namespace, device: torch.device, _: Precision) -> tuple[Work, Work, torch.dtype]:
    """Compute the loss of 2 + 6 views and its gradient."""
    out_dim = ARCHITECTURES[options.arch].out_dim
    torch.manual_seed(SEED)
    student = torch.rand(8 * options.samples, out_dim, device=device).requires_grad_()
    teacher = torch.rand(2 * options.samples, out_dim, device=device)
    criterion = make_criterion(out_dim).to(device)

    def run(loss_of: Callable[[Tensor, Tensor], Tensor]) -> float:
        student.grad = None
        loss = loss_of(student, criterion.targets(teacher, 0.04))
        loss.backward()
        assert student.grad is not None
        return loss.item() + 100 * student.grad.norm().item()

    return (
        lambda: run(lambda logits, targets: double_loop(logits, targets, options.samples)),
        lambda: run(criterion.cross_entropy),
        torch.float32,
    )


def compare_step(options: argparse.Namespace, device: torch.device, precision: Precision) -> tuple[Work, Work, torch.dtype]:
    """Do whole steps: views, teacher, student, loss, backward, AdamW, EMA; the checksum is the loss before the update."""
    sizes = ARCHITECTURES[options.arch]
    minibatch = {"tile": make_tiles(options.samples, sizes.side, device), "sample": torch.arange(options.samples)}
    works = []
    for loss_of in (plain_step_loss, lambda objective, batch, step: objective.loss(objective.network, batch, step)[0]):
        torch.manual_seed(SEED)
        # Without stochastic depth: grouped and single forward passes draw its masks in another order.
        backbone = build_vit(sizes.spec, drop_path=0.0)
        objective = DinoObjective(
            backbone,
            DinoHead(backbone.embed_dim, hidden=sizes.hidden, bottleneck=sizes.bottleneck, out_dim=sizes.out_dim),
            make_criterion(sizes.out_dim),
            schedule=DinoSchedule(1000, 0.996, 1.0, 0.04, 0.07, 300, 0),
            recipe=sizes.recipe,
            koleo_weight=0.0,
            seed=SEED,
        )
        objective.to(device)
        optimizer = build_optimizer(objective.network, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-5)
        works.append(make_step(objective, optimizer, minibatch, loss_of, precision))
    return works[0], works[1], precision.dtype


def make_step(
    objective: DinoObjective,
    optimizer: torch.optim.Optimizer,
    minibatch: dict[str, Tensor],
    loss_of: Callable[[DinoObjective, dict[str, Tensor], int], Tensor],
    precision: Precision,
) -> Work:
    """Bind one side's step; both sides go through the same number of steps."""
    counter = iter(range(10**9))

    def work() -> float:
        step = next(counter)
        with precision.autocast():
            loss = loss_of(objective, minibatch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_update(step)
        return loss.item()

    return work


def plain_step_loss(objective: DinoObjective, minibatch: dict[str, Tensor], step: int) -> Tensor:
    """Give each view its own forward pass, and each pair of views its own term."""
    samples = len(minibatch["tile"])
    groups = dino_views(minibatch["tile"], None, seed=SEED, samples=minibatch["sample"].numpy(), recipe=objective.recipe)
    views = [view for group in groups for view in group.split(samples)]
    with torch.no_grad():
        teacher = torch.cat([objective.teacher(view)[0] for view in views[:2]])
        targets = objective.criterion.targets(teacher, objective.teacher_temperature(step))
    student = torch.cat([objective.student(view)[0] for view in views])
    loss = double_loop(student, targets, samples)
    objective.criterion.update_centre(teacher)
    return loss


def double_loop(student: Tensor, targets: Tensor, samples: int) -> Tensor:
    """Compute DINO's loss pair by pair, as its authors wrote it down."""
    student_views, teacher_views = (student / 0.1).split(samples), targets.split(samples)
    terms = [
        -(q * torch.log_softmax(logits, dim=-1)).sum(-1).mean()
        for t, q in enumerate(teacher_views)
        for v, logits in enumerate(student_views)
        if t != v
    ]
    return torch.stack(terms).mean()


def plain_views(tiles: Tensor, samples: np.ndarray, recipe: ViewRecipe) -> list[Tensor]:
    """Cut view after view with torchvision, from the same draws."""
    groups = []
    for stream, n_views, size in (
        (GLOBAL_STREAM, 2, recipe.size_global),
        (LOCAL_STREAM, recipe.locals_per_sample, recipe.size_local),
    ):
        draws = draw_views(
            SEED,
            samples,
            stream=stream,
            n_views=n_views,
            size=size,
            tile_shape=tuple(tiles.shape[1:]),
            recipe=recipe,
            jitter=stream == GLOBAL_STREAM,
        )
        groups.append(torch.stack([plain_view(tiles[b], draws, v, b) for v in range(n_views) for b in range(len(tiles))]))
    return groups


def plain_view(tile: Tensor, draws: ViewDraws, v: int, b: int) -> Tensor:
    """Cut one view of one tile with torchvision."""
    view = tv.crop(tile, int(draws.top[v, b]), int(draws.left[v, b]), draws.size, draws.size)
    if draws.vertical[v, b]:
        view = tv.vertical_flip(view)
    if draws.horizontal[v, b]:
        view = tv.horizontal_flip(view)
    view = tv.to_dtype(view, torch.float32, scale=True)
    if draws.jitter is not None and draws.jitter.on[v, b]:
        offset = draws.jitter.offset[v, b].to(tile.device)
        view = ((view + offset[:, None, None]).clamp(0, 1) ** float(draws.jitter.exponent[v, b])).clamp(0, 1)
    std, mean = torch.std_mean(view, dim=(1, 2), correction=0)
    return tv.normalize(view, mean.tolist(), (std + 1e-6).tolist())


def view_checksum(views: Tensor) -> float:
    """Weigh every pixel by its place, so that a misplaced one shows."""
    weights = torch.linspace(0.5, 1.5, views[0].numel(), device=views.device).view(views[0].shape)
    return (views.abs() * weights).mean().item()


def make_tiles(samples: int, side: int, device: torch.device) -> Tensor:
    """Make tiles of uniform noise on the device."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, 256, (samples, 3, side, side), dtype=torch.uint8, generator=generator).to(device)


def make_criterion(out_dim: int) -> DinoLoss:
    """Build DINO's loss with the settings of the method."""
    return DinoLoss(out_dim, student_temperature=0.1, centre_momentum=0.9, centering="mean")


def report(name: str, plain: Work, fast: Work, dtype: torch.dtype, repeats: int, device: torch.device) -> bool:
    """Time both sides in turn, print them, and say whether their checksums agree."""
    times: tuple[list[float], list[float]] = ([], [])
    sums = [0.0, 0.0]
    for repeat in range(repeats + 1):
        for side, work in enumerate((plain, fast)):
            start = time.perf_counter()
            sums[side] = work()  # reads a number back, so the device has finished
            if repeat > 0:  # the first one warms up
                times[side].append(time.perf_counter() - start)
    slow, quick = (1e3 * statistics.median(side) for side in times)
    equal = abs(sums[0] - sums[1]) <= TOLERANCE[dtype] * abs(sums[0])
    print(
        f"{name:6} plain {slow:9.2f} ms   ours {quick:9.2f} ms   ratio {slow / quick:6.2f}   "
        f"checksum {sums[0]:.6f} {sums[1]:.6f} {'equal' if equal else 'DIFFERENT'}",
        flush=True,
    )
    return equal


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="views|loss|step", help="comparisons (default: all)")
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="small", help="sizes of network, tiles and views")
    parser.add_argument("--samples", type=int, default=16, help="samples per step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats, median shown (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of step (default: auto)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(argv)
    options.what = options.what or ["views", "loss", "step"]
    unknown = set(options.what) - {"views", "loss", "step"}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: choose from views, loss, step")
    return options


if __name__ == "__main__":
    sys.exit(main())
