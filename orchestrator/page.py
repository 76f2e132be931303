"""`blip-batch report`: one self-contained HTML page of an output; a sample of its images with their results."""

import base64
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from random import Random
from typing import Any, Final

from blip_engine.requests import Task

from .contract import JobSpec
from .errors import FetchError, UsageError
from .export import records_of, refuse_our_own, tell_of_stopped_round
from .fetch import fetch
from .jobs import read_job, spec_of
from .plan import Plan, load_plan
from .settings import Settings, load_settings
from .storage import open_object, open_store

_BINS: Final = 24
_SCORES_KEPT: Final = 20_000  # of all rows, drawn evenly
_THUMBNAIL: Final = 192  # pixels
#: What the histogram is of.
_SCORES: Final[dict[Task, str]] = {
    "caption": "score", "vqa": "score", "itm": "match", "capfilt": "caption_match",
}  # fmt: skip


@dataclass
class _Drawn:
    """So many of a stream's values, each with the same chance, and the number of all."""

    most: int
    random: Random = field(default_factory=lambda: Random(0))  # the same page for the same output
    values: list[Any] = field(default_factory=list)
    seen: int = 0

    def add(self, value: Any) -> None:
        self.seen += 1
        if len(self.values) < self.most:
            self.values.append(value)
        elif (place := self.random.randrange(self.seen)) < self.most:
            self.values[place] = value


def write_page(output: str, file: str, sample: int = 24, settings: Settings | None = None) -> tuple[int, int]:
    """Writes the page to `file` (a path or s3:// URI) and returns how many thumbnails and rows it shows.

    Reads every part once; the memory is that of a few. Raises UsageError for an output without a job, JobError when
    rows have no part yet or a part is wrong, and StorageError.
    """
    settings = settings or load_settings()
    store = open_store(output, settings)
    plan, job = load_plan(store, settings), read_job(store)
    if plan is None or job is None:
        raise UsageError(f"{output} holds no job: there is no plan/plan.json")
    refuse_our_own(store.root, file)
    tell_of_stopped_round(plan)
    spec = spec_of(job, store)
    rows, scores, codes = _Drawn(sample), _Drawn(_SCORES_KEPT), Counter[str]()
    for record in records_of(plan):
        if record["error"] is not None:
            codes[record["error"]["code"]] += 1
            continue
        rows.add(record)
        if isinstance(score := record["result"].get(_SCORES.get(spec.task, "")), float):
            scores.add(score)
    shown = sorted(rows.values, key=lambda record: record["row"])
    pictures = _thumbnails(plan, shown, settings)
    target, key = open_object(file, settings)
    page = "".join(_page(spec, job.get("options"), plan, codes, scores.values, shown, pictures))
    target.put(key, page.encode(errors="replace"))
    return len(pictures), len(shown)


def _thumbnails(plan: Plan, records: Sequence[dict[str, Any]], settings: Settings) -> dict[int, str]:
    """Row -> a JPEG in base64; without those that cannot be had, and none at all where Pillow is not installed."""
    policy = plan.image_policy()

    def load(record: dict[str, Any]) -> bytes:
        try:
            location = policy.resolve(record["image"])
            return fetch(location, settings.max_image_bytes, settings.fetch_timeout_seconds)
        except FetchError:  # it is gone by now: a row without a picture
            return b""

    with tempfile.TemporaryDirectory(prefix="blip-report-") as name, ThreadPoolExecutor(8) as pool:
        folder = Path(name)
        for record, data in zip(records, pool.map(load, records), strict=True):
            (folder / str(record["row"])).write_bytes(data)
        command = [sys.executable, "-m", "blip_engine.thumbnails", name, str(_THUMBNAIL)]
        subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - our own module
        return {int(path.stem): base64.b64encode(path.read_bytes()).decode() for path in folder.glob("*.jpg")}


def _page(
    spec: JobSpec, options: Any, plan: Plan, codes: Counter[str], scores: list[float], shown: list[dict[str, Any]],
    pictures: dict[int, str],
) -> Iterator[str]:  # fmt: skip
    failed = codes.total()
    title = f"{spec.task} of {plan.rows:,} rows"
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
    yield f"<h1>{escape(title)}</h1><table>"
    facts = {"manifest": plan.source, "output": spec.output, "model": spec.model, "options": options}
    for name, value in {**facts, "with results": f"{plan.rows - failed:,}", "failed": f"{failed:,}"}.items():
        yield f"<tr><th>{name}<td>{escape(str(value))}"
    yield "</table>"
    if codes:
        yield "<h2>Errors by code</h2><table>"
        for code, count in codes.most_common():
            yield f"<tr><th>{escape(code)}<td>{count:,}"
        yield "</table>"
    if scores:
        yield f"<h2>{escape(_SCORES[spec.task])}</h2>{_histogram(scores)}"
    yield f"<h2>{len(shown)} of {plan.rows - failed:,} results</h2><main>"
    yield from (_figure(record, pictures.get(record["row"])) for record in shown)
    yield "</main>"


_STYLE: Final = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:2em;max-width:75em}th{text-align:left;padding-right:1em}"
    "main{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;width:12em;overflow-wrap:anywhere}"
    "img{max-width:100%;display:block}small{color:#666}rect{fill:#47a}"
)


def _histogram(scores: list[float]) -> str:
    low, high = min(scores), max(scores)
    width = (high - low) / _BINS or 1.0
    counts = Counter(min(_BINS - 1, int((score - low) / width)) for score in scores)
    most = max(counts.values())
    bars = "".join(
        f"<rect x={place * 20} y={100 - 100 * count / most:.1f} width=18 height={100 * count / most:.1f}>"
        f"<title>{low + place * width:.3g} to {low + (place + 1) * width:.3g}: {count}</title></rect>"
        for place, count in sorted(counts.items())
    )
    box = f"<svg viewBox='0 0 {_BINS * 20} 100' width=600 height=125 role=img>{bars}</svg>"
    return f"{box}<p>{low:.3g} to {high:.3g}, the middle at {sorted(scores)[len(scores) // 2]:.3g}"


def _figure(record: dict[str, Any], picture: str | None) -> str:
    image = f'<img alt="" src="data:image/jpeg;base64,{picture}">' if picture else ""
    asked = "".join(f"<br><i>{escape(text)}</i>" for text in _asked(record["input"]))
    said = "".join(f"<br>{escape(line)}" for line in _said(record["result"]))
    name = f"<small>row {record['row']}: {escape(str(record['image']))}</small>"
    return f"<figure>{image}<figcaption>{name}{asked}{said}</figcaption></figure>"


def _asked(given: dict[str, Any]) -> Iterator[str]:
    for key in ("prompt", "question", "questions", "text", "texts"):
        if given.get(key):
            yield str(given[key])


def _said(result: dict[str, Any]) -> Iterator[str]:
    for name, value in result.items():
        if name in {"embedding", "text_embedding"}:
            yield f"{name}: {len(value)} numbers"
        elif value is not None:
            yield f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
