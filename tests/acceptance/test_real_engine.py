"""The whole system with the real engine and the bundled checkpoints: accuracy, memory, and what absent torch says."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from servers import RedisServer
from system import Cluster, records

from orchestrator.verify import verify

DRAWINGS = 500


def blip_batch(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)],
        env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_demo_is_right_about_held_out_drawings(tmp_path: Path) -> None:
    process = blip_batch("demo", "--output", tmp_path / "demo", "--count", DRAWINGS)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    right = {
        "caption": lambda record: record["result"]["caption"] == record["input"]["expected"],
        "vqa": lambda record: record["result"]["answer"] == record["input"]["expected"],
        "itm": lambda record: (record["result"]["match"] >= 0.5) == record["input"]["expected"],
    }
    for task, agrees in right.items():
        output = tmp_path / "demo" / f"{task}-{DRAWINGS}"
        audit = verify(str(output))
        assert audit.ok, audit.problems
        found = records(output)
        assert len(found) == DRAWINGS
        assert sum(map(agrees, found)) / len(found) >= 0.97, task
        assert f"{output}/results/" in out
        summary = json.loads((output / "summary.json").read_text())
        assert len(summary["model"]["weights_sha256"]) == 64


def test_answers_chosen_from_a_list(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    subprocess.run([sys.executable, "-m", "blip_engine.shapes.drawings", str(folder), "--count", "100"], check=True)
    manifest = folder / "vqa.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    answers = sorted({row["expected"] for row in rows})
    manifest.write_text("".join(json.dumps({**row, "answers": answers}) + "\n" for row in rows))
    process = blip_batch("run", manifest, "--task", "vqa", "--model", "demo", "--output", tmp_path / "out")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    found = records(tmp_path / "out")
    assert all({entry["answer"] for entry in record["result"]["ranking"]} == set(answers) for record in found)
    assert sum(record["result"]["answer"] == record["input"]["expected"] for record in found) >= 97


def test_worker_then_orchestrator_killed_in_mid_job(redis_server: RedisServer, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "blip_engine.shapes.drawings", str(tmp_path / "in"), "--count", "200"], check=True
    )
    cluster = Cluster(tmp_path)
    del cluster.environment["BLIP_ENGINE"]
    cluster.environment["BLIP_ENGINE_TIMEOUT_SECONDS"] = "120"
    try:
        orchestrator, worker = cluster.start_orchestrator(), cluster.start_worker()
        job = cluster.submit(tmp_path / "in" / "caption.jsonl", tmp_path / "out", model="demo", chunk_rows=25).id
        cluster.until(job, lambda state: state.chunks_done >= 1)
        worker.kill()
        cluster.start_worker()
        cluster.until(job, lambda state: state.chunks_done >= 3)
        orchestrator.kill()
        cluster.start_orchestrator()
        state = cluster.until_ended(job, 90)
    finally:
        cluster.close()
    assert (state.status, state.completed, state.failed) == ("completed", 200, 0)
    audit = verify(str(tmp_path / "out"))
    assert audit.ok, audit.problems
    found = records(tmp_path / "out")
    assert [record["row"] for record in found] == list(range(200))
    assert sum(record["result"]["caption"] == record["input"]["expected"] for record in found) >= 190


def photographs(folder: Path, count: int) -> Path:
    """`count` JPEGs of 640 x 480 and more: noise, gradients, and blocks of colour; links to 100 different ones."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(100):
        width, height = 640 + 160 * (n % 4), 480 + 120 * (n % 3)
        ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
        coarse = rng.integers(0, 256, (height // 40, width // 40, 3)).repeat(40, 0).repeat(40, 1)
        noise = rng.normal(0, 5 + n % 30, (height, width, 3))
        pixels = np.resize(coarse, (height, width, 3)) * (n % 2) * 0.5 + ramp * 0.5 + noise
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{n:04d}.jpg", quality=85)
    for n in range(100, count):
        (folder / f"{n:04d}.jpg").hardlink_to(folder / f"{n % 100:04d}.jpg")
    return folder


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    process = blip_batch(
        "run", photographs(tmp_path / "photos", 2000), "--task", "caption", "--model", "demo",
        "--output", tmp_path / "out", "--option", "num_beams=1", "--option", "max_new_tokens=4",
        BLIP_SLOTS="64",
    )  # fmt: skip
    samples = sample_memory(process, tmp_path / "out" / "results")
    _, err = process.communicate(timeout=10)
    assert process.returncode == 0, err
    audit = verify(str(tmp_path / "out"))
    assert audit.ok, audit.problems
    assert (audit.rows_found, audit.failed) == (2000, 0)
    chunks = audit.chunks
    watched = 0
    for name, seen in samples.items():
        early = [rss for parts, rss in seen if chunks // 5 <= parts < chunks // 2]
        late = [rss for parts, rss in seen if parts >= chunks * 3 // 4]
        if early and late:
            watched += 1
            assert max(late) < 1.1 * max(early) + 8 * 2**20, (name, max(early) >> 20, max(late) >> 20)
    assert watched >= 5  # the command, Redis, the worker, its loader and its engine


def sample_memory(process: "subprocess.Popen[str]", results: Path) -> dict[str, list[tuple[int, int]]]:
    """(parts written, resident bytes) over time, of the command and of every process below it."""
    samples: dict[str, list[tuple[int, int]]] = defaultdict(list)
    while process.poll() is None:
        parts = len(list(results.glob("part-*"))) if results.is_dir() else 0
        try:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in tree:
                samples[f"{one.pid} {' '.join(one.cmdline())[:80]}"].append((parts, one.memory_info().rss))
        except psutil.NoSuchProcess:  # one ended while we looked
            continue
        time.sleep(0.2)
    return samples


@pytest.mark.parametrize("package", ["torch", "PIL"])
def test_without_the_worker_extra_one_line_says_what_to_install(tmp_path: Path, package: str) -> None:
    (tmp_path / "hides" / package).mkdir(parents=True)
    code = f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')"
    (tmp_path / "hides" / package / "__init__.py").write_text(code)
    (tmp_path / "rows.txt").write_text("a.png\n")
    process = blip_batch(
        "run", tmp_path / "rows.txt", "--task", "caption", "--model", "demo", "--output", tmp_path / "out",
        PYTHONPATH=str(tmp_path / "hides"),
    )  # fmt: skip
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert f"No module named '{package}'; install blip-batch[worker]" in line
    assert "Traceback" not in err


def test_the_command_and_the_orchestrator_never_import_torch() -> None:
    code = (
        "import sys, orchestrator.cli, orchestrator.embedded, orchestrator.service;"
        "print([name for name in ('torch', 'numpy', 'PIL', 'workers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
