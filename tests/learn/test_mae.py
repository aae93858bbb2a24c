"""The masked autoencoder against a version that goes image by image and patch by patch."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coda_ray.draws import uniforms
from coda_ray.learn.heads import init_fan_in
from coda_ray.learn.mae import MASK_STREAM, DecoderSpec, MaeObjective, MaskedAutoencoder
from coda_ray.learn.optim import build_optimizer
from coda_ray.learn.precision import choose_precision
from coda_ray.learn.views import ViewRecipe, supervised_view
from coda_ray.learn.vit import VitSpec, build_vit

SPEC = VitSpec(name="vit", image_size=32, channels=3, patch=8, width=24, depth=2, heads=2)
DECODER = DecoderSpec(width=16, depth=2, heads=2)
RECIPE = ViewRecipe(
    kind="crop",
    tile_crop=40,
    size_global=32,
    size_local=16,
    locals_per_sample=0,
    flip_probability=0.5,
    jitter_probability=0.5,
    jitter_std=0.005,
)
B, N, KEPT, SIDE = 3, 16, 4, 8


def _mae(seed: int = 0, drop_path: float = 0.0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(build_vit(SPEC, drop_path=drop_path), DECODER)


def _input(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, 32, 32, generator=generator), torch.rand(B, N, generator=generator)


def _cell(image: Tensor, number: int) -> tuple[slice, slice]:
    row, column = divmod(number, image.shape[-1] // SIDE)
    return slice(row * SIDE, (row + 1) * SIDE), slice(column * SIDE, (column + 1) * SIDE)


def _sincos(row: int, column: int, width: int) -> list[float]:
    bands = [1 / 10000 ** (k / (width // 4)) for k in range(width // 4)]
    return [f(place * band) for f in (np.sin, np.cos) for place in (row, column) for band in bands]


def _plain_loss(mae: MaskedAutoencoder, images: Tensor, noise: Tensor) -> Tensor:
    """Go through the images and their patches one by one; the decoder sees them in the image's own order."""
    vit, decoder, across = mae.encoder, mae.decoder, images.shape[-1] // SIDE
    terms = []
    for image, ranks in zip(images, noise, strict=True):
        kept = set(ranks.argsort()[: int(len(ranks) * (1 - mae.mask_ratio))].tolist())
        embedded = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
        for number in sorted(kept):
            pixels = image[(slice(None), *_cell(image, number))]
            embedded.append(
                (vit.patch_embed.proj.weight * pixels).sum((1, 2, 3)) + vit.patch_embed.proj.bias + vit.pos_embed[0, 1 + number]
            )
        hidden = torch.stack(embedded)[None]
        for block in vit.blocks:
            hidden = block(hidden)
        known = decoder.embed(vit.norm(hidden))[0]
        rows, visible = [known[0]], iter(known[1:])
        for number in range(len(ranks)):
            place = torch.tensor(_sincos(*divmod(number, across), DECODER.width), dtype=known.dtype)
            rows.append((next(visible) if number in kept else decoder.mask_token) + place)
        hidden = torch.stack(rows)[None]
        for block in decoder.blocks:
            hidden = block(hidden)
        predicted = decoder.predict(decoder.norm(hidden))[0, 1:]
        for number in range(len(ranks)):
            if number not in kept:
                pixels = image[(slice(None), *_cell(image, number))].permute(1, 2, 0).flatten()
                target = (pixels - pixels.mean()) / (pixels.var(correction=0) + 1e-6).sqrt()
                terms.append((predicted[number] - target).square().mean())
    return torch.stack(terms).mean()


def test_loss_and_gradients_equal_the_plain_version() -> None:
    ours, plain = _mae().double(), _mae().double()
    images, noise = _input()
    loss = ours(images.double(), noise)
    expected = _plain_loss(plain, images.double(), noise)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)  # timm's positions are float32
    loss.backward()
    expected.backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_encoder_sees_the_visible_patches_alone() -> None:
    mae = _mae().eval()
    images, noise = _input()
    kept = noise.argsort(dim=1)[:, :KEPT]
    encoded = mae.encode(images, kept)
    embedded = mae.encoder._pos_embed(mae.encoder.patch_embed(images))
    for b in range(B):
        chosen = embedded[b, [0, *(1 + kept[b]).tolist()]]
        torch.testing.assert_close(encoded[b], mae.encoder.norm(mae.encoder.blocks(chosen[None]))[0])
    changed = images.clone()
    for b in range(B):
        for number in set(range(N)) - set(kept[b].tolist()):
            changed[(b, slice(None), *_cell(images, number))] = 9.0
    assert torch.equal(mae.encode(changed, kept), encoded)
    number = int(kept[0, 0])
    changed[(0, slice(None), *_cell(images, number))] = 9.0
    assert not torch.equal(mae.encode(changed, kept)[0], encoded[0])


def test_many_masks_of_one_image_equal_as_many_copies() -> None:
    mae = _mae()
    images, noise = _input()
    torch.testing.assert_close(mae(images[:1], noise), mae(images[:1].expand(B, -1, -1, -1), noise))


def test_views_of_another_size_than_the_encoders() -> None:
    mae = _mae()
    assert mae.patches(48) == 36
    assert torch.isfinite(mae(torch.randn(2, 3, 48, 48), torch.rand(2, 36)))


def test_a_mask_that_leaves_nothing_is_refused() -> None:
    torch.manual_seed(0)
    mae = MaskedAutoencoder(build_vit(SPEC, drop_path=0.0), DECODER, mask_ratio=0.99)
    with pytest.raises(ValueError, match=r"mask_ratio = 0.99 leaves 0 of 16 patches visible"):
        mae(*_input())
    with pytest.raises(ValueError, match=r"width = 18: must be a multiple of 4"):
        DecoderSpec(width=18, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"width = 16: must be a multiple of heads \(3\)"):
        DecoderSpec(width=16, depth=1, heads=3)


def test_decoder_takes_the_initial_values_of_small_networks() -> None:
    mae = _mae()
    linears = [layer for layer in mae.decoder.modules() if isinstance(layer, nn.Linear)]
    assert len(linears) == 2 + 4 * DECODER.depth
    assert abs(torch.cat([layer.weight.flatten() for layer in linears]).std().item() - 0.02) < 0.002
    init_fan_in(mae.decoder)
    assert abs(mae.decoder.predict.weight.std().item() - 16**-0.5) < 0.02
    assert (mae.decoder.predict.bias == 0).all()


def _objective(seed: int = 0) -> MaeObjective:
    return MaeObjective(_mae(seed), recipe=RECIPE, seed=7)


def _minibatch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (B, 3, 48, 48), dtype=torch.uint8, generator=generator)
    return {"tile": tiles, "sample": torch.tensor([5, 900, 2**40])}


def test_objective_masks_by_seed_and_sample() -> None:
    objective, minibatch = _objective(), _minibatch()
    loss, metrics = objective.loss(objective.network, minibatch, 0)
    samples = minibatch["sample"].numpy()
    views = supervised_view(minibatch["tile"], seed=7, samples=samples, recipe=RECIPE)
    noise = torch.from_numpy(uniforms(7, samples, N, MASK_STREAM)).float()
    assert torch.equal(loss, objective.network(views, noise))
    assert set(metrics) == {"loss"}
    assert torch.equal(metrics["loss"], loss)
    assert not metrics["loss"].requires_grad
    alone = [objective.loss(objective.network, {k: v[b : b + 1] for k, v in minibatch.items()}, 0)[0] for b in range(B)]
    torch.testing.assert_close(torch.stack(alone).mean(), loss)


def test_held_out_loss_is_the_mean_over_samples_and_changes_nothing() -> None:
    objective, minibatch = _objective(), _minibatch()
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    alone = [{key: value[b : b + 1] for key, value in minibatch.items()} for b in range(B)]
    expected = sum(objective.loss(objective.network, one, 0)[0].item() for one in alone) / B
    halves = [{key: value[part] for key, value in minibatch.items()} for part in (slice(0, 1), slice(1, None))]
    for parts in ([minibatch], halves, alone):
        assert objective.held_out_loss(parts) == pytest.approx(expected, rel=1e-5)
    assert objective.held_out_loss([minibatch]) == objective.held_out_loss([minibatch])
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss(precision: str) -> None:
    objective, minibatch = _objective(), _minibatch()
    init_fan_in(objective.network)
    optimizer = build_optimizer(objective.network, lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    for step in range(40):
        with choose_precision(torch.device("cpu"), precision).autocast():
            loss, _ = objective.loss(objective.network, minibatch, step)
        optimizer.zero_grad()
        loss.backward()
        objective.before_update(step)
        optimizer.step()
        objective.after_update(step)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


def test_state_goes_round_and_must_fit() -> None:
    objective, other = _objective(), _objective(seed=1)
    state = {key: value.clone() for key, value in objective.state_dict().items()}
    assert {key.partition(".")[0] for key in state} == {"encoder", "decoder"}
    build_vit(SPEC, drop_path=0.0).load_state_dict(
        {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    )
    for restore in (other.load_state_dict, _objective(seed=2).warm_start):
        restore(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    del state["decoder.mask_token"]
    with pytest.raises(ValueError, match=r"the saved state does not fit MaskedAutoencoder: it lacks decoder.mask_token"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="it has centre, which is not in the model"):
        other.warm_start({**objective.state_dict(), "centre": torch.zeros(1)})
