"""`blip-batch list`, `status`, `watch`, `errors`, `pause`, `resume`, `cancel`, `retry`: jobs of a cluster.

They work on the coordination Redis of BLIP_REDIS_URL, and on the outputs where a command needs them. Heavy imports
wait inside.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .report import EXIT_FAILED, EXIT_INTERRUPTED, exit_code, print_json, print_line

if TYPE_CHECKING:
    from rich.table import Table

    from .ledger import Ledger
    from .settings import Settings

_ENDED: Final = frozenset({"completed", "failed", "cancelled"})  # contract.ENDED, without its imports


def _known_jobs(incomplete: str) -> list[str]:
    """Job ids for the shell's completion; none where Redis does not answer."""
    from .errors import BlipBatchError  # noqa: PLC0415

    try:
        with _ledger() as (ledger, _):
            return [job for job in ledger.jobs() if job.startswith(incomplete)]
    except BlipBatchError:  # a shell that waits for a word is no place for messages
        return []


Job = Annotated[str, typer.Argument(help="The job's id; `list` shows them.", autocompletion=_known_jobs)]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def register_jobs(app: typer.Typer) -> None:
    """Adds the commands to `blip-batch`."""
    app.command(name="list")(list_)
    for command in (status, watch, errors, pause, resume, cancel, retry):
        app.command()(command)


@contextmanager
def _ledger() -> "Iterator[tuple[Ledger, Settings]]":
    from .ledger import Ledger  # noqa: PLC0415
    from .settings import load_settings  # noqa: PLC0415

    settings = load_settings()
    ledger = Ledger.connect(settings)
    try:
        yield ledger, settings
    finally:
        ledger.close()


def list_(as_json: JsonFlag = False) -> None:
    """All known jobs, the oldest first."""
    from .lifecycle import list_jobs  # noqa: PLC0415

    with _ledger() as (ledger, settings):
        jobs = list_jobs(ledger, settings)
    if as_json:
        print_json(jobs)
        return
    for job in jobs:
        counts = job["request_counts"]
        done = f"{job['rows_done']:,}/{counts['total']:,}"
        print_line(f"{job['id']:<24} {job['status']:<11} {job['task']:<8} {done:>19} {_speed(job):>14} {job['output']}")


def status(job: Job, as_json: JsonFlag = False) -> None:
    """How far a job is, how fast, when it will be done, what it costs, and what failed."""
    from .lifecycle import read_status  # noqa: PLC0415

    with _ledger() as (ledger, settings):
        view = read_status(ledger, settings, job)
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
        yield "speed", f"{_speed(view)} from {view['workers']:g} workers"
    if view["eta_seconds"] is not None:
        yield "time left", _duration(view["eta_seconds"])
    if view["estimated_cost"] is not None:
        yield "cost", f"{view['estimated_cost']:.2f} when done"


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
    from .lifecycle import read_status  # noqa: PLC0415

    with _ledger() as (ledger, settings), _shown(as_json) as show:
        try:
            while True:
                view = read_status(ledger, settings, job)
                show(view, ledger.live_workers())
                if view["status"] in _ENDED:
                    break
                time.sleep(interval)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
    raise typer.Exit(exit_code(view["status"], view["request_counts"]["failed"]))


@contextmanager
def _shown(as_json: bool) -> Iterator[Callable[[dict[str, Any], dict[str, dict[str, Any]]], None]]:
    """What shows a job and the live workers: a table that is drawn over, or lines of JSON."""
    if as_json:
        yield lambda view, workers: print_line(json.dumps({**view, "live_workers": workers}))
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415

    with Live(console=Console(), auto_refresh=False) as live:
        yield lambda view, workers: live.update(_table(view, workers), refresh=True)


def _table(view: dict[str, Any], workers: dict[str, dict[str, Any]]) -> "Table":
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=view["id"], show_header=False, title_justify="left")
    for name, value in _lines(view):
        table.add_row(name, value)
    for name, info in sorted(workers.items()):
        models = ", ".join(info.get("models", ())) or "no model yet"
        table.add_row("worker", f"{name}: {info.get('slots', 1)} slots, {models}")
    return table


def errors(
    job: Job,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print whole error records, one JSON object a line.")] = False,
) -> None:
    """The rows that have failed so far, each with its code and message."""
    from .contract import to_line  # noqa: PLC0415
    from .lifecycle import errors as failed_rows  # noqa: PLC0415

    with _ledger() as (ledger, settings):
        for number, record in enumerate(failed_rows(ledger, settings, job), 1):
            if as_json:
                sys.stdout.write(to_line(record).decode())
            else:
                print_line(f"row {record['row']:<10} {record['error']['code']:<18} {record['error']['message']}")
            if number == limit:
                return


def pause(job: Job) -> None:
    """Hand out nothing more of a job until `resume`; finished work is kept."""
    from .lifecycle import pause as change  # noqa: PLC0415

    _do(change, job, "paused")


def resume(job: Job) -> None:
    """Go on with a job that is paused, cancelled or failed, from its finished parts."""
    from .lifecycle import resume as change  # noqa: PLC0415

    _do(change, job, "resumed")


def cancel(job: Job) -> None:
    """End a job as soon as its workers let go; finished work is kept."""
    from .lifecycle import cancel as change  # noqa: PLC0415

    _do(change, job, "cancelling")


def _do(change: "Callable[[Ledger, str], None]", job: str, done: str) -> None:
    with _ledger() as (ledger, _):
        change(ledger, job)
    print_line(f"{job} {done}")


def retry(
    job: Job,
    wait: Annotated[bool, typer.Option("--wait", help="Until the round has ended; the exit code tells how.")] = False,
) -> None:
    """Do the rows that failed again, in a new round, merged into the same results."""
    from .lifecycle import read_status  # noqa: PLC0415
    from .lifecycle import retry as begin  # noqa: PLC0415

    with _ledger() as (ledger, settings):
        begun = begin(ledger, settings, job)
        print_line(f"{job} round {begun.round}: {begun.rows} rows")
        if not wait:
            return
        while (view := read_status(ledger, settings, job))["status"] not in _ENDED:
            time.sleep(0.5)
    if view["error"]:
        typer.echo(f"Error: {view['error']['message']}", err=True)
        raise typer.Exit(EXIT_FAILED)
    raise typer.Exit(exit_code(view["status"], view["request_counts"]["failed"]))
