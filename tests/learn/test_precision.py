"""Precision: the choice per device, its reason, and what autocast computes in."""

import pytest
import torch

from coda_ray.learn.precision import choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("units", "dtype", "said"),
    [
        ({"avx512_bf16": True}, torch.bfloat16, "AVX512-BF16"),
        ({"amx_bf16": True}, torch.bfloat16, "AMX"),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32, "neither"),
    ],
)
def test_auto_on_a_cpu_follows_its_hardware(
    units: dict[str, bool], dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    chosen = choose_precision(CPU, "auto")
    assert chosen.dtype is dtype
    assert said in chosen.reason


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_on_cuda_follows_its_capability(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    chosen = choose_precision(torch.device("cuda"), "auto")
    assert chosen.dtype is dtype
    assert "Some GPU" in chosen.reason


@pytest.mark.parametrize(("wanted", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_named_precision_is_what_matrix_products_come_out_in(wanted: str, dtype: torch.dtype) -> None:
    chosen = choose_precision(CPU, wanted)
    with chosen.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype
    assert "asked for" in chosen.reason


def test_an_unknown_precision_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"precision = 'fp16': choose one of auto, bf16, fp32"):
        choose_precision(CPU, "fp16")
