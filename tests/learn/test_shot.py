"""Adaptation through the frozen classifier: each term against a slow loop, and what must not move."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_objectives import CPU, RECIPE, SPEC, B, _dino
from torch.nn.parallel import DistributedDataParallel

from coda_ray.learn.dual import DualModel
from coda_ray.learn.moments import Moments
from coda_ray.learn.optim import build_optimizer
from coda_ray.learn.precision import choose_precision
from coda_ray.learn.shot import SourceFreeObjective, Terms, divergence, moment_distance, sureness
from coda_ray.learn.views import dino_views
from coda_ray.learn.vit import build_vit, tokens
from coda_ray.tiles.plan import share_of

CLASSES = 5
NAMES = {"entropy": "prediction_entropy", "diversity": "prediction_diversity", "consistency": "consistency", "moments": "moments"}


def only(margin=1.0, **weights):
    """Weigh the terms that are named."""
    return Terms(**dict.fromkeys(("dino", *NAMES), 0.0) | weights, margin=margin)


def minibatch(partner=True, samples=B, first=0):
    rng = np.random.default_rng(3)
    images = torch.from_numpy(rng.integers(0, 255, (2, 8, 3, 24, 24), dtype=np.uint8))[:, first : first + samples]
    found = {"tile": images[0], "sample": torch.arange(first, first + samples)}
    return found | ({"partner": images[1]} if partner else {})


def source_moments():
    generator = torch.Generator().manual_seed(1)
    return Moments(torch.randn(2, 16, generator=generator), torch.rand(2, 16, generator=generator) + 0.1)


def build(terms, prior=None, drop_path=0.0):
    torch.manual_seed(5)
    model = DualModel(build_vit(SPEC, drop_path=0.0), build_vit(SPEC, drop_path=0.0), CLASSES)
    for parameter in model.parameters():  # far from the small initial weights, where all predictions are alike
        parameter.data += 0.2 * torch.randn_like(parameter)
    return SourceFreeObjective(_dino(drop_path=drop_path), model, terms, source=source_moments(), prior=prior)


def predictions(objective, images):
    """Slow: one view at a time through student and classifier."""
    views, _ = dino_views(
        images["tile"],
        images.get("partner"),
        seed=7,
        samples=images["sample"].numpy(),
        recipe=replace(RECIPE, locals_per_sample=0),
    )
    features = [tokens(objective.dino.student.backbone, view[None]) for view in views]
    return torch.cat([objective.model.classify(own).float().softmax(-1) for own in features]).detach(), torch.cat(
        features
    ).detach()


def slow(name, p, features, prior):
    half = len(p) // 2
    if name == "entropy":
        return sum(-sum(float(q) * math.log(q) for q in row) for row in p) / len(p)
    if name == "diversity":
        mean = [sum(float(row[k]) for row in p) / len(p) for k in range(CLASSES)]
        return sum(m * math.log(m / float(w)) for m, w in zip(mean, prior, strict=True))
    if name == "consistency":
        pairs = [(p[i], p[i + half]) for i in range(half)]
        crossed = [-sum(float(a) * math.log(b) for a, b in zip(*both, strict=True)) for one in pairs for both in (one, one[::-1])]
        return sum(crossed) / len(crossed)
    source, distances = source_moments(), []
    for kind, rows in enumerate((features[:, 0], features[:, 1:].flatten(0, 1))):
        least = 1e-2 * float(source.std.square().mean())
        for d in range(rows.shape[1]):
            values = rows[:, d].double()
            mean, std = float(values.mean()), float(values.std(correction=0))
            wanted, spread = float(source.mean[kind, d]), float(source.std[kind, d])
            distances.append(((mean - wanted) ** 2 + (std - spread) ** 2) / max(spread**2, least))
    return sum(distances) / len(distances)


@pytest.mark.parametrize("partner", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_each_term_is_that_of_a_slow_loop(name, partner):
    objective, images = build(only(**{name: 0.5})), minibatch(partner)
    loss, metrics = objective.loss(objective.network, images, 0)
    wanted = slow(name, *predictions(objective, images), [1 / CLASSES] * CLASSES)
    assert metrics[NAMES[name]].item() == pytest.approx(wanted, rel=1e-4)
    assert loss.item() == pytest.approx(0.5 * wanted, rel=1e-4)
    assert set(metrics) == {"loss", NAMES[name]}


def test_a_prior_of_the_source_takes_the_place_of_equal_shares():
    prior, images = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1]), minibatch()
    objective = build(only(diversity=1), prior)
    _, metrics = objective.loss(objective.network, images, 0)
    assert metrics["prediction_diversity"].item() == pytest.approx(
        slow("diversity", *predictions(objective, images), prior), rel=1e-4
    )
    mean = torch.rand(CLASSES).softmax(-1)
    alike = torch.full((CLASSES,), 1 / CLASSES)
    assert divergence(mean, alike.log()).item() == pytest.approx(divergence(mean, None).item(), abs=1e-6)
    negative_entropy = float((mean * mean.log()).sum())
    assert divergence(mean, None).item() == pytest.approx(negative_entropy + math.log(CLASSES), abs=1e-6)
    assert divergence(prior, prior.log()).item() == pytest.approx(0, abs=1e-6)


def test_unsure_predictions_are_left_out_of_entropy_and_diversity_alone():
    images = minibatch()
    objective = build(only(entropy=1, diversity=1, consistency=1))
    p, features = predictions(objective, images)
    entropies = -(p * p.log()).sum(-1)
    margin = float(entropies.sort().values[3:5].mean()) / math.log(CLASSES)
    sure = p[entropies <= margin * math.log(CLASSES)]
    assert 0 < len(sure) < len(p)
    objective.terms = replace(objective.terms, margin=margin)
    _, metrics = objective.loss(objective.network, images, 0)
    equal = [1 / CLASSES] * CLASSES
    assert metrics["prediction_entropy"].item() == pytest.approx(slow("entropy", sure, None, None), rel=1e-4)
    assert metrics["prediction_diversity"].item() == pytest.approx(slow("diversity", sure, None, equal), rel=1e-4)
    assert metrics["consistency"].item() == pytest.approx(slow("consistency", p, features, None), rel=1e-4)


def test_dino_is_what_it_is_by_itself():
    images, alone = minibatch(), _dino(drop_path=0.0)
    objective = build(only(dino=1))
    wanted, told = alone.loss(alone.network, images, 0)
    loss, metrics = objective.loss(objective.network, images, 0)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert set(metrics) == {*told, "dino"}
    assert torch.equal(objective.state_dict()["centre"], alone.state_dict()["centre"])


def step(objective, optimizer, images, number):
    torch.manual_seed(number)
    loss, _ = objective.loss(objective.network, images, number)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    objective.before_update(number)
    optimizer.step()
    objective.after_update(number)


def optimizer_of(objective):
    return build_optimizer(objective.network, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


@pytest.mark.parametrize("terms", [Terms(), replace(Terms(), dino=0)], ids=["all", "without DINO"])
def test_the_classifier_stays_to_the_bit_and_the_extractor_moves(terms):
    objective = build(terms, drop_path=0.1)
    before, began = copy.deepcopy(objective.model.state_dict()), copy.deepcopy(objective.state_dict())
    optimizer = optimizer_of(objective)
    objective.network.train()
    for number in range(4):
        step(objective, optimizer, minibatch(), number)
    assert all(torch.equal(value, before[name]) for name, value in objective.model.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.model.parameters())
    moved = {name.partition(".")[0] for name, value in objective.state_dict().items() if not torch.equal(value, began[name])}
    everything = {"student", "teacher"} | ({"student_head", "teacher_head", "centre"} if terms.dino else set())
    assert moved == everything


def test_a_run_in_the_middle_goes_on_as_if_nothing_had_happened():
    whole, resumed = build(Terms()), build(Terms())
    optimizer = optimizer_of(whole)
    step(whole, optimizer, minibatch(), 0)
    resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    other = optimizer_of(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for objective, own in ((whole, optimizer), (resumed, other)):
        step(objective, own, minibatch(), 1)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_what_cannot_be_learnt_is_refused():
    objective = build(only(entropy=1))
    with pytest.raises(ValueError, match="needs the moments of the tokens on the source"):
        SourceFreeObjective(objective.dino, objective.model, Terms(), source=None, prior=None)
    with pytest.raises(ValueError, match="every term of the method has weight 0; give one of them more"):
        only()


def test_where_no_prediction_counts_nothing_is_learnt_from_them():
    objective = build(only(entropy=1, diversity=1, margin=1e-6))
    loss, metrics = objective.loss(objective.network, minibatch(), 0)
    loss.backward()
    assert metrics["prediction_entropy"] == 0
    assert all((p.grad == 0).all() for p in objective.network.parameters() if p.grad is not None)


def test_predictions_and_moments_are_compared_in_float32_whatever_the_precision():
    log_p, features = torch.randn(64, CLASSES).log_softmax(-1), torch.randn(8, 5, 16)

    def measured():
        entropy, mean = sureness(log_p, 0.9)
        return torch.stack([entropy, divergence(mean, None), moment_distance(features, source_moments())])

    exact = measured()
    with choose_precision(CPU, "bf16").autocast():
        assert torch.equal(measured(), exact)


def gradients_of(objective, network, low, high, samples):
    """Backward pass as the training loop weighs it: shares of a mini-batch may differ by one sample."""
    network.train()
    world = dist.get_world_size() if dist.is_initialized() else 1
    loss, metrics = objective.loss(network, minibatch(samples=high - low, first=low), 0)
    (loss * ((high - low) * world / samples)).backward()
    found = {name: p.grad for name, p in objective.network.named_parameters()}
    return found | {name: metrics[name] for name in ("prediction_entropy", "prediction_diversity", "moments")}


def _on_rank(rank, file, results, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for number, terms in enumerate(cases):
        objective = build(terms)
        wrapped = DistributedDataParallel(objective.network, find_unused_parameters=objective.find_unused)
        found = gradients_of(objective, wrapped, *share_of(rank, 2, 7), 7)
        torch.save(found, f"{results}/{number}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_together_are_one_process_with_the_whole_mini_batch(tmp_path):
    entropies = torch.special.entr(predictions(build(Terms()), minibatch(samples=7))[0]).sum(-1)
    margin = float(entropies.sort().values[6:8].mean()) / math.log(CLASSES)
    sure = (entropies <= margin * math.log(CLASSES)).view(2, 7).sum(0)
    assert sure[:3].sum() / 3 != sure[3:].sum() / 4, "the ranks' shares of sure predictions must differ"
    cases = [replace(Terms(), margin=margin), replace(Terms(), dino=0)]
    mp.spawn(_on_rank, (str(tmp_path / "meeting"), str(tmp_path), cases), nprocs=2)
    for number, terms in enumerate(cases):
        objective = build(terms)
        wanted = gradients_of(objective, objective.network, 0, 7, 7)
        for rank in range(2):
            found = torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True)
            for name, value in wanted.items():
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=f"case {number}: {name}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 5e-2)])
def test_a_step_on_cuda_is_close_to_one_on_the_cpu(precision, tolerance):
    prior = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1])
    here, there = (build(Terms(), prior) for _ in range(2))
    there.to(torch.device("cuda"))
    _, expected = here.loss(here.network, minibatch(), 0)
    with choose_precision(torch.device("cuda"), precision).autocast():
        loss, metrics = there.loss(there.network, minibatch(), 0)
    loss.backward()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name].cpu(), value, rtol=tolerance, atol=tolerance, msg=name)
