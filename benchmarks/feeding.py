"""What it costs to bring an image to the engine, in processor time: GET, decode, resize, and the messages around them.

    python -m benchmarks.feeding
    python -m benchmarks.feeding --rows 20000

`GET`: images of 60 kB from a local S3 server, through boto3's client and as loaders do it (the client's side only).
`JPEG`: to the model's pixels, with each of the settings that change how. `row`: rows about tiny images through loaders
and engine process, with an engine that answers at once: microseconds of each process per row.
"""

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from PIL import Image

from blip_engine.images import decode_image, resized_pixels
from blip_engine.requests import Caption, Request, options_for
from blip_engine.resizing import resized
from orchestrator.contract import Row
from orchestrator.s3 import s3_client
from orchestrator.s3_images import fetch_object
from workers.engine_process import EngineProcess, EngineSettings
from workers.loader import LoaderLimits, LoaderPool
from workers.pipeline import ChunkRun, JobContext, Lane
from workers.slots import Slots

from . import common

_SIDE = 384
_SIZES = ((640, 480), (1280, 960), (2048, 1536), (4000, 3000))
_CHUNK = 256  # rows


def milliseconds(action: Callable[[], object], times: int) -> float:
    """Of this process's processor time, on average."""
    action()
    started = time.process_time()
    for _ in range(times):
        action()
    return 1e3 * (time.process_time() - started) / times


@contextmanager
def images_on_s3(number: int) -> Iterator[list[str]]:
    """The URIs of images on `rclone serve s3`."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from servers import RcloneServer  # type: ignore[import-not-found] # noqa: PLC0415 - of the tests

    with tempfile.TemporaryDirectory() as name:
        server = RcloneServer(Path(name))
        server.start()
        os.environ.update(server.s3_environment())
        bucket = Path(name) / "rclone" / "blip"
        bucket.mkdir()
        for index in range(number):
            (bucket / f"{index}.jpg").write_bytes(os.urandom(60_000))
        try:
            yield [f"s3://blip/{index}.jpg" for index in range(number)]
        finally:
            server.kill()


def measure_gets(times: int) -> dict[str, float]:
    """Milliseconds of a GET."""
    with images_on_s3(64) as uris:
        client = s3_client(10.0)
        keys = cycle(uri.rpartition("/")[2] for uri in uris)
        places = cycle(uris)

        def by_client() -> bytes:
            return client.get_object(Bucket="blip", Key=next(keys))["Body"].read()

        def as_loaders() -> bytes:
            return fetch_object(next(places), 10**6, 30.0)

        return {"boto3's client": milliseconds(by_client, times), "loaders": milliseconds(as_loaders, times)}


def photograph(width: int, height: int) -> bytes:
    """A JPEG with as much detail as one."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(smooth + generator.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


def measure_images(times: int) -> list[list[object]]:
    """Milliseconds of an image by size, and how far a setting's pixels are from the default's, in levels of 255."""
    rows: list[list[object]] = []
    for width, height in _SIZES:
        data = photograph(width, height)
        plain = resized_pixels(decode_image(data), _SIDE).astype(int)
        draft = resized_pixels(decode_image(data, draft=2 * _SIDE), _SIDE)
        pixels = torch.from_numpy(np.array(decode_image(data)))
        device = resized(pixels, (_SIDE, _SIDE)).permute(1, 2, 0).numpy()
        rows.append([
            f"{width} x {height}",
            milliseconds(lambda data=data: decode_image(data), times),  # type: ignore[misc]
            milliseconds(lambda data=data: resized_pixels(decode_image(data), _SIDE), times),  # type: ignore[misc]
            milliseconds(lambda data=data: resized_pixels(decode_image(data, draft=2 * _SIDE), _SIDE), times),  # type: ignore[misc]
            float(np.abs(draft - plain).mean()), int(np.abs(draft - plain).max()),
            float(np.abs(device - plain).mean()), int(np.abs(device - plain).max()),
        ])  # fmt: skip
    return rows


class Engine:
    """Answers at once; see `measure_rows`."""

    def __init__(self, device: str, precision: str, compiled: bool | None) -> None:
        """As of the real one."""

    def load_model(self, _name: str, model: str, _task: str) -> Any:
        """As of the real one."""
        facts = {"revision": None, "weights_sha256": "0" * 64, "image_size": (32, 32), "precision": "", "device": "cpu"}
        return SimpleNamespace(source=model, **facts)

    def submit(self, _request: Request) -> "Future[list[Caption]]":
        """As of the real one."""
        future: Future[list[Caption]] = Future()
        future.set_result([Caption("a photograph of a dog on a beach", -0.5123, (2023, 1997, 102))])
        return future


def measure_rows(number: int) -> dict[str, float]:
    """Microseconds per row of the worker's processes."""
    with tempfile.TemporaryDirectory() as name:
        for index in range(_CHUNK):
            Image.new("RGB", (32, 32), (index, 0, 7)).save(Path(name) / f"{index}.png")
        rows = [Row(n, f"{name}/{n}.png", n, ("",), False, {}) for n in range(_CHUNK)]
        slots = Slots(_CHUNK)
        loaders = LoaderPool(1, slots, LoaderLimits(10**6, 10**6, 5.0, 30.0), print)
        engine = EngineProcess(EngineSettings("benchmarks.feeding:Engine", "cpu", "fp32", 60.0, 60.0), slots, print)
        loaders.start()
        engine.start()
        try:
            checkpoint = engine.load_model("none", "caption").result(60)
            job = JobContext("caption", options_for("caption"), checkpoint, str)
            lane = Lane(range(_CHUNK), loaders, engine)
            pids = {"engine process": [engine.pid or 0], "loaders": loaders.pids()}
            return _per_row(lambda: lane.run(ChunkRun(job, rows, lambda: None)), number, pids)
        finally:
            loaders.close()
            engine.close()


def _per_row(chunk: Callable[[], object], number: int, others: Mapping[str, list[int]]) -> dict[str, float]:
    def seconds() -> dict[str, float]:
        everyone = {"parent: lane, loaders' and engine's threads": [os.getpid()], **others}
        return {name: sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids) for name, pids in everyone.items()}

    chunk()
    before, chunks = seconds(), max(1, number // _CHUNK)
    for _ in range(chunks):
        chunk()
    return {name: 1e6 * (spent - before[name]) / (chunks * _CHUNK) for name, spent in seconds().items()}


def main() -> None:
    """Measure all three, print the tables."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--times", type=int, default=20, help="of each image; GETs twenty times as many")
    given = parser.parse_args()
    facts = common.machine(common.settle_process(given))
    common.print_machine(facts)
    gets = measure_gets(20 * given.times)
    common.print_table(("GET of 60 kB", "ms"), list(gets.items()))
    print()
    header = ("JPEG", "decode, ms", "and resize", "as a draft", "draft's levels off", "most", "device's", "most")
    images = measure_images(given.times)
    common.print_table(header, images)
    print()
    rows = measure_rows(given.rows)
    common.print_table(("row", "microseconds"), list(rows.items()))
    common.write_json(given.json, facts, gets=gets, images=images, rows=rows)


if __name__ == "__main__":
    main()
