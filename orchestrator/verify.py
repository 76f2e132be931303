"""An audit of an output, from object storage alone: is every row of the plan there, exactly once, as it was written?"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from .errors import ObjectNotFound, StorageError, UsageError
from .finalizer import SUMMARY_KEY, Totals, present_chunks
from .parts import PREFIX, PartError, PartInfo, check, chunk_of, part_key
from .plan import Plan, load_plan
from .settings import Settings, load_settings
from .storage import open_store

_MOST_PROBLEMS: Final = 100


@dataclass
class Audit:
    """What was found. `ok`: every planned row exactly once, all checksums right, and the job is complete."""

    output: str
    rows_planned: int = 0
    rows_found: int = 0
    failed: int = 0  # of the rows found, those with error records
    chunks: int = 0
    parts: int = 0
    complete: bool = False  # summary.json is there
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)  # the first hundred

    @property
    def ok(self) -> bool:
        return self.problem_count == 0

    def report(self, problem: str) -> None:
        self.problem_count += 1
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(problem)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify(output: str, settings: Settings | None = None) -> Audit:
    """Audits an output. Raises UsageError when there is no job, and StorageError when the store cannot be read."""
    settings = settings or load_settings()
    store = open_store(output, settings)
    plan = load_plan(store, settings)
    if plan is None:
        raise UsageError(f"{output} holds no job: there is no plan/plan.json")
    audit = Audit(output, rows_planned=plan.rows, chunks=plan.chunks)
    totals = _audit_parts(plan, audit)
    audit.parts, audit.rows_found, audit.failed = len(totals.parts), totals.rows, totals.failed
    _audit_summary(plan, totals, audit)
    return audit


def _audit_parts(plan: Plan, audit: Audit) -> Totals:
    totals = Totals()
    present = present_chunks(plan)
    for info in plan.store.list(PREFIX):
        if chunk_of(info.key) not in present:
            audit.report(f"{info.key}: no chunk of the plan")
    for chunk in plan.all_chunks():
        if chunk.id not in present:
            audit.report(
                f"{part_key(chunk.id)} is missing: rows {chunk.first_row} to {chunk.first_row + chunk.rows - 1}"
            )
            continue
        try:
            part = check(plan.store, chunk)
        except (PartError, ObjectNotFound) as error:
            audit.report(str(error))
            continue
        _audit_metadata(plan, part.info, audit)
        totals.add(part)
    return totals


def _audit_metadata(plan: Plan, part: PartInfo, audit: Audit) -> None:
    """Where the store keeps metadata (S3): what the part's writer said of it must be what it is."""
    head = plan.store.head(part_key(part.chunk))
    known = head.metadata if head else {}
    actual = {"rows": str(part.rows), "failed": str(part.failed), "sha256": part.sha256, "plan": plan.hash}
    for name, value in actual.items():
        if known.get(name, value) != value:
            audit.report(f"{part_key(part.chunk)}: its {name} is {value}, its metadata says {known[name]}")


def _audit_summary(plan: Plan, totals: Totals, audit: Audit) -> None:
    try:
        summary = json.loads(plan.store.get(SUMMARY_KEY))
    except ObjectNotFound:
        audit.report("summary.json is missing: the job is not complete")
        return
    except ValueError:
        raise StorageError(f"{plan.store.uri(SUMMARY_KEY)} is not JSON") from None
    audit.complete = True
    written = {part["key"]: part["sha256"] for part in summary["parts"]}
    for part in totals.parts:
        if written.get(part_key(part.chunk)) != part.sha256:
            audit.report(f"{part_key(part.chunk)}: its checksum is not the one in summary.json")
    counts = {"total": totals.rows, "completed": totals.rows - totals.failed, "failed": totals.failed}
    if summary["request_counts"] != counts:
        audit.report(f"summary.json counts {summary['request_counts']}, the parts hold {counts}")
