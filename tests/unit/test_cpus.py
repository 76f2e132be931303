"""What a container's CPU limit leaves of the node's processors: groups of both versions, as files of a made-up node."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workers import engine_child, loader
from workers.cpus import settle_threads, usable_cpus
from workers.slots import Slots

V2 = "0::/pod/app\n"
V1 = "11:memory:/pod/app\n4:cpu,cpuacct:/pod/app\n1:name=systemd:/pod\n"


@pytest.fixture(autouse=True)
def _node(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 processors, and nobody's decision."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # what a test sets is undone
        monkeypatch.delenv(name)


def write(root: Path, groups: str, files: dict[str, str]) -> None:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("", {}, 64),
        (V2, {"pod/app/cpu.max": "max 100000\n"}, 64),
        (V2, {"pod/app/cpu.max": "400000 100000\n"}, 4),
        (V2, {"pod/app/cpu.max": "max 100000\n", "pod/cpu.max": "250000 100000\n"}, 3),  # the pod's limit, of 2.5
        (V2, {"pod/app/cpu.max": "50000 100000\n"}, 1),
        (V2, {"cpu.max": "800000 100000\n"}, 8),  # the container sees its group at the top, and the node's path
        ("0::/../../app\n", {"app/cpu.max": "800000 100000\n"}, 8),
        (V2, {"pod/app/cpu.max": "9900000 100000\n"}, 64),  # more than there is
        (V2, {"pod/app/cpu.max": ""}, 64),
        (V2, {"pod/app/cpu.max": "nonsense 0\n"}, 64),
        (V1, {"cpu/pod/app/cpu.cfs_quota_us": "-1\n", "cpu/pod/app/cpu.cfs_period_us": "100000\n"}, 64),
        (V1, {"cpu/pod/app/cpu.cfs_quota_us": "600000\n", "cpu/pod/app/cpu.cfs_period_us": "100000\n"}, 6),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/cpu.cfs_period_us": "50000\n"}, 3),
        ("1:memory:/\n", {"memory/cpu.max": "100000 100000\n", "cpu/cpu.cfs_quota_us": "100000"}, 64),
    ],
)
def test_the_limit_of_a_group(tmp_path: Path, groups: str, files: dict[str, str], cpus: int) -> None:
    write(tmp_path, groups, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert usable_cpus(tmp_path) == cpus


def test_threads_are_no_more_than_the_limit_and_than_the_cores(tmp_path: Path) -> None:
    write(tmp_path, V2, {"sys/fs/cgroup/pod/app/cpu.max": "1600000 100000\n"})
    settle_threads(tmp_path)
    assert os.environ.pop("OMP_NUM_THREADS") == "16"
    for first in range(0, 64, 8):  # eight threads a core
        for n in range(first, first + 8):
            name = f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list"
            write(tmp_path, V2, {name: f"{first}-{first + 7}\n"})
    settle_threads(tmp_path)
    assert os.environ.pop("OMP_NUM_THREADS") == "8"


def test_without_a_limit_or_with_a_decision_threads_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle_threads(tmp_path)
    assert "OMP_NUM_THREADS" not in os.environ
    write(tmp_path, V2, {"sys/fs/cgroup/pod/app/cpu.max": "1600000 100000\n"})
    monkeypatch.setenv("OMP_NUM_THREADS", "40")
    settle_threads(tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "40"


def test_threads_that_wait_soon_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two engines on one machine take the processors from each other, for milliseconds at every operator."""
    settle_threads(tmp_path)
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    settle_threads(tmp_path)
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    settle_threads(tmp_path)
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(("device", "cpus", "count"), [("cpu", 6, 3), ("cpu", 1, 1), ("cpu", 64, 8)])
def test_loaders_follow_the_limit(monkeypatch: pytest.MonkeyPatch, device: str, cpus: int, count: int) -> None:
    monkeypatch.setattr(loader, "usable_cpus", lambda: cpus)
    assert loader.loader_count(0, device) == count
    assert loader.loader_count(5, device) == 5


def test_the_engine_process_heeds_the_limit_before_it_builds_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(engine_child, "keep_memory", lambda: None)  # it is for a process of its own
    monkeypatch.setattr(engine_child, "settle_threads", lambda: seen.append("limited"))
    pipe: Any = SimpleNamespace(send=lambda message: seen.append(message[0][0]))
    engine_child.engine_main(pipe, Slots(1), "no_such_module:Engine", "cpu", "auto", None)
    assert seen == ["limited", "broken"]


def test_the_engine_process_has_not_imported_torch_by_then() -> None:
    """What the engine process imports by itself must not bring torch, which reads the variable once."""
    script = "import sys, workers.engine_child; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
