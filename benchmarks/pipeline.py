"""A whole `blip-batch run` against the engine alone, on the same photo-sized JPEGs; and who uses the processors.

    python -m benchmarks.pipeline --images 192 --repeats 3
    python -m benchmarks.pipeline --images 192 --store s3

The engine alone gets decoded pixels in a process of its own, set up as a worker's. `run` is the command itself, with
its private Redis, control loop, loaders and worker. Two ratios come out: `steady` leaves out starting and stopping
(rows behind the first finished part, by the time between the first and the last one: a batch more or less, so take many
batches), `whole` is the job's own figure, from planning to the last part, loading of the model included. Processor
seconds are sampled by process. With `--store s3` the images and the results are on a local S3 server (`rclone serve
s3`), which shares the processors.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
from PIL import Image

from blip_engine import Engine
from blip_engine.images import decode_image, resized_pixels
from blip_engine.memory import keep_memory
from blip_engine.precision import choose_device
from blip_engine.requests import Request, Task, options_for

from . import common

OPTIONS: dict[Task, dict[str, Any]] = {
    "caption": {"num_beams": 3, "min_new_tokens": 20, "max_new_tokens": 20},
    "vqa": {"num_beams": 3, "min_new_tokens": 9, "max_new_tokens": 9},
    "itm": {},
}
_SAMPLE_SECONDS = 1.0  # often enough; what looks costs the engine time, too


def draw(folder: Path, prefix: str, number: int, task: Task, texts: int) -> list[Path]:
    """JPEGs of 640 x 480 with as much detail as a photograph, and `rows.jsonl` beside them, which names them so."""
    generator, paths = np.random.default_rng(0), []
    asked = common.random_texts(max(1, texts), 10)
    field = {"caption": None, "vqa": "question", "itm": "text"}[task]
    with (folder / "rows.jsonl").open("w") as rows:
        for index in range(number):
            coarse = Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = np.clip(smooth + generator.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
            paths.append(folder / f"{index:06}.jpg")
            Image.fromarray(noisy).save(paths[-1], quality=85)
            for text in asked if field else [None]:
                row = {"image": prefix + paths[-1].name} | ({field: text} if field else {})
                rows.write(json.dumps(row) + "\n")
    return paths


def engine_only(checkpoint: str, paths: Sequence[Path], given: argparse.Namespace, results: Any) -> None:
    """In a process of its own: images per second of the engine on decoded pixels."""
    keep_memory()
    common.settle_process(given)
    task: Task = given.task
    with Engine.load({task: checkpoint}, given.device, given.precision) as engine:
        side = common.config_of(given.model).vision_config.image_size
        pixels = [resized_pixels(decode_image(path.read_bytes()), (side, side)) for path in paths]
        texts = tuple(common.random_texts(given.texts, 10)) if task != "caption" else ("",)
        options = options_for(task, OPTIONS[task])

        def run(images: Sequence[Any]) -> float:
            started = time.perf_counter()
            futures = [engine.submit(Request(task, task, each, texts, options)) for each in images]
            for future in futures:
                future.result()
            return time.perf_counter() - started

        run(pixels[: max(1, len(pixels) // 4)])
        results.put(len(pixels) / run(pixels))


def alone(checkpoint: Path, paths: Sequence[Path], given: argparse.Namespace) -> float:
    """`engine_only`'s figure. Raises RuntimeError if that process fails."""
    context = get_context("spawn")
    results = context.SimpleQueue()
    child = context.Process(target=engine_only, args=(str(checkpoint), paths, given, results))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"the engine's process ended with {child.exitcode}")
    return float(results.get())


class Usage:
    """Processor seconds of a command's processes by what they are, sampled while it runs."""

    def __init__(self) -> None:
        self._seconds: dict[int, tuple[str, float]] = {}
        self._samples: list[tuple[float, dict[str, float]]] = []  # by the clock that files are dated with

    def sample(self, command: psutil.Process) -> None:
        """Look at all processes that are there now."""
        try:
            everyone = [command, *command.children(recursive=True)]
        except psutil.NoSuchProcess:  # it just ended
            return
        for process in everyone:
            try:
                times = process.cpu_times()
                name = self._name(process, command)
            except psutil.Error:  # it just ended; its last sample counts
                continue
            self._seconds[process.pid] = name, times.user + times.system
        self._samples.append((time.time(), self.seconds()))

    def _name(self, process: psutil.Process, command: psutil.Process) -> str:
        known = self._seconds.get(process.pid, ("", 0.0))[0]
        line = " ".join(process.cmdline())
        if known and (known != "loaders" or not line):  # one that ended has no line; a loader may prove to be an engine
            return known
        if process.pid == command.pid:
            return "command and control loop"
        if "redis-server" in line:
            return "redis"
        if "-m workers" in line:
            return "worker"
        if "spawn_main" not in line:
            return "other"
        loaded = any("libtorch" in region.path for region in process.memory_maps())
        return "engine" if loaded else "loaders"

    def seconds(self) -> dict[str, float]:
        """By name."""
        found: dict[str, float] = defaultdict(float)
        for name, seconds in self._seconds.values():
            found[name] += seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def cores(self, start: float, end: float) -> dict[str, float]:
        """By name, processor seconds per second between two times; empty if they are too near to each other."""
        within = [sample for sample in self._samples if start <= sample[0] <= end]
        if len(within) < 2:
            return {}
        (first, before), (last, after) = within[0], within[-1]
        return {name: (seconds - before.get(name, 0.0)) / (last - first) for name, seconds in after.items()}


def whole_run(
    manifest: str, output: str, checkpoint: Path, given: argparse.Namespace, environment: Mapping[str, str]
) -> tuple[float, Usage]:
    """Wall seconds of `blip-batch run`, and who used the processors. Raises RuntimeError if it fails."""
    options = [f"--option={name}={json.dumps(value)}" for name, value in OPTIONS[given.task].items()]
    command = [
        sys.executable, "-m", "orchestrator.cli", "run", manifest, "--task", given.task, "--output", output,
        "--model", str(checkpoint), "--chunk-rows", str(given.chunk_rows), "--device", given.device,
        "--precision", given.precision, *options,
    ]  # fmt: skip
    if given.threads:
        environment = {**environment, "OMP_NUM_THREADS": str(given.threads)}
    usage, started = Usage(), time.monotonic()
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env={**os.environ, **environment})
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            usage.sample(watched)
            time.sleep(_SAMPLE_SECONDS)
        if process.returncode:
            told.seek(0)
            raise RuntimeError(f"blip-batch run ended with {process.returncode}: {told.read()[-2000:]}")
    return time.monotonic() - started, usage


def figures(folder: Path, images: int, usage: Usage) -> dict[str, Any]:
    """Images per second of a finished job with its output in `folder`, and milliseconds of every process per image."""
    summary = json.loads((folder / "summary.json").read_text())
    if summary["request_counts"]["failed"]:
        raise RuntimeError(f"rows failed: {summary['errors']}")
    parts = sorted(((folder / part["key"]).stat().st_mtime, part["rows"]) for part in summary["parts"])
    start, end = parts[0][0], parts[-1][0]
    if end <= start:
        raise RuntimeError("one part says nothing of the rate: take more --images or fewer --chunk-rows")
    behind = sum(rows for _, rows in parts[1:]) * images / summary["request_counts"]["total"]
    steady = behind / (end - start)
    return {
        "steady": steady,
        "whole": images / summary["seconds"],
        "steady_cores": (cores := usage.cores(start, end)),
        "steady_cpu_ms_per_image": {name: 1e3 * each / steady for name, each in cores.items()},
    }


@contextmanager
def store(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path, Mapping[str, str]]]:
    """Where images and results are: the prefix to name, the same as a folder, and the environment to reach it with."""
    if given.store == "local":
        yield str(folder), folder, {}
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from servers import RcloneServer  # type: ignore[import-not-found] # noqa: PLC0415 - of the tests

    server = RcloneServer(folder)
    server.start()
    bucket = folder / "rclone" / "blip"
    bucket.mkdir()
    try:
        yield "s3://blip", bucket, {**server.s3_environment(), "BLIP_ALLOW_UNCONDITIONAL_PUT": "true"}
    finally:
        server.kill()


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every repeat: the engine alone, then the whole."""
    repeats = []
    with tempfile.TemporaryDirectory() as name, store(given, Path(name)) as (prefix, folder, environment):
        (folder / "in").mkdir()
        checkpoint = common.random_checkpoint(Path(name) / "model", given.task, given.model)
        paths = draw(folder / "in", f"{prefix}/in/", given.images, given.task, given.texts)
        for repeat in range(given.repeats):
            print(f"repeat {repeat + 1} of {given.repeats} ...", file=sys.stderr, flush=True)
            engine = alone(checkpoint, paths, given)
            output = f"out-{repeat}"
            manifest = f"{prefix}/in/rows.jsonl"
            wall, usage = whole_run(manifest, f"{prefix}/{output}", checkpoint, given, environment)
            found = figures(folder / output, given.images, usage)
            repeats.append({"engine": engine, **found, "wall": wall, "cpu_seconds": usage.seconds()})
    return repeats


def show(repeats: Sequence[dict[str, Any]]) -> None:
    """The ratios, and the processors' time of the last repeat."""
    rows = []
    for name in ("steady", "whole"):
        ratios = sorted(each[name] / each["engine"] for each in repeats)
        middle = {side: statistics.median(each[side] for each in repeats) for side in ("engine", name)}
        spread = f"{ratios[0]:.3f}-{ratios[-1]:.3f}"
        rows.append([name, middle["engine"], middle[name], statistics.median(ratios), spread])
    common.print_table(("rate", "engine alone, images/s", "run, images/s", "ratio", "spread"), rows)
    print()
    last = repeats[-1]
    print(f"processor time of the last run, {last['wall']:.1f} s from start to end:")
    table = [
        [name, seconds, last["steady_cores"].get(name), last["steady_cpu_ms_per_image"].get(name)]
        for name, seconds in last["cpu_seconds"].items()
    ]
    common.print_table(("process", "CPU seconds", "cores while steady", "CPU ms per image while steady"), table)


def main(arguments_given: Sequence[str] | None = None) -> None:
    """Measure both, print the ratios, and who used the processors."""
    parser = common.arguments(__doc__)
    parser.add_argument("--task", choices=list(OPTIONS), default="caption")
    parser.add_argument("--texts", type=int, default=1, help="questions or texts about every image")
    parser.add_argument("--images", type=int, help="default: 192; on a GPU 8192")
    parser.add_argument("--chunk-rows", type=int, help="small, for many parts to tell the steady rate by; two chunks "
                        "must fill a batch of the engine (default: 16; on a GPU 256)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store", choices=["local", "s3"], default="local")
    parser.add_argument("--quick", action="store_true", help="1 repeat of 24 images: whether it runs")
    given = parser.parse_args(arguments_given)
    device = choose_device(given.device)
    if given.quick:
        given.images, given.repeats, given.chunk_rows = 24, 1, 8
    given.images = given.images or (8192 if device.type == "cuda" else 192)
    given.chunk_rows = given.chunk_rows or (256 if device.type == "cuda" else 16)
    facts = common.machine(device) | {"model": given.model, "precision": given.precision}
    common.print_machine(facts)
    repeats = compare(given)
    show(repeats)
    common.write_json(given.json, facts, repeats=repeats)


if __name__ == "__main__":
    main()
