"""An audit of an output, from object storage alone: is every row of the plan there, exactly once, as it was written?"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from .contract import Chunk
from .errors import JobError, ObjectNotFound, UsageError
from .finalizer import Totals, read_summary
from .parts import ALTERED, PREFIX, REDO, PartError, PartInfo, chunk_of, part_prefix
from .plan import Plan, load_plan
from .rounds import (
    MergedChunk,
    PartMissing,
    Round,
    each_chunk,
    last_part,
    load_rounds,
    merged_chunk,
    round_key,
    wanted_key,
)
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
    rounds: int = 1  # passes: the first, and one for each retry
    complete: bool = False  # summary.json is there, of the last round
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
    """Audits an output. Raises UsageError when there is no job, JobError when its plan is damaged, and StorageError."""
    settings = settings or load_settings()
    store = open_store(output, settings)
    plan = load_plan(store, settings)
    if plan is None:
        raise UsageError(f"{output} holds no job: there is no plan/plan.json")
    audit = Audit(output, rows_planned=plan.rows, chunks=plan.chunks)
    rounds = load_rounds(plan)
    totals = _audit_parts(plan, rounds, audit)
    audit.parts, audit.rows_found, audit.failed = len(totals.parts), totals.rows, totals.failed
    audit.rounds = 1 + len(rounds)
    _audit_summary(plan, totals, audit)
    return audit


def _audit_parts(plan: Plan, rounds: Sequence[Round], audit: Audit) -> Totals:
    _audit_names(plan, rounds, audit)
    totals = Totals()
    for merged, problems in each_chunk(plan, lambda chunk: _look(plan, chunk, rounds)):
        for problem in problems:
            audit.report(problem)
        if merged is not None:
            totals.add(merged)
    return totals


def _look(plan: Plan, chunk: Chunk, rounds: Sequence[Round]) -> tuple[MergedChunk | None, list[str]]:
    """A chunk's parts, if they can be read, and what is wrong with them."""
    try:
        merged = merged_chunk(plan, chunk, rounds, so_far=True)
    except PartMissing as error:
        return None, [f"{error}; {REDO}"]
    except PartError as error:
        return None, [str(error)]
    problems = [problem for _, part in merged.parts for problem in _metadata_problems(plan, part.key, part.info)]
    number, rows = last_part(chunk, rounds)
    if merged.parts[-1][0] != number:
        problems.insert(0, f"{PartMissing(plan, chunk, number, rows)}; {REDO}")
    return merged, problems


def _audit_names(plan: Plan, rounds: Sequence[Round], audit: Audit) -> None:
    """Reports parts that no chunk of the plan, or none of the round, can have."""
    for info in plan.store.list(PREFIX):
        chunk = chunk_of(info.key, plan.results)
        if chunk is None or chunk >= plan.chunks:
            audit.report(f"{info.key}: no chunk of the plan")
    known = {key(number) for number in range(1, len(rounds) + 2) for key in (round_key, wanted_key)}
    prefixes = {part_prefix(this.number): this for this in rounds}
    for info in plan.store.list("rounds/"):
        chunk, this = chunk_of(info.key, plan.results), prefixes.get(info.key.rpartition("-")[0] + "-")
        if info.key not in known and (chunk is None or this is None or not this.rows_of(chunk)):
            audit.report(f"{info.key}: no chunk of a round")


def _metadata_problems(plan: Plan, key: str, part: PartInfo) -> Iterator[str]:
    """Where the store keeps metadata (S3): what the part's writer said of it must be what it is."""
    head = plan.store.head(key)
    known = head.metadata if head else {}
    actual = {"rows": str(part.rows), "failed": str(part.failed), "sha256": part.sha256, "plan": plan.hash}
    for name, value in actual.items():
        if known.get(name, value) != value:
            yield f"{key}: its {name} is {value}, its metadata says {known[name]}"


def _audit_summary(plan: Plan, totals: Totals, audit: Audit) -> None:
    try:
        summary = read_summary(plan)
    except ObjectNotFound:
        audit.report("summary.json is missing: the job is not complete")
        return
    except JobError as error:
        audit.report(str(error))
        return
    if summary.get("round", 0) != audit.rounds - 1:
        audit.report(f"summary.json is of round {summary.get('round', 0)}: round {audit.rounds - 1} is not complete")
        return
    audit.complete = True
    written = {part["key"]: part["sha256"] for part in summary["parts"]}
    for key, part in totals.parts:
        if written.get(key) != part.sha256:
            audit.report(f"{key}: {ALTERED}")
    counts = {"total": totals.rows, "completed": totals.rows - totals.failed, "failed": totals.failed}
    if summary["request_counts"] != counts:
        audit.report(f"summary.json counts {summary['request_counts']}, the parts hold {counts}")
