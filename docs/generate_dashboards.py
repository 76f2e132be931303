"""Write helm/blip-batch/dashboards/*.json, Grafana's dashboards, from the panels below (`make docs`).

Every query has the variable `$namespace` (all by default, also where there is no such label) and takes `max` of what
each orchestrator tells alike, `sum` of what each worker tells of itself. A test runs every one against a Prometheus
that scraped a real run, and none may be empty.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parents[1] / "helm" / "blip-batch" / "dashboards"
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH: Final = 24  # of Grafana's grid


@dataclass(frozen=True)
class Panel:
    """A picture of one or more queries."""

    title: str
    description: str
    queries: Sequence[tuple[str, str]]  # PromQL with N for the filter and R for the range, and the legend
    unit: str = "short"
    kind: str = "timeseries"  # or stat, heatmap, table
    width: int = 12
    decimals: int | None = None

    def as_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        height = {"stat": 4}.get(self.kind, 8)
        defaults: dict[str, Any] = {"unit": self.unit, "noValue": "-", "color": {"mode": "palette-classic"}}
        if self.decimals is not None:
            defaults["decimals"] = self.decimals
        if self.kind == "timeseries":
            defaults["custom"] = {"fillOpacity": 10, "showPoints": "never"}
        return {
            "id": number, "type": self.kind, "title": self.title, "description": self.description,
            "datasource": _SOURCE, "gridPos": {"x": x, "y": y, "w": self.width, "h": height},
            "targets": [self._target(place, *query) for place, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": defaults, "overrides": []}, "options": self._options(),
        }  # fmt: skip

    def _target(self, place: int, query: str, legend: str) -> dict[str, Any]:
        target: dict[str, Any] = {
            "refId": chr(ord("A") + place), "datasource": _SOURCE, "expr": _expanded(query), "legendFormat": legend,
        }  # fmt: skip
        if self.kind in {"stat", "table"}:
            target["instant"] = True
        if self.kind in {"heatmap", "table"}:
            target["format"] = self.kind
        return target

    def _options(self) -> dict[str, Any]:
        match self.kind:
            case "stat":
                return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}
            case "timeseries":
                legend = {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]}
                return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
            case "heatmap":
                return {
                    "calculate": False,
                    "yAxis": {"unit": self.unit},
                    "color": {"mode": "scheme", "scheme": "Oranges"},
                }
            case _:
                return {"showHeader": True}


def _expanded(query: str) -> str:
    return query.replace("{N", '{namespace=~"$namespace"').replace("[R]", "[$__rate_interval]")


def stat(title: str, description: str, query: str, unit: str = "short", decimals: int | None = None) -> Panel:
    return Panel(title, description, [(query, title)], unit, "stat", 4, decimals)


def quantiles(metric: str, by: str = "", legend: str = "") -> list[tuple[str, str]]:
    return [
        (f"histogram_quantile({q}, sum by (le{by}) (rate({metric}_bucket{{N}}[R])))", f"p{round(q * 100)}{legend}")
        for q in (0.5, 0.95, 0.99)
    ]


_SPEED: Final = "max(rate(blip_rows_done_total{N}[R]))"
_PRICE: Final = "max(blip_live_workers{N}) * max(blip_worker_price_per_hour{N})"
_NEEDS_PRICE: Final = "Needs BLIP_PRICE_PER_WORKER_HOUR on the orchestrator."

OVERVIEW: Final = (
    stat("Backlog", "Rows without an outcome yet, of all jobs; those in flight count.", "max(blip_backlog_rows{N})"),
    stat("Rows per second", "Rows that get their outcome, of all jobs.", _SPEED, decimals=1),
    stat(
        "Time left", "The backlog at the speed of the last minutes; nothing while nothing moves.",
        f"max(blip_backlog_rows{{N}}) / ({_SPEED} > 0)", "s",
    ),
    stat("Live workers", "Heard of within the last 45 seconds.", "max(blip_live_workers{N})"),
    stat("Cost per hour", f"Live workers at their price. {_NEEDS_PRICE}", _PRICE, "currencyUSD", 2),
    stat(
        "Cost per 1,000 rows", f"At the speed of the last minutes. {_NEEDS_PRICE}",
        f"{_PRICE} / ({_SPEED} * 3.6 > 0)", "currencyUSD", 4,
    ),
    Panel(
        "Rows per second by outcome", "What workers committed: results, and error records.",
        [("sum by (outcome) (rate(blip_rows_total{N}[R]))", "{{outcome}}")], "rps",
    ),
    Panel(
        "Backlog over time", "Rows left, and chunks handed out.",
        [("max(blip_backlog_rows{N})", "rows"), ("max(blip_inflight_chunks{N})", "chunks in flight")],
    ),
    Panel(
        "Errors by code", "Rows that failed, by the code of their error record; the runbook tells what each means.",
        [("sum by (code) (rate(blip_row_errors_total{N}[R])) > 0", "{{code}}")], "rps",
    ),
    Panel(
        "Share of failed rows", "Of the rows that were committed.",
        [("sum(rate(blip_rows_total{N, outcome=\"failed\"}[R])) / (sum(rate(blip_rows_total{N}[R])) > 0)", "failed")],
        "percentunit",
    ),
    Panel(
        "Workers", "Live ones, and how many the autoscaler is asked for.",
        [("max(blip_live_workers{N})", "live"), ("max(blip_desired_workers{N})", "desired")],
    ),
    Panel("Jobs by status", "Those that Redis knows.", [("max by (status) (blip_jobs{N})", "{{status}}")]),
    Panel(
        "Rows per second by task", "What workers committed.",
        [("sum by (task) (rate(blip_rows_total{N}[R]))", "{{task}}")], "rps",
    ),
    Panel(
        "Since a job last moved", "Of the jobs in progress, the one that has waited longest for a row.",
        [("time() - min(blip_oldest_progress_timestamp_seconds{N})", "oldest")], "s",
    ),
    Panel(
        "Chunks whose worker or hint was lost", "Requeued: handed out again. Found: its part was in storage already.",
        [("max by (action) (increase(blip_reconciled_chunks_total{N}[R]))", "{{action}}")],
    ),
    Panel(
        "Redis memory", "Used of maxmemory, and whether chunks are held back because of it; 0 without a limit.",
        [("max(blip_redis_memory_ratio{N})", "used"), ("max(blip_feeder_paused{N})", "feeder paused")], "percentunit",
    ),
)  # fmt: skip

ENGINE: Final = (
    Panel(
        "Engine busy", "Share of the time that each worker's engine ran batches. Low with a backlog: it waits.",
        [("rate(blip_engine_busy_seconds_total{N}[R])", "{{instance}}")], "percentunit",
    ),
    Panel(
        "Rows with the engine", "In its batch, or waiting for it, by worker.",
        [("blip_engine_queue_rows{N}", "{{instance}}")],
    ),
    Panel(
        "Batch size", "Mean rows in a batch, by task.",
        [("sum by (task) (rate(blip_batch_rows_sum{N}[R])) / (sum by (task) (rate(blip_batch_rows_count{N}[R])) > 0)",
          "{{task}}")],
    ),
    Panel(
        "Batches per second", "By task.", [("sum by (task) (rate(blip_batch_rows_count{N}[R]))", "{{task}}")], "ops",
    ),
    Panel(
        "Time of a batch by stage", "Median and 95th percentile on the device: vision, and the text after it.",
        quantiles("blip_engine_seconds", ", task, stage", " {{task}} {{stage}}")[:2], "s",
    ),
    Panel(
        "Device time of a row by stage", "Mean, by task and stage.",
        [("sum by (task, stage) (rate(blip_engine_seconds_sum{N}[R])) / on (task) group_left () "
          "(sum by (task) (rate(blip_batch_rows_sum{N}[R])) > 0)", "{{task}} {{stage}}")], "s",
    ),
    Panel("GPU use", "As NVML tells.", [("blip_gpu_utilization_ratio{N}", "{{instance}}")], "percentunit"),
    Panel("GPU memory", "In use, by anyone.", [("blip_gpu_memory_used_bytes{N}", "{{instance}}")], "bytes"),
    Panel("Time of a chunk", "From its lease to its commit.", quantiles("blip_chunk_seconds"), "s"),
    Panel(
        "Hints by outcome", "What became of the chunks that workers took.",
        [("sum by (outcome) (rate(blip_chunks_total{N}[R]))", "{{outcome}}")], "ops",
    ),
    Panel(
        "Restarts and halved batches", "Engine and loader processes that died or hung; batches halved for memory.",
        [("sum(increase(blip_engine_restarts_total{N}[R]))", "engine"),
         ("sum(increase(blip_loader_restarts_total{N}[R]))", "loaders"),
         ("sum(increase(blip_engine_oom_splits_total{N}[R]))", "halved batches")],
    ),
    Panel(
        "Since a worker last moved", "Since a row was done of the chunk that stands still.",
        [("time() - blip_last_progress_timestamp_seconds{N}", "{{instance}}")], "s",
    ),
    Panel("Chunks in hand", "By worker.", [("blip_worker_chunks{N}", "{{instance}}")]),
    Panel("Workers", "Version, device, precision, models, GPU.", [("blip_worker_info{N}", "")], kind="table"),
)  # fmt: skip

STORAGE: Final = (
    Panel("Fetching an image", "Retries and failures included.", quantiles("blip_fetch_seconds"), "s"),
    Panel(
        "Fetching an image: all of them", "How many took how long.",
        [("sum by (le) (increase(blip_fetch_seconds_bucket{N}[R]))", "{{le}}")], "s", "heatmap",
    ),
    Panel(
        "Images per second", "Fetched, by all workers.",
        [("sum(rate(blip_fetch_seconds_count{N}[R]))", "images")], "ops",
    ),
    Panel("Bytes per second", "Of encoded images.", [("sum(rate(blip_fetch_bytes_total{N}[R]))", "bytes")], "Bps"),
    Panel(
        "Mean size of an image", "Encoded; failed fetches count as 0.",
        [("sum(rate(blip_fetch_bytes_total{N}[R])) / (sum(rate(blip_fetch_seconds_count{N}[R])) > 0)", "bytes")],
        "bytes",
    ),
    Panel(
        "Failures of storage", "Rows whose image was not had, by code.",
        [("sum by (code) (rate(blip_row_errors_total{N, "
          "code=~\"image_not_found|access_denied|fetch_.*|uri_not_allowed|unsupported_uri\"}[R]))", "{{code}}")], "rps",
    ),
    Panel("Decoding an image", "The resize included.", quantiles("blip_decode_seconds"), "s"),
    Panel(
        "Decoding an image: all of them", "How many took how long.",
        [("sum by (le) (increase(blip_decode_seconds_bucket{N}[R]))", "{{le}}")], "s", "heatmap",
    ),
)  # fmt: skip

DASHBOARDS: Final = {
    "overview": ("BLIP batch: overview", OVERVIEW),
    "engine": ("BLIP batch: engine", ENGINE),
    "storage": ("BLIP batch: storage", STORAGE),
}


def _placed(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """In rows from left to right."""
    found, x, y, bottom = [], 0, 0, 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > _WIDTH:
            x, y = 0, bottom
        found.append(panel.as_json(number, x, y))
        x, bottom = x + panel.width, max(bottom, y + found[-1]["gridPos"]["h"])
    return found


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "namespace", "label": "Namespace", "type": "query", "datasource": _SOURCE,
            "query": "label_values(blip_redis_up, namespace)", "refresh": 2, "includeAll": True, "allValue": ".*",
            "multi": True, "current": {"text": "All", "value": "$__all"},
        },
    ]  # fmt: skip


def dashboard(name: str) -> str:
    """The JSON of one of DASHBOARDS."""
    title, panels = DASHBOARDS[name]
    links = [
        {"title": "BLIP batch", "type": "dashboards", "tags": ["blip-batch"], "asDropdown": True, "keepTime": True}
    ]
    document = {
        "uid": f"blip-batch-{name}", "title": title, "tags": ["blip-batch"], "schemaVersion": 38, "version": 1,
        "editable": True, "graphTooltip": 1, "refresh": "10s", "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser", "links": links, "templating": {"list": _variables()}, "panels": _placed(panels),
    }  # fmt: skip
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(dashboard(name), encoding="utf-8")


if __name__ == "__main__":
    main()
