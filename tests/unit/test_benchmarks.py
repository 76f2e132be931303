"""Every benchmark runs, on a tiny model: that its figures are there, not what they are."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def figures(tmp_path: Path, benchmark: str, *arguments: str) -> Any:
    """The JSON document of a run; its table is the last thing it prints."""
    command = [
        sys.executable, "-m", f"benchmarks.{benchmark}", "--model", "tiny", "--device", "cpu", "--precision", "fp32",
        "--threads", "1", "--json", str(tmp_path / "out.json"), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
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


def test_pipeline(tmp_path: Path) -> None:
    (repeat,) = figures(tmp_path, "pipeline", "--quick", "--task", "itm", "--store", "s3")["repeats"]
    assert all(repeat[rate] > 0 for rate in ("engine", "steady", "whole"))
    assert {"engine", "loaders", "worker", "redis"} <= repeat["cpu_seconds"].keys()
