"""The vision transformer of every role (feature extractor, classifier, supervised model), built by timm."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file
from timm.layers.attention import Attention
from timm.layers.config import set_fused_attn
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from coda_ray.learn.heads import init_fan_in


@dataclass(frozen=True)
class VitSpec:
    """Name and sizes of a vision transformer.

    Parameters
    ----------
    name
        A timm vision transformer such as `deit_small_patch16_224`, or `vit` for one of the sizes below.
    image_size
        Side of the global view (px); smaller views get interpolated position embeddings. A timm name leaves
        it None to keep its own.
    channels
        Image channels.
    patch, width, depth, heads
        Sizes of `vit`; None with a timm name, which has its own.
    """

    name: str
    image_size: int | None
    channels: int
    patch: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        """Check that sizes are given where, and only where, they are used."""
        sizes = {"patch": self.patch, "width": self.width, "depth": self.depth, "heads": self.heads}
        if self.name != "vit":
            given = [key for key, value in sizes.items() if value is not None]
            if given:
                raise ValueError(f"{self.name} has its own {', '.join(given)}: leave them out, or use model 'vit'")
            return
        missing = [key for key, value in {"image_size": self.image_size, **sizes}.items() if value is None]
        if missing:
            raise ValueError(f"model 'vit' needs {', '.join(missing)}")


# The name under which timm makes a transformer of free sizes: every size of it is given.
# The small backbone that comes with the package, in half precision.
SHIPPED = Path(__file__).parents[1] / "weights" / "simulated.safetensors"
FREE_SIZES = "vit_tiny_patch16_224"
_TIMM_SIZES = {
    "img_size": "image_size",
    "in_chans": "channels",
    "patch_size": "patch",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
}


def timm_arguments(spec: VitSpec) -> dict[str, Any]:
    """Give the arguments by which plain `timm.create_model` builds the network of `build_vit`; JSON."""
    sizes = {theirs: getattr(spec, own) for theirs, own in _TIMM_SIZES.items() if getattr(spec, own) is not None}
    return {
        "model_name": FREE_SIZES if spec.name == "vit" else spec.name,
        **sizes,
        "num_classes": 0,
        "dynamic_img_size": True,
    }


def spec_of(arguments: Mapping[str, Any]) -> VitSpec:
    """Read `timm_arguments` back.

    Raises
    ------
    ValueError
        When they are anything else: timm takes arguments that fetch files, and these come from one.
    """
    name = "vit" if "embed_dim" in arguments else str(arguments.get("model_name"))
    spec = VitSpec(name, **{own: arguments.get(theirs) for theirs, own in _TIMM_SIZES.items()})  # type: ignore[arg-type]
    if timm_arguments(spec) != dict(arguments) or not timm.is_model(arguments["model_name"]):
        raise ValueError(f"timm arguments {dict(arguments)} are not those of a plain vision transformer that timm has")
    return spec


class CpuFriendlyAttention(Attention):
    """timm's attention, but in float32 where a CPU computes the rest in bfloat16.

    Between few tokens (local views, small networks) torch's bfloat16 backward of
    `scaled_dot_product_attention` takes four to seven times as long on a CPU as the float32 one, which
    outweighs what bfloat16 saves elsewhere.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend among tokens (B, N, D)."""
        if not (x.device.type == "cpu" and torch.is_autocast_enabled("cpu")) or self.gate is not None:
            return super().forward(x, attn_mask, is_causal)
        samples, length, _ = x.shape
        qkv = self.qkv(x).view(samples, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).float()
        with torch.autocast("cpu", enabled=False):
            mixed = scaled_dot_product_attention(
                self.q_norm(q),
                self.k_norm(k),
                v,
                attn_mask=attn_mask,
                dropout_p=self.attn_drop.p if self.training else 0.0,
                is_causal=is_causal,
            )
        joined = self.norm(mixed.transpose(1, 2).reshape(samples, length, self.attn_dim))
        return cast(Tensor, self.proj_drop(self.proj(joined)))


def build_vit(spec: VitSpec, *, drop_path: float) -> VisionTransformer:
    """Build a transformer with random weights, without a classification head.

    Parameters
    ----------
    spec
        Which one.
    drop_path
        Stochastic depth of the last block; it rises linearly from 0 at the first (Huang et al., ECCV 2016).

    Returns
    -------
    timm.models.vision_transformer.VisionTransformer
        Attention is `scaled_dot_product_attention`; any image size that is a multiple of the patch is
        accepted.

    Raises
    ------
    ValueError
        When timm has no plain vision transformer of that name.
    """
    set_fused_attn(True)
    if spec.name == "vit":
        return VisionTransformer(
            img_size=cast(int, spec.image_size),
            patch_size=cast(int, spec.patch),
            in_chans=spec.channels,
            embed_dim=cast(int, spec.width),
            depth=cast(int, spec.depth),
            num_heads=cast(int, spec.heads),
            num_classes=0,
            dynamic_img_size=True,
            drop_path_rate=drop_path,
            attn_layer=CpuFriendlyAttention,
        )
    return _create(spec.name, spec.channels, spec.image_size, drop_path=drop_path, pretrained=False)


def tokens(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Embed images.

    Parameters
    ----------
    vit
        The transformer.
    images
        (B, C, S, S) float, S a multiple of the patch.

    Returns
    -------
    Tensor
        (B, 1 + N, D): the CLS token, then N patch tokens, after the final LayerNorm.
    """
    return vit.forward_features(images)


def layer_tokens(vit: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Embed images, and keep what every block made of them.

    Parameters
    ----------
    vit
        The transformer.
    images
        (B, C, S, S) float, S a multiple of the patch.

    Returns
    -------
    list of Tensor
        One (B, 1 + N, D) per block, in order: the CLS token, then N patch tokens; the last has not seen the final LayerNorm.
    """
    blocks = vit.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
    return [torch.cat([cls, patches], 1) for patches, cls in cast(list[tuple[Tensor, Tensor]], blocks)]


def cls_attention(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Read where the CLS token looks in the last block, as DINO shows it (Caron et al., ICCV 2021, figure 1).

    Parameters
    ----------
    vit
        The transformer.
    images
        (B, C, S, S) float, S a multiple of the patch.

    Returns
    -------
    Tensor
        (B, heads, S / patch, S / patch) float32: the softmax weights of the patches, which sum to 1 less the weight that the CLS
        token gives itself.
    """
    attention = cast(Attention, vit.blocks[-1].attn)
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        tokens(vit, images)
    finally:
        hook.remove()
    samples, length, _ = seen[0].shape
    qkv = attention.qkv(seen[0]).view(samples, length, 3, attention.num_heads, attention.head_dim)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).float()
    likeness = attention.q_norm(q[:, :, :1]) @ attention.k_norm(k).transpose(-2, -1)
    weights: Tensor = (likeness * attention.scale).softmax(-1)
    side = math.isqrt(length - 1)
    return weights[:, :, 0, 1:].reshape(samples, attention.num_heads, side, side)


def initialise(vit: VisionTransformer, init: str) -> None:
    """Give a transformer its initial weights, in place.

    Parameters
    ----------
    vit
        As made by `build_vit`.
    init
        `imagenet`: timm's weights of that name. `random`: the weights that `build_vit` drew. `fan-in`: linear
        layers drawn anew by `init_fan_in`. `simulated`: the small backbone that this package ships
        (coda_ray/weights/README.md). Otherwise the path of a local `.safetensors` file in timm's layout; its
        classification head (`head.*`) is ignored.

    Raises
    ------
    RuntimeError
        When ImageNet weights cannot be had.
    ValueError
        When the file does not hold the weights of this transformer; names the keys.
    FileNotFoundError
        When there is no such file.
    """
    if init == "random":
        return
    if init == "fan-in":
        init_fan_in(vit)
        return
    if init == "imagenet":
        load_exactly(vit, _imagenet(vit), "timm's ImageNet weights")
        return
    path = weights_file(init)
    if path is None:
        raise ValueError(f"init = {init!r}: give imagenet, simulated, random, fan-in, or the path of a .safetensors file")
    if not path.is_file():
        raise FileNotFoundError(f"init = {init!r}: no such file; give the path of a .safetensors file")
    state = {key: value.float() for key, value in load_file(path).items() if not key.startswith("head.")}
    if init == "simulated":  # made for views of 96 px; others see the same patches on another grid
        side = list(vit.patch_embed.grid_size)
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], side, num_prefix_tokens=1)
    load_exactly(vit, state, str(path))


def weights_file(init: str) -> Path | None:
    """Find the file of the weights that `initialise` reads; None where they are no file."""
    if init == "simulated":
        return SHIPPED
    return Path(init) if init.endswith(".safetensors") else None


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a state that must fit to the last key and shape.

    Parameters
    ----------
    module
        Receives the values, in place.
    state
        One tensor per parameter and buffer.
    origin
        Where the state comes from, for the message.

    Raises
    ------
    ValueError
        Names what is missing, what is too much and what has another shape.
    """
    own = module.state_dict()
    faults = [f"lacks {key}" for key in own.keys() - state.keys()]
    faults += [f"has {key}, which is not in the model" for key in state.keys() - own.keys()]
    faults += [
        f"has {key} of shape {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + ("; ..." if len(faults) > 8 else "")
        raise ValueError(f"{origin} does not fit {type(module).__name__}: it {shown} ({len(faults)} faults)")
    module.load_state_dict(dict(state))


def _create(name: str, channels: int, image_size: int | None, *, drop_path: float, pretrained: bool) -> VisionTransformer:
    """Make timm's model of that name, and insist that it is a plain ViT with a CLS token."""
    sizes: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        model = timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=0,
            in_chans=channels,
            dynamic_img_size=True,
            drop_path_rate=drop_path,
            attn_layer=CpuFriendlyAttention,
            **sizes,
        )
    except TypeError:  # timm's other architectures do not take these options
        model = None
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        model = None
    if not isinstance(model, VisionTransformer) or not model.has_class_token or model.num_prefix_tokens != 1:
        raise ValueError(f"model {name!r}: timm has no plain vision transformer of that name; try deit_small_patch16_224")
    return model


def _imagenet(vit: VisionTransformer) -> dict[str, Tensor]:
    """Fetch the ImageNet weights of the architecture that `vit` was built from."""
    remedy = "give the path of a local .safetensors file as init, or init = random"
    name = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise RuntimeError(f"init = imagenet: a transformer of free sizes has no ImageNet weights; {remedy}")
    side = vit.patch_embed.img_size[0]
    try:
        source = _create(name, vit.patch_embed.proj.in_channels, side, drop_path=0.0, pretrained=True)
    except Exception as error:  # the network, the hub's client and its cache each raise their own kind
        raise RuntimeError(
            f"init = imagenet: the weights of {name} could not be had; {remedy} ({type(error).__name__}: {error})"
        ) from error
    return source.state_dict()
