"""The dual model: a classifier transformer stacked on the tokens of a frozen feature extractor."""

from collections.abc import Mapping
from typing import Self, cast

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from coda_ray.learn.ema import frozen
from coda_ray.learn.heads import init_linear
from coda_ray.learn.vit import load_exactly, tokens


class DualModel(nn.Module):
    """Classify images by a second transformer that reads the first one's tokens.

    CODA (WACV 2024, arXiv 2311.12623, section 3): all tokens of the extractor after its final LayerNorm, a
    linear layer, the classifier's blocks and norm, a linear layer on token 0. The classifier's own patch, CLS
    and position embeddings are never used; they stay, as in the published model, and count among its
    parameters.

    Parameters
    ----------
    extractor
        Feature extractor; frozen here, and always in evaluation mode.
    classifier
        Transformer whose blocks are trained.
    n_classes
        Classes.
    """

    def __init__(self, extractor: VisionTransformer, classifier: VisionTransformer, n_classes: int) -> None:
        super().__init__()
        self.extractor = extractor
        self.project = init_linear(nn.Linear(extractor.embed_dim, classifier.embed_dim))
        self.classifier = classifier
        self.head = init_linear(nn.Linear(classifier.embed_dim, n_classes))
        frozen(self.extractor)

    def train(self, mode: bool = True) -> Self:
        """Switch the classifier's mode; the extractor stays in evaluation mode."""
        super().train(mode)
        self.extractor.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, C, S, S) to logits (B, n_classes) and the extractor's CLS tokens (B, D)."""
        features = self.features(images)
        return self.classify(features), features[:, 0]

    @property
    def width(self) -> int:
        """D."""
        return self.extractor.embed_dim

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, C, S, S) to the extractor's tokens (B, 1 + N, D), without a graph as long as it is frozen."""
        return tokens(self.extractor, images)

    def classify(self, features: Tensor) -> Tensor:
        """Map an extractor's tokens (B, 1 + N, D) to logits (B, n_classes)."""
        hidden = self.classifier.norm(self.classifier.blocks(self.project(features)))
        return cast(Tensor, self.head(hidden[:, 0]))

    def replace_extractor(self, state: Mapping[str, Tensor]) -> None:
        """Put an adapted teacher under the unchanged classifier.

        Parameters
        ----------
        state
            State of a transformer of the extractor's architecture.

        Raises
        ------
        ValueError
            When keys or shapes differ; names them.
        """
        load_exactly(self.extractor, state, "the adapted extractor")
