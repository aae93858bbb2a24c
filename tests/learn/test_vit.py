"""The transformer: sizes, tokens at both view sizes, initial weights."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath

from coda_ray.learn.vit import VitSpec, build_vit, cls_attention, initialise, layer_tokens, load_exactly, tokens

SMALL = VitSpec(name="vit", image_size=32, channels=3, patch=8, width=24, depth=3, heads=2)
DEIT_S = VitSpec(name="deit_small_patch16_224", image_size=None, channels=3)


def test_deit_s_has_the_sizes_of_the_method() -> None:
    vit = build_vit(DEIT_S, drop_path=0.1)
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (384, 12, 6)
    assert vit.patch_embed.img_size == (224, 224)
    assert vit.norm.eps == vit.blocks[0].norm1.eps == 1e-6
    assert all(block.attn.fused_attn for block in vit.blocks)
    rates = [block.drop_path1.drop_prob for block in vit.blocks if isinstance(block.drop_path1, DropPath)]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(1, 12)])


def test_a_transformer_of_free_sizes() -> None:
    vit = build_vit(SMALL, drop_path=0.0)
    assert vit.norm.eps == 1e-6
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (24, 3, 2)
    assert not [key for key in vit.state_dict() if key.startswith("head")]


@pytest.mark.parametrize(("side", "n_patches"), [(32, 16), (16, 4)])
def test_tokens_are_cls_and_patches_of_any_view_size(side: int, n_patches: int) -> None:
    vit = build_vit(SMALL, drop_path=0.0).eval()
    out = tokens(vit, torch.randn(2, 3, side, side))
    assert out.shape == (2, 1 + n_patches, 24)
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 1 + n_patches), atol=1e-5, rtol=0)


def test_fused_attention_equals_attention_written_out() -> None:
    attention = build_vit(SMALL, drop_path=0.0).blocks[0].attn.eval()
    x = torch.randn(2, 5, 24)
    q, k, v = attention.qkv(x).view(2, 5, 3, 2, 12).permute(2, 0, 3, 1, 4)
    weights = ((q @ k.transpose(-2, -1)) / 12**0.5).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 24))
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(attention(x).float(), expected, atol=2e-2, rtol=2e-2)


def test_attention_in_bf16_on_a_cpu_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    product = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        seen.extend([q.dtype, k.dtype, v.dtype])
        return product(q, k, v, **options)

    monkeypatch.setattr("coda_ray.learn.vit.scaled_dot_product_attention", spy)
    block = build_vit(SMALL, drop_path=0.0).blocks[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(torch.randn(2, 5, 24))
    assert seen == [torch.float32] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "deit_small_patch16_224", "image_size": 224, "channels": 3, "width": 100}, "has its own width"),
        ({"name": "vit", "image_size": None, "channels": 3, "patch": 8}, "needs image_size, width, depth, heads"),
    ],
)
def test_sizes_belong_to_free_transformers_only(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VitSpec(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["no_such_model", "resnet18", "deit_small_distilled_patch16_224"])
def test_a_name_that_is_no_plain_transformer_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"model '{name}'.*try deit_small_patch16_224"):
        build_vit(VitSpec(name=name, image_size=None, channels=3), drop_path=0.0)


def test_random_keeps_the_weights_that_the_seed_drew() -> None:
    torch.manual_seed(3)
    first = build_vit(SMALL, drop_path=0.0)
    initialise(first, "random")
    torch.manual_seed(3)
    second = build_vit(SMALL, drop_path=0.0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_fan_in_keeps_the_signal_of_a_small_network():
    torch.manual_seed(0)
    vit = build_vit(SMALL, drop_path=0.0)
    initialise(vit, "fan-in")
    for layer in vit.modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.weight.std().item() * layer.in_features**0.5 == pytest.approx(1.0, rel=0.1)
            assert layer.bias is None or not layer.bias.any()


def test_a_local_file_is_loaded_without_its_classification_head(tmp_path: Path) -> None:
    origin, fresh = build_vit(SMALL, drop_path=0.0), build_vit(SMALL, drop_path=0.0)
    path = tmp_path / "weights.safetensors"
    save_file({**origin.state_dict(), "head.weight": torch.zeros(1000, 24), "head.bias": torch.zeros(1000)}, path)
    initialise(fresh, str(path))
    assert all(torch.equal(a, b) for a, b in zip(origin.parameters(), fresh.parameters(), strict=True))


def test_a_file_of_another_model_is_refused_by_key_and_shape(tmp_path: Path) -> None:
    vit = build_vit(SMALL, drop_path=0.0)
    state = {**vit.state_dict(), "extra": torch.zeros(1), "pos_embed": torch.zeros(1, 5, 24)}
    del state["norm.bias"]
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    with pytest.raises(ValueError, match=r"lacks norm\.bias.*\(3 faults\)") as caught:
        initialise(vit, str(path))
    assert "has extra, which is not in the model" in str(caught.value)
    assert "has pos_embed of shape (1, 5, 24), the model has (1, 17, 24)" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


def test_a_path_that_cannot_be_a_weight_file(tmp_path: Path) -> None:
    vit = build_vit(SMALL, drop_path=0.0)
    with pytest.raises(ValueError, match=r"init = 'weights\.pth': give imagenet, simulated, random"):
        initialise(vit, "weights.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        initialise(vit, str(tmp_path / "absent.safetensors"))


def test_imagenet_weights_come_from_timm_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = build_vit(DEIT_S, drop_path=0.1)
    create, asked = timm.create_model, []

    def offline(name: str, *, pretrained: bool, **sizes: object) -> torch.nn.Module:
        asked.append((name, pretrained))
        model = create(name, pretrained=False, **sizes)
        torch.nn.init.constant_(model.norm.bias, 7.0)
        return model

    monkeypatch.setattr(timm, "create_model", offline)
    initialise(vit, "imagenet")
    assert asked == [("deit_small_patch16_224", True)]
    assert (vit.norm.bias == 7.0).all()


def test_imagenet_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = build_vit(DEIT_S, drop_path=0.0)

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(RuntimeError, match=r"deit_small_patch16_224 could not be had; give the path.*or init = random"):
        initialise(vit, "imagenet")
    with pytest.raises(RuntimeError, match=r"free sizes has no ImageNet weights; give the path"):
        initialise(build_vit(SMALL, drop_path=0.0), "imagenet")


def test_load_exactly_takes_a_state_that_fits() -> None:
    a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    load_exactly(b, a.state_dict(), "a")
    assert torch.equal(a.weight, b.weight)


def test_layer_tokens_are_what_each_block_puts_out() -> None:
    vit = build_vit(SMALL, drop_path=0.0).eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    final = tokens(vit, images)
    expected = seen[:3]
    found = layer_tokens(vit, images)
    assert [block.shape for block in found] == [(2, 17, 24)] * 3
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(vit.norm(found[-1]), final)
    assert [block.shape for block in layer_tokens(vit, torch.randn(2, 3, 16, 16))] == [(2, 5, 24)] * 3


def test_cls_attention_is_what_the_last_block_weighs_its_values_by() -> None:
    vit = build_vit(SMALL, drop_path=0.0).eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    attention = vit.blocks[-1].attn
    hook = attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    tokens(vit, images)
    hook.remove()
    x, mixed = seen[0]
    weights = cls_attention(vit, images)
    assert weights.shape == (2, 2, 4, 4)
    assert not attention._forward_pre_hooks
    patches = weights.flatten(2)
    # Head by head: what the patches and the CLS token itself put in, projected, is what the block put out.
    whole = torch.cat([1 - patches.sum(-1, keepdim=True), patches], -1)
    values = attention.qkv(x)[..., 48:].view(2, 17, 2, 12)
    expected = attention.proj(torch.einsum("bhn,bnhd->bhd", whole, values).flatten(1))
    torch.testing.assert_close(expected, mixed[:, 0], atol=1e-5, rtol=1e-4)
    assert cls_attention(vit, torch.randn(1, 3, 16, 16)).shape == (1, 2, 2, 2)
