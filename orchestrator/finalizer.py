"""The end of a job: every part verified against the plan, failures gathered, the summary written."""

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from .contract import JobSpec, JobState, to_line
from .errors import JobError
from .parts import PartInfo, as_manifest_row, count_codes
from .plan import Plan
from .rounds import SUMMARY_KEY, MergedChunk, is_whole, load_rounds, merged_chunks
from .stopping import go_on
from .temporary import temporary_file

ERRORS_KEY: Final = "errors.jsonl"


@dataclass
class Totals:
    """What all chunks together hold."""

    parts: list[tuple[str, PartInfo]] = field(default_factory=list)  # with their keys
    codes: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    failed: int = 0

    def add(self, chunk: MergedChunk) -> None:
        failures = chunk.failures
        self.parts += [(part.key, part.info) for _, part in chunk.parts]
        self.codes.update(count_codes(failures))
        self.rows += len(chunk.records)
        self.failed += len(failures)


def finalize(spec: JobSpec, plan: Plan, state: JobState) -> dict[str, Any] | None:
    """Writes errors.jsonl and summary.json and returns the summary; None when chunks have no part yet.

    May be killed at any point and run again, or twice at once: what is written follows from the parts.
    Raises PartError and StorageError.
    """
    rounds = load_rounds(plan)
    if not is_whole(plan, rounds):
        return None
    totals, images = Totals(), plan.image_policy()
    with temporary_file("blip-errors-") as errors:
        for chunk in merged_chunks(plan):
            go_on()
            totals.add(chunk)
            errors.write(b"".join(to_line(as_manifest_row(failure, images)) for failure in chunk.failures))
        if totals.failed or (rounds and plan.store.head(ERRORS_KEY) is not None):  # of the round before: now empty
            plan.store.put_file(ERRORS_KEY, errors.path)
    return _write_summary(plan, _summary(spec, totals, state) | {"round": len(rounds)})


def read_summary(plan: Plan) -> dict[str, Any]:
    """The summary of a complete job. Raises ObjectNotFound when there is none, and JobError for what is no summary."""
    try:
        summary: dict[str, Any] = json.loads(plan.store.get(SUMMARY_KEY))
        counted = set(summary["request_counts"]) == {"total", "completed", "failed"}
        if counted and all({"key", "sha256"} <= set(part) for part in summary["parts"]):
            return summary
    except (ValueError, TypeError, KeyError, RecursionError):  # told below
        pass
    raise JobError("summary_invalid", f"{plan.store.uri(SUMMARY_KEY)} is damaged; delete it and run the job again")


def _write_summary(plan: Plan, summary: dict[str, Any]) -> dict[str, Any]:
    """Writes the summary and returns the one that counts: an older one stays as long as it is of the same parts."""
    text = json.dumps(summary, indent=2).encode() + b"\n"
    if not plan.store.put_new(SUMMARY_KEY, text):
        with contextlib.suppress(JobError):  # a damaged one is written anew
            older = read_summary(plan)
            if older["parts"] == summary["parts"]:
                return older
        plan.store.put(SUMMARY_KEY, text)
    return summary


def _summary(spec: JobSpec, totals: Totals, state: JobState) -> dict[str, Any]:
    started, finished = state.in_progress_at or state.created_at or 0.0, state.finalizing_at or 0.0
    seconds = max(0.0, finished - started)
    worked = totals.rows - state.restored  # rows of parts that were there before do not make us faster
    return {
        "id": spec.id,
        "task": spec.task,
        "model": state.model or {"source": spec.model},
        "status": "failed" if totals.failed == totals.rows else "completed",
        "request_counts": {
            "total": totals.rows, "completed": totals.rows - totals.failed, "failed": totals.failed,
        },
        "errors": dict(totals.codes.most_common()),
        "started_at": started,
        "finished_at": finished,
        "seconds": round(seconds, 3),
        "images_per_second": round(worked / seconds, 3) if seconds else None,
        "parts": [
            {"key": key, "rows": part.rows, "failed": part.failed, "sha256": part.sha256}
            for key, part in totals.parts
        ],
    }  # fmt: skip
