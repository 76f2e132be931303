"""The pieces of a cluster as real processes, for tests that kill, stop and signal them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from orchestrator.contract import JobSpec, JobState
from orchestrator.jobs import make_spec, submit
from orchestrator.ledger import Ledger
from orchestrator.settings import load_settings

TESTS = Path(__file__).parent
FAST = {
    "BLIP_LEASE_SECONDS": "3", "BLIP_RENEW_SECONDS": "0.5", "BLIP_RECONCILE_SECONDS": "0.3",
    "BLIP_POLL_SECONDS": "0.05", "BLIP_API_PORT": "0",
    "BLIP_LEAD_SECONDS": "2", "BLIP_DRAIN_SECONDS": "3", "BLIP_ENGINE_TIMEOUT_SECONDS": "4",
    "BLIP_FETCH_TIMEOUT_SECONDS": "3", "BLIP_LOADER_TIMEOUT_SECONDS": "3", "BLIP_LOADERS": "1",
    "BLIP_ENGINE": "dry_engine:Engine", "PYTHONPATH": str(TESTS),
}  # fmt: skip


class Cluster:
    """Workers and orchestrators around the Redis of BLIP_REDIS_URL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, **FAST}
        self.settings = load_settings()
        self.ledger = Ledger.connect(self.settings)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.model = folder / "model"
        self.model.mkdir()

    def start(self, module: str, **environment: str) -> "subprocess.Popen[bytes]":
        log = (self.folder / f"{module}-{len(self.processes)}.log").open("wb")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", module], env={**self.environment, **environment}, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def start_worker(self, **environment: str) -> "subprocess.Popen[bytes]":
        return self.start("workers", **environment)

    def start_orchestrator(self) -> "subprocess.Popen[bytes]":
        return self.start("orchestrator")

    def submit(self, manifest: Path | str, output: Path | str, task: str = "caption", **more: Any) -> JobSpec:
        more = {"model": str(self.model), "chunk_rows": 10} | more
        spec = make_spec(str(manifest), task, str(output), **more)
        submit(self.ledger, spec, self.settings)
        return spec

    def until(self, job: str, holds: Callable[[JobState], bool], seconds: float = 60) -> JobState:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.ledger.state(job)
            if state is not None and holds(state):
                return state
            time.sleep(0.02)
        raise AssertionError(f"still {self.ledger.state(job)}\n{self.logs()}")

    def until_ended(self, job: str, seconds: float = 60) -> JobState:
        return self.until(job, lambda state: state.ended, seconds)

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))

    def close(self) -> None:
        pids = [process.pid for process in self.processes]
        trees = [
            child for pid in pids if psutil.pid_exists(pid) for child in psutil.Process(pid).children(recursive=True)
        ]
        for process in self.processes:
            process.kill()
            process.wait()
        self.ledger.close()
        psutil.wait_procs(trees, timeout=5)
        assert not [child for child in trees if child.is_running()], "children outlived their parents"


def children(pid: int, what: str) -> list[psutil.Process]:
    """The child processes of a worker that run `what` ("loader" or "engine"), told by their open shared memory."""
    found = []
    for child in psutil.Process(pid).children():
        line = " ".join(child.cmdline())
        if "multiprocessing.spawn" in line:
            found.append(child)
    return found if what == "any" else [child for child in found if _has_thread_of(child, what)]


def _has_thread_of(child: psutil.Process, what: str) -> bool:
    maps = Path(f"/proc/{child.pid}/maps").read_text()
    return ("_imaging" in maps) == (what == "loader")


def write_images(folder: Path, count: int, size: tuple[int, int] = (40, 30)) -> None:
    """`n.png` has the colour (n % 256, n // 256, 7)."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        Image.new("RGB", size, (n % 256, n // 256, 7)).save(folder / f"{n}.png")


def write_rows(path: Path, rows: "list[Mapping[str, object]]") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def simple_job(folder: Path, count: int, **fields: object) -> Path:
    """A manifest of `count` images, one row each."""
    write_images(folder, count)
    return write_rows(folder / "rows.jsonl", [{"image": f"{n}.png", "id": n, **fields} for n in range(count)])


def colour(n: int) -> str:
    return f"{n % 256},{n // 256},7"


def records(output: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for part in sorted((output / "results").glob("part-*.jsonl"))
        for line in part.read_text().splitlines()
    ]


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)
