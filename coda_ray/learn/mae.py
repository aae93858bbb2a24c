"""The masked autoencoder: an encoder of the visible patches, a light decoder, and what the training loop drives."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from coda_ray.draws import uniforms
from coda_ray.learn.heads import init_linear
from coda_ray.learn.views import ViewRecipe, supervised_view
from coda_ray.learn.vit import CpuFriendlyAttention, load_exactly

MASK_STREAM = 111
PATCH_EPSILON = 1e-6


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes of a masked autoencoder's decoder.

    Parameters
    ----------
    width
        Dimensions of its tokens, a multiple of 4 (for the positions) and of `heads`.
    depth, heads
        Blocks, and attention heads of each.
    """

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        """Check that positions and heads divide the width."""
        for name, divisor in (("4", 4), ("heads", self.heads)):
            if self.width % divisor:
                raise ValueError(f"the decoder's width = {self.width}: must be a multiple of {name} ({divisor})")


class MaeDecoder(nn.Module):
    """Predict the pixels of masked patches from the tokens of the visible ones.

    MAE (He et al., CVPR 2022, section 3): a linear layer, one learned token for every masked patch, fixed
    two-dimensional sine-cosine positions (none on the CLS token), blocks, a norm, a linear layer to pixels.

    Parameters
    ----------
    encoder_width
        Dimensions of the encoder's tokens.
    spec
        Sizes of the decoder.
    pixels
        Values of one patch, all channels.
    """

    def __init__(self, encoder_width: int, spec: DecoderSpec, pixels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, spec.width)
        self.mask_token = nn.Parameter(torch.empty(spec.width))
        self.blocks = nn.Sequential(
            *(Block(spec.width, spec.heads, qkv_bias=True, attn_layer=CpuFriendlyAttention) for _ in range(spec.depth))
        )
        self.norm = nn.LayerNorm(spec.width, eps=1e-6)
        self.predict = nn.Linear(spec.width, pixels)
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                init_linear(layer)

    def forward(self, visible: Tensor, order: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predict the masked patches.

        Parameters
        ----------
        visible
            (B, 1 + K, D): the encoder's CLS token, then the tokens of the K visible patches.
        order
            (B, N) int64: patch numbers, visible ones first. Attention does not see the order of its tokens,
            so they stay in this one.
        grid
            Patches down and across.

        Returns
        -------
        Tensor
            (B, N - K, pixels), in the order of `order[:, K:]`.
        """
        known = self.embed(visible)
        kept = visible.shape[1] - 1
        token = self.mask_token
        positions = build_sincos2d_pos_embed(list(grid), len(token), device=token.device, dtype=token.dtype)[order]
        masked = token + positions[:, kept:]
        hidden = torch.cat([known[:, :1], known[:, 1:] + positions[:, :kept], masked], dim=1)
        return cast(Tensor, self.predict(self.norm(self.blocks(hidden)[:, 1 + kept :])))


class MaskedAutoencoder(nn.Module):
    """Reconstruct masked patches from the visible ones.

    MAE (He et al., CVPR 2022). The encoder sees the visible patches and its CLS token alone; the loss is the
    mean squared error over masked patches, whose pixels are normalised patch by patch (section 4.1,
    "reconstruction target").

    Parameters
    ----------
    encoder
        Transformer; after training it is the feature extractor.
    decoder
        Sizes of the decoder.
    mask_ratio
        Share of patches that are masked; of N patches, the whole part of N * (1 - mask_ratio) is visible.
    """

    def __init__(self, encoder: VisionTransformer, decoder: DecoderSpec, mask_ratio: float = 0.75) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch = encoder.patch_embed.patch_size[0]
        self.decoder = MaeDecoder(encoder.embed_dim, decoder, self.patch**2 * encoder.patch_embed.proj.in_channels)
        self.mask_ratio = mask_ratio

    def patches(self, size: int) -> int:
        """Count the patches, N, of an image whose sides are `size` (px)."""
        return int((size // self.patch) ** 2)

    def visible(self, patches: int) -> int:
        """Count the visible ones among N patches.

        Raises
        ------
        ValueError
            When none or all would be visible.
        """
        kept = int(patches * (1.0 - self.mask_ratio))
        if not 0 < kept < patches:
            raise ValueError(
                f"mask_ratio = {self.mask_ratio} leaves {kept} of {patches} patches visible; choose it so that some "
                "are visible and some masked, or take larger views or smaller patches"
            )
        return kept

    def encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """Embed the visible patches.

        Parameters
        ----------
        images
            (B, C, S, S) float, or (1, C, S, S) of which all rows of `kept` are masks.
        kept
            (B, K) int64: numbers of the visible patches.

        Returns
        -------
        Tensor
            (B, 1 + K, D): the CLS token, then the visible patches in the order of `kept`, after the final norm.
        """
        vit = self.encoder
        embedded = vit._pos_embed(vit.patch_embed(images))
        hidden = torch.cat([embedded[:, :1].expand(len(kept), -1, -1), _take(embedded[:, 1:], kept)], dim=1)
        return cast(Tensor, vit.norm(vit.blocks(vit.norm_pre(hidden))))

    def targets(self, images: Tensor) -> Tensor:
        """Cut images (B, C, S, S) into patches (B, N, pixels), row by row, each of mean 0 and variance 1."""
        samples, channels, height, width = images.shape
        side = self.patch
        cells = images.reshape(samples, channels, height // side, side, width // side, side)
        patches = cells.permute(0, 2, 4, 3, 5, 1).reshape(samples, -1, side * side * channels)
        return layer_norm(patches, patches.shape[-1:], eps=PATCH_EPSILON)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Compute the loss.

        Parameters
        ----------
        images
            (B, C, S, S) float, S a multiple of the patch; or (1, C, S, S), and B masks of that one image.
        noise
            (B, N) numbers that rank the patches; those with the lowest are visible.

        Returns
        -------
        Tensor
            0-d, the mean over masked patches and their pixels.

        Raises
        ------
        ValueError
            When the mask ratio leaves no patch visible, or none masked.
        """
        order = noise.argsort(dim=1, stable=True)
        kept = self.visible(noise.shape[1])
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        predicted = self.decoder(self.encode(images, order[:, :kept]), order, grid)
        errors: Tensor = predicted - _take(self.targets(images), order[:, kept:])
        return errors.square().mean()


class MaeObjective:
    """The masked autoencoder on the training view of each tile.

    Mini-batches hold `tile` (B, C, H, W) uint8 and `sample` (B,) int64 sample numbers, which are best left on
    the host. The mask is a pure function of (seed, sample number).

    Parameters
    ----------
    network
        Encoder and decoder.
    recipe
        How the training view is cut.
    seed
        Seed of views and masks.
    """

    network: nn.Module
    find_unused = False

    def __init__(self, network: MaskedAutoencoder, *, recipe: ViewRecipe, seed: int) -> None:
        self.network = network
        self.recipe = recipe
        self.seed = seed
        self.patches = network.patches(recipe.size_global)

    def to(self, device: torch.device) -> None:
        """Move the network to a device; before the optimizer is built."""
        self.network.to(device)

    def loss(self, network: nn.Module, minibatch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the reconstruction loss of one mini-batch; the one metric is `loss`."""
        device = next(self.network.parameters()).device
        samples = minibatch["sample"].cpu().numpy()
        tiles = minibatch["tile"].to(device, non_blocking=True)
        views = supervised_view(tiles, seed=self.seed, samples=samples, recipe=self.recipe)
        noise = torch.from_numpy(uniforms(self.seed, samples, self.patches, MASK_STREAM)).float()
        loss = network(views, noise.to(device, non_blocking=True))
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def held_out_loss(self, minibatches: Iterable[dict[str, Tensor]]) -> float:
        """Average the reconstruction loss over samples that train nothing; mini-batches as of `loss`, one or more."""
        total, samples = 0.0, 0
        for minibatch in minibatches:
            count = len(minibatch["tile"])
            total, samples = total + count * float(self.loss(self.network, minibatch, 0)[0]), samples + count
        return total / samples

    def before_update(self, step: int) -> None:
        """Leave the gradients as they are."""

    def after_update(self, step: int) -> None:
        """Nothing follows the optimizer's step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Name encoder and decoder, prefixed so; the tensors are live."""
        return dict(self.network.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore encoder and decoder.

        Raises
        ------
        ValueError
            When a key or a shape does not fit; names it.
        """
        load_exactly(self.network, state, "the saved state")

    def warm_start(self, state: Mapping[str, Tensor]) -> None:
        """Begin a new run from the weights of another, as made by `state_dict`.

        Raises
        ------
        ValueError
            When a key or a shape does not fit; names it.
        """
        self.load_state_dict(state)


def _take(rows: Tensor, numbers: Tensor) -> Tensor:
    """Pick rows (B or 1, N, D) by their numbers (B, K), each sample its own; (B, K, D)."""
    every = rows.expand(len(numbers), -1, -1)
    return every.gather(1, numbers[:, :, None].expand(-1, -1, rows.shape[-1]))
