"""What a person asks of a watcher, without one at work."""

from types import SimpleNamespace

import pytest

from coda_ray.config import ConfigError, Place
from coda_ray.jump.layout import PlateName
from coda_ray.lease import Lease
from coda_ray.online.board import journeys
from coda_ray.online.ledger import Ledger
from coda_ray.online.service import _try_again, watch
from coda_ray.online.serving import watch_folder
from coda_ray.storage import open_place
from synthetic import small_config

BROKEN, TWIN = PlateName("sim_b", "b0", "p1"), PlateName("sim_c", "b0", "p1")
FINE = PlateName("sim_b", "b0", "p2")


@pytest.fixture
def watcher(tmp_path):
    """What is asked of a watcher: a ledger in which one plate is set aside and another is reported."""
    ledger, lines = Ledger.open(open_place(Place(address=str(tmp_path))), {}, "me"), []
    for plate, state in ((BROKEN, "aside"), (FINE, "reported")):
        ledger.append(plate, "arrived")
        ledger.append(plate, state, reason="broken")
    return SimpleNamespace(ledger=ledger, lease=SimpleNamespace(check=lambda: None), say=lines.append, lines=lines)


def states(watcher):
    return {plate: journey.state for plate, journey in journeys(watcher.ledger.entries).items()}


@pytest.mark.parametrize("name", ["p1", "sim_b/b0/p1"])
def test_a_plate_that_was_set_aside_is_taken_up_again_once(watcher, name):
    _try_again(watcher, [name, name])
    assert states(watcher) == {BROKEN: "arrived", FINE: "reported"}
    assert watcher.lines == ["sim_b/b0/p1: is not set aside but arrived; it goes on from there"]


def test_one_that_was_not_set_aside_is_told(watcher):
    _try_again(watcher, ["p2"])
    assert states(watcher)[FINE] == "reported"
    assert watcher.lines == ["sim_b/b0/p2: is not set aside but reported; it goes on from there"]


def test_a_name_of_none_or_of_several_is_refused(watcher):
    with pytest.raises(ConfigError, match=r"again = 'p3': no such plate has arrived; these were set aside: sim_b/b0/p1"):
        _try_again(watcher, ["p3"])
    watcher.ledger.append(TWIN, "arrived")
    with pytest.raises(ConfigError, match=r"again = 'p1': several plates have that name; give one of sim_b/b0/p1, sim_c/b0/p1"):
        _try_again(watcher, ["p1"])
    _try_again(watcher, ["sim_b/b0/p1"])
    assert states(watcher)[BROKEN] == "arrived"


@pytest.mark.parametrize(("again", "code"), [((), 0), (("p1",), 1)])
def test_what_cannot_be_done_beside_another_watcher_is_told(tmp_path, again, code):
    config, lines = small_config(tmp_path, watch={"source": "sim_a", "lease_s": 8.0}), []
    with Lease(watch_folder(config).child("lease"), "other", 8.0) as held:
        assert held.acquire(wait=True, say=lines.append)
        assert watch(config, once=True, command="", say=lines.append, progress=None, again=again) == code
    assert lines[-1].startswith("another watcher is at work")
    assert ("--again was not done" in lines[-1]) == (code == 1)
