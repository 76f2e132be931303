"""`blip-batch submit`, `list`, `status`, `watch`, `errors`, `pause`, `resume`, `cancel`, `retry`: jobs of a cluster.

They go through the HTTP API at BLIP_API_URL, or, without that, through the Redis at BLIP_REDIS_URL (`backends`). Heavy
imports wait inside.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .cli_run import (
    ChunkRows,
    Column,
    Format,
    MaxErrorRatio,
    Model,
    Option,
    Results,
    Tasks,
    given_columns,
    given_options,
)
from .report import EXIT_INTERRUPTED, exit_code, print_json, print_line

if TYPE_CHECKING:
    from rich.table import Table

    from .backends import Backend, Change

_LIST: Final = "{:<24} {:<11} {:<8} {:>19} {:>9} {:>14} {}"  # a line of `list`
_ENDED: Final = frozenset({"completed", "failed", "cancelled"})  # contract.ENDED, without its imports


def _known_jobs(incomplete: str) -> list[str]:
    """Job ids for the shell's completion; none where nobody answers."""
    from .errors import BlipBatchError  # noqa: PLC0415

    try:
        with _backend() as backend:
            return [job["id"] for job in backend.jobs() if job["id"].startswith(incomplete)]
    except BlipBatchError:  # a shell that waits for a word is no place for messages
        return []


Job = Annotated[str, typer.Argument(help="The job's id; `list` shows them.", autocompletion=_known_jobs)]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def register_jobs(app: typer.Typer) -> None:
    """Adds the commands to `blip-batch`."""
    app.command(name="list")(list_)
    for command in (submit, status, watch, errors, pause, resume, cancel, retry):
        app.command()(command)


@contextmanager
def _backend() -> "Iterator[Backend]":
    from .backends import connected  # noqa: PLC0415
    from .errors import RedisUnavailable  # noqa: PLC0415

    try:
        with connected() as backend:
            yield backend
    except RedisUnavailable as error:  # who has set neither address is new here
        raise RedisUnavailable(
            f"{error}, or set BLIP_API_URL to an orchestrator's API; for one machine, `blip-batch run` needs neither"
        ) from error


def submit(  # noqa: PLR0913, PLR0917 - a command has as many arguments as options
    manifest: Annotated[str, typer.Argument(help="s3:// URI, or a path that the orchestrator and the workers see.")],
    task: Tasks,
    output: Annotated[str, typer.Option(help="s3:// prefix or folder for the results.")],
    model: Model = None,
    option: Option = None,
    manifest_format: Format = None,
    column: Column = None,
    weight: Annotated[
        float, typer.Option(help="Its share of the workers, against other jobs' weights; above 0, at most 1,000.")
    ] = 1.0,
    chunk_rows: ChunkRows = None,
    results: Results = "jsonl",
    max_error_ratio: MaxErrorRatio = 0.5,
    wait: Annotated[bool, typer.Option("--wait", help="Until the job has ended; the exit code tells how.")] = False,
) -> None:
    """Send a job to the cluster, and print its id. The same command again goes on with the same job."""
    job = {
        "manifest": manifest, "task": task, "output": output, "model": model, "manifest_format": manifest_format,
        "columns": given_columns(column), "options": given_options(option), "weight": weight, "chunk_rows": chunk_rows,
        "results": results, "max_error_ratio": max_error_ratio,
    }  # fmt: skip
    with _backend() as backend:
        made = backend.submit(job)
        print_line(made)
        if wait:
            _wait(backend, made)


def list_(as_json: JsonFlag = False) -> None:
    """All known jobs, the oldest first."""
    with _backend() as backend:
        jobs = list(backend.jobs())
    if as_json:
        print_json(jobs)
        return
    if not jobs:
        print_line("no jobs")
        return
    print_line(_LIST.format("job", "status", "task", "rows done", "failed", "speed", "output"))
    for job in jobs:
        counts = job["request_counts"]
        done, failed = f"{job['rows_done']:,}/{counts['total']:,}", f"{counts['failed']:,}"
        print_line(_LIST.format(job["id"], job["status"], job["task"], done, failed, _speed(job), job["output"]))


def status(job: Job, as_json: JsonFlag = False) -> None:
    """How far a job is, how fast, when it will be done, what it costs, and what failed."""
    with _backend() as backend:
        view = backend.status(job)
    if as_json:
        print_json(view)
        return
    for name, value in _lines(view):
        print_line(f"{name:<14}{value}")


def _lines(view: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What `status` and `watch` show of a job, a name and a text each."""
    counts = view["request_counts"]
    yield "status", view["status"] + (f", round {view['round']}" if view["round"] else "")
    if view["error"]:
        yield "error", f"{view['error']['code']}: {view['error']['message']}"
    if view["notice"]:
        yield "notice", view["notice"]
    yield "task", f"{view['task']} with {view['model']}"
    yield "manifest", view["manifest"]
    yield "output", view["output"]
    yield "rows", f"{view['rows_done']:,} of {counts['total']:,}"
    yield "failed", f"{counts['failed']:,}"
    for code, rows in view["errors"].items():
        yield f"  {code}", f" {rows:,}"
    if view["rows_per_second"] is not None:
        yield "speed", f"{_speed(view)} from {view['workers']:g} worker{'' if view['workers'] == 1 else 's'}"
    if view["eta_seconds"] is not None:
        yield "time left", _duration(view["eta_seconds"])
    if view["estimated_cost"] is not None:
        whole = view["status"] == "completed" or view["eta_seconds"] is not None
        yield "cost", f"{view['estimated_cost']:.4g} {'when done' if whole else 'so far'}"


def _speed(view: dict[str, Any]) -> str:
    return "" if view["rows_per_second"] is None else f"{view['rows_per_second']:,.1f} rows/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def watch(
    job: Job,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a look, each on a line.")] = False,
) -> None:
    """A live table of a job, until it has ended; then the exit code tells how. Ctrl-C leaves the job at work."""
    with _backend() as backend, _shown(as_json) as show:
        try:
            while True:
                view = backend.status(job)
                show(view)
                if view["status"] in _ENDED:
                    break
                time.sleep(interval)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
    raise typer.Exit(exit_code(view["status"], view["request_counts"]["failed"]))


@contextmanager
def _shown(as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What shows a job and the live workers: a table that is drawn over, or lines of JSON."""
    if as_json:
        yield lambda view: print_line(json.dumps(view))
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415

    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        yield lambda view: live.update(_table(view), refresh=True)
    if not console.is_terminal:  # where it leaves the last line open
        console.print()


def _table(view: dict[str, Any]) -> "Table":
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=view["id"], show_header=False, title_justify="left")
    for name, value in _lines(view):
        table.add_row(name, value)
    for name, info in sorted(view["live_workers"].items()):
        models = ", ".join(info.get("models", ())) or "no model yet"
        table.add_row("worker", f"{name}: {info.get('slots', 1)} slots, {models}")
    return table


def errors(
    job: Job,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print whole error records, one JSON object a line.")] = False,
) -> None:
    """The rows that have failed so far, each with its code, image and message."""
    from .contract import to_line  # noqa: PLC0415
    from .failures import told  # noqa: PLC0415

    with _backend() as backend:
        for number, record in enumerate(backend.errors(job), 1):
            if as_json:
                sys.stdout.write(to_line(record).decode())
            else:
                print_line(f"row {record['row']:<10} {record['error']['code']:<18} {told(record)}")
            if number == limit:
                return


def pause(job: Job) -> None:
    """Hand out nothing more of a job until `resume`; finished work is kept."""
    _change(job, "pause", "paused")


def resume(job: Job) -> None:
    """Go on with a job that is paused, cancelled or failed, from its finished parts."""
    _change(job, "resume", "resumed")


def cancel(job: Job) -> None:
    """End a job as soon as its workers let go; finished work is kept."""
    _change(job, "cancel", "cancelling")


def _change(job: str, change: "Change", done: str) -> None:
    with _backend() as backend:
        backend.change(job, change)
    print_line(f"{job} {done}")


def retry(
    job: Job,
    wait: Annotated[bool, typer.Option("--wait", help="Until the round has ended; the exit code tells how.")] = False,
) -> None:
    """Do the rows that failed again, in a new round, merged into the same results."""
    with _backend() as backend:
        view = backend.status(job)
        if view["status"] == "completed" and not view["request_counts"]["failed"]:  # as `run --retry` has it
            print_line(f"{job}: every row has a result; nothing to retry")
            return
        begun = backend.retry(job)
        rows = "its rows are being counted" if begun.rows is None else f"{begun.rows} rows"
        print_line(f"{job} round {begun.round}: {rows}")
        if wait:
            _wait(backend, job)


def _wait(backend: "Backend", job: str) -> None:
    """Until the job has ended; then the exit code tells how. Ctrl-C leaves it at work."""
    try:
        while (view := backend.status(job))["status"] not in _ENDED:
            time.sleep(0.5)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if view["error"]:
        typer.echo(f"Error: {view['error']['message']}", err=True)
    raise typer.Exit(exit_code(view["status"], view["request_counts"]["failed"]))
