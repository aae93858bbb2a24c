"""Export of finished stages: what they say and what the folder says is the same, to the bit; and how a model is found."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from coda_ray.config import ConfigError, Place
from coda_ray.jump.prepare import preparation_of
from coda_ray.learn.exported import ADAPTATION, DESCRIPTION, WEIGHTS, ModelError, read_model
from coda_ray.learn.views import evaluation_view
from coda_ray.pipeline.models import choose, export_of, find_model, stored_models
from coda_ray.pipeline.request import Request
from coda_ray.pipeline.train_stages import load_model
from coda_ray.pipeline.transfer import plan, stages_of
from coda_ray.storage import open_place
from coda_ray.tracking.card import CARD
from coda_ray.tracking.records import FEATURE_SCORES
from coda_ray.training.checkpoints import DamagedFileError
from synthetic import finish, place, small_config, write_tiles

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("supervised", "coda", "oda", "oda-mae", "coda-shot", "tent")


def write_records(results, config, requests, transfers, stages):
    """Leave the records of the job that ran some transfers."""
    job = {"key": "job", "kind": "matrix", "name": "test", "command": "test", "config": config.model_dump(mode="json")}
    job |= {"transfers": [t.key for t in transfers], "stages": [s.path for s in stages], "requests": len(requests)}
    results.write("jobs/job.json", json.dumps(job).encode())
    for transfer in transfers:
        accuracy = 0.4 + transfer.identity["seed"] / 10
        scores = dict.fromkeys(
            ("accuracy", "macro_f1", "well_accuracy", "well_macro_f1", "accuracy_low", "accuracy_high"), accuracy
        )
        record = {**transfer.identity, **scores, **dict.fromkeys(FEATURE_SCORES), "n_wells": 14, "key": transfer.key}
        record["history"] = transfer.trained.path if transfer.trained else None
        results.write(f"transfers/{transfer.key}.json", json.dumps(record).encode())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A results folder as a finished matrix leaves it, with random weights."""
    config = small_config(tmp_path_factory.mktemp("models"))
    for source in ("a", "b"):
        write_tiles(config, source, batches=2, plates_per_batch=2)
    requests = [Request("a", "b", method, "source", 0) for method in METHODS]
    requests += [
        Request("a", "b", "coda", "source", 1),
        Request("a", "b", "coda", "batch", 0),
        Request("a", "a", "dual-cb", "plate", 0),
    ]
    transfers = list({t.key: t for request in requests for t in plan(config, request)}.values())
    stages = stages_of(transfers)
    finish(config, stages)
    write_records(open_place(config.results), config, requests, transfers, stages)
    return config


@pytest.fixture(scope="module")
def models(config):
    return stored_models(open_place(config.results))


@pytest.fixture(scope="module")
def exported(config, models, tmp_path_factory):
    """The folder of CODA from a to all of b."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    stored = choose(models, open_place(config.results), method="coda", granularity="source", seed=0)
    export = export_of(config, stored)
    assert export.write(open_place(place(folder)))
    return folder, export, stored


def tiles(side=32, channels=2):
    return torch.randint(0, 255, (5, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", [*METHODS, "dual-cb", "dual-dino", "dual-mae"])
def test_an_export_answers_as_the_stages_do(config, models, tmp_path, method):
    results = open_place(config.results)
    stored = choose(models, results, method=method, granularity="source", seed=0)
    assert export_of(config, stored).write(open_place(place(tmp_path)))
    views = evaluation_view(tiles(), config.views.size_global)
    before, after = load_model(config, stored.classifier, stored.adapted, 2).eval(), read_model(tmp_path)
    with torch.no_grad():
        (logits, cls), (ours, embedding) = before(views), after.network(views)
    assert torch.equal(logits, ours)
    assert torch.equal(cls, embedding)
    assert torch.equal(after.predict(tiles()).probabilities, logits.softmax(1))


def test_the_description_says_what_decides_the_input_and_what_it_was_trained_on(config, exported):
    folder, _, stored = exported
    told = json.loads((folder / DESCRIPTION).read_text())
    assert told["channels"] == ["DNA", "ER"]
    assert told["classes"] == ["moa 0", "moa 1", "moa 2"]
    assert told["preparation"] == json.loads(json.dumps(preparation_of(config)))
    assert told["view"] | {"normalisation": ""} == {"tile_crop": 32, "size": 24, "normalisation": ""}
    expected = {"method": "coda", "source": "a", "target": "b", "granularity": "source", "unit": "b", "seed": 0}
    assert told["origin"] == expected
    assert [stage["stage"].split("/")[0] for stage in told["trained_on"]] == ["pretrain", "classify", "adapt"]
    assert [stage["tiles"] for stage in told["trained_on"]] == [stage.inputs["tiles"] for stage in stored.stages]
    assert str(folder.parent.parent) not in (folder / DESCRIPTION).read_text() + (folder / CARD).read_text()


def test_the_card_shows_the_scores_over_seeds(exported):
    card = (exported[0] / CARD).read_text()
    row = "| b | whole | plate | 14 | 40.0 (40.0 to 40.0); 45.0 ± 7.1" + " | 40.0; 45.0 ± 7.1" * 3 + " | 2 |"
    assert row in card.splitlines()
    assert all(f"## {part}" in card for part in ("Input", "Training", "Scores", "Limits", "Licences"))
    assert "/ 255" in card


def test_scores_of_an_unadapted_model_and_of_one_unit(config, models):
    results = open_place(config.results)
    card = export_of(config, choose(models, results, method="dual-cb", seed=0)).files[CARD].decode()
    assert "| a | adapted | plate |" in card
    assert "| b | whole | plate |" in card
    assert "b | adapted" not in card
    card = export_of(config, choose(models, results, granularity="batch", unit="b1")).files[CARD].decode()
    assert "| b | adapted | plate |" in card
    assert "(batch b1)" in card


def test_an_export_is_written_once_and_never_over_another(config, models, exported):
    folder, export, _ = exported
    (folder / CARD).write_text("old")
    assert not export.write(open_place(place(folder)))
    assert (folder / CARD).read_bytes() == export.files[CARD]
    other = export_of(config, choose(models, open_place(config.results), method="tent"))
    with pytest.raises(ConfigError, match="another model is there; give another folder"):
        other.write(open_place(place(folder)))
    assert (folder / WEIGHTS).read_bytes() == export.files[WEIGHTS]


def test_a_write_that_is_broken_off_leaves_no_model(config, exported, tmp_path):
    out = open_place(place(tmp_path))
    out.write(WEIGHTS, exported[1].files[WEIGHTS])
    with pytest.raises(ConfigError, match="there is no model; give an exported folder"):
        find_model(config, str(tmp_path))


def test_the_lines_of_the_docs_load_it(exported, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "predict.md").read_text(), re.DOTALL)
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) == 10
    monkeypatch.chdir(exported[0].parent)
    names = {"tiles": tiles(side=37)}
    exec(code, names)  # noqa: S102
    expected = read_model(exported[0]).predict(tiles(side=37)).probabilities
    torch.testing.assert_close(names["logits"].softmax(1), expected, rtol=1e-6, atol=1e-7)


def test_a_model_is_found_by_each_address(config, exported):
    folder, export, stored = exported
    results = Path(config.results.address)
    for address in (folder, results / stored.last.path):
        assert find_model(config, str(address)).key == export.model.key
    elsewhere = config.model_copy(update={"results": Place(address="/nowhere")})
    assert find_model(elsewhere, str(results / stored.last.path)).key == export.model.key
    unadapted = find_model(config, str(results / stored.classifier.path))
    assert unadapted.description["origin"]["method"] == "dual-cb"
    for address in (results, results / "evaluate" / "x", results / stored.classifier.needs[0].path):
        with pytest.raises(ConfigError, match="there is no model; give an exported folder"):
            find_model(config, str(address))


def test_a_choice_that_is_open_or_wrong_lists_what_is_there(config, models):
    results = open_place(config.results)
    with pytest.raises(ConfigError, match=r"method = 'coda': 4 models are such; .*\n.*adapt/.*coda a to b batch b0, seed 0"):
        choose(models, results, method="coda")
    with pytest.raises(ConfigError, match=r"(?s)seed = 7: no finished model in .* is such; there are\n.*supervised a, seed 0"):
        choose(models, results, seed=7)
    with pytest.raises(ConfigError, match=r"there is none yet: run jobs/adapt.py"):
        choose([], results)


def test_a_model_is_exported_where_the_tiles_are_now(config, models, tmp_path):
    shutil.copytree(config.results.address, tmp_path / "results")
    here = config.model_copy(update={"results": Place(address=str(tmp_path / "results"))})
    results = open_place(here.results)
    job = results.read_json("jobs/job.json")
    # As after `make demo`, which reaches its tiles through servers that are gone then.
    job["config"]["tiles"]["address"] = str(tmp_path / "gone")
    results.write("jobs/job.json", json.dumps(job).encode())
    chosen = {"method": "dual-cb", "granularity": "source", "seed": 0}
    files, expected = (
        export_of(one, choose(found, open_place(one.results), **chosen)).files
        for one, found in ((here, stored_models(results)), (config, models))
    )
    assert ADAPTATION in expected
    assert files == expected


def test_a_stage_that_was_changed_or_is_unfinished_is_no_model(config, exported, tmp_path):
    stored, results = exported[2], open_place(config.results)
    copied = open_place(place(tmp_path))
    for stage in stored.stages:
        for name in ("stage.json", "done.json", "model.safetensors"):
            copied.write(f"{stage.path}/{name}", results.read(f"{stage.path}/{name}"))
    adapted, address = stored.last.path, str(tmp_path / stored.last.path)
    with pytest.raises(ConfigError, match=r"no job of these results tells how its tiles were prepared; run jobs/adapt.py"):
        find_model(config, address)
    note = json.loads(copied.read(f"{adapted}/stage.json"))
    copied.write(f"{adapted}/stage.json", json.dumps(note | {"inputs": note["inputs"] | {"seed": 5}}).encode())
    with pytest.raises(ConfigError, match=r"stage.json: its content has the key .*; it was changed"):
        find_model(config, address)
    assert stored_models(copied) == []
    copied.write("jobs/job.json", results.read("jobs/job.json"))
    assert [m.last.path for m in stored_models(copied)] == [stored.classifier.path]
    copied.delete(f"{stored.classifier.path}/done.json")
    assert stored_models(copied) == []


def test_weights_that_are_missing_are_named(config, exported, tmp_path):
    (tmp_path / DESCRIPTION).write_bytes((exported[0] / DESCRIPTION).read_bytes())
    with pytest.raises(ModelError, match=r"model.safetensors: the file is not there; export or copy the whole folder again"):
        find_model(config, str(tmp_path))


def test_a_model_whose_parts_are_of_two_trainings_is_not_exported(config, exported, tmp_path):
    copied = config.model_copy(update={"results": place(tmp_path / "results")})
    shutil.copytree(config.results.address, copied.results.address)
    folder = open_place(copied.results).child(exported[2].classifier.needs[0].path)
    folder.write("done.json", json.dumps({**folder.read_json("done.json"), "sha256": "b" * 64}).encode())
    with pytest.raises(DamagedFileError, match="classify dual-cb on a, seed 0 was made of the pretrain dino-cb on a"):
        export_of(copied, exported[2])


def test_the_job_exports_or_tells_why_not(config, exported, monkeypatch, capsys, tmp_path):
    def job(*arguments):
        monkeypatch.setattr(sys, "argv", ["jobs/export.py", "--results.address", config.results.address, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "jobs" / "export.py"), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    chosen = ["--method", "coda", "--granularity", "source", "--seed", "0"]
    code, said, _ = job(*chosen, "--out", tmp_path / "model")
    assert code == 0
    assert said == f"coda a to b source b, seed 0: key {exported[1].model.key}\nexported: {tmp_path / 'model'}\n"
    assert (tmp_path / "model" / DESCRIPTION).read_bytes() == (exported[0] / DESCRIPTION).read_bytes()
    assert "there already" in job(*chosen, "--out", tmp_path / "model")[1]
    assert job(*chosen)[::2] == (2, "jobs/export.py: out and register are unset; give --out FOLDER, --register NAME, or both\n")
    code, _, told = job("--method", "coda", "--out", tmp_path / "other")
    assert code == 2
    assert "4 models are such" in told
    assert not (tmp_path / "other").exists()
