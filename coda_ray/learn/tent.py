"""Tent: a trained classifier adapts to new images by minimising the entropy of what it says of them."""

import torch
from torch import Tensor, nn

from coda_ray.learn.dual import DualModel
from coda_ray.learn.objectives import ClassifierObjective
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.learn.views import ViewRecipe, evaluation_view


class TentObjective(ClassifierObjective):
    """Entropy of the predictions, minimised over scale and shift of the normalisation layers alone.

    Tent (Wang et al., ICLR 2021, section 3), mini-batch by mini-batch. The transformers have LayerNorm only:
    there are no running statistics to estimate anew. Of a dual model the extractor's norms are trained too.
    Mini-batches hold `tile` (B, C, H, W) uint8; a label in one is not read.

    Parameters
    ----------
    model
        Trained with labels; here all but the norms' weights and biases is frozen.
    recipe
        Size of the evaluation view; there is no augmentation.
    """

    find_unused = False

    def __init__(self, model: SupervisedModel | DualModel, *, recipe: ViewRecipe) -> None:
        super().__init__(model.requires_grad_(False), recipe=recipe)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)

    def loss(self, network: nn.Module, minibatch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the mean entropy of the predictions of one mini-batch.

        Parameters
        ----------
        network
            The model as the loop wrapped it; put into evaluation mode, so that stochastic depth is off.
        minibatch
            See the class.
        step
            Optimisation step, from 0.

        Returns
        -------
        loss
            0-d (nats), with its graph.
        metrics
            In nats: `loss` and `entropy_of_mean`, the entropy of the mean prediction, which falls to 0 where the
            model says the same of all images.
        """
        device = next(self.network.parameters()).device
        views = evaluation_view(minibatch["tile"].to(device, non_blocking=True), self.recipe.size_global)
        logits, _ = network.eval()(views)
        log_p = torch.log_softmax(logits.float(), dim=-1)
        loss = -(log_p.exp() * log_p).sum(-1).mean()
        entropy_of_mean = torch.special.entr(log_p.detach().exp().mean(0)).sum()
        return loss, {"loss": loss.detach(), "entropy_of_mean": entropy_of_mean}
