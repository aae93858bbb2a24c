import re
import subprocess
import sys

import pytest
import yaml

from coda_ray.config import (
    SUBMITTED,
    Config,
    ConfigError,
    Range,
    build_config,
    dump_config,
    parse_job,
    steps_of,
    told_in_one_line,
)
from jobs.adapt import AdaptJob


def test_defaults_are_the_papers():
    config = Config()
    assert config.model.arch == "deit_small_patch16_224"
    assert (config.pretrain.lr, config.pretrain.minibatch, config.pretrain.steps) == (1e-4, 128, "300 epochs")
    assert (config.dino.out_dim, config.dino.student_temperature, config.dino.ema_start) == (4096, 0.1, 0.996)


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"adapt": {"lr": 3e-4, "minibatch": 8}, "held_out": {"a": "p1"}}))
    config = build_config(Config, str(file), ["--adapt.lr", "5e-4", "--adapt.no_partner", "same-image", "--pretrain.steps=30"])
    assert (config.adapt.lr, config.adapt.minibatch, config.adapt.no_partner) == (5e-4, 8, "same-image")
    assert config.pretrain.steps == 30
    assert config.held_out == {"a": "p1"}


def test_a_dumped_config_reads_back(tmp_path):
    config = build_config(Config, None, ["--views.size-local", "64", "--matrix.seeds", "1,2"])
    file = tmp_path / "c.yaml"
    file.write_text(dump_config(config))
    assert build_config(Config, str(file)) == config


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["--adapt.lr", "-1"], r"adapt\.lr = '-1'.*greater than 0.*--adapt\.lr"),
        (["--pretrain.steps", "many"], r"pretrain\.steps = 'many'.*300 epochs"),
        (["--pretrain.steps", "inf steps"], r"pretrain\.steps = 'inf steps': give a number"),
        (["--pretrain.steps", "nan epochs"], r"pretrain\.steps = 'nan epochs': give a number"),
        (["--pretrain.steps", "400.7 steps"], r"pretrain\.steps = '400\.7 steps': give a number"),
        (
            ["--pretrain.select", "best-knn", "--train.knn-every", "0 epochs"],
            r"pretrain\.select = best-knn needs train\.knn_every",
        ),
        (["--classify.validate-every", "0"], r"classify\.validate_every = 0: give a number of steps"),
        (["--views.size-local", "500"], r"size_local <= size_global <= tile_crop"),
        (["--views.size-local", "90"], r"views\.size_local = 90 is no multiple of the model's patch of 16 px"),
        (["--train.workers", "two"], r"train\.workers = 'two'"),
        (["--train.workers", "4-2"], r"train\.workers = '4-2': give 0"),
        (["--train.workers", "0-3"], r"train\.workers = '0-3': give 0"),
        (
            ["--train.workers", "2", "--train.gpus-per-worker", "0.5"],
            r"train\.gpus_per_worker = 0\.5 with train\.workers = '2'.*or",
        ),
        (["--train.gpus-per-worker", "1.5"], r"train\.gpus_per_worker = 1\.5: .*give 1, or less"),
        (["--train.workers", "1-4", "--classify.minibatch", "3"], r"classify\.minibatch = 3: 4 worker.* need 4"),
        (["--train.workers", "2", "--adapt.minibatch-unit", "1"], r"adapt\.minibatch_unit = 1: 2 worker"),
        (
            ["--dino.koleo-weight", "0.1", "--pretrain.minibatch", "1"],
            r"pretrain\.minibatch = 1: .*by dino\.koleo_weight, need 2",
        ),
        (["--adapt.dino.koleo-weight", "0.1", "--adapt.minibatch", "1"], r"adapt\.minibatch = 1: .*by adapt\.dino\.koleo_weight"),
        (["--tiles", "s3://b/x"], r"tiles: this is a section; remedy: .*--tiles\.address VALUE"),
        (["--watch.policy", "who@where"], r"^watch\.policy: "),
        (["--model.arch", "vit", "--model.heads", "5"], r"model\.width = \d+ is no multiple of model\.heads = 5"),
        (["--matrix.seeds", "[0,"], r"matrix\.seeds = '\[0,'.*--matrix\.seeds"),
        (["--matrix.seeds", "0,-1"], r"matrix\.seeds = -1: .*greater than or equal to 0.*--matrix\.seeds "),
        (["--held-out", "a"], r"held_out = 'a'.*--held-out.*name=value"),
        (["--tiles.address", "gs://b/x"], r"tiles\.address = 'gs://b/x': only s3://.*--tiles\.address"),
        (["--stream.cache", "s3://b/x"], r"stream\.cache = 's3://b/x'"),
        (["--adapt.minibach", "3", "--adapt.lrr=4"], r"--adapt\.minibach: .*did you mean --adapt\.minibatch\?\n--adapt\.lrr: "),
        (["--watch.source", "a", "--watch.targets", "a,b"], r"watch\.targets = \['a', 'b'\]: 'a' is watch\.source.*leave it out"),
        (["--watch.source", "b+a", "--watch.targets", "a"], r"watch\.targets = \['a'\]: 'a' is watch\.source, or a lab of it"),
        (["--matrix.sources", "a+b,a+a"], r"matrix\.sources = 'a\+a': a is in the pool twice; name each lab once"),
        (["--matrix.sources", "a+"], r"matrix\.sources = 'a\+': a lab of the pool has no name; .*such as sim_a\+sim_b"),
        (["--matrix.sources", "[[]]"], r"matrix\.sources = \[\]: a lab of the pool has no name"),
        (["--matrix.targets", "a+b"], r"matrix\.targets = 'a\+b': a pool of labs can be a source alone; .*each by itself: a, b"),
        (["--online.target", "a+b"], r"online\.target = 'a\+b': a pool of labs can be a source alone"),
        (["--tune.pairs", '[["a+b", "a"]]'], r"tune\.pairs = .*'a' is adapted to itself: it is the source, or a lab of it"),
        (["--baselines.sphering_epsilon", "0"], r"^baselines\.sphering_epsilon = '0': .* be 'auto'.*\n.*greater than 0"),
        (["stray"], r"'stray' belongs to no option"),
    ],
)
def test_a_wrong_value_is_told_with_field_value_and_remedy(overrides, told):
    with pytest.raises(ConfigError, match=told):
        build_config(Config, None, overrides)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ([], ("coda", "source")),
        (["--tune.method", "oda", "--tune.granularity", "batch"], ("oda", "batch")),
        (["--tune.method", "oda", "--method", "tent", "--granularity", "plate"], ("tent", "plate")),
    ],
)
def test_what_a_sweep_chose_is_adapted_with_where_nothing_else_is_told(options, chosen):
    job = build_config(AdaptJob, None, ["--source", "a", "--target", "b", *options])
    assert (job.method, job.granularity) == chosen


def test_a_pool_has_one_spelling(tmp_path):
    file = tmp_path / "c.yaml"
    values = {"matrix": {"sources": ["c", ["b", "a"], "d+ c"]}, "tune": {"pairs": [["b+a", "c"], [["d", "a", "b"], "c"]]}}
    file.write_text(yaml.safe_dump(values))
    config = build_config(Config, str(file), ["--watch.source", "b+a", "--online.source", "b + a"])
    assert config.matrix.sources == ["c", "a+b", "c+d"]
    assert config.tune.pairs == [("a+b", "c"), ("a+b+d", "c")]
    assert (config.watch.source, config.online.source) == ("a+b", "a+b")
    assert build_config(Config, None, ["--matrix.sources", '["c", ["b", "a"]]']).matrix.sources == ["c", "a+b"]
    file.write_text(dump_config(config))
    assert build_config(Config, str(file)) == config
    assert build_config(AdaptJob, None, ["--source", "b+a", "--target", "a+b"]).target == "a+b"


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        ("a+b", "a", r"target a: source a\+b was trained on it"),
        ("c", "a+b", r"target a\+b: a pool of labs can be a source alone"),
    ],
)
def test_what_cannot_be_adapted_to_is_told_before_the_start(source, target, told):
    with pytest.raises(ConfigError, match=told):
        build_config(AdaptJob, None, ["--source", source, "--target", target])


def test_of_a_wrong_field_those_that_follow_it_are_not_told():
    with pytest.raises(ConfigError, match=r"^tune\.method = 'codaa': [^\n]*$"):
        build_config(AdaptJob, None, ["--source", "a", "--target", "b", "--tune.method", "codaa"])


def test_an_unknown_field_gets_its_nearest_name(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("adapt: {lrate: 1.0, minibach: 3}")
    with pytest.raises(ConfigError, match=r"adapt\.minibach.*did you mean 'minibatch'"):
        build_config(Config, str(file))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tiles.endpoint-url", "http://user:pass@host:9000"),
        ("tiles.endpoint-url", "http://user:pa/ss@host"),
        ("tiles.address", "s3://user:pass@bucket/x"),
        ("tiles.address", "s3://user:pa/ss@bucket/x"),
        ("tiles.address", "https://user:pass@host/x"),
        ("tiles.address", "S3://user:pass@bucket/x"),
        ("ingest.image-list", "s3://user:pass@bucket/list.csv"),
        ("ingest.listed-as", "s3://user:pa/ss@bucket"),
    ],
)
def test_keys_in_an_address_are_refused_and_not_repeated(name, value):
    with pytest.raises(ConfigError, match=rf"{re.escape(name.replace('-', '_'))}: .*keys come from the environment") as refusal:
        build_config(Config, None, [f"--{name}", value])
    assert "user:" not in str(refusal.value)
    assert "ss@" not in str(refusal.value)


def test_a_mapping_given_as_an_option_stands_in_place_of_the_files(tmp_path):
    file, space = tmp_path / "c.yaml", {"granularity": ["source"], "adapt.lr": {"low": 1e-5, "high": 1e-3, "log": True}}
    file.write_text(yaml.safe_dump({"tune": {"space": space, "samples": 3}, "held_out": {"a": "p1", "b": "p2"}}))
    options = ["--tune.space", '{"adapt.lr": {"low": 1, "high": 2}}', "--held-out", "c=p3", "--held-out", "d=p4"]
    config = build_config(Config, str(file), options)
    assert config.tune.space == {"adapt.lr": Range(low=1, high=2)}
    assert config.held_out == {"c": "p3", "d": "p4"}
    assert config.tune.samples == 3
    assert build_config(Config, str(file)).held_out == {"a": "p1", "b": "p2"}


@pytest.mark.parametrize(
    "given", ["s3://user:pass@bucket/x", "{address: s3://user:pass@bucket", '{"address": "s3://user:pass@b"}']
)
def test_keys_given_to_a_section_are_not_repeated(tmp_path, given):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"results": given, "metadata": [given]}))
    for source in ((str(file), []), (None, ["--results", given]), (None, [f"--metadata={given}"])):
        with pytest.raises(ConfigError, match=r"results|metadata") as refusal:
            build_config(Config, *source)
        assert "pass@" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--model.init", "imagnet"],
            r"model\.init = 'imagnet': give imagenet, simulated, random, fan-in or a local \.safetensors file",
        ),
        (["--model.arch", "vit"], r"model\.arch = vit has no imagenet weights.*give model\.init fan-in"),
        (["--adapt.betas", "[0.9, 1.0]"], r"adapt\.betas.* = 1\.0: .*less than 1"),
        (["--views.size-global", "600"], r"size_local <= size_global <= tile_crop is wanted, and they are 96, 600, 448"),
    ],
)
def test_what_a_worker_would_refuse_is_told_before(options, told):
    with pytest.raises(ConfigError, match=told):
        build_config(Config, None, options)


def test_relative_folders_become_absolute_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    overrides = ["--tiles.address", "~/tiles", "--bucket.address", "s3://b/x@y", "--stream.cache", "cache"]
    config = build_config(Config, None, overrides)
    assert (config.results.address, config.metadata.address) == (str(tmp_path / "results"), str(tmp_path / "metadata"))
    assert (config.tiles.address, config.bucket.address) == ("/home/someone/tiles", "s3://b/x@y")
    assert config.stream.cache == str(tmp_path / "cache")
    assert build_config(Config, None, ["--tiles.address", "file:///t"]).tiles.address == "/t"
    assert Config(results={"address": "r"}).results.address == "r"


def test_a_submitted_job_refuses_relative_folders(monkeypatch):
    monkeypatch.setenv(SUBMITTED, "{}")
    shared = ["--metadata.address", "/m", "--tiles.address", "s3://b/tiles"]
    with pytest.raises(ConfigError, match=r"^results\.address = 'results': .*absolute.*--results\.address[^\n]*$"):
        build_config(Config, None, shared)
    assert build_config(Config, None, [*shared, "--results.address", "/r"]).results.address == "/r"


def test_the_variable_of_submitted_jobs_is_rays():
    constants = pytest.importorskip("ray._private.runtime_env.constants")
    assert constants.RAY_JOB_CONFIG_JSON_ENV_VAR == SUBMITTED


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("wrong"), 2), (FileNotFoundError("wrong"), 1), (ValueError("wrong"), 1), (KeyError("wrong"), 1)],
)
def test_expected_errors_end_in_one_line(error, code, capsys):
    with pytest.raises(SystemExit) as end, told_in_one_line("jobs/x.py", KeyError):
        raise error
    assert end.value.code == code
    assert capsys.readouterr().err == f"jobs/x.py: {error}\n"


def test_ctrl_c_is_told_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as end, told_in_one_line("jobs/x.py"):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == "jobs/x.py: interrupted\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), told_in_one_line("jobs/x.py"):
        _ = 1 / 0


@pytest.mark.parametrize("text", ["- a\n", "a: [", None])
def test_a_bad_file_is_named(tmp_path, text):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"--config .*c\.yaml"):
        build_config(Config, str(file))


def test_exit_code_2_and_one_message_before_ray_is_imported(tmp_path):
    code = (
        "import sys; from coda_ray.config import Config, parse_job\n"
        "try: parse_job(Config, ['--adapt.lr', '0'], prog='x', description='d')\n"
        "except SystemExit as e: assert e.code == 2, e.code\n"
        "assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "adapt.lr" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_field_with_unit_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse_job(Config, ["--help"], prog="x", description="d")
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--adapt.no-partner {error,same-image}" in shown
    assert "(default: 0.0001)" in shown
    assert "(px)" in shown
    for name, section in Config.model_fields.items():
        for field, info in getattr(section.annotation, "model_fields", {}).items():
            assert f"--{name.replace('_', '-')}.{field.replace('_', '-')}" in shown
            assert info.description, f"{name}.{field} has no description"


def test_print_config_prints_what_will_run(capsys):
    with pytest.raises(SystemExit) as end:
        parse_job(Config, ["--print-config", "--adapt.lr", "0.5"], prog="x", description="d")
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["adapt"]["lr"] == 0.5


def test_durations():
    assert steps_of(7, 100) == 7
    assert steps_of("2.5 epochs", 100) == 250
