"""What tests of whole jobs share: quick settings, small manifests, and a loop that steps and works."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from mini_worker import MiniWorker

from orchestrator.contract import JobSpec, JobState
from orchestrator.control import Controller
from orchestrator.jobs import make_spec
from orchestrator.storage import open_store


def write_manifest(folder: Path, rows: int, bad: Callable[[int], bool] = lambda _: False) -> Path:
    manifest = folder / "rows.jsonl"
    lines = [json.dumps({"image": f"{'bad' if bad(n) else 'img'}-{n}.png", "id": f"r{n}"}) for n in range(rows)]
    text = "\n".join(lines) + "\n"
    if not manifest.exists() or manifest.read_text() != text:  # written anew it would be another version
        manifest.write_text(text)
    return manifest


def caption_spec(manifest: object, output: object, **more: object) -> JobSpec:
    return make_spec(str(manifest), "caption", str(output), **{"model": "demo", "chunk_rows": 10, **more})  # type: ignore[arg-type]


def advance(
    controller: Controller, job: str, until: Callable[[JobState], bool], worker: MiniWorker | None = None,
    seconds: float = 20,
) -> JobState:  # fmt: skip
    """Steps, and works one hint a step, until the job is as wanted."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        controller.step()
        state = controller.ledger.state(job)
        if state is not None and until(state):
            return state
        hint = worker.take() if worker else None
        if worker and hint:
            worker.work(hint)
        time.sleep(0.005)
    raise AssertionError(f"still {controller.ledger.state(job)}")


def ended(state: JobState) -> bool:
    return state.ended


def rows_of(output: object) -> list[int]:
    """All row numbers of all parts, as a reader of the results finds them."""
    store = open_store(str(output))
    return [
        json.loads(line)["row"] for info in store.list("results/part-") for line in store.get(info.key).splitlines()
    ]
