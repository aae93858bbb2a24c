"""Comparisons of layers: the stage against forward passes by hand."""

import numpy as np
import pytest
import torch

from coda_ray.analysis.cka import MinibatchCka
from coda_ray.learn.views import evaluation_view
from coda_ray.learn.vit import build_vit
from coda_ray.pipeline import data, layers, networks
from coda_ray.pipeline.layers import compare_layers, layers_of
from coda_ray.pipeline.methods.continued import adapt
from coda_ray.pipeline.train_stages import extractor_of, pretrain
from coda_ray.storage import open_place
from coda_ray.tiles.store import read_tiles
from synthetic import model_on, small_config, write_tiles


@pytest.fixture(scope="module")
def trained(ray_cluster, tmp_path_factory):
    """A pre-training on a, and its adaptation to b."""
    config = small_config(tmp_path_factory.mktemp("layers"), report={"layer_tiles": 20})
    for source in ("a", "b"):
        write_tiles(config, source, plates_per_batch=2)
    before = pretrain(config, "a", objective="dino-cb", seed=0)
    after = adapt(config, model_on(before), "b", granularity="source", unit="b", seed=0)
    for stage in (before, after):
        stage.run(config, None)
    return config, before, after


def by_hand(config, stage, views):
    """Tokens after each block, by walking through the blocks."""
    vit = build_vit(networks.vit_spec(config, 2), drop_path=0.0).eval()
    vit.load_state_dict(extractor_of(config, stage))
    with torch.no_grad():
        x, found = vit._pos_embed(vit.patch_embed(views)), []
        for block in vit.blocks:
            x = block(x)
            found.append(x.numpy())
    return found


def test_cka_is_that_of_the_tokens_of_each_block(trained, monkeypatch):
    config, before, after = trained
    monkeypatch.setattr(layers, "MINIBATCH", 8)
    index = data.load_tiles(config, "b")
    stage = compare_layers(config, index, before, after)
    assert stage.run(config, None)["tiles"] == 20
    drawn = data.drawn(index, 20)
    views = evaluation_view(torch.from_numpy(np.stack(read_tiles(drawn, np.arange(20), 32))), 24)
    found = layers_of(config, stage)
    for name, reading in {"all tokens": lambda t: t.reshape(len(t), -1), "CLS": lambda t: t[:, 0]}.items():
        cka = MinibatchCka()
        for part in (slice(0, 8), slice(8, 16)):  # the last four are no whole mini-batch
            cka.update(*[[reading(block[part]) for block in by_hand(config, one, views)] for one in (before, after)])
        np.testing.assert_allclose(found[name], cka.matrix(), atol=1e-4)
        assert found[name].shape == (2, 2)
    assert not np.allclose(found["CLS"], found["all tokens"])


def test_the_comparison_is_named_by_its_inputs_and_run_once(trained):
    config, before, after = trained
    index = data.load_tiles(config, "b")
    stage = compare_layers(config, index, before, after)
    assert stage.key != compare_layers(config, index, after, before).key
    more = config.model_copy(update={"report": config.report.model_copy(update={"layer_tiles": 21})})
    assert stage.key != compare_layers(more, index, before, after).key
    assert stage.key == compare_layers(config, index.without_labels(), before, after).key
    facts = stage.run(config, None)
    results = open_place(config.results)
    results.write(f"{stage.path}/cka.parquet", b"touched")
    assert stage.run(config, None) == facts
    assert results.read(f"{stage.path}/cka.parquet") == b"touched"
