"""Measure test-time training of many images side by side beside one image after the other, in one run.

serial: per image a fresh copy of the model and torch's SGD
ours:   one copy of the parameters per image, all trained at once (coda_ray.learn.ttt)

Both sides take the same images and masks and must end with the same weights; a difference is an error (exit code 1).
"""

import argparse
import copy
import platform
import statistics
import sys
import time

import numpy as np
import torch
from torch import Tensor

from coda_ray.draws import uniforms
from coda_ray.learn.heads import init_fan_in
from coda_ray.learn.mae import DecoderSpec, MaskedAutoencoder
from coda_ray.learn.ttt import TTT_STREAM, TttRecipe, adapted_parameters
from coda_ray.learn.vit import VitSpec, build_vit

SEED = 0
TOLERANCE = 1e-4
Weights = dict[str, Tensor]


def main(argv: list[str] | None = None) -> int:
    """Run both sides in turn, compare their weights and print the ratio of their times."""
    options = _parse(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model, views = make_model(options).to(device).eval(), make_views(options).to(device)
    recipe = TttRecipe(steps=options.steps, masks=options.masks, trains="all")  # the more of the two
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"torch {torch.__version__}, {chip}, {options.threads} CPU thread(s), {options.repeats} repeats")
    print(
        f"{options.images} images of {options.size} px, {options.images_at_once} at once, {recipe.steps} steps of {recipe.masks} "
        f"masks, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    )
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(options.repeats + 1):
        weights = []
        for side, adapt in enumerate((serial, fast)):
            start = time.perf_counter()
            weights.append(adapt(model, views, recipe, options.images_at_once))
            wait_for(device)
            if repeat > 0:  # the first one warms up
                times[side].append(time.perf_counter() - start)
    slow, quick = (statistics.median(side) for side in times)
    difference, moved = largest_difference(*weights), largest_difference(weights[1], untrained(model, len(views)))
    equal = difference <= TOLERANCE * moved
    print(f"serial {slow / len(views):8.3f} s/image   ours {quick / len(views):8.3f} s/image   ratio {slow / quick:5.2f}")
    print(
        f"weights moved by at most {moved:.2e}, largest difference {difference:.2e}, "
        f"allowed {TOLERANCE * moved:.2e}: {'equal' if equal else 'DIFFERENT'}"
    )
    return 0 if equal else 1


def serial(model: MaskedAutoencoder, views: Tensor, recipe: TttRecipe, _: int) -> Weights:
    """Adapt to one image after the other, as the paper's authors do."""
    adapted = []
    for sample, view in enumerate(views):
        own = copy.deepcopy(model)
        sgd = torch.optim.SGD(own.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        patches = own.patches(view.shape[-1])
        for step in range(recipe.steps):
            drawn = uniforms(SEED, np.array([sample]), recipe.masks * patches, TTT_STREAM + step)
            noise = torch.from_numpy(drawn).float().view(recipe.masks, patches).to(view.device)
            sgd.zero_grad()
            own(view[None], noise).backward()
            sgd.step()
        adapted.append({name: value.detach() for name, value in own.named_parameters()})
    return {name: torch.stack([own[name] for own in adapted]) for name in adapted[0]}


def fast(model: MaskedAutoencoder, views: Tensor, recipe: TttRecipe, at_once: int) -> Weights:
    """Adapt to `at_once` images side by side."""
    chunks = [
        adapted_parameters(model, chunk, np.arange(first, first + len(chunk), dtype=np.int64), seed=SEED, recipe=recipe)
        for first, chunk in zip(range(0, len(views), at_once), views.split(at_once), strict=True)
    ]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def untrained(model: MaskedAutoencoder, images: int) -> Weights:
    """Stack the weights that every image starts from."""
    return {name: value.detach().expand(images, *value.shape) for name, value in model.named_parameters()}


def largest_difference(first: Weights, second: Weights) -> float:
    """Find the largest difference between two sets of weights."""
    return max((value - second[name]).abs().max().item() for name, value in first.items())


def make_model(options: argparse.Namespace) -> MaskedAutoencoder:
    """Build a masked autoencoder with random weights."""
    torch.manual_seed(SEED)
    spec = VitSpec("vit", options.size, options.channels, options.patch, options.width, options.depth, options.heads)
    decoder = DecoderSpec(options.decoder_width, options.decoder_depth, options.decoder_heads)
    model = MaskedAutoencoder(build_vit(spec, drop_path=0.0), decoder)
    init_fan_in(model)
    return model


def make_views(options: argparse.Namespace) -> Tensor:
    """Make self-normalised views of noise."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(options.images, options.channels, options.size, options.size, generator=generator)


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value, meaning in (
        ("images", 16, "images to adapt to"),
        ("images-at-once", 8, "images that ours adapts to side by side"),
        ("steps", 20, "steps per image"),
        ("masks", 128, "masks per step"),
        ("size", 32, "side of a view (px)"),
        ("channels", 3, "channels"),
        ("patch", 8, "side of a patch (px)"),
        ("width", 64, "width of the encoder"),
        ("depth", 4, "blocks of the encoder"),
        ("heads", 4, "heads of the encoder"),
        ("decoder-width", 32, "width of the decoder"),
        ("decoder-depth", 2, "blocks of the decoder"),
        ("decoder-heads", 4, "heads of the decoder"),
        ("repeats", 3, "timed repeats, median shown"),
        ("threads", 1, "CPU threads"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
