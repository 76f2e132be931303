"""Jobs of embed and capfilt with the bundled checkpoints: their vectors and their filter mean something."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from system import records
from test_real_engine import blip_batch

from orchestrator.verify import verify

COUNT = 120


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    subprocess.run(
        [sys.executable, "-m", "blip_engine.shapes.drawings", str(folder), "--count", str(COUNT)], check=True
    )
    return folder


def rows_of(drawings: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (drawings / f"{task}.jsonl").read_text().splitlines()]


def run(manifest: Path, task: str, output: Path, *more: str) -> None:
    process = blip_batch("run", manifest, "--task", task, "--model", "demo", "--output", output, *more)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    audit = verify(str(output))
    assert audit.ok, audit.problems
    assert (audit.rows_found, audit.failed) == (COUNT, 0)


def test_the_own_caption_is_the_nearest(drawings: Path, tmp_path: Path) -> None:
    rows = [{"image": row["image"], "text": row["expected"]} for row in rows_of(drawings, "caption")]
    manifest = drawings / "embed.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(manifest, "embed", tmp_path / "out", "--results", "parquet")
    exported = blip_batch("export", tmp_path / "out", tmp_path / "all.parquet")
    exported.communicate(timeout=60)
    assert exported.returncode == 0
    result = pq.read_table(tmp_path / "all.parquet").column("result").combine_chunks()
    images, texts = (np.stack(result.field(name).to_numpy(False)) for name in ("embedding", "text_embedding"))
    assert images.shape == texts.shape
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-2)
    captions = np.array([row["text"] for row in rows])
    ranks = [int((texts @ image > texts[n] @ image)[captions != captions[n]].sum()) for n, image in enumerate(images)]
    assert np.mean(np.array(ranks) == 0) >= 0.7, ranks  # of 120; chance is below 0.01
    assert np.mean(np.array(ranks) < 5) >= 0.95, ranks


def test_right_texts_are_kept_and_wrong_ones_dropped(drawings: Path, tmp_path: Path) -> None:
    run(drawings / "itm.jsonl", "capfilt", tmp_path / "out")
    found = records(tmp_path / "out")
    truths = [row["expected"] for row in rows_of(drawings, "caption")]
    right = sum(
        (record["input"]["text"] in record["result"]["kept"]) == record["input"]["expected"] for record in found
    )
    captioned = sum(truth in record["result"]["kept"] for truth, record in zip(truths, found, strict=True))
    assert right >= 0.95 * COUNT
    assert captioned >= 0.93 * COUNT
    assert all((record["result"]["text_match"] > 0.5) == (record["result"]["kept"][:1] == [record["input"]["text"]])
               or record["input"]["text"] == record["result"]["caption"] for record in found)  # fmt: skip
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert len(summary["model"]["weights_sha256"].split("+")) == 2
