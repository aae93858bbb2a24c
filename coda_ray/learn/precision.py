"""The one decision about numeric precision: made once per process, and explained."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

CHOICES = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class Precision:
    """What the forward passes compute in; parameters and optimizer state stay float32.

    Parameters
    ----------
    device_type
        `torch.device.type` that the decision is for.
    dtype
        `torch.bfloat16` or `torch.float32`.
    reason
        A sentence for the log.
    """

    device_type: str
    dtype: torch.dtype
    reason: str

    def autocast(self) -> AbstractContextManager[None]:
        """Enter the chosen precision: torch autocast in bfloat16, nothing at all in float32."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)


def choose_precision(device: torch.device, wanted: str) -> Precision:
    """Choose the precision of a device.

    Parameters
    ----------
    device
        Where the training runs.
    wanted
        `auto` (bfloat16 where the device has it in hardware, float32 elsewhere), `bf16` or `fp32`.

    Returns
    -------
    Precision
        The choice, with its reason.

    Raises
    ------
    ValueError
        When `wanted` is none of the three.
    """
    if wanted not in CHOICES:
        raise ValueError(f"precision = {wanted!r}: choose one of {', '.join(CHOICES)}")
    in_hardware, found = _bf16_hardware(device)
    if wanted == "fp32":
        return Precision(device.type, torch.float32, "float32, as asked for")
    if wanted == "bf16":
        note = found if in_hardware else f"{found}, so it is emulated and slow"
        return Precision(device.type, torch.bfloat16, f"bfloat16, as asked for ({note})")
    dtype, name = (torch.bfloat16, "bfloat16") if in_hardware else (torch.float32, "float32")
    return Precision(device.type, dtype, f"{name}, because {found}")


def _bf16_hardware(device: torch.device) -> tuple[bool, str]:
    """Say whether the device multiplies bfloat16 matrices in hardware, and how that is known."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        has = (major, minor) >= (8, 0)
        return has, f"{name} (compute capability {major}.{minor}) {'has' if has else 'lacks'} it in hardware"
    if device.type == "cpu":
        units = [label for key, label in _CPU_UNITS.items() if torch.cpu.get_capabilities().get(key, False)]
        if units:
            return True, f"the CPU has {' and '.join(units)}"
        return False, "the CPU has neither AVX512-BF16 nor AMX"
    return False, f"bfloat16 hardware is not known of on {device.type!r} devices"


_CPU_UNITS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}
