"""Chunks that are overdue: a worker died at them, or their hint was lost. Found in storage, or handed out again."""

import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final

from .ledger import Ledger
from .rounds import parts_of
from .stopping import go_on
from .work import Work, counts

_BATCH: Final = 50  # chunks that are handed out again as soon as they are known to be lost
_SECONDS: Final = 5.0  # then the job is to be fed again; what is left is overdue the next time too

log = logging.getLogger(__name__)


def reconcile(
    ledger: Ledger, job: str, epoch: str, work: Work, overdue: Sequence[int], publish: Callable[[Sequence[int]], None]
) -> None:
    """Counts the parts of overdue chunks that are in storage; the other chunks are given a deadline and published.

    Raises StaleEpochError, RedisUnavailable and StorageError; what was done until then stays done.
    """
    until = monotonic() + _SECONDS
    for begin in range(0, len(overdue), _BATCH):
        go_on()
        if monotonic() > until:
            return
        lost = []
        for chunk, part in parts_of(work.plan, overdue[begin : begin + _BATCH], work.number):
            if part is None:
                lost.append(chunk)
            elif ledger.mark(job, epoch, work.plan.hash, [counts(part)], work.number):
                ledger.add_total("found", 1)
                ledger.add_total("rows_done", part.rows)
        if lost:
            log.warning("%s: %d chunks lost their worker or hint; handing them out again", job, len(lost))
            again = ledger.requeue(job, epoch, lost)
            publish(again)
            ledger.add_total("requeued", len(again))
