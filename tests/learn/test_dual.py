"""The dual and the supervised model: sizes of the method, what is trained, what is frozen."""

import pytest
import torch

from coda_ray.learn.dual import DualModel
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.learn.vit import VitSpec, build_vit, tokens

SMALL = VitSpec(name="vit", image_size=32, channels=3, patch=8, width=24, depth=2, heads=2)
WIDER = VitSpec(name="vit", image_size=32, channels=3, patch=8, width=32, depth=2, heads=2)
DEIT_S = VitSpec(name="deit_small_patch16_224", image_size=None, channels=3)


def _dual() -> DualModel:
    torch.manual_seed(0)
    return DualModel(build_vit(SMALL, drop_path=0.5), build_vit(WIDER, drop_path=0.0), n_classes=5)


def test_parameter_counts_of_the_method() -> None:
    dual = DualModel(build_vit(DEIT_S, drop_path=0.0), build_vit(DEIT_S, drop_path=0.0), n_classes=54)
    total = sum(p.numel() for p in dual.parameters())
    trainable = sum(p.numel() for p in dual.parameters() if p.requires_grad)
    assert round(total / 1e6, 1) == 43.5
    assert round(trainable / 1e6, 1) == 21.8


def test_forward_equals_its_parts_in_order() -> None:
    dual = _dual().eval()
    images = torch.randn(3, 3, 32, 32)
    features = tokens(dual.extractor, images)
    hidden = dual.project(features)
    for block in dual.classifier.blocks:
        hidden = block(hidden)
    logits, cls = dual(images)
    torch.testing.assert_close(logits, dual.head(dual.classifier.norm(hidden)[:, 0]))
    assert torch.equal(cls, features[:, 0])
    assert logits.shape == (3, 5)


def test_training_reaches_the_classifier_and_never_the_extractor() -> None:
    dual = _dual().train()
    assert dual.classifier.training
    assert not dual.extractor.training
    images = torch.randn(3, 3, 32, 32)
    first, second = dual(images)[1], dual(images)[1]
    assert torch.equal(first, second), "stochastic depth is off in the extractor"
    assert not first.requires_grad, "a frozen extractor records no graph"
    dual(images)[0].sum().backward()
    assert all(p.grad is None for p in dual.extractor.parameters())
    without = {name for name, p in dual.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {
        f"classifier.{name}" for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    }


def test_replacing_the_extractor_changes_it_alone() -> None:
    dual = _dual()
    before = {key: value.clone() for key, value in dual.state_dict().items()}
    torch.manual_seed(9)
    adapted = build_vit(SMALL, drop_path=0.0)
    dual.replace_extractor(adapted.state_dict())
    for key, value in dual.state_dict().items():
        if key.startswith("extractor."):
            assert torch.equal(value, adapted.state_dict()[key.removeprefix("extractor.")])
        else:
            assert torch.equal(value, before[key])
    with pytest.raises(ValueError, match=r"the adapted extractor does not fit VisionTransformer: it has .* of shape \(32,\)"):
        dual.replace_extractor(build_vit(WIDER, drop_path=0.0).state_dict())


def test_supervised_model_classifies_its_cls_token() -> None:
    torch.manual_seed(0)
    model = SupervisedModel(build_vit(SMALL, drop_path=0.0), n_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    logits, cls = model(images)
    assert torch.equal(cls, tokens(model.vit, images)[:, 0])
    torch.testing.assert_close(logits, cls @ model.head.weight.T + model.head.bias)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
