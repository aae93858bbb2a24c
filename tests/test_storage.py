import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError

from coda_ray import storage
from coda_ray.config import Place
from coda_ray.jump.simulate.serve import serve_folder
from coda_ray.storage import open_place, retrying
from simulated import KEY

BROKEN = [
    EndpointConnectionError(endpoint_url="http://nowhere"),
    ConnectionClosedError(endpoint_url="http://nowhere"),
    ClientPayloadError("cut short"),
]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    import s3fs

    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One folder behind an open server and behind one that wants signed requests."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "bucket").mkdir()
    with serve_folder(folder) as open_url, serve_folder(folder, key=KEY) as keyed_url:
        yield folder, open_url, keyed_url


@pytest.fixture(params=["folder", "anonymous", "keys"])
def place(request, served, tmp_path):
    """An empty place of each kind."""
    _folder, open_url, keyed_url = served
    if request.param == "folder":
        return Place(address=str(tmp_path / "deep" / "er"))
    url = open_url if request.param == "anonymous" else keyed_url
    return Place(
        address=f"s3://bucket/{tmp_path.name}", endpoint_url=url, anonymous=request.param == "anonymous", region="us-east-1"
    )


def test_what_is_written_is_read(place):
    here = open_place(place)
    data = bytes(range(256)) * 500
    assert not here.exists("a b/x.bin")
    here.write("a b/x.bin", data)
    here.write("a b/x.bin", data[::-1])
    assert here.exists("a b/x.bin")
    assert here.read("a b/x.bin") == data[::-1]
    assert here.read_address(here.address("a b/x.bin")) == data[::-1]
    assert here.child("a b").read("x.bin") == data[::-1]
    assert pickle.loads(pickle.dumps(here)).read("a b/x.bin") == data[::-1]  # noqa: S301 (our own)


def test_names_are_sorted_and_of_one_level(place):
    here = open_place(place)
    assert here.names("p") == here.names("p/none") == []
    for name in ("p/2.txt", "p/1.txt", "p/sub/3.txt", "q/4.txt"):
        here.write(name, b"x")
    assert here.names("p") == ["1.txt", "2.txt", "sub"]
    assert here.names() == ["p", "q"]


def test_files_of_every_level(place):
    here = open_place(place)
    assert here.files() == here.files("none") == []
    for name in ("p/2.txt", "p/a b+c/1.txt", "q/4.txt", "p2/x"):
        here.write(name, name.encode())
    found = here.files("p")
    assert [(file.path, file.size) for file in found] == [("p/2.txt", 7), ("p/a b+c/1.txt", 13)]
    assert [file.path for file in here.files()] == ["p/2.txt", "p/a b+c/1.txt", "p2/x", "q/4.txt"]
    assert [file.path for file in here.child("p").files()] == ["2.txt", "a b+c/1.txt"]
    assert here.files("p/2.txt") == []
    here.write("p/2.txt", b"longer than before")
    again = here.files("p")
    assert again[0].size == 18
    assert again[0].tag != found[0].tag
    assert again[0].modified >= found[0].modified
    assert again[1] == found[1]


def test_files_that_are_being_written_are_not_listed(tmp_path, monkeypatch):
    here = open_place(Place(address=str(tmp_path)))
    here.write("x", b"old")
    seen, real = [], storage.os.replace

    def replace(part, path):
        assert Path(part).exists()
        seen.append([file.path for file in here.files()])
        real(part, path)

    monkeypatch.setattr(storage.os, "replace", replace)
    here.write("y", b"new")
    assert seen == [["x"]]
    assert [file.path for file in here.files()] == ["x", "y"]


def test_files_tell_the_time_of_their_last_change(tmp_path):
    here = open_place(Place(address=str(tmp_path)))
    here.write("x", b"x")
    os.utime(tmp_path / "x", (1000.5, 2000.5))
    assert [file.modified for file in here.files()] == [2000.5]


def test_a_file_is_created_once(exclusive):
    assert exclusive.create("a b/x", b"first")
    assert not exclusive.create("a b/x", b"second")
    assert exclusive.read("a b/x") == b"first"
    assert exclusive.names("a b") == ["x"]
    exclusive.refuses_overwrites("a b/probe")
    assert exclusive.names("a b") == ["x"]


def test_of_many_who_create_one_file_one_succeeds(tmp_path):
    here, people = open_place(Place(address=str(tmp_path))), 8
    start = Barrier(people, timeout=60)

    def create(round_, who):
        start.wait()
        return here.create(f"{round_}", f"{who}".encode())

    with ThreadPoolExecutor(people) as pool:
        for round_ in range(20):
            won = list(pool.map(create, [round_] * people, range(people)))
            assert [str(who) for who in range(people) if won[who]] == [here.read(f"{round_}").decode()]
    assert len(here.names()) == 20


def answers_late(monkeypatch, here, error, written):
    """Let the first exclusive write fail after, or before, it was done."""
    owner, name = (storage.os, "link") if here.is_local else (here.fs, "pipe_file")
    real, calls = getattr(owner, name), []

    def late(*arguments, **options):
        calls.append(arguments)
        if len(calls) > 1 or written:
            real(*arguments, **options)
        if len(calls) == 1:
            raise error

    monkeypatch.setattr(owner, name, late)
    return calls


def refusal(code):
    """What s3fs raises where the server gives this code and names no condition."""
    from s3fs.errors import translate_boto_error

    return translate_boto_error(ClientError({"Error": {"Code": code}}, "PutObject"))


@pytest.mark.parametrize("written", [True, False])
def test_after_a_lost_answer_the_file_is_known_as_ones_own(exclusive, monkeypatch, written):
    calls = answers_late(monkeypatch, exclusive, BROKEN[1], written)
    assert exclusive.create("x", b"mine")
    assert len(calls) == 2
    assert exclusive.read("x") == b"mine"


def test_after_a_lost_answer_the_file_of_another_is_told(exclusive, monkeypatch):
    exclusive.write("x", b"theirs")
    answers_late(monkeypatch, exclusive, BROKEN[1], written=False)
    assert not exclusive.create("x", b"mine")
    assert exclusive.read("x") == b"theirs"


@pytest.mark.parametrize("code", ["PreconditionFailed", "412"])
def test_a_refusal_that_names_no_condition_is_understood(conditional, tmp_path, monkeypatch, code):
    here = open_place(Place(address=f"s3://bucket/{tmp_path.name}", endpoint_url=conditional))
    here.write("x", b"theirs")
    calls = answers_late(monkeypatch, here, refusal(code), written=False)
    assert not here.create("x", b"mine")
    assert len(calls) == 1


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "409"])
def test_a_conflict_of_two_writes_is_tried_again(conditional, tmp_path, monkeypatch, code):
    here = open_place(Place(address=f"s3://bucket/{tmp_path.name}", endpoint_url=conditional))
    calls = answers_late(monkeypatch, here, refusal(code), written=False)
    assert here.create("x", b"mine")
    assert len(calls) == 2


def test_a_server_that_ignores_conditions_is_found_out(served, tmp_path):
    _folder, _open, url = served
    here = open_place(Place(address=f"s3://bucket/{tmp_path.name}", endpoint_url=url, region="us-east-1"))
    with pytest.raises(OSError, match=r"s3://bucket/.*ledger: this S3 server ignores conditional writes .*shared folder"):
        here.refuses_overwrites("ledger")
    assert here.names() == []


def test_ranges_and_their_errors(place):
    here = open_place(place)
    here.write("x", b"0123456789")
    first, missing, second = here.read_ranges([("x", 2, 5), ("none", 0, 3), ("x", 9, 10)])
    assert (first, second) == (b"234", b"9")
    assert isinstance(missing, FileNotFoundError)
    assert here.read_ranges([]) == []
    assert here.read_ranges([("x", 8, 12), ("x", 20, 30)]) == [b"89", b""]


def test_missing_is_told_at_once(place, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: pytest.fail("retried"))
    with pytest.raises(FileNotFoundError):
        open_place(place).read("none")


def test_json_is_an_object_or_is_told(place):
    folder = open_place(place)
    folder.write("note.json", b'{"a": [1]}')
    assert folder.read_json("note.json") == {"a": [1]}
    assert folder.read_json("nothing.json") is None
    for content, told in (
        (b'{"a": ', r"note\.json: not JSON \(.*delete it"),
        (b"[1]", r"note\.json: not a JSON object; delete it"),
    ):
        folder.write("note.json", content)
        with pytest.raises(ValueError, match=told):
            folder.read_json("note.json")


def test_delete_takes_files_folders_and_nothing(place):
    here = open_place(place)
    here.write("p/1", b"x")
    here.write("p/q/2", b"x")
    here.delete("p/1")
    assert here.names("p") == ["q"]
    here.delete("p")
    here.delete("p")
    assert here.names() == []


@pytest.mark.parametrize("wrong", ["secret", "key", "anonymous"])
def test_a_refused_request_is_retried_and_then_told(served, monkeypatch, caplog, wrong):
    folder, _, url = served
    (folder / "bucket" / "x").write_bytes(b"x")
    if wrong == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret-key-0001")
    if wrong == "key":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another-access-key-0001")
    here = open_place(Place(address="s3://bucket", endpoint_url=url, anonymous=wrong == "anonymous"))
    with pytest.raises(OSError, match=r"s3://bucket/x: gave up after 5 attempts") as caught:
        here.read("x")
    assert not isinstance(caught.value, FileNotFoundError)
    assert sum("attempt" in record.message for record in caplog.records) == 4


def test_local_writes_leave_no_part_behind(tmp_path, monkeypatch):
    here = open_place(Place(address=str(tmp_path)))
    here.write("x", b"old")
    monkeypatch.setattr(storage.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        here.write("x", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert here.read("x") == b"old"


def test_retrying_gives_the_first_success():
    answers = iter([PermissionError("no"), TimeoutError("slow"), "yes"])

    def call():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retrying(call, "x") == "yes"


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: type(error).__name__)
def test_a_broken_connection_is_retried_and_then_told_with_the_address(error):
    answers = iter([error, b"yes"])

    def call():
        answer = next(answers, error)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retrying(call, "s3://b/x") == b"yes"
    with pytest.raises(OSError, match=rf"s3://b/x: gave up after 5 attempts: {type(error).__name__}"):
        retrying(call, "s3://b/x")


def test_what_is_no_error_of_storage_is_raised_as_it_is(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: pytest.fail("retried"))
    with pytest.raises(ZeroDivisionError):
        retrying(lambda: 1 // 0, "x")


@pytest.mark.parametrize("ranges", [False, True])
def test_missing_keys_are_told_at_once_with_the_remedy(monkeypatch, tmp_path, ranges):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: pytest.fail("retried"))
    here = open_place(Place(address="s3://bucket", endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(PermissionError, match=r"s3://bucket/x: .*AWS_ACCESS_KEY_ID.*bucket\.anonymous"):
        here.read_ranges([("x", 0, 2)]) if ranges else here.read("x")


def test_s3fs_leaves_the_retries_to_us_in_every_process():
    import s3fs

    pickled = pickle.dumps(open_place(Place(address="s3://bucket", anonymous=True)))
    s3fs.S3FileSystem.clear_instance_cache()
    assert pickle.loads(pickled).fs.retries == 1  # noqa: S301 (our own)


def test_ranges_that_fail_are_read_again_together(tmp_path, monkeypatch, caplog):
    here = open_place(Place(address=str(tmp_path)))
    here.write("x", b"0123")
    real, calls = here.fs.cat_ranges, []

    def flaky(paths, starts, ends, **options):
        calls.append(len(paths))
        return (
            [OSError("reset"), BROKEN[0], *real(paths[2:], starts[2:], ends[2:])]
            if len(calls) == 1
            else real(paths, starts, ends)
        )

    monkeypatch.setattr(here.fs, "cat_ranges", flaky)
    assert here.read_ranges([("x", 0, 2), ("x", 1, 3), ("x", 2, 4)]) == [b"01", b"12", b"23"]
    assert calls == [3, 2]
    assert len(caplog.records) == 1


def test_ranges_that_go_on_failing_are_raised_with_the_address(tmp_path, monkeypatch):
    here = open_place(Place(address=str(tmp_path)))
    here.write("x", b"0123")
    monkeypatch.setattr(here.fs, "cat_ranges", lambda paths, *_, **__: [b"01", BROKEN[0]][-len(paths) :])
    with pytest.raises(OSError, match=rf"{tmp_path}/y: gave up after 5 attempts: EndpointConnectionError"):
        here.read_ranges([("x", 0, 2), ("y", 2, 4)])


def test_only_s3_and_folders_are_known():
    with pytest.raises(ValueError, match=r"gs://bucket.*only s3"):
        open_place(Place.model_construct(address="gs://bucket"))


def test_home_and_file_addresses_are_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_place(Place(address="~/x")).root == open_place(Place(address=f"file://{tmp_path}/x")).root == str(tmp_path / "x")


def test_a_read_only_server_serves_and_a_missing_folder_is_told(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"x")
    with serve_folder(tmp_path, read_only=True) as url:
        assert open_place(Place(address="s3://b", endpoint_url=url, anonymous=True)).read("x") == b"x"
    with pytest.raises(FileNotFoundError, match="no such folder"), serve_folder(tmp_path / "none"):
        pass
