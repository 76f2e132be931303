"""The GPU's own counters, through NVML. No GPU, no driver, no nvidia-ml-py: nothing to tell, and no error."""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any


class Gpu:
    """One device of this machine."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.name = str(nvml.nvmlDeviceGetName(handle))

    @classmethod
    def open(cls, device: str) -> "Gpu | None":
        """What torch calls `device` ("cuda:1", "auto"), with CUDA_VISIBLE_DEVICES heeded; None where there is none."""
        kind, _, index = device.partition(":")
        if kind not in {"auto", "cuda"}:
            return None
        try:
            import pynvml  # noqa: PLC0415 - optional

            pynvml.nvmlInit()
            return cls(pynvml, _handle(pynvml, int(index or 0)))
        except Exception:  # of whatever kind: a worker must not fail for want of a gauge
            return None

    def read(self) -> Mapping[str, float]:
        """Metrics by name; those that this device does not have are absent (a share of a GPU has no utilization)."""
        found: dict[str, float] = {}
        with suppress(self._nvml.NVMLError):
            found["blip_gpu_utilization_ratio"] = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
        with suppress(self._nvml.NVMLError):
            found["blip_gpu_memory_used_bytes"] = float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        return found


def _handle(nvml: Any, index: int) -> Any:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = str(index) if visible is None else visible.split(",")[index].strip()
    if not chosen:
        raise LookupError("CUDA_VISIBLE_DEVICES hides every GPU")
    if chosen.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(chosen))
    return nvml.nvmlDeviceGetHandleByUUID(chosen)
