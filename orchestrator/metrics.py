"""What Prometheus is told of the whole system: read from the ledger when it asks, at most every few seconds.

Every orchestrator says the same, for the truth is in Redis: queries take `max` over them, never `sum`. A worker tells
its own part (`workers.metrics`). Names and labels are fixed, dashboards and alerts rely on them; no label holds a job,
a row or an image, so the number of series does not grow with the work.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .contract import Status
from .control import MEMORY_LIMIT
from .errors import BlipBatchError
from .ledger import Ledger
from .lifecycle import backlog
from .settings import Settings

CACHE_SECONDS: Final = 2.0  # two replicas of Prometheus ask within them: Redis is read once


@dataclass(frozen=True, slots=True)
class Family:
    """One metric."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds of a histogram's

    def metric(self, values: Mapping[tuple[str, ...], float]) -> Metric:
        """A counter or gauge as Prometheus reads it; `values` by the labels' values."""
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(self.name, self.help, labels=self.labels)
        for labels, value in values.items():
            family.add_metric(labels, value)
        return family


#: Total in the ledger -> what the control loop did with a chunk that was overdue.
RECONCILED: Final = {"requeued": "handed out again", "found": "its part was found in storage and counted"}

FAMILIES: Final = (
    Family("blip_redis_up", "gauge", "1 if the orchestrator reaches Redis; at 0 its other blip metrics are absent."),
    Family("blip_jobs", "gauge", "Jobs known to Redis, by status; those that ended included.", ("status",)),
    Family(
        "blip_backlog_rows", "gauge",
        "Rows that are in no finished part yet, of all jobs that have not ended; rows in flight count. 0 means idle.",
    ),
    Family("blip_desired_workers", "gauge", "Workers that should run now, as GET /v1/backlog tells an autoscaler."),
    Family("blip_inflight_chunks", "gauge", "Chunks handed out and not finished: a worker has them, or they wait."),
    Family("blip_live_workers", "gauge", "Workers that were heard of within the last 45 seconds."),
    Family(
        "blip_rows_done_total", "counter",
        "Rows that got their outcome, a result or an error record, since Redis was last empty. A retry counts anew.",
    ),
    Family(
        "blip_reconciled_chunks_total", "counter",
        "Chunks whose worker or hint was lost, by what was done: requeued (handed out again), or found (its part was "
        "in storage, and was counted).", ("action",),
    ),
    Family("blip_feeder_paused", "gauge", "1 while no chunks are handed out because Redis is at 70 % of its memory."),
    Family("blip_redis_memory_ratio", "gauge", "Redis' used memory divided by its maxmemory; 0 where it has no limit."),
    Family(
        "blip_oldest_progress_timestamp_seconds", "gauge",
        "Of the jobs in progress, the one that has waited longest for a row: when it last got one (Unix time). Absent "
        "when no job is in progress.",
    ),
    Family(
        "blip_worker_price_per_hour", "gauge",
        "What a worker costs, as BLIP_PRICE_PER_WORKER_HOUR says; absent where that is not set.",
    ),
)  # fmt: skip


class LedgerCollector(Collector):
    """Reads the ledger, or gives what it read just before."""

    def __init__(self, ledger: Ledger, settings: Settings) -> None:
        self._ledger, self._settings = ledger, settings
        self._lock = threading.Lock()
        self._read: list[Metric] = []
        self._expires = 0.0

    def describe(self) -> Iterable[Metric]:
        """The names alone: nothing is read when it is registered."""
        return (family.metric({}) for family in FAMILIES)

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            if time.monotonic() >= self._expires:
                self._read = list(self._families())
                self._expires = time.monotonic() + CACHE_SECONDS
            return self._read

    def _families(self) -> Iterator[Metric]:
        try:
            values = self._values()
        except BlipBatchError:  # Redis is away; it says so, instead of numbers that are no more
            values = {"blip_redis_up": {(): 0.0}}
        for family in FAMILIES:
            if family.name in values:
                yield family.metric(values[family.name])

    def _values(self) -> dict[str, dict[tuple[str, ...], float]]:
        ledger, settings = self._ledger, self._settings
        statuses, totals, memory = ledger.statuses(), ledger.totals(), ledger.memory_ratio()
        left = backlog(ledger, settings)
        active = ledger.active_jobs()
        in_flight = [ledger.in_flight(job) for job in active]
        plain: dict[str, float | None] = {
            "blip_redis_up": 1.0,
            "blip_backlog_rows": left.rows,
            "blip_desired_workers": left.desired_workers,
            "blip_inflight_chunks": sum(live + waiting for _, live, waiting in in_flight),
            "blip_live_workers": len(ledger.live_workers()),
            "blip_rows_done_total": totals.get("rows_done", 0),
            "blip_feeder_paused": memory >= MEMORY_LIMIT,
            "blip_redis_memory_ratio": memory,
            "blip_oldest_progress_timestamp_seconds": self._oldest_progress(active),
            "blip_worker_price_per_hour": settings.price_per_worker_hour,
        }
        return {
            "blip_jobs": {(status,): statuses.get(status, 0) for status in get_args(Status)},
            "blip_reconciled_chunks_total": {(action,): totals.get(action, 0) for action in RECONCILED},
            **{name: {(): float(value)} for name, value in plain.items() if value is not None},
        }

    def _oldest_progress(self, active: Sequence[str]) -> float | None:
        states = filter(None, map(self._ledger.state, active))
        times = [state.progress_at for state in states if state.status == "in_progress" and state.progress_at]
        return min(times, default=None)


def make_registry(ledger: Ledger, settings: Settings) -> CollectorRegistry:
    """The orchestrator's metrics, and those of its process."""
    registry = CollectorRegistry()
    registry.register(LedgerCollector(ledger, settings))
    ProcessCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """Body and content type of the answer to `GET /metrics` with this `Accept` header. Reads Redis, so it may block."""
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
