"""The dry job of `benchmarks.orchestrator job` through Ray Data, for a Python that has it: PYTHON ray_peer.py IN OUT.

Reads the same lines, adds the same result to each row, writes JSON Lines. It numbers no rows and checks nothing.
The time counts from when Ray is up. Prints one JSON document.
"""

import json
import sys
import time
from typing import Any

import ray  # type: ignore[import-not-found]

RESULT = {"caption": "a photograph of a dog on a beach", "score": -0.5123, "tokens": 8}


def caption(batch: dict[str, Any]) -> dict[str, Any]:
    """Columns of a batch, with the results."""
    count = len(batch["image"])
    inputs = [{"prompt": prompt} for prompt in batch.pop("prompt")]
    return {**batch, "task": ["caption"] * count, "result": [RESULT] * count, "error": [None] * count, "input": inputs}


def main(manifest: str, output: str) -> None:
    """Run it."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    began = time.monotonic()
    ray.data.read_json(manifest, lines=True).map_batches(caption).write_json(output)
    print(json.dumps({"seconds": time.monotonic() - began, "ray": ray.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
