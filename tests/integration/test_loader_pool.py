"""Loader processes over real images: codes of bad ones, and what a death or a hang costs."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from blip_engine.images import decode_image, resized_pixels
from workers import load
from workers.load import decode_into as whole_decode
from workers.loader import LoaderLimits, LoaderPool, loader_main
from workers.messages import Failure
from workers.slots import DECODING, Slots

SIZE = (24, 32)


class Pool:
    """A pool over eight slots, and a way to load a list of files."""

    def __init__(self, count: int = 1, hang_timeout: float = 30.0) -> None:
        self.slots = Slots(8)
        self.broken: list[str] = []
        limits = LoaderLimits(10**6, 10**6, 5.0, hang_timeout)
        self.pool = LoaderPool(count, self.slots, limits, self.broken.append)
        self.pool.start()
        self.replies: SimpleQueue[tuple[Any, Any]] = SimpleQueue()

    def submit(self, paths: list[Path]) -> None:
        for slot, path in enumerate(paths):
            self.pool.load(slot, str(path), SIZE, self.replies, slot)

    def outcomes(self, count: int) -> list[Any]:
        by_slot = dict(self.replies.get(timeout=20) for _ in range(count))
        return [by_slot[slot] for slot in range(count)]

    def load(self, paths: list[Path]) -> list[Any]:
        self.submit(paths)
        return self.outcomes(len(paths))


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.pool.close()


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = []
    for n in range(8):
        pixels = np.random.default_rng(n).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{n}.jpg")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def expect_pixels(pool: Pool, images: list[Path], slots: list[int]) -> None:
    for slot in slots:
        assert np.array_equal(
            pool.slots.pixels(slot, SIZE), resized_pixels(decode_image(images[slot].read_bytes()), SIZE)
        )


@pytest.mark.parametrize("count", [1, 3])
def test_pixels_land_in_their_slots(images: list[Path], count: int) -> None:
    pool = Pool(count)
    try:
        assert pool.load(images) == [SIZE] * 8
        expect_pixels(pool, images, list(range(8)))
        assert len(pool.pool.pids()) == count
    finally:
        pool.pool.close()


def test_bad_images_have_codes_and_neighbours_are_fine(pool: Pool, images: list[Path], tmp_path: Path) -> None:
    whole = images[0].read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_bytes(b"no image at all")
    (tmp_path / "big.jpg").write_bytes(b"\xff\xd8" + b"\0" * 10**6)
    Image.new("1", (2000, 2000)).save(tmp_path / "bomb.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    names = ["cut.jpg", "text.jpg", "big.jpg", "bomb.png", "pipe.jpg", "absent.jpg"]
    outcomes = pool.load([images[0], *(tmp_path / name for name in names), images[7]])
    assert [getattr(outcome, "code", None) for outcome in outcomes] == [
        None, "image_truncated", "image_unreadable", "image_too_large", "image_too_large", "image_unreadable",
        "image_not_found", None,
    ]  # fmt: skip
    expect_pixels(pool, images, [0, 7])
    assert pool.pool.restarts == 0


def held_loader(pool: Pool, images: list[Path]) -> psutil.Process:
    """A stopped loader that holds the first image, with others behind it."""
    assert pool.load(images[:1]) == [SIZE]
    (pid,) = pool.pool.pids()
    loader = psutil.Process(pid)
    loader.send_signal(signal.SIGSTOP)
    pool.submit(images)
    time.sleep(0.2)
    return loader


def test_a_loader_that_is_killed_once_costs_nothing(pool: Pool, images: list[Path]) -> None:
    held_loader(pool, images).kill()
    assert pool.outcomes(8) == [SIZE] * 8
    expect_pixels(pool, images, list(range(8)))
    assert pool.pool.restarts == 1


def test_an_image_that_kills_its_loader_fails_alone(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.loader.loader_main", _dies_of_image_3)
    pool = Pool(2)
    try:
        outcomes = pool.load(images)
    finally:
        pool.pool.close()
    assert outcomes[3] == Failure("crashed", "the loader process died on this image (signal 9)")
    assert outcomes[:3] + outcomes[4:] == [SIZE] * 7
    assert pool.pool.restarts == 2


def _dies_of_image_3(pipe: Connection, slots: Slots, limits: LoaderLimits) -> None:
    load.decode_into = _deadly_decode
    loader_main(pipe, slots, limits)


def _deadly_decode(slots: Slots, slot: int, *rest: Any) -> Failure | tuple[int, int]:
    if slot == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole_decode(slots, slot, *rest)


@pytest.mark.parametrize(("decoding", "code"), [(False, "fetch_timeout"), (True, "image_unreadable")])
def test_a_hanging_loader_is_killed(images: list[Path], decoding: bool, code: str) -> None:
    pool = Pool(hang_timeout=1.0)
    try:
        loader = held_loader(pool, images)
        if decoding:  # what the loader itself writes once it has the bytes
            pool.slots.set_phase(0, DECODING)
        outcomes = pool.outcomes(8)
        assert outcomes[0].code == code
        assert "more than 1 seconds" in outcomes[0].message
        assert outcomes[1:] == [SIZE] * 7
        assert not loader.is_running()
    finally:
        pool.pool.close()


def test_an_idle_loader_that_dies_costs_nothing(pool: Pool, images: list[Path]) -> None:
    assert pool.load(images[:1]) == [SIZE]
    os.kill(pool.pool.pids()[0], signal.SIGKILL)
    assert pool.load(images) == [SIZE] * 8


def test_loaders_that_cannot_start_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.loader.loader_main", _dies)
    told = threading.Event()
    lines: list[str] = []
    pool = LoaderPool(1, Slots(1), LoaderLimits(1, 1, 1, 1), lambda line: (lines.append(line), told.set())[0])
    pool.start()
    assert told.wait(20)
    pool.close()
    assert lines[0] == "loader processes die at start (exit code 7)"


def _dies(*_: object) -> None:
    sys.exit(7)


def test_a_loader_imports_neither_torch_nor_celery() -> None:
    code = "import sys, workers.load; print([m for m in ('torch', 'celery', 'redis', 'boto3') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
