import pytest
import torch

from coda_ray.learn.optim import build_optimizer
from coda_ray.storage import Place, open_place
from coda_ray.training import checkpoints
from coda_ray.training.checkpoints import Checkpoint, DamagedFileError


@pytest.fixture
def folder(tmp_path):
    return open_place(Place(address=str(tmp_path)))


def test_the_newest_two_are_kept_and_the_newest_is_loaded(folder):
    for step in (5, 10, 15):
        checkpoints.save(folder, Checkpoint(step, {"w": torch.full((2,), float(step))}, {"history": [step]}))
    assert folder.names("checkpoints") == ["step-00000010", "step-00000015"]
    latest = checkpoints.load_latest(folder, 100)
    assert latest is not None
    assert (latest.step, latest.facts) == (15, {"history": [15]})
    assert latest.tensors["w"].tolist() == [15.0, 15.0]


def test_a_checkpoint_past_a_step_is_not_for_it(folder):
    for step in (5, 10):
        checkpoints.save(folder, Checkpoint(step, {"w": torch.zeros(1)}, {}))
    assert [getattr(checkpoints.load_latest(folder, until), "step", None) for until in (10, 9, 4)] == [10, 5, None]


@pytest.mark.parametrize("harm", ["flip", "cut", "no note"])
def test_a_damaged_checkpoint_is_passed_over_and_told(folder, harm, caplog):
    for step in (1, 2):
        checkpoints.save(folder, Checkpoint(step, {"w": torch.arange(8.0) * step}, {}))
    name = "checkpoints/step-00000002"
    data = folder.read(f"{name}/state.safetensors")
    if harm == "flip":
        folder.write(f"{name}/state.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "cut":
        folder.write(f"{name}/state.safetensors", data[: len(data) // 2])
    else:
        folder.delete(f"{name}/state.json")
    latest = checkpoints.load_latest(folder, 100)
    assert latest is not None
    assert latest.step == 1
    assert "step-00000002: passed over" in caplog.text


def test_no_checkpoint_is_none(folder):
    assert checkpoints.load_latest(folder, 100) is None


def test_a_changed_model_file_is_refused(folder):
    sha = checkpoints.write_tensors(folder, "model.safetensors", {"w": torch.ones(3)})
    assert checkpoints.read_tensors(folder, "model.safetensors", sha)["w"].tolist() == [1, 1, 1]
    checkpoints.write_tensors(folder, "model.safetensors", {"w": torch.zeros(3)})
    with pytest.raises(DamagedFileError, match=r"model\.safetensors: SHA-256"):
        checkpoints.read_tensors(folder, "model.safetensors", sha)


def steps(network, optimizer, n):
    for i in range(n):
        network(torch.full((4, 3), float(i + 1))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_optimizer_continues_to_the_bit():
    def fresh():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        return network, build_optimizer(network, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)

    network, optimizer = fresh()
    steps(network, optimizer, 3)
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    saved = {k: v.clone() for k, v in checkpoints.optimizer_tensors(optimizer).items()}
    steps(network, optimizer, 2)
    other, other_optimizer = fresh()
    other.load_state_dict(weights)
    checkpoints.load_optimizer(other_optimizer, saved)
    steps(other, other_optimizer, 2)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
