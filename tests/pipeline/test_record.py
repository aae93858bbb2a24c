import subprocess

import pytest

from coda_ray.pipeline.data import load_tiles
from coda_ray.pipeline.record import code_state, data_used, job_record
from synthetic import small_config, write_tiles


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "a.py").write_text("1\n")
    for words in (
        ["init", "--quiet"],
        ["add", "a.py"],
        ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false", "commit", "--quiet", "-m", "one"],
    ):
        subprocess.run(["git", "-C", folder, *words], check=True)
    return folder


def test_the_commit_and_whether_files_differ_from_it(checkout):
    clean = code_state(checkout)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (checkout / "new.py").write_text("not tracked\n")
    assert code_state(checkout) == clean
    (checkout / "a.py").write_text("2\n")
    assert code_state(checkout) == clean | {"dirty": True}


def test_a_folder_inside_anothers_checkout_has_no_commit(checkout):
    library = checkout / "site-packages"
    library.mkdir()
    assert code_state(library) == {}


def test_a_checkout_that_git_cannot_read_has_no_commit(tmp_path):
    (tmp_path / ".git").write_text("gitdir: nowhere\n")
    assert code_state(tmp_path) == {}


def test_tiles_are_named_by_address_and_fingerprint(tmp_path):
    config = small_config(tmp_path)
    for source in "AB":
        write_tiles(config, source)
    used = data_used(config, [("A", "B"), ("A", "A")])
    assert [(one["name"], one["context"]) for one in used] == [("A", "source, target"), ("B", "target")]
    for one in used:
        index = load_tiles(config, one["name"])
        assert one["address"].startswith(config.tiles.address)
        assert one["address"].endswith(f"/{one['name']}")
        assert (one["fingerprint"], one["tiles"]) == (index.fingerprint, len(index))
    record = job_record(
        config, key="k", kind="adapt", name="n", command="c", pairs=[("A", "B")], transfers=["t"], stages=[]
    )  # fmt: skip
    assert record["data"] == [used[0] | {"context": "source"}, used[1]]
    assert record["config"] == config.model_dump(mode="json")
