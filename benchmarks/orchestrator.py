"""How much the system itself costs: planning, handing out, writing and finalizing, with no image and no model.

    python -m benchmarks.orchestrator plan --rows 100000000
    python -m benchmarks.orchestrator job --rows 10000000
    python -m benchmarks.orchestrator fairness

`plan`: the time from submit to `in_progress` of a manifest of JSON Lines of 100 bytes each, on a local S3 server that
makes the bytes up as they are asked for (it shares the processors), with the peak memory of the orchestrator's process,
and what Redis holds of the job at most, with as many chunks leased as ever are.

`job`: a whole job from submit to `completed`, through the real services: Redis with its log on disk, the orchestrator,
workers. The workers are real but for loaders and engine: each row has its result at once (`benchmarks.dry_worker`).
Manifest and output are on local disk. Then `verify` reads it all again. `--peer-python PYTHON` names a Python with Ray
Data (`pip install "ray[data]"` in a virtual environment of its own), for the same job through that; see `ray_peer`.

`fairness`: the seconds of a job of 200 rows alone, and beside one of a million rows, with a whole worker, loaders and
all, around an engine that answers at once.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from orchestrator.contract import Hint, JobState
from orchestrator.jobs import make_spec, submit
from orchestrator.ledger import Ledger
from orchestrator.plan import load_plan
from orchestrator.settings import load_settings
from orchestrator.storage import open_store

from . import common, synthetic_s3

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
from servers import RedisServer, free_port  # type: ignore[import-not-found] # noqa: E402 -- of the tests

_MB = 1e6
_SAMPLE_SECONDS = 0.2
_LARGEST_CHUNK = 4096  # rows: what a chunk of automatic size has at such speeds


class System:
    """The services around a Redis of their own, and what they use."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.environment = {**os.environ, **environment}
        self._redis = RedisServer(folder)
        self._redis.aof = True  # as it is to be run
        self._redis.start()
        self.environment["BLIP_REDIS_URL"] = os.environ["BLIP_REDIS_URL"] = self._redis.url
        self.settings = load_settings()
        self.ledger = Ledger.connect(self.settings)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.redis_peak = 0.0  # bytes above what an empty one holds
        self._cpu: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def start(self, name: str, module: str, *arguments: str) -> None:
        """Start a module as a process."""
        with (self.folder / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", module, *arguments]
            self.processes[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def _sample(self) -> None:
        client = self._redis.client()
        empty = client.info("memory")["used_memory"]
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.redis_peak = max(self.redis_peak, client.info("memory")["used_memory"] - empty)
            for name, process in [*self.processes.items(), ("redis", self._redis.process)]:
                self._look(name, process.pid)
        client.close()

    def _look(self, name: str, pid: int) -> None:
        try:
            times = psutil.Process(pid).cpu_times()
            status = Path(f"/proc/{pid}/status").read_text()
        except (psutil.Error, OSError):  # it ended; its last sample counts
            return
        self._cpu[name] = times.user + times.system
        if "VmHWM" in status:
            self._peaks[name] = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / _MB

    def usage(self) -> dict[str, dict[str, float]]:
        """By process: CPU seconds, and peak resident memory in MB."""
        time.sleep(2 * _SAMPLE_SECONDS)
        return {name: {"cpu_seconds": cpu, "peak_mb": self._peaks.get(name, 0.0)} for name, cpu in self._cpu.items()}

    def submit(self, manifest: str, output: Path, chunk_rows: int | None = None) -> str:
        """Submit a captioning job; its id."""
        model = self.folder / "model"
        model.mkdir(exist_ok=True)
        spec = make_spec(manifest, "caption", str(output), model=str(model), chunk_rows=chunk_rows)
        return submit(self.ledger, spec, self.settings)

    def until(self, job: str, holds: Callable[[JobState], bool]) -> JobState:
        """Wait for a job. Raises RuntimeError when it fails, or a process ends."""
        while True:
            state = self.ledger.state(job)
            if state is not None and (state.error or holds(state)):
                break
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if ended:
                raise RuntimeError(f"{ended[0]} ended: {(self.folder / f'{ended[0]}.log').read_text()[-2000:]}")
            time.sleep(0.02)
        if state.error:
            raise RuntimeError(state.error["message"])
        return state

    def close(self) -> None:
        """End everything."""
        self._stop.set()
        self._sampler.join()
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.ledger.close()
        self._redis.kill()


@contextmanager
def running(given: argparse.Namespace, **environment: str) -> Iterator[System]:
    """A system in a folder of its own, which vanishes."""
    with tempfile.TemporaryDirectory(prefix="blip-bench-", dir=given.folder) as name, ExitStack() as stack:
        before = dict(os.environ)
        stack.callback(lambda: (os.environ.clear(), os.environ.update(before)))
        system = System(Path(name), BLIP_ALLOWED_BUCKETS="bench", BLIP_API_PORT="0", **environment)
        stack.callback(system.close)
        yield system


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """Plan a manifest that is on S3."""
    port = free_port()
    s3 = {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    os.environ.update(s3)
    with running(given, **s3) as system:
        system.start("s3", "benchmarks.synthetic_s3", str(port), str(given.latency))
        system.start("orchestrator", "orchestrator")
        _await_control_loop(system)
        _crowd(system)
        output = system.folder / "out"
        job = system.submit(f"s3://bench/rows-{given.rows}.jsonl", output, given.chunk_rows)
        state = system.until(job, lambda state: state.status == "in_progress")
        assert state.created_at is not None
        assert state.in_progress_at is not None
        seconds = state.in_progress_at - state.created_at
        leased = _lease_all(system, job, output)
        return {
            "rows": state.total, "bytes": state.total * synthetic_s3.ROW_BYTES, "chunks": state.chunks,
            "seconds": seconds, "rows_per_second": state.total / seconds, "leased": leased, **_costs(system),
        }  # fmt: skip


def _await_control_loop(system: System) -> None:
    """Until it leads: its start is not planning."""
    while system.ledger.lead("bench", 0.0) is not None:
        time.sleep(0.02)
        if (code := system.processes["orchestrator"].poll()) is not None:
            raise RuntimeError(f"the orchestrator ended with {code}")


def _crowd(system: System) -> None:
    """Workers that can hold as many chunks as may ever be in flight of one job."""

    def seen() -> None:
        while not system._stop.wait(1):
            system.ledger.worker_seen("crowd", {"slots": 4096, "models": []})

    system.ledger.worker_seen("crowd", {"slots": 4096, "models": []})
    threading.Thread(target=seen, daemon=True).start()


def _lease_all(system: System, job: str, output: Path) -> int:
    """Lease every chunk that is handed out; how many that is."""
    found = load_plan(open_store(str(output), system.settings), system.settings)
    assert found is not None
    most = min(found.chunks, 4096)
    while system.ledger.in_flight(job)[2] < most:
        time.sleep(0.05)
    for number in range(most):
        system.ledger.acquire(Hint.of(job, found.hash, found.chunk(number)), "crowd")
    return system.ledger.in_flight(job)[1]


def _costs(system: System) -> dict[str, Any]:
    return {"processes": system.usage(), "redis_job_mb": system.redis_peak / _MB}


def write_manifest(path: Path, rows: int) -> None:
    """The rows of `synthetic_s3` as a file."""
    with path.open("wb") as file:
        for block in synthetic_s3.rows(0, rows * synthetic_s3.ROW_BYTES):
            file.write(block)


def job(given: argparse.Namespace) -> dict[str, Any]:
    """A whole job around dry workers, then `verify`."""
    with running(given) as system:
        manifest, output = system.folder / "rows.jsonl", system.folder / "out"
        write_manifest(manifest, given.rows)
        system.start("orchestrator", "orchestrator")
        for number in range(given.workers):
            system.start(f"worker {number + 1}", "benchmarks.dry_worker")
        while len(system.ledger.live_workers()) < given.workers:
            time.sleep(0.05)
        done = system.submit(str(manifest), output, given.chunk_rows)
        state = system.until(done, lambda state: state.status == "completed")
        times = [state.created_at, state.in_progress_at, state.finalizing_at, state.completed_at]
        seconds = [float(end or 0) - float(begin or 0) for begin, end in pairwise(times)]
        costs = _costs(system)
        audit, verify_seconds = _verify(output)
        return {
            "rows": state.total, "chunks": state.chunks, "seconds": sum(seconds),
            "rows_per_second": state.total / sum(seconds), "plan_seconds": seconds[0], "work_seconds": seconds[1],
            "finalize_seconds": seconds[2], "verify_seconds": verify_seconds, "verify_ok": audit["ok"],
            "rows_found": audit["rows_found"], "failed": audit["failed"],
            **_peer(given, manifest, state.total), **costs,
        }  # fmt: skip


def _peer(given: argparse.Namespace, manifest: Path, rows: int) -> dict[str, Any]:
    """The same through Ray Data, if asked for."""
    if given.peer_python is None:
        return {}
    script, output = Path(__file__).with_name("ray_peer.py"), manifest.with_name("peer")
    command = [given.peer_python, str(script), str(manifest), str(output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return {"peer": f"Ray Data {told['ray']}", "peer_rows_per_second": rows / told["seconds"]}


def _verify(output: Path) -> tuple[dict[str, Any], float]:
    began = time.monotonic()
    command = [sys.executable, "-m", "orchestrator.cli", "verify", str(output), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout), time.monotonic() - began


def fairness(given: argparse.Namespace) -> dict[str, Any]:
    """A small job alone, and beside a huge one."""
    from PIL import Image  # noqa: PLC0415 -- only here

    with running(given, BLIP_ENGINE="dry_engine:Engine", BLIP_LOADERS="1", PYTHONPATH=str(TESTS)) as system:
        for number in range(200):
            Image.new("RGB", (64, 48), (number, 0, 7)).save(system.folder / f"{number}.png")
        small, huge = (_of_images(system.folder, rows) for rows in (200, given.rows))
        system.start("orchestrator", "orchestrator")
        system.start("worker", "workers")
        times: dict[str, list[float]] = {"warm": [], "alone": [], "beside": []}
        times["warm"].append(_seconds_of(system, small, "warm"))
        for repeat in range(given.repeats):
            times["alone"].append(_seconds_of(system, small, f"alone-{repeat}"))
        running_job = system.submit(str(huge), system.folder / "huge", given.chunk_rows)
        system.until(running_job, lambda state: state.chunks_done >= 4)
        for repeat in range(given.repeats):
            times["beside"].append(_seconds_of(system, small, f"beside-{repeat}"))
        state = system.until(running_job, lambda _: True)
        assert state.status == "in_progress", "the huge job was not huge enough"
        alone, beside = statistics.median(times["alone"]), statistics.median(times["beside"])
        return {
            "huge_rows": state.total, "huge_rows_done": state.completed, "rows": 200, "times": times,
            "alone_seconds": alone, "beside_seconds": beside, "ratio": beside / alone,
        }  # fmt: skip


def _of_images(folder: Path, rows: int) -> Path:
    path = folder / f"rows-{rows}.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"image": "{number % 200}.png"}}\n' for number in range(rows))
    return path


def _seconds_of(system: System, manifest: Path, output: str) -> float:
    began = time.monotonic()
    job = system.submit(str(manifest), system.folder / output)
    system.until(job, lambda state: state.status == "completed")
    return time.monotonic() - began


def show(found: Mapping[str, Any]) -> None:
    """The figures, and who used processors and memory."""
    plain = {name: value for name, value in found.items() if not isinstance(value, dict)}
    common.print_table(("what", "value"), list(plain.items()))
    if "processes" in found:
        print()
        rows = [[name, each["cpu_seconds"], each["peak_mb"]] for name, each in found["processes"].items()]
        common.print_table(("process", "CPU seconds", "peak memory, MB"), rows)


def main(arguments_given: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["plan", "job", "fairness"])
    parser.add_argument("--rows", type=int, help="default: plan 100,000,000; job 10,000,000; fairness 1,000,000")
    parser.add_argument("--chunk-rows", type=int, help="default: plan automatic; job 4096; fairness 1000")
    parser.add_argument("--workers", type=int, default=2, help="of `job`; processes of two threads each")
    parser.add_argument("--latency", type=float, default=0.0, help="of `plan`; seconds that each GET waits")
    parser.add_argument("--peer-python", help="of `job`; a Python with Ray Data, to run the same through that")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for manifest and output; default: the system's temporary one")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--quick", action="store_true", help="few rows: whether it runs")
    given = parser.parse_args(arguments_given)
    given.rows = given.rows or _ROWS[given.mode][given.quick]
    given.chunk_rows = given.chunk_rows or {"plan": None, "job": _LARGEST_CHUNK, "fairness": 1000}[given.mode]
    facts = common.machine(torch.device("cpu"))
    common.print_machine(facts)
    measure = {"plan": plan, "job": job, "fairness": fairness}[given.mode]
    repeats = [measure(given) for _ in range(1 if given.mode == "fairness" else given.repeats)]
    for found in repeats:
        show(found)
    if len(repeats) > 1:
        print(f"\nmedian: {statistics.median(found['rows_per_second'] for found in repeats):,.0f} rows/s")
    common.write_json(given.json, facts, repeats=repeats)


#: mode -> rows as issued, and for `--quick`
_ROWS: dict[str, tuple[int, int]] = {
    "plan": (100_000_000, 1_000_000), "job": (10_000_000, 50_000), "fairness": (1_000_000, 1_000_000),
}  # fmt: skip

if __name__ == "__main__":
    main()
