"""Which GPU's numbers are told. NVML itself needs a driver: a stand-in for its module says what it was asked."""

import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.settings import load_settings
from workers.gpu import Gpu
from workers.metrics import WorkerMetrics


class NVMLError(Exception):
    pass


class Nvml(SimpleNamespace):
    """Two GPUs, and a share of one that has no utilization."""

    NVMLError = NVMLError

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return ["GPU-a", "GPU-b"][index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"NVIDIA {handle}"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if handle.startswith("MIG"):
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=87)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=6 << 30)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    module = Nvml(broken=False)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return module


@pytest.mark.parametrize(
    ("device", "visible", "name"),
    [
        ("auto", None, "NVIDIA GPU-a"), ("cuda", None, "NVIDIA GPU-a"), ("cuda:1", None, "NVIDIA GPU-b"),
        ("cuda", "1", "NVIDIA GPU-b"), ("cuda:1", "1, 0", "NVIDIA GPU-a"), ("auto", "MIG-x", "NVIDIA MIG-x"),
    ],
)  # fmt: skip
def test_the_device_is_the_one_that_torch_means(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, device: str, visible: str | None, name: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = Gpu.open(device)
    assert gpu is not None
    assert gpu.name == name


def series(device: str) -> dict[str, float]:
    metrics = WorkerMetrics(load_settings(device=device))
    return {sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples}


def test_numbers_of_a_gpu(nvml: Nvml) -> None:
    found = series("cuda")
    assert found["blip_gpu_utilization_ratio"] == 0.87
    assert found["blip_gpu_memory_used_bytes"] == 6 << 30


def test_a_share_of_a_gpu_has_no_utilization(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-x")
    found = series("auto")
    assert "blip_gpu_utilization_ratio" not in found
    assert "blip_gpu_memory_used_bytes" in found


@pytest.mark.parametrize("why", ["cpu", "no driver", "none visible", "no such index", "no module", "a strange device"])
def test_without_a_gpu_the_series_are_absent(nvml: Nvml, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "no module":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    if why == "none visible":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    nvml.broken = why == "no driver"
    found = series({"cpu": "cpu", "no such index": "cuda:7", "a strange device": "cuda:x"}.get(why, "auto"))
    assert not [name for name in found if name.startswith("blip_gpu")]
    assert found["blip_worker_info"] == 1


def test_the_real_module_without_a_driver_is_no_error() -> None:
    assert import_module("pynvml").nvmlInit
    assert "blip_worker_info" in series("auto")
