"""Why rows failed, in a line for people: of a job that ends because of them, and of one that ended with them."""

from collections.abc import Mapping
from itertools import islice
from typing import Any, Final

from .contract import JobSpec, JobState
from .errors import BlipBatchError, JobError
from .ledger import Ledger
from .parts import chunk_of, describe, part_prefix, read_part
from .plan import Plan

GUARD_ROWS: Final = 1000  # max_error_ratio is looked at from so many rows on
_LOOKS: Final = 8  # parts that are asked for an example: one is only worth a moment


def counted(codes: Mapping[str, int]) -> str:
    """`image_not_found 1,104, crashed 2`."""
    return ", ".join(f"{code} {rows:,}" for code, rows in codes.items())


def told(record: Mapping[str, Any]) -> str:
    """An error record's message; with the image, where the message does not name it."""
    image, message = record["image"], str(record["error"]["message"])
    return message if image is None or image in message else f"{image}: {message}"


def guard_errors(spec: JobSpec, state: JobState, plan: Plan, ledger: Ledger) -> None:
    """Raises JobError when more rows failed than the job's `max_error_ratio` allows."""
    done = state.completed + state.failed
    if done >= GUARD_ROWS and state.failed > spec.max_error_ratio * done:
        raise JobError(
            "too_many_errors",
            f"{state.failed} of the first {done} rows failed ({counted(ledger.error_codes(spec.id))}), more than "
            f"max_error_ratio={spec.max_error_ratio:g}{_example(plan, state.round)}; mend that and retry, or raise the "
            f"ratio and run again; the failed rows are in {spec.output}/results",
        )


def all_failed(plan: Plan, codes: Mapping[str, int], round_number: int) -> JobError:
    """Of a job without a single result."""
    return JobError(
        "all_rows_failed",
        f"all {plan.rows} rows failed ({counted(codes)}){_example(plan, round_number)}; see "
        f"{plan.store.uri('errors.jsonl')}",
    )


def _example(plan: Plan, round_number: int) -> str:
    """The first failed row of the round's first parts; empty where a few looks find none."""
    try:
        for info in islice(plan.store.list(part_prefix(round_number)), _LOOKS):
            part = describe(plan.store, info.key, plan.hash) if chunk_of(info.key, plan.results) is not None else None
            if part is not None and part.failed:
                record = next(record for record in read_part(plan.store, info.key)[0] if record["error"] is not None)
                return f"; the first: row {record['row']} {told(record)}"
    except (BlipBatchError, StopIteration):  # a line without an example is better than none
        pass
    return ""
