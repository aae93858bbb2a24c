"""The supervised model: one transformer and a linear layer on its CLS token."""

from typing import cast

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from coda_ray.learn.heads import init_linear
from coda_ray.learn.vit import tokens


class SupervisedModel(nn.Module):
    """Classify images by the CLS token of one transformer.

    Parameters
    ----------
    vit
        The transformer, trained with the labels.
    n_classes
        Classes.
    """

    def __init__(self, vit: VisionTransformer, n_classes: int) -> None:
        super().__init__()
        self.vit = vit
        self.head = init_linear(nn.Linear(vit.embed_dim, n_classes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, C, S, S) to logits (B, n_classes) and CLS tokens (B, D)."""
        features = self.features(images)
        return self.classify(features), features[:, 0]

    @property
    def width(self) -> int:
        """D."""
        return self.vit.embed_dim

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, C, S, S) to the transformer's tokens (B, 1 + N, D)."""
        return tokens(self.vit, images)

    def classify(self, features: Tensor) -> Tensor:
        """Map a transformer's tokens (B, 1 + N, D) to logits (B, n_classes)."""
        return cast(Tensor, self.head(features[:, 0]))
