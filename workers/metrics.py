"""What Prometheus is told of this worker: its parent process sums up what its children report, and answers scrapes.

Loaders send the times of an image with its answer, the engine process a report of each batch. The sums are the
parent's, so a child that dies takes nothing of them along: counters never go back while the worker lives. Labels have
values of closed sets only, whatever a manifest or a job may hold.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from blip_engine.requests import JOB_TASKS, BatchReport
from orchestrator.contract import ERROR_CODES
from orchestrator.metrics import Family
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
        "When a row was last done of the chunk in hand that stands still for longest (Unix time); with none in hand, "
        "when an image was last loaded, a batch run, or a hint dealt with; at first, when it began.",
    ),
    Family(
        "blip_worker_info", "gauge",
        "1, with the version, the settings of device, precision and models, and the GPU's name.",
        ("version", "device", "precision", "models", "gpu"),
    ),
)  # fmt: skip
#: Counters begin with 0, so that the first event is an increase.
_KNOWN: Final[Mapping[str, Iterable[tuple[str, ...]]]] = {
    "blip_rows_total": [(task, outcome) for task in JOB_TASKS for outcome in ("completed", "failed")],
    "blip_row_errors_total": [(code,) for code in ERROR_CODES],
    "blip_chunks_total": [(outcome,) for outcome in CHUNK_OUTCOMES],
}
#: Asked for at a scrape, as gauges are; everything else is told when it happens.
_ASKED: Final = {"blip_engine_restarts_total", "blip_loader_restarts_total"}


class WorkerMetrics:
    """The numbers, in a registry of their own. Everything may be called from any thread, and takes microseconds."""

    def __init__(self, settings: Settings) -> None:
        #: What is asked for at a scrape, by the metric's name.
        self.sources: dict[str, Callable[[], float]] = {"blip_last_progress_timestamp_seconds": lambda: self.last_event}
        #: When an image was last loaded, a batch run, or a hint dealt with (Unix time).
        self.last_event = time.time()
        self.registry = CollectorRegistry()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series, and tell what resets tell
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for family in FAMILIES:
            if family.kind == "histogram":
                self._histograms[family.name] = Histogram(
                    family.name, family.help, family.labels, buckets=family.buckets, registry=self.registry
                )
            elif family.kind == "counter" and family.name not in _ASKED:
                counter = Counter(family.name, family.help, family.labels, registry=self.registry)
                self._counters[family.name] = counter
                for labels in _KNOWN.get(family.name, ()):
                    counter.labels(*labels)
        self.registry.register(_Asked(self.sources, settings))
        ProcessCollector(registry=self.registry)

    def loaded(self, loaded: Loaded) -> None:
        """A loader is done with an image."""
        self._histograms["blip_fetch_seconds"].observe(loaded.fetch_seconds)
        self._counters["blip_fetch_bytes_total"].inc(loaded.bytes)
        if loaded.decode_seconds:
            self._histograms["blip_decode_seconds"].observe(loaded.decode_seconds)
        self.last_event = time.time()

    def batch(self, report: BatchReport) -> None:
        """The engine ran a batch."""
        self._histograms["blip_batch_rows"].labels(report.task).observe(report.requests)
        for stage, seconds in report.stage_seconds.items():
            self._histograms["blip_engine_seconds"].labels(report.task, stage).observe(seconds)
        self._counters["blip_engine_busy_seconds_total"].inc(report.busy_seconds)
        self._counters["blip_engine_oom_splits_total"].inc(report.oom_splits)
        self.last_event = time.time()

    def committed(self, task: str, part: PartInfo, seconds: float) -> None:
        """A chunk's part is in storage and was counted."""
        self._counters["blip_rows_total"].labels(task, "completed").inc(max(0, part.rows - part.failed))
        self._counters["blip_rows_total"].labels(task, "failed").inc(part.failed)
        for code, rows in _codes(part.codes):
            self._counters["blip_row_errors_total"].labels(code).inc(rows)
        self._histograms["blip_chunk_seconds"].observe(seconds)

    def chunk(self, outcome: str) -> None:
        """A hint came to this end, one of CHUNK_OUTCOMES."""
        self._counters["blip_chunks_total"].labels(outcome).inc()
        self.last_event = time.time()


class _Asked(Collector):
    """What others know, at the moment of a scrape."""

    def __init__(self, sources: Mapping[str, Callable[[], float]], settings: Settings) -> None:
        self._sources, self._gpu = sources, Gpu.open(settings.device)
        gpu = self._gpu.name if self._gpu else ""
        self._info = _version(), settings.device, settings.precision, ",".join(settings.models), gpu

    def describe(self) -> Iterable[Metric]:
        return (family.metric({}) for family in FAMILIES if family.kind == "gauge" or family.name in _ASKED)

    def collect(self) -> Iterator[Metric]:
        told: dict[str, dict[tuple[str, ...], float]] = {"blip_worker_info": {self._info: 1.0}}
        for name, source in self._sources.items():
            told[name] = {(): source()}
        for name, value in (self._gpu.read() if self._gpu else {}).items():
            told[name] = {(): value}
        return (family.metric(told[family.name]) for family in FAMILIES if family.name in told)


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
