"""Plates from arrival to predictions: on a simulated bucket and a real Ray, undisturbed, killed at every entry, and broken."""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy.ndimage import zoom

from coda_ray.config import Config, ConfigError, told_in_one_line
from coda_ray.jump.ingest import IngestError, run_ingest
from coda_ray.jump.simulate.defects import spoil_file
from coda_ray.jump.simulate.deliver import deliver_plate
from coda_ray.jump.simulate.layout import draw_plates
from coda_ray.jump.simulate.settings import PRESETS
from coda_ray.lease import Lease, LostLeaseError
from coda_ray.online.board import journeys
from coda_ray.online.ledger import Ledger
from coda_ray.online.meter import DriftMeter, plates_of
from coda_ray.online.service import watch
from coda_ray.online.serving import Choice, Models, watch_folder
from coda_ray.online.watcher import Watcher
from coda_ray.pipeline import data
from coda_ray.pipeline.matrix import run_transfers
from coda_ray.pipeline.request import Request
from coda_ray.storage import open_place
from coda_ray.tiles.store import TileStore
from coda_ray.tracking.registry import RegistryError
from coda_ray.tracking.runs import Tracker
from simulated import write_tiny
from synthetic import place, small_config, write_tiles

pytestmark = pytest.mark.long
SETTINGS = PRESETS["tiny"].model_copy(update={"sources": ["sim_a", "sim_b"]})
PLATES = [plate for plate in draw_plates(SETTINGS) if plate.source == "sim_b"]
STEPS = ["arrived", "ingested", "checked", "chosen", "predicted", "reported"]


@contextmanager
def silent(title: str, unit: str) -> Iterator[object]:
    """Progress that nobody sees."""
    yield lambda done, total: None


@contextmanager
def watching(config, say, tracker=None, after_a_kill=False):
    """A watcher that holds the lease and has begun."""
    tracker = tracker or Tracker(None)
    models = Models(config, "python jobs/watch.py --config my.yaml --once", tracker, say)
    with Lease(watch_folder(config).child("lease"), "test", 60.0) as lease:
        assert lease.acquire(wait=True, say=say)
        lease.took_over = after_a_kill
        ledger = Ledger.open(watch_folder(config).child("ledger"), models.identity, "test")
        models.begin()
        yield Watcher(config, models, ledger, lease, tracker, say, silent)


class Lab:
    """A bucket that plates are delivered to, and what a watcher makes of them."""

    def __init__(self, root, gallery, **watching):
        self.root, self.gallery = root, gallery
        self.lines = []
        shutil.copytree(gallery, root / "bucket", ignore=lambda _, names: [name for name in names if name == "sim_b"])
        settings = {"source": "sim_a", "targets": ["sim_b"], "settle_s": 0, "tries": 2, "retry_after_s": 0, **watching}
        self.config = small_config(
            root,
            watch=settings,
            views={"tile_crop": 40, "size_global": 32, "size_local": 16},
            adapt={"no_partner": "same-image"},
        )

    def changed(self, **watching):
        """The configuration with other settings of the watcher."""
        return self.config.model_copy(update={"watch": self.config.watch.model_copy(update=watching)})

    def deliver(self, *numbers, spoil=lambda data: data):
        for number in numbers:
            deliver_plate(open_place(place(self.gallery)), open_place(place(self.root / "bucket")), PLATES[number], spoil)

    def watcher(self, config=None, **how):
        """A watcher that holds the lease and has begun."""
        return watching(config or self.config, self.lines.append, **how)

    def run(self, config=None):
        """Look until nothing is left to do; give the journey of each plate."""
        with self.watcher(config) as watcher:
            while watcher.look():
                pass
            return list(journeys(watcher.ledger.entries).values())

    def predictions(self):
        """Every table of predictions of the plates, by path."""
        found = (self.root / "results" / "predictions").rglob("sim_b/*/*/*.parquet")
        return {str(path.relative_to(self.root)): pd.read_parquet(path) for path in found}


@pytest.fixture(scope="module")
def gallery(ray_cluster, tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("gallery") / "bucket", sources=SETTINGS.sources)


@pytest.fixture(scope="module")
def base(gallery, tmp_path_factory):
    """A lab whose source is ingested, and its model trained."""
    lab = Lab(tmp_path_factory.mktemp("base"), gallery)
    run_ingest(
        lab.config.model_copy(update={"ingest": lab.config.ingest.model_copy(update={"sources": ["sim_a"]})}), lambda _: None
    )
    Models(lab.config, "watch", Tracker(None), lab.lines.append).begin()
    return lab


@pytest.fixture
def lab(base, gallery, tmp_path):
    """A copy of it in which nothing has arrived."""

    def make(name="lab", **watching):
        made = Lab(tmp_path / name, gallery, **watching)
        for part in ("tiles", "results"):
            shutil.copytree(base.root / part, made.root / part, ignore=shutil.ignore_patterns("watch"))
        data.forget()
        return made

    return make


def told(journey):
    """What is known of a plate, without places."""
    return {state: {k: v for k, v in facts.items() if k != "folder"} for state, facts in journey.facts.items()}


def test_every_plate_gets_a_model_of_its_own_and_a_broken_one_is_set_aside(lab):
    here = lab(policy="plate")
    here.deliver(0)
    here.deliver(1, spoil=partial(spoil_file, kind="truncated"))
    here.deliver(2)
    first, broken, last = here.run()
    assert [list(journey.facts) for journey in (first, last)] == [STEPS, STEPS]
    assert list(broken.facts) == ["arrived", "aside"]
    assert len(broken.failures) == 2
    assert "truncated" in broken.facts["aside"]["reason"] or "max_bad_share" in broken.facts["aside"]["reason"]
    assert [journey.facts["chosen"]["plates"] for journey in (first, last)] == [
        [PLATES[0].name],
        [PLATES[0].name, PLATES[2].name],
    ]
    keys = {journey.facts["predicted"]["model_key"] for journey in (first, last)}
    assert len(keys) == 2
    for journey in (first, last):
        predicted = journey.facts["predicted"]
        wells = pd.read_parquet(f"{predicted['folder']}/wells.parquet")
        assert set(wells["Metadata_Model"]) == {predicted["model_key"]}
        assert len(wells) == journey.facts["checked"]["wells"] == SETTINGS.wells_per_plate
    table = pd.read_csv(here.root / "results" / "watch" / "plates.csv")
    assert table["state"].tolist() == ["reported", "aside", "reported"]
    assert (here.root / "results" / "watch" / "drift.png").read_bytes().startswith(b"\x89PNG")
    records = sorted((here.root / "results" / "watched").glob("*/*/*/*.json"))
    assert [json.loads(path.read_text())["number"] for path in records] == [1, 3]
    before = here.predictions()
    assert len(here.run()) == 3
    assert set(here.predictions()) == set(before)


def test_tiles_of_many_plates_are_indexed_once_a_look(lab, monkeypatch):
    here = lab(policy="nearest", drift_threshold=1e6)
    here.deliver(0, 1, 2)
    loaded, index = [], TileStore.index
    monkeypatch.setattr(TileStore, "index", lambda self, sources: loaded.append(tuple(sources)) or index(self, sources))
    with here.watcher() as watcher:
        before = len(loaded)
        watcher.look()
        assert [journey.state for journey in journeys(watcher.ledger.entries).values()] == ["reported"] * 3
    assert sorted(loaded[before:]) == [("sim_a",), ("sim_b",)]


class Killed(BaseException):
    """What a process that is killed does not catch either."""


def finished(lab):
    """What is done once and for all, and when it was written (ns): stages, tiles and predictions."""
    notes = [*(lab.root / "results").rglob("done.json"), *lab.root.rglob("plate.json")]
    return {path: path.stat().st_mtime_ns for path in notes}


def killed_at_every_entry(lab):
    """Watch until all is done; before and after each entry the watcher dies, and another one begins; nothing is done twice."""
    deaths, done = 0, finished(lab)
    while True:
        data.forget()
        before, done = done, finished(lab)
        assert before.items() <= done.items()
        with lab.watcher() as watcher:
            append = watcher.ledger.append

            def dying(*plate_and_state, append=append, late=deaths % 2, **facts):
                if late:
                    append(*plate_and_state, **facts)
                raise Killed

            watcher.ledger.append = dying
            try:
                watcher.look()
            except Killed:
                deaths += 1
            else:
                return deaths, list(journeys(watcher.ledger.entries).values())


def test_a_watcher_that_is_killed_around_every_entry_ends_like_one_that_is_not(lab):
    undisturbed, killed = lab("undisturbed", policy="plate"), lab("killed", policy="plate")
    for one in (undisturbed, killed):
        one.deliver(0, 1)
    expected = undisturbed.run()
    deaths, found = killed_at_every_entry(killed)
    done = [{path.relative_to(one.root) for path in finished(one)} for one in (undisturbed, killed)]
    assert done[0] == done[1]
    assert deaths == 2 * 2 * len(STEPS)
    assert [told(journey) for journey in found] == [told(journey) for journey in expected]
    one, other = undisturbed.predictions(), killed.predictions()
    assert one.keys() == other.keys()
    assert len(one) >= 2 * 3
    for path, table in one.items():
        pd.testing.assert_frame_equal(table, other[path])


class Sent(Tracker):
    """Remembers the plates that it was given."""

    def __init__(self):
        super().__init__(None)
        self.plates = []

    def plate(self, record, picture):
        assert picture.startswith(b"\x89PNG")
        self.plates.append(record)


def test_what_a_killed_watcher_had_reported_is_sent_again(lab):
    here = lab(policy="nearest", drift_threshold=1e6)
    here.deliver(0, 1)
    first, after_an_end, after_a_kill, poorer = Sent(), Sent(), Sent(), Sent()
    with here.watcher(tracker=first) as watcher:
        watcher.look()
    with here.watcher(tracker=after_an_end):
        pass
    with here.watcher(tracker=after_a_kill, after_a_kill=True):
        pass
    assert [record["plate"] for record in first.plates] == [PLATES[0].name, PLATES[1].name]
    assert after_an_end.plates == []
    assert after_a_kill.plates == first.plates
    next((here.root / "results" / "watched").rglob(f"{PLATES[0].name}.json")).unlink()
    with here.watcher(tracker=poorer, after_a_kill=True):
        pass
    assert poorer.plates == first.plates[1:]


def test_the_nearest_model_predicts_and_a_plate_that_is_far_from_all_gets_its_own(lab):
    here = lab(policy="nearest", drift_threshold=1e-6)
    here.deliver(0)
    (first,) = here.run()
    assert first.facts["chosen"]["why"] == "further than the threshold from all that is known"
    assert first.facts["chosen"]["unit"] == PLATES[0].name
    assert first.facts["chosen"]["nearest"] == "sim_a"
    assert first.facts["chosen"]["drift_nearest"] == first.facts["checked"]["drift_source"] > 0
    assert first.facts["chosen"]["distances"] == {"sim_a": first.facts["checked"]["drift_source"]}
    here.deliver(1, 2)
    _, *others = here.run(here.changed(drift_threshold=1e6))
    for journey in others:
        chosen, drift = journey.facts["chosen"], journey.facts["checked"]["drift_source"]
        assert chosen["why"] == "nearest"
        assert chosen["drift_nearest"] <= drift
        assert chosen["model"] == chosen["nearest"]
        assert chosen["unit"] in ("sim_a", PLATES[0].name)
        distances = chosen["distances"]
        assert list(distances) == ["sim_a", f"sim_b plate {PLATES[0].name}"]
        assert distances["sim_a"] == drift
        assert distances[chosen["nearest"]] == min(distances.values()) == chosen["drift_nearest"]
        record = next((here.root / "results" / "watched").rglob(f"{journey.plate.plate}.json"))
        assert json.loads(record.read_text())["distances"] == distances


def adapted_by_hand(lab, *numbers):
    """Deliver plates, and adapt to each of them by another job."""
    lab.deliver(*numbers)
    ingested = lab.config.model_copy(update={"ingest": lab.config.ingest.model_copy(update={"sources": ["sim_b"]})})
    run_ingest(ingested, lambda _: None)
    data.forget()
    request = Request("sim_a", "sim_b", "coda", "plate", 0)
    run_transfers(lab.config, [request], kind="adapt", name="by hand", command="", say=lab.lines.append)


def test_a_unit_that_another_job_adapted_to_is_known(lab):
    here = lab(policy="nearest", drift_threshold=1e6)
    adapted_by_hand(here, 0, 1)
    found = here.run()
    # Each plate is a unit itself, at no distance.
    assert [journey.facts["chosen"]["drift_nearest"] for journey in found] == [0.0, 0.0]
    assert [journey.facts["chosen"]["unit"] for journey in found] == [PLATES[0].name, PLATES[1].name]
    assert all(journey.facts["chosen"]["plates"] == [] for journey in found)


def test_a_damaged_unit_is_passed_over_and_no_new_plate_is_blamed(lab):
    here = lab(policy="nearest", drift_threshold=1e6)
    adapted_by_hand(here, 0)
    for shard in (here.root / "tiles").rglob(f"{PLATES[0].name}/shard-*.npy"):
        shard.unlink()
    shutil.rmtree(here.root / "bucket" / "cpg0016-jump" / "sim_b")
    here.deliver(1)
    (first,) = here.run()
    here.deliver(2)
    _, second = here.run()
    for journey in (first, second):
        assert journey.state == "reported"
        assert journey.failures == []
        assert journey.facts["chosen"]["unit"] in ("sim_a", PLATES[1].name)
    told = [line for line in here.lines if "passed over" in line]
    assert len(told) == 2
    assert told[0].startswith(f"sim_b plate {PLATES[0].name}: is passed over, because")


def test_a_batch_is_waited_for_and_adapted_to_once(lab):
    here = lab(policy="batch")
    alone, *pair = (i for i in range(3) if sum(p.batch == PLATES[i].batch for p in PLATES) >= 1)
    here.deliver(alone, pair[0])
    first, waiting = here.run()
    assert first.facts["chosen"]["granularity"] == "batch"
    assert first.state == "reported"
    assert waiting.state == "checked"
    assert any(f"its batch lacks 1 of 2 plates: {PLATES[pair[1]].name}" in line for line in here.lines)
    here.deliver(pair[1])
    _, second, third = here.run()
    assert second.facts["chosen"]["stage"] == third.facts["chosen"]["stage"] != first.facts["chosen"]["stage"]
    assert second.facts["chosen"]["plates"] == [PLATES[i].name for i in (alone, *pair)]
    assert second.facts["predicted"]["model_key"] == third.facts["predicted"]["model_key"]


def test_an_adaptation_that_fails_is_tried_again_and_the_rest_go_on(lab):
    here = lab(policy="plate", drift_threshold=1.0)
    here.config = here.config.model_copy(update={"adapt": here.config.adapt.model_copy(update={"no_partner": "error"})})
    here.deliver(0, 1)
    lonely, _ = here.run()
    assert lonely.state == "aside"
    assert "no partner" in lonely.facts["aside"]["reason"]
    assert "--adapt.no-partner same-image" in lonely.facts["aside"]["reason"]


def test_storage_that_does_not_answer_is_no_plates_fault(lab, monkeypatch):
    here = lab(policy="nearest")
    here.deliver(0)
    with here.watcher() as watcher:
        monkeypatch.setattr("coda_ray.online.watcher.run_ingest", fail_with(OSError("gave up after 5 attempts")))
        monkeypatch.setattr("coda_ray.storage.Folder.names", fail_with(OSError("refused")))
        with pytest.raises(OSError, match=r"metadata|gave up"):
            watcher.look()
        assert all(not journey.failures for journey in journeys(watcher.ledger.entries).values())
        monkeypatch.undo()
        while watcher.look():
            pass
        (journey,) = journeys(watcher.ledger.entries).values()
        assert journey.state == "reported"


@pytest.mark.parametrize("part", ["bucket", "tiles"])
def test_a_share_that_is_not_mounted_any_more_is_no_plates_fault(lab, monkeypatch, part):
    here = lab(policy="nearest")
    here.deliver(0)

    def unmount(*args):
        (here.root / part).rename(here.root / "away")
        (here.root / part).mkdir()
        raise IngestError("no image list was found")

    monkeypatch.setattr("coda_ray.online.watcher.run_ingest", unmount)
    with here.watcher() as watcher:
        with pytest.raises(OSError, match=rf"{part}: nothing is there any more; mount it, or correct {part}\.address"):
            watcher.look()
        (journey,) = journeys(watcher.ledger.entries).values()
        assert (journey.state, journey.failures) == ("arrived", [])


def test_a_file_that_storage_refuses_is_its_plates_fault_and_the_plate_is_tried_again_when_asked(lab, monkeypatch):
    here = lab(policy="nearest", targets=["sim_b"])
    here.deliver(0, 1)
    ingest = run_ingest

    def refusing(config, report):
        if config.ingest.plates == [PLATES[0].name]:
            raise OSError("gave up after 5 attempts: PermissionError: Access Denied")
        return ingest(config, report)

    monkeypatch.setattr("coda_ray.online.watcher.run_ingest", refusing)
    refused, fine = here.run()
    assert (refused.state, fine.state) == ("aside", "reported")
    assert "Access Denied" in refused.facts["aside"]["reason"]
    monkeypatch.undo()
    with pytest.raises(SystemExit) as ended:
        again(here, "nothing")
    assert ended.value.code == 2
    assert again(here, PLATES[0].name) == 0
    assert [journey.state for journey in here.run()] == ["reported", "reported"]


def again(lab, name):
    """Watch once, with a plate that was set aside."""
    with told_in_one_line("watch"):
        return watch(lab.config, once=True, command="", say=lab.lines.append, progress=silent, again=[name])


def test_a_plate_of_small_tiles_is_set_aside_and_the_others_are_not(lab):
    here = lab(policy="plate")
    here.deliver(0, spoil=shrunken)
    here.deliver(1)
    small, fine = here.run()
    assert (small.state, fine.state) == ("aside", "reported")
    assert "tiles of 24 px are smaller than the model's crop of 40 px" in small.facts["aside"]["reason"]
    assert fine.facts["chosen"]["plates"] == [PLATES[1].name]


def test_an_error_that_nobody_thought_of_is_its_plates_alone(lab, monkeypatch, caplog):
    here = lab(policy="nearest")
    here.deliver(0, 1)
    check = Watcher._check

    def failing(self, journey):
        return {}["nothing"] if journey.plate.plate == PLATES[0].name else check(self, journey)

    monkeypatch.setattr(Watcher, "_check", failing)
    broken, fine = here.run()
    assert (broken.state, fine.state) == ("aside", "reported")
    assert broken.facts["aside"]["reason"] == "KeyError: 'nothing'"
    (first, _) = [record for record in caplog.records if record.name == "coda_ray.online.watcher"]
    assert PLATES[0].name in first.message
    assert first.exc_info[0] is KeyError


def test_a_plate_whose_drift_is_no_number_is_set_aside_at_once(lab, monkeypatch):
    here = lab(policy="nearest")
    here.deliver(0, 1)
    features = DriftMeter._features

    def broken(self, plates):
        found = features(self, plates)
        return np.full_like(found, np.nan) if PLATES[0].name in [plate.plate for plate in plates] else found

    monkeypatch.setattr(DriftMeter, "_features", broken)
    odd, fine = here.run()
    assert (odd.state, fine.state) == ("aside", "reported")
    assert len(odd.failures) == 1
    assert "no finite numbers" in odd.facts["aside"]["reason"]


def test_a_finished_model_is_used_though_tiles_that_it_knew_of_were_made_anew(lab):
    here = lab(policy="plate")
    here.deliver(0, 1)
    journeys_before = here.run()
    (tiles,) = (here.root / "tiles").rglob(f"{PLATES[0].name}/plate.json")
    shutil.rmtree(tiles.parent)
    here.deliver(0, spoil=other_microscope)
    ingested = here.config.model_copy(update={"ingest": here.config.ingest.model_copy(update={"plates": [PLATES[0].name]})})
    run_ingest(ingested, lambda _: None)
    data.forget()
    with here.watcher() as watcher:
        for journey in journeys_before:
            choice = Choice.of(journey.facts["chosen"])
            assert watcher.models.make([choice]) == {}
            assert watcher.models.export(choice).model.key == journey.facts["predicted"]["model_key"]
            assert watcher.models.seconds(choice) > 0
        # One that was not made before the tiles changed would be another model now.
        (here.root / "results" / choice.stage / "done.json").unlink()
        (reason,) = watcher.models.make([choice]).values()
        assert "have changed since this model was chosen" in reason


def shrunken(content):
    """A field of view of a microscope that reads every second pixel."""
    sink = io.BytesIO()
    tifffile.imwrite(sink, tifffile.imread(io.BytesIO(content))[::2, ::2])
    return sink.getvalue()


def test_a_model_that_cannot_be_registered_predicts_all_the_same(lab, monkeypatch):
    here = lab(policy="nearest", register_as="models")
    here.config = here.config.model_copy(update={"tracking": here.config.tracking.model_copy(update={"enabled": True})})
    monkeypatch.setattr("coda_ray.online.watcher.register", fail_with(RegistryError("mlflow: not reached")))
    here.deliver(0)
    (journey,) = here.run()
    assert journey.state == "reported"
    assert journey.facts["predicted"]["version"] is None
    assert any(
        f"jobs/export.py --config my.yaml --results.address {here.config.results.address} --register models --stage" in line
        for line in here.lines
    )


def test_what_no_plate_could_mend_is_told_before_the_first_look(lab):
    here = lab(register_as="models")
    with pytest.raises(ConfigError, match=r"watch\.register_as is set, but nothing is sent to MLflow"):
        watch(here.config, once=True, command="", say=here.lines.append, progress=silent)


def test_a_watcher_that_lost_its_lease_says_what_to_do(lab, monkeypatch):
    here = lab()
    monkeypatch.setattr("coda_ray.online.service._begin", fail_with(LostLeaseError("bert has taken the lease")))
    with pytest.raises(LostLeaseError, match=r"bert has taken the lease; .*start it again.*watch\.lease_s"):
        watch(here.config, once=True, command="", say=here.lines.append, progress=silent)


def test_a_watcher_refuses_scores_that_no_model_gives(lab):
    here = lab()
    adapt = here.config.adapt.model_copy(update={"standardise": "after"})
    with pytest.raises(ConfigError, match=r"give --adapt\.standardise never"):
        watch(here.config.model_copy(update={"adapt": adapt}), once=True, command="", say=here.lines.append, progress=silent)


@pytest.mark.parametrize(
    ("plates_with_controls", "field"), [(0, r"watch\.policy = nearest"), (1, r"watch\.drift_threshold is unset")]
)
def test_policy_nearest_needs_a_measure_of_drift_and_the_others_do_not(lab, monkeypatch, plates_with_controls, field):
    here, features = lab(policy="nearest"), DriftMeter._features
    with_controls = []

    def some(self, plates):
        found = features(self, plates)
        if plates[0] not in with_controls and len(with_controls) == plates_with_controls:
            return found[:0]
        with_controls.append(plates[0])
        return found

    monkeypatch.setattr(DriftMeter, "_features", some)
    here.deliver(0)
    with pytest.raises(ConfigError, match=field):
        watch(here.config, once=True, command="", say=here.lines.append, progress=silent)
    config = here.changed(policy="plate")
    assert watch(config, once=True, command="", say=here.lines.append, progress=silent) == 0
    table = pd.read_csv(here.root / "results" / "watch" / "plates.csv")
    assert table["state"].tolist() == ["reported"]
    assert table["drift_source"].isna().all()


def fail_with(error):
    """A function that raises."""

    def fail(*args, **kwargs):
        raise error

    return fail


def test_too_few_wells_set_a_plate_aside_at_once(lab):
    here = lab(min_wells=1.0)
    here.config = here.config.model_copy(update={"ingest": here.config.ingest.model_copy(update={"max_bad_share": 1.0})})
    lost = iter(range(10**6))
    here.deliver(0, spoil=lambda content: content[:99] if next(lost) < 12 else content)
    (journey,) = here.run()
    assert journey.state == "aside"
    assert len(journey.failures) == 1
    assert "wells have a tile, less than watch.min_wells = 1.0" in journey.facts["aside"]["reason"]


def test_another_model_needs_another_ledger(lab):
    here = lab()
    here.run()
    with pytest.raises(ConfigError, match=r"watch\.seed = 0, and now it is 1"), here.watcher(here.changed(seed=1)):
        pass


def test_a_ledger_stands_for_the_settings_that_its_method_reads(tmp_path):
    config = small_config(tmp_path, watch={"source": "a"})
    write_tiles(config, "a", batches=3)

    def identity(method, entropy):
        changed = {"watch": {"source": "a", "method": method}, "shot": {"entropy": entropy}}
        return Models(Config.model_validate(config.model_dump(mode="json") | changed), "watch", Tracker(None), print).identity

    assert identity("coda-shot", 1.0) != identity("coda-shot", 0.5)
    assert identity("coda", 1.0) == identity("coda", 0.5)


def test_of_two_watchers_one_works(lab):
    here = lab()
    held = Lease(watch_folder(here.config).child("lease"), "other", 60.0)
    with held:
        assert held.acquire(wait=True, say=here.lines.append)
        assert watch(here.config, once=True, command="", say=here.lines.append, progress=silent) == 0
    assert here.lines[-1] == "another watcher is at work; nothing to do"
    here.deliver(0)
    assert watch(here.config, once=True, command="", say=here.lines.append, progress=silent) == 0
    assert here.lines[-1].startswith("1 plates: 1 reported, 0 set aside, 0 on their way")


def other_microscope(content):
    """The same field of view at twice the magnification, by a detector whose answer is the square of the light."""
    image = tifffile.imread(io.BytesIO(content)).astype(np.float64)
    top, left = (side // 4 for side in image.shape)
    near = zoom(image[top:-top, left:-left], 2, order=1)
    sink = io.BytesIO()
    tifffile.imwrite(sink, (60000 * (near / near.max()) ** 2).astype(np.uint16))
    return sink.getvalue()


def test_drift_fires_on_another_microscope_and_not_on_an_ordinary_new_plate(ray_cluster, tmp_path):
    shape = {"sources": ["sim_a", "sim_b"], "batches_per_source": 4, "dmso_wells": 12, "sites_per_well": 2}
    gallery = write_tiny(tmp_path / "gallery", **shape)
    config = small_config(
        tmp_path,
        bucket={"address": str(gallery)},
        metadata={"address": str(gallery / "metadata")},
        ingest={"sources": ["sim_a"]},
        watch={"source": "sim_a", "policy": "nearest", "settle_s": 0},
        views={"tile_crop": 40, "size_global": 32, "size_local": 16},
        adapt={"no_partner": "same-image"},
    )
    run_ingest(config, lambda _: None)
    data.forget()
    models = Models(config, "watch", Tracker(None), print)
    models.begin()
    meter = DriftMeter(config, models.export(models.source).model, silent)
    # The source's held-out plate took no part in its model or its reference: it is an ordinary new plate.
    ordinary = data.held_out_tiles(config, "sim_a").without_labels()
    (name,) = plates_of(ordinary)
    meter.embed([ordinary], "")
    assert meter.reference.drift(meter.controls([name])) < meter.threshold

    # The same cells under another microscope.
    (plate,) = [plate for plate in draw_plates(PRESETS["tiny"].model_copy(update=shape)) if plate.name == name.plate]
    deliver_plate(open_place(place(gallery)), open_place(place(tmp_path / "other")), plate, other_microscope)
    moved = {"bucket": place(tmp_path / "other"), "tiles": place(tmp_path / "others")}
    moved["ingest"] = config.ingest.model_copy(update={"plates": [plate.name]})
    other = config.model_copy(update=moved)
    run_ingest(other, lambda _: None)
    moved_meter = DriftMeter(config, meter.model, silent)
    moved_meter.embed([data.load_tiles(other, "sim_a").without_labels()], "")
    assert meter.reference.drift(moved_meter.controls([name])) > meter.threshold

    # A plate of another lab with that microscope arrives: by the threshold that is measured it gets a model of its own.
    shutil.copytree(gallery, tmp_path / "arriving", ignore=lambda _, names: [name for name in names if name == "sim_b"])
    first = next(plate for plate in draw_plates(PRESETS["tiny"].model_copy(update=shape)) if plate.source == "sim_b")
    deliver_plate(open_place(place(gallery)), open_place(place(tmp_path / "arriving")), first, other_microscope)
    arriving = config.model_copy(update={"bucket": place(tmp_path / "arriving")})
    with watching(arriving, print) as watcher:
        watcher.look()
        (journey,) = journeys(watcher.ledger.entries).values()
    chosen = journey.facts["chosen"]
    assert (chosen["unit"], chosen["threshold"]) == (first.name, meter.threshold)
    assert chosen["drift_nearest"] > chosen["threshold"]
    assert chosen["why"] == "further than the threshold from all that is known"
