"""What Prometheus is told of this worker: its parent process sums up what its children report, and answers scrapes.

Loaders send the times of an image with its answer, the engine process a report of each batch. The sums are the
parent's, so a child that dies takes nothing of them along: counters never go back while the worker lives. Labels have
values of closed sets only, whatever a manifest or a job may hold.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from blip_engine.requests import JOB_TASKS, BatchReport
from orchestrator.contract import ERROR_CODES
from orchestrator.metrics import Family, Value
from orchestrator.parts import PartInfo
from orchestrator.settings import Settings

from .gpu import Gpu
from .messages import Loaded

#: What became of a hint.
CHUNK_OUTCOMES: Final = ("committed", "duplicate", "dropped", "abandoned", "put_back", "failed", "left")

# Bounds from measured times: a file on disk is read in less than a millisecond, an object of S3 in 5 to 100, a time-out
# takes 30 s; a drawing is decoded in 0.1 ms, a photograph in 3 to 100; a batch takes from 10 ms (small models, a GPU)
# to 30 s (large ones, a CPU); chunks are cut to take half a minute.
_FETCH: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_DECODE: Final = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 4.0, 16.0, 60.0)
_ENGINE: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_CHUNK: Final = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 600.0)
_BATCH: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)

FAMILIES: Final = (
    Family(
        "blip_rows_total", "counter",
        "Rows of the chunks that this worker committed, by task and outcome: completed (a result) or failed (an error "
        "record).", ("task", "outcome"),
    ),
    Family("blip_row_errors_total", "counter", "Rows that failed, by the code in their error record.", ("code",)),
    Family(
        "blip_fetch_seconds", "histogram", "Time to fetch an image from its storage, retries and failures included.",
        buckets=_FETCH,
    ),
    Family("blip_fetch_bytes_total", "counter", "Bytes of encoded images that were fetched."),
    Family(
        "blip_decode_seconds", "histogram", "Time to decode an image and to resize it to what the model takes.",
        buckets=_DECODE,
    ),
    Family(
        "blip_batch_rows", "histogram", "Rows (images with their texts) that the engine ran together in a batch.",
        ("task",), _BATCH,
    ),
    Family(
        "blip_engine_seconds", "histogram",
        "Time of a batch on the device, by task and stage: vision (images to states), text (the rest: reading, "
        "decoding, scoring).", ("task", "stage"), _ENGINE,
    ),
    Family(
        "blip_engine_busy_seconds_total", "counter",
        "Time the engine spent on batches; its rate is the share of the time that the engine was busy.",
    ),
    Family("blip_engine_queue_rows", "gauge", "Rows that are with the engine: in its batch, or waiting for it."),
    Family(
        "blip_chunk_seconds", "histogram", "Time from a chunk's lease to its commit.", buckets=_CHUNK,
    ),
    Family(
        "blip_chunks_total", "counter",
        "Hints taken, by what became of the chunk: committed; duplicate (done, but counted before); dropped (done, "
        "held by someone, or gone when the hint came); abandoned (the lease was lost); put_back (draining, or storage "
        "was away); failed (its job was ended); left (an unexpected error).", ("outcome",),
    ),
    Family("blip_worker_chunks", "gauge", "Chunks that this worker holds now."),
    Family(
        "blip_engine_oom_splits_total", "counter",
        "Times that the device ran out of memory and the batches were halved.",
    ),
    Family("blip_engine_restarts_total", "counter", "Times that the engine process died or hung, and was replaced."),
    Family("blip_loader_restarts_total", "counter", "Times that a loader process died or hung, and was replaced."),
    Family("blip_gpu_utilization_ratio", "gauge", "Share of the last moments in which the GPU ran something (NVML)."),
    Family("blip_gpu_memory_used_bytes", "gauge", "Memory of the GPU that is in use, by anyone (NVML)."),
    Family(
        "blip_last_progress_timestamp_seconds", "gauge",
        "When an image was last loaded, a batch run, or a hint dealt with (Unix time); at first, when it began.",
    ),
    Family(
        "blip_worker_info", "gauge",
        "1, with the version, the settings of device, precision and models, and the GPU's name.",
        ("version", "device", "precision", "models", "gpu"),
    ),
)  # fmt: skip
_BY_NAME: Final[Mapping[str, Family]] = {family.name: family for family in FAMILIES}


class WorkerMetrics(Collector):
    """The sums. Everything may be called from any thread, and costs a few microseconds at most."""

    def __init__(self, settings: Settings) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[str, ...], list[float]]] = {family.name: {} for family in FAMILIES}
        self._progress = time.time()
        self._gpu = Gpu.open(settings.device)
        gpu = self._gpu.name if self._gpu else ""
        self._info = _version(), settings.device, settings.precision, ",".join(settings.models), gpu
        #: What is asked for at a scrape, by the metric's name; filled in by the worker.
        self.sources: dict[str, Callable[[], float]] = {}
        self._begin()

    def _begin(self) -> None:
        """Counters begin with 0, so that the first event is an increase."""
        known: dict[str, Iterable[tuple[str, ...]]] = {
            "blip_rows_total": [(task, outcome) for task in JOB_TASKS for outcome in ("completed", "failed")],
            "blip_row_errors_total": [(code,) for code in ERROR_CODES],
            "blip_chunks_total": [(outcome,) for outcome in CHUNK_OUTCOMES],
        }
        for family in FAMILIES:
            if family.kind != "gauge":
                for labels in known.get(family.name, [()] if not family.labels else []):
                    self._cell(family.name, labels)

    def loaded(self, loaded: Loaded) -> None:
        """A loader is done with an image."""
        self._observe("blip_fetch_seconds", loaded.fetch_seconds)
        self._add("blip_fetch_bytes_total", loaded.bytes)
        if loaded.decode_seconds:
            self._observe("blip_decode_seconds", loaded.decode_seconds)
        self._progress = time.time()

    def batch(self, report: BatchReport) -> None:
        """The engine ran a batch."""
        self._observe("blip_batch_rows", report.requests, report.task)
        for stage, seconds in report.stage_seconds.items():
            self._observe("blip_engine_seconds", seconds, report.task, stage)
        self._add("blip_engine_busy_seconds_total", report.busy_seconds)
        self._add("blip_engine_oom_splits_total", report.oom_splits)
        self._progress = time.time()

    def committed(self, task: str, part: PartInfo, seconds: float) -> None:
        """A chunk's part is in storage and was counted."""
        self._add("blip_rows_total", part.rows - part.failed, task, "completed")
        self._add("blip_rows_total", part.failed, task, "failed")
        for code, rows in _codes(part.codes):
            self._add("blip_row_errors_total", rows, code)
        self._observe("blip_chunk_seconds", seconds)

    def chunk(self, outcome: str) -> None:
        """A hint came to this end, one of CHUNK_OUTCOMES."""
        self._add("blip_chunks_total", 1, outcome)
        self._progress = time.time()

    def _cell(self, name: str, labels: tuple[str, ...]) -> list[float]:
        """Of a histogram the sum, then the buckets' counts; of a counter one number. For whoever has the lock."""
        cells = self._values[name]
        if labels not in cells:
            cells[labels] = [0.0] * (1 + (len(_BY_NAME[name].buckets) + 1 if _BY_NAME[name].buckets else 0))
        return cells[labels]

    def _add(self, name: str, amount: float, *labels: str) -> None:
        with self._lock:
            self._cell(name, labels)[0] += amount

    def _observe(self, name: str, value: float, *labels: str) -> None:
        with self._lock:
            cell = self._cell(name, labels)
            cell[0] += value
            cell[1 + bisect_left(_BY_NAME[name].buckets, value)] += 1

    def describe(self) -> Iterable[Metric]:
        """The names alone, for the registry."""
        return (family.metric({}) for family in FAMILIES)

    def collect(self) -> Iterable[Metric]:
        """Everything, as it is now."""
        with self._lock:
            sums = {name: {labels: cell[:] for labels, cell in cells.items()} for name, cells in self._values.items()}
        asked = {name: source() for name, source in self.sources.items()}
        asked |= self._gpu.read() if self._gpu else {}
        asked["blip_last_progress_timestamp_seconds"] = self._progress
        for family in FAMILIES:
            values: dict[tuple[str, ...], Value] = {
                labels: cell if family.buckets else cell[0] for labels, cell in sums[family.name].items()
            }
            if family.name in asked:
                values = {(): asked[family.name]}
            if family.name == "blip_worker_info":
                values = {self._info: 1.0}
            if values:
                yield family.metric(values)

    def registry(self) -> CollectorRegistry:
        """With the metrics of the parent process."""
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        return registry


def _codes(text: str) -> Iterable[tuple[str, int]]:
    """The codes and rows of a part. One that is none of ours, from a strange part, makes no series of its own."""
    for pair in filter(None, text.split(",")):
        code, _, rows = pair.partition("=")
        if rows.isdecimal():
            yield (code if code in ERROR_CODES else "internal"), int(rows)


def _version() -> str:
    try:
        return version("blip-batch")
    except PackageNotFoundError:  # from a source tree that was not installed
        return "unknown"
