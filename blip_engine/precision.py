"""Which device and which number type a model runs on."""

from collections.abc import Mapping
from typing import Final

import torch

from .errors import OptionError
from .requests import check_precision

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}


def choose_device(device: str) -> torch.device:
    """`auto` is the first GPU, or else the CPU. Raises OptionError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise OptionError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:1") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {device!r} is not here: {_seen(torch.cuda.device_count())}")
    return chosen


def _seen(count: int) -> str:
    if not count:
        return "torch sees no CUDA device; use auto or cpu, or install the torch that is built for this GPU"
    return f"torch sees {', '.join(f'cuda:{number}' for number in range(count))}; use one of these, or auto"


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of weights and activations; log-probabilities and scores are float32 whatever it is.

    `auto`: bfloat16 where the hardware multiplies it (GPUs from Ampere on, CPUs with AVX512-BF16 or AMX), else float16
    on a GPU and float32 on a CPU. `int8`, on a CPU only: the large products in int8, the rest in bfloat16. Raises
    OptionError for an unknown policy, or one that the device has not.
    """
    check_precision(precision)
    if precision == "int8" and device.type != "cpu":
        raise OptionError(f"precision 'int8' is for CPUs, not {device.type}; use bf16 or fp16")
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    features = cpu_features()
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


def name_of(dtype: torch.dtype, int8: bool) -> str:
    """What `choose_dtype` was asked for, or chose."""
    return "int8" if int8 else next(name for name, known in _DTYPES.items() if known == dtype)


def cpu_features() -> Mapping[str, object]:
    """What this processor can do, by name (`avx512_bf16`, `amx_bf16`); nothing is known where torch cannot say."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
