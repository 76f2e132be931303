"""How images reach the engine, through the whole system: settings that change the way and not the words."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from servers import RedisServer
from system import records

from orchestrator.errors import UsageError
from orchestrator.settings import Settings, load_settings
from workers.worker import Worker


def blip_batch(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)],
        env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_resized_on_the_device_the_captions_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    subprocess.run([sys.executable, "-m", "blip_engine.shapes.drawings", str(folder), "--count", "60"], check=True)
    for path in (folder / "images").iterdir():  # drawings are at the model's size: these are not
        with Image.open(path) as image:
            image.resize((150, 120), Image.Resampling.LANCZOS).save(path)
    found = {}
    for resize in ("pillow", "device"):
        output = tmp_path / resize
        process = blip_batch(
            "run", folder / "caption.jsonl", "--task", "caption", "--model", "demo", "--output", output,
            "--chunk-rows", 30, BLIP_RESIZE=resize, BLIP_JPEG_DRAFT="true", BLIP_FETCHES="3",
        )  # fmt: skip
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found[resize] = [record["result"] for record in records(output)]
    words = {resize: [result["caption"] for result in results] for resize, results in found.items()}
    assert words["device"] == words["pillow"]
    assert len(set(words["device"])) > 30
    scores = [[result["score"] for result in results] for results in found.values()]
    assert scores[0] != scores[1]  # it was another way
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


@pytest.fixture
def worker(redis_server: RedisServer) -> Iterator[Worker]:
    worker = Worker(preloading("caption:demo", "itm:demo"), "w")
    yield worker
    worker.close()


def preloading(*named: str) -> Settings:
    return load_settings(preload=",".join(named), loaders=1, device="cpu")


def test_models_are_loaded_before_any_job_asks(worker: Worker) -> None:
    worker.start()
    assert not worker.engine.loading
    assert worker._presence["models"] == ["demo"]
    sizes = [worker.engine.load_model("demo", task).result(60).image_size for task in ("caption", "itm")]
    assert sizes == [(64, 64), (64, 64)]
    assert list(worker.engine._loads) == ["caption:demo", "itm:demo"]  # asked for again, they were there


@pytest.mark.parametrize("wrong", ["demo", "caption:", "capfilt:demo", "caption demo"])
def test_a_wrong_preload_is_one_line(redis_server: RedisServer, wrong: str) -> None:
    worker = Worker(preloading(wrong), "w")
    try:
        with pytest.raises(UsageError, match=f"BLIP_PRELOAD='{wrong}': write TASK:MODEL"):
            worker.start()
    finally:
        worker.close()
