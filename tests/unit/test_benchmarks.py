"""Every benchmark runs, on a tiny model: that its figures are there, not what they are."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.stages import watching
from blip_engine.checkpoint import find_checkpoint
from blip_engine.graphs import GraphedDecoder
from blip_engine.requests import Request, options_for
from blip_engine.resident import ResidentModel
from blip_engine.runner import runner_for

ROOT = Path(__file__).parents[2]


def figures(tmp_path: Path, benchmark: str, *arguments: str) -> Any:
    """The JSON document of a run; its table is the last thing it prints."""
    command = [
        sys.executable, "-m", f"benchmarks.{benchmark}", "--model", "tiny", "--device", "cpu", "--precision", "fp32",
        "--threads", "1", "--json", str(tmp_path / "out.json"), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "| --- |" in done.stdout
    document = json.loads((tmp_path / "out.json").read_text())
    assert {"processor", "cores", "threads", "torch", "commit", "command"} <= document["machine"].keys()
    return document


def test_engine(tmp_path: Path) -> None:
    names = ["caption-beams3", "vqa-8", "itm-1", "embed"]
    rows = figures(tmp_path, "engine", "--quick", "--workloads", *names)["rows"]
    assert [row["workload"] for row in rows] == names
    assert all(row["ours"] > 0 and row["transformers"] > 0 for row in rows)
    assert [row["same"] for row in rows] == pytest.approx([1, 1, 0, 0], abs=1e-5)  # the same work was done


def test_limit(tmp_path: Path) -> None:
    found = figures(tmp_path, "limit", "--quick", "--workloads", "caption-beams3", "vqa-8", "itm-8")
    assert found["peaks"]["flop_per_second"].keys() == {"fp32", "bf16"}
    shares = {(row["workload"], row["stage"]): row["peak_share"] for row in found["rows"]}
    for stage in ("vision", "vision attention", "cross K/V", "text attention", "decoder", "head", "all, not watched"):
        assert shares["caption-beams3", stage] > 0
    assert {"vqa-8", "itm-8"} <= {workload for workload, stage in shares if stage == "text encoder"}


def test_profile(tmp_path: Path) -> None:
    (found,) = figures(tmp_path, "profile", "--repeats", "1", "--workloads", "caption-beams3")["workloads"]
    assert {"vision", "cross K/V", "decoder", "text attention", "head", "search"} <= found["stages"].keys()
    assert found["stages"]["vision"]["operators"] > 0
    assert any("mm" in row["operator"] for row in found["operators"])


def test_watched_decoding_is_not_captured(checkpoints: Path) -> None:
    """On a GPU it is else: a graph has no stages, and a wait for the device voids its capture."""
    resident: ResidentModel[Any] = ResidentModel(
        find_checkpoint(str(checkpoints / "caption")), "caption", torch.device("cpu"), torch.float32
    )
    runner = runner_for("caption", resident)

    def capture(_: Any) -> Any:
        raise AssertionError("captured")

    runner._decoder = GraphedDecoder(resident.model.text_decoder, capture)  # type: ignore[union-attr]
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    batch = [runner.prepare(Request("m", "caption", image, ("",), options_for("caption", {})))]
    for _ in range(3):
        with watching(runner) as seen:
            assert len(runner.run(batch)) == 1
        assert seen.calls["decoder"] > 1
    assert isinstance(runner._decoder, GraphedDecoder)  # type: ignore[union-attr]


def test_pipeline(tmp_path: Path) -> None:
    (repeat,) = figures(tmp_path, "pipeline", "--quick", "--task", "itm", "--store", "s3")["repeats"]
    assert all(repeat[rate] > 0 for rate in ("engine", "steady", "whole"))
    assert {"engine", "loaders", "worker", "redis"} <= repeat["cpu_seconds"].keys()


def test_feeding(tmp_path: Path) -> None:
    found = figures(tmp_path, "feeding", "--times", "1", "--rows", "512")
    assert found["gets"].keys() == {"boto3's client", "loaders"}
    assert [row[-1] <= 1 for row in found["images"]] == [True] * 4  # the device's resize, in levels
    assert all(spent > 0 for spent in found["rows"].values())
    assert len(found["rows"]) == 3


def orchestrator(tmp_path: Path, mode: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.orchestrator", mode, "--quick", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "| --- |" in done.stdout
    document = json.loads((tmp_path / "out.json").read_text())
    assert {"processor", "cores", "commit", "command"} <= document["machine"].keys()
    (found,) = document["repeats"]
    return found


def test_orchestrator_plan(tmp_path: Path) -> None:
    found = orchestrator(tmp_path, "plan")
    assert (found["rows"], found["chunks"], found["leased"]) == (1_000_000, 1954, 1954)
    assert found["rows_per_second"] > 0
    assert found["processes"]["orchestrator"]["peak_mb"] <= 300
    assert 0 < found["redis_job_mb"] < 50


def test_orchestrator_job(tmp_path: Path) -> None:
    found = orchestrator(tmp_path, "job")
    assert (found["rows"], found["rows_found"], found["failed"], found["verify_ok"]) == (50_000, 50_000, 0, True)
    assert all(found[name] > 0 for name in ("rows_per_second", "plan_seconds", "work_seconds", "finalize_seconds"))
    assert {"orchestrator", "worker 1", "worker 2", "redis"} == found["processes"].keys()


def test_orchestrator_fairness(tmp_path: Path) -> None:
    found = orchestrator(tmp_path, "fairness")
    assert found["huge_rows_done"] < found["huge_rows"]
    assert found["beside_seconds"] > 0
