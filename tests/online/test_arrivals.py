import gzip
import json
import shutil
import time
from collections import Counter
from urllib.parse import quote_plus

import pandas as pd
import pytest

from coda_ray import storage
from coda_ray.config import Config, Place
from coda_ray.jump.layout import PlateName
from coda_ray.jump.simulate.bucket import _write_plate
from coda_ray.jump.simulate.layout import draw_plates, draw_wells
from coda_ray.jump.simulate.serve import serve_folder
from coda_ray.jump.simulate.settings import PRESETS
from coda_ray.jump.tables import read_tables
from coda_ray.online.arrivals import Arrivals, Waiting, _Events, _key_in, _new_objects, complete_batch
from coda_ray.storage import open_place

TINY = PRESETS["tiny"]
PLATES = {PlateName(plate.source, plate.batch, plate.name): plate for plate in draw_plates(TINY)}
A = [name for name in PLATES if name.source == "sim_a"]
B = [name for name in PLATES if name.source == "sim_b"]
C = [name for name in PLATES if name.source == "sim_c"]
WELLS = draw_wells(TINY)
CHANNELS = ("DNA", "ER", "RNA", "AGP", "Mito")
WANTED = 3 * len(WELLS)


def spoiled():
    """A compressed list whose blocks are no blocks."""
    whole = gzip.compress(b"Metadata_Well,Metadata_Site\nA01,1\n" * 50)
    return whole[:10] + bytes(byte ^ 255 for byte in whole[10:-8]) + whole[-8:]


class Bucket:
    """A bucket in a folder, to which plates come piece by piece; its images hold one letter."""

    def __init__(self, folder):
        self.folder = folder
        self.files = open_place(Place(address=str(folder)))
        self.know(PLATES)

    def know(self, plates, kind="TARGET2"):
        rows = [(*plate, kind) for plate in plates]
        table = pd.DataFrame(rows, columns=["Metadata_Source", "Metadata_Batch", "Metadata_Plate", "Metadata_PlateType"])
        self.files.write("metadata/plate.csv", table.to_csv(index=False).encode())

    def image(self, plate, channel="DNA", well=None):
        one = PLATES[plate]
        return f"{one.images}/{one.image_name(well or next(iter(WELLS)), 0, CHANNELS.index(channel))}"

    def send_list(self, plate):
        _write_plate(TINY, PLATES[plate], WELLS, [], self.files)

    def send_images(self, plate, but=()):
        for well in WELLS:
            for channel in CHANNELS:
                if (path := self.image(plate, channel, well)) not in but:
                    self.files.write(path, b"x")

    def send(self, plate):
        self.send_images(plate)
        self.send_list(plate)


class Clock:
    """The time, which stands still, after every file of a test."""

    def __init__(self):
        self.now = time.time() + 1000

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def bucket(tmp_path):
    return Bucket(tmp_path / "served" / "bucket")


@pytest.fixture(params=["folder", "s3"])
def place(request, bucket):
    """The bucket as a folder and as S3 serves it."""
    if request.param == "folder":
        yield Place(address=str(bucket.folder))
        return
    with serve_folder(bucket.folder.parent, read_only=True) as url:
        yield Place(address=f"s3://{bucket.folder.name}", endpoint_url=url, anonymous=True)


def arrivals_of(place, clock, ingest=None, **watch):
    watch = {"source": "sim_a", "settle_s": 300, **watch}
    place = place if isinstance(place, Place) else Place(address=str(place.folder))
    metadata = place.model_copy(update={"address": f"{place.address}/metadata"})
    return Arrivals(Config(bucket=place, metadata=metadata, watch=watch, ingest=ingest or {}), clock)


def plates_of(found):
    return [one.plate for one in found]


def test_a_bucket_without_plates(place, clock):
    assert arrivals_of(place, clock).look(set()) == ([], [])


def test_complete_plates_of_other_sources_arrive_in_the_order_of_their_change(place, bucket, clock):
    for plate in (A[0], C[0], B[1], B[0]):
        bucket.send(plate)
    arrived, waiting = arrivals_of(place, clock).look(set())
    assert waiting == []
    assert set(plates_of(arrived)) == {C[0], B[1], B[0]}
    assert arrived == sorted(arrived, key=lambda one: (one.changed, one.plate))
    assert {(one.sites, one.missing) for one in arrived} == {(len(WELLS), 0)}
    newest = max(path.stat().st_mtime for path in bucket.folder.rglob(f"*{C[0].plate}*/**/*") if path.is_file())
    (changed,) = [one.changed for one in arrived if one.plate == C[0]]
    assert changed == pytest.approx(newest, abs=1)


def test_what_is_skipped_or_no_target_is_not_looked_at(bucket, clock):
    for plate in (B[0], B[1], C[0]):
        bucket.send(plate)
    assert plates_of(arrivals_of(bucket, clock, targets=["sim_b"]).look({B[0]})[0]) == [B[1]]
    assert set(plates_of(arrivals_of(bucket, clock, targets=["sim_c"]).look(set())[0])) == {C[0]}
    assert set(plates_of(arrivals_of(bucket, clock, source="sim_a+sim_b").look(set())[0])) == {C[0]}


def test_a_plate_comes_piece_by_piece(place, bucket, clock):
    arrivals = arrivals_of(place, clock)
    late = [bucket.image(B[0], "DNA"), bucket.image(B[0], "Mito")]
    unwanted = bucket.image(B[0], "AGP")
    bucket.send_images(B[0], but=[*late, unwanted])
    assert arrivals.look(set()) == ([], [])
    bucket.send_list(B[0])
    settled(place, bucket)
    assert arrivals.look(set()) == ([], [Waiting(B[0], f"2 of {WANTED} images are not there")])
    bucket.files.write(late[0], b"")
    bucket.files.write(late[1], b"x")
    settled(place, bucket)
    assert arrivals.look(set())[1] == [Waiting(B[0], f"1 of {WANTED} images are not there")]
    bucket.files.write(late[0], b"x")
    settled(place, bucket)
    # It has changed since the look before, whatever the times of its files are.
    reason = "it is taken after 300 s without a change"
    assert arrivals.look(set()) == ([], [Waiting(B[0], reason)])
    clock.now += 300
    arrived, waiting = arrivals.look(set())
    assert (plates_of(arrived), waiting, arrived[0].missing) == ([B[0]], [], 0)


def settled(place, bucket):
    """Wait until the server that stands for S3, which keeps what it knows of a folder for a second, gives what is there."""

    def seen(folder):
        return [(file.path, file.size) for file in folder.files()]

    while seen(open_place(place)) != seen(bucket.files):
        time.sleep(0.05)


def test_a_plate_is_at_rest_after_some_time_without_change(bucket, clock):
    bucket.send(B[0])
    changed = max(path.stat().st_mtime for path in bucket.folder.rglob("*") if path.is_file())
    arrivals = arrivals_of(bucket, clock)
    clock.now = changed + 299.5
    (waiting,) = arrivals.look(set())[1]
    assert waiting.reason.endswith("it is taken after 300 s without a change")
    clock.now = changed + 301
    assert plates_of(arrivals.look(set())[0]) == [B[0]]
    bucket.files.write(bucket.image(B[0]), b"changed")
    assert arrivals.look(set())[0] == []
    clock.now += 301
    assert plates_of(arrivals.look(set())[0]) == [B[0]]
    bucket.send_list(B[0])
    assert arrivals.look(set())[0] == []


def test_times_before_and_after_ours(bucket, clock):
    bucket.send(B[0])
    clock.now = 1000.0
    (waiting,) = arrivals_of(bucket, clock).look(set())[1]
    assert waiting.reason.startswith("it is taken after")


def test_a_plate_that_stays_incomplete_is_taken_when_asked_for(bucket, clock):
    missing = [bucket.image(B[0], "ER"), bucket.image(B[0], "DNA")]
    bucket.send_images(B[0], but=missing)
    bucket.send_list(B[0])
    bucket.files.write(missing[0], b"")
    assert arrivals_of(bucket, clock).look(set())[0] == []
    (waiting,) = arrivals_of(bucket, clock, incomplete_after_s=5000).look(set())[1]
    assert waiting.reason == f"2 of {WANTED} images are not there; it is taken after 5000 s without a change"
    clock.now += 5000
    (arrival,) = arrivals_of(bucket, clock, incomplete_after_s=5000).look(set())[0]
    assert (arrival.plate, arrival.sites, arrival.missing) == (B[0], len(WELLS), 2)


def test_a_list_that_is_half_written_waits_with_the_reason(bucket, clock):
    bucket.send(C[0])
    (path,) = PLATES[C[0]].lists
    whole = bucket.files.read(path)
    arrivals = arrivals_of(bucket, clock)
    bucket.files.write(path, whole[: len(whole) // 2])
    (waiting,) = arrivals.look(set())[1]
    assert waiting.plate == C[0]
    assert f"{path}: not an image list" in waiting.reason
    bucket.files.write(path, whole)
    arrivals.look(set())
    clock.now += 300
    assert plates_of(arrivals.look(set())[0]) == [C[0]]


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "not an image list"), (b"Metadata_Well,Metadata_Site\nA01,1\n", "names no image of the wanted channels")],
    ids=["empty", "without images"],
)
def test_a_list_that_names_nothing_waits(bucket, clock, content, told):
    path = f"cpg0016-jump/sim_b/workspace/load_data_csv/{B[0].batch}/{B[0].plate}/load_data_with_illum.csv"
    bucket.files.write(path, content)
    (waiting,) = arrivals_of(bucket, clock).look(set())[1]
    assert told in waiting.reason


def test_the_plate_table_decides_which_plates_count(bucket, clock):
    for plate in B[:3]:
        bucket.send(plate)
    bucket.know([B[0]])
    arrivals = arrivals_of(bucket, clock)
    arrived, waiting = arrivals.look(set())
    assert plates_of(arrived) == [B[0]]
    assert waiting == [Waiting(plate, "the plate table does not know it") for plate in sorted(B[1:3])]
    bucket.know(B[:3], kind="COMPOUND")
    assert arrivals.look(set()) == ([], [])
    assert set(plates_of(arrivals_of(bucket, clock, {"plate_types": []}).look(set())[0])) == set(B[:3])
    bucket.know([B[0]])
    assert set(plates_of(arrivals_of(bucket, clock, {"plate_types": []}).look(set())[0])) == set(B[:3])


def test_a_metadata_folder_that_is_not_mounted_is_an_outage(bucket, clock):
    bucket.send(B[0])
    arrivals = arrivals_of(bucket, clock)
    assert plates_of(arrivals.look(set())[0]) == [B[0]]
    (bucket.folder / "metadata").rename(bucket.folder / "away")
    with pytest.raises(OSError, match=r"metadata: plate\.csv\.gz is missing or empty, and ingest\.plate_types = \['TARGET2'\]"):
        arrivals.look(set())
    assert plates_of(arrivals_of(bucket, clock, {"plate_types": []}).look(set())[0]) == [B[0]]


def test_the_current_layout_of_a_list_comes_first(bucket, clock):
    plate = A[0]
    bucket.send(plate)
    current, old = PLATES[plate].lists
    assert plates_of(arrivals_of(bucket, clock, source="sim_b", targets=["sim_a"]).look(set())[0]) == [plate]
    bucket.files.write(old, b"damaged")
    assert plates_of(arrivals_of(bucket, clock, source="sim_b", targets=["sim_a"]).look(set())[0]) == [plate]
    bucket.files.write(current, b"damaged")
    assert arrivals_of(bucket, clock, source="sim_b", targets=["sim_a"]).look(set())[0] == []


def test_tables_and_lists_are_read_once_and_folders_listed_once_a_look(bucket, clock, monkeypatch):
    for plate in B:
        bucket.send(plate)
    arrivals, read, listed = arrivals_of(bucket, clock), Counter(), Counter()
    read_file, list_files = storage.Folder.read, storage.Folder.files
    monkeypatch.setattr(storage.Folder, "read", lambda self, path: read.update([self.path(path)]) or read_file(self, path))
    monkeypatch.setattr(storage.Folder, "files", lambda self, path="": listed.update([self.path(path)]) or list_files(self, path))
    for _ in range(3):
        assert len(arrivals.look(set())[0]) == len(B)
    assert set(read.values()) == {1}
    assert len([path for path in read if "load_data" in path]) == len(B)
    images = [path for path in listed if "/images/" in path]
    assert len(images) == len(B)
    assert all(listed[path] == 3 for path in listed)


def test_images_in_many_folders_are_found_from_the_one_above(bucket, clock):
    rows = []
    for site in range(12):
        path = f"cpg0016-jump/sim_b/images/{B[0].batch}/images/{B[0].plate}/site {site}/x.tif"
        bucket.files.write(path, b"x")
        rows.append(f"A01,{site},s3://cellpainting-gallery/{path}\n")
    target = f"cpg0016-jump/sim_b/workspace/load_data_csv/{B[0].batch}/{B[0].plate}/load_data_with_illum.csv"
    bucket.files.write(target, ("Metadata_Well,Metadata_Site,URL_OrigDNA\n" + "".join(rows)).encode())
    (arrival,) = arrivals_of(bucket, clock).look(set())[0]
    assert (arrival.sites, arrival.missing) == (12, 0)


def listing(bucket, plate, addresses):
    """Write an image list that names these images, site by site."""
    target = f"cpg0016-jump/{plate.source}/workspace/load_data_csv/{plate.batch}/{plate.plate}/load_data_with_illum.csv"
    rows = "".join(f"A01,{site},{address}\n" for site, address in enumerate(addresses))
    bucket.files.write(target, f"Metadata_Well,Metadata_Site,URL_OrigDNA\n{rows}".encode())


@pytest.mark.parametrize(
    "content",
    [bytes(200_000), gzip.compress(b"Metadata_Well,Metadata_Site\nA01,1\n" * 50)[:-20], spoiled(), b"PAR1" + bytes(99)],
    ids=["zero bytes", "cut gzip", "corrupted gzip", "broken parquet"],
)
def test_a_damaged_list_holds_up_its_own_plate_alone(bucket, clock, content):
    bucket.send(C[0])
    path = f"cpg0016-jump/sim_b/workspace/load_data_csv/{B[0].batch}/{B[0].plate}/load_data_with_illum.csv.gz"
    bucket.files.write(path, content)
    arrived, (waiting,) = arrivals_of(bucket, clock).look(set())
    assert plates_of(arrived) == [C[0]]
    assert waiting.plate == B[0]
    assert f"{path}: not an image list" in waiting.reason


def test_a_folder_that_may_not_be_read_holds_up_its_own_plates_alone(bucket, clock, monkeypatch):
    for plate in (B[0], C[0]):
        bucket.send(plate)
    refused, files = open_place(Place(address=str(bucket.folder / PLATES[B[0]].images))).root, storage.Folder.files

    def refusing(self, relative=""):
        if self.path(relative) == refused:
            raise PermissionError("Access Denied")
        return files(self, relative)

    monkeypatch.setattr(storage.Folder, "files", refusing)
    arrived, waiting = arrivals_of(bucket, clock).look(set())
    assert plates_of(arrived) == [C[0]]
    assert waiting == [Waiting(B[0], "its images cannot be listed: Access Denied")]


def test_of_images_in_many_folders_nothing_is_listed_that_holds_other_plates(bucket, clock, tmp_path, monkeypatch):
    bucket.send(C[0])
    scattered = [f"cpg0016-jump/sim_b/site {site}/{B[0].plate}/x.tif" for site in range(12)]
    for path in scattered:
        bucket.files.write(path, b"x")
    listing(bucket, B[0], [*scattered, "https://elsewhere/x.tif"])
    elsewhere = [tmp_path / "elsewhere" / str(site) / "x.tif" for site in range(12)]
    for path in elsewhere:
        open_place(Place(address=str(path.parent))).write("x.tif", b"x")
    listing(bucket, B[1], elsewhere)
    listed, files = [], storage.Folder.files
    monkeypatch.setattr(storage.Folder, "files", lambda self, path="": listed.append(self.path(path)) or files(self, path))
    arrived, waiting = arrivals_of(bucket, clock).look(set())
    assert set(plates_of(arrived)) == {B[1], C[0]}
    assert waiting == [Waiting(B[0], "1 of 13 images are not there")]
    own = {str(path.parent) for path in elsewhere} | {str((bucket.folder / path).parent) for path in scattered}
    assert own <= set(listed)
    above = ["", "/", bucket.folder, bucket.folder / "cpg0016-jump" / "sim_b", tmp_path, tmp_path / "elsewhere"]
    assert not set(map(str, above)) & set(listed)


def record(bucket, key, name="ObjectCreated:Put"):
    return {"eventName": name, "s3": {"bucket": {"name": bucket}, "object": {"key": quote_plus(key, safe="/")}}}


def test_plates_that_events_name_are_looked_up(place, bucket, clock, tmp_path, caplog):
    for plate in [*B[:3], C[0], C[1]]:
        bucket.send(plate)
    lists = {plate: PLATES[plate].lists[-1] for plate in PLATES}

    def event(name, content):
        bucket.files.write(f"events/{name}", content if isinstance(content, bytes) else json.dumps(content).encode())

    event("1.json", {"Records": [record("bucket", lists[B[0]]), record("bucket", bucket.image(C[1]))]})
    event("day/2.json", {"Type": "Notification", "Message": json.dumps({"Records": [record("bucket", lists[B[1]])]})})
    event("3.json", {"detail-type": "Object Created", "detail": {"bucket": {"name": "bucket"}, "object": {"key": lists[C[0]]}}})
    event("4.json", {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "bucket"})
    event("5.json", {"Records": [record("bucket", lists[C[1]], "ObjectRemoved:Delete"), record("bucket", lists[A[0]])]})
    event("6.json", b'{"Records": [')
    event("7.json", ["x"])
    arrivals = arrivals_of(place, clock, events=f"{place.address}/events")
    for _ in range(2):
        arrived, waiting = arrivals.look(set())
        assert (set(plates_of(arrived)), waiting) == ({B[0], B[1], C[0]}, [])
    told = [record.message for record in caplog.records if "no S3 event notification" in record.message]
    assert len(told) == 2
    assert "events/6.json" in told[0]
    assert "events/7.json" in told[1]
    event("8.json", {"Records": [record("bucket", lists[B[2]]), record("bucket", lists[C[2]]), record("bucket", lists[B[2]])]})
    settled(place, bucket)
    arrived, waiting = arrivals.look({B[0]})
    assert set(plates_of(arrived)) == {B[1], B[2], C[0]}
    assert waiting == [Waiting(C[2], "its image list is not there")]


def test_event_files_are_read_some_at_a_time_and_may_expire(bucket, monkeypatch):
    monkeypatch.setattr("coda_ray.online.arrivals.EVENTS_AT_A_TIME", 2)
    for number, plate in enumerate(PLATES):
        event = json.dumps({"Records": [record("bucket", PLATES[plate].lists[-1])]}).encode()
        bucket.files.write(f"events/{number}.json", event)
    events, taken, content = _Events(bucket.files.child("events")), [], _Events._content
    monkeypatch.setattr(_Events, "_content", lambda self, file: taken.append(len(self._read)) or content(self, file))
    events.refresh(bucket.files, "cpg0016-jump")
    assert list(events.plates) == list(PLATES)
    # Before a file is read, those of the groups before it were taken.
    assert all(before >= number // 2 * 2 for number, before in enumerate(taken))
    bucket.files.delete("events")
    events.refresh(bucket.files, "cpg0016-jump")
    assert list(events.plates) == list(PLATES)
    assert (len(taken), len(events._read)) == (len(PLATES), 0)


def test_events_of_other_buckets_and_with_blanks(bucket):
    event = {
        "Records": [{"eventName": "s3:ObjectCreated:Put", "s3": {"bucket": {"name": "b"}, "object": {"key": "p/a+b%2Bc/x"}}}]
    }
    ((name, key),) = _new_objects(event)
    assert (name, key) == ("b", "p/a b+c/x")
    here = open_place(Place(address="s3://b/p", anonymous=True))
    assert _key_in(here, name, key) == "a b+c/x"
    assert _key_in(here, "bb", key) is None
    assert _key_in(here, "b", "pp/x") is None
    assert _key_in(bucket.files, "any", key) == key


def test_what_a_batch_will_hold(bucket):
    bucket.know(PLATES)
    tables = read_tables(bucket.files.child("metadata"))
    batch = B[-1].batch
    expected = sorted(plate for plate in B if plate.batch == batch)
    assert len(expected) > 1
    assert complete_batch(tables, "sim_b", batch, ["TARGET2"]) == complete_batch(tables, "sim_b", batch, []) == expected
    assert complete_batch(tables, "sim_b", batch, ["COMPOUND"]) == complete_batch(tables, "sim_b", "none", []) == []


@pytest.mark.slow
def test_every_plate_of_a_simulated_bucket_arrives(tiny_bucket, tmp_path, clock):
    arrived, waiting = arrivals_of(tiny_bucket.place, clock, {"channels": list(CHANNELS)}).look(set())
    assert (set(plates_of(arrived)), waiting) == ({*B, *C}, [])
    copy = shutil.copytree(tiny_bucket.folder, tmp_path / "copy")
    min((copy / PLATES[B[0]].images).iterdir()).unlink()
    arrived, waiting = arrivals_of(Place(address=str(copy)), clock, {"channels": list(CHANNELS)}).look(set())
    assert set(plates_of(arrived)) == {*B[1:], *C}
    assert waiting == [Waiting(B[0], f"1 of {len(CHANNELS) * len(WELLS)} images are not there")]
