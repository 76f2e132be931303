"""`blip-batch run`, `demo`, `worker` and `convert`. Heavy imports wait inside them: `--help` is instant."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from .errors import UsageError
from .report import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_ROW_ERRORS, exit_code, print_line

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.progress import Task as Line

    from .contract import JobSpec, JobState
    from .embedded import Embedded
    from .settings import Settings

DEMO_TASKS: Final = ("caption", "vqa", "itm")
_SHOWN: Final = 4  # rows of each task in the demo's table

# No square brackets with small letters in them: help takes them for markup, and leaves them out.
Tasks = Annotated[str, typer.Option(help="caption, vqa, itm, embed or capfilt.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="owner/name on the hub (@revision pins it), directory, or demo; for capfilt CAPTIONER+FILTER. Default, by "
        "task: Salesforce/ blip-image-captioning-base, blip-vqa-base, blip-itm-base-coco (itm, embed), the first and "
        "the last (capfilt)."
    ),
]
Option = Annotated[list[str] | None, typer.Option(help="An option of the task, name=value; repeatable.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Of the manifest, instead of detection: jsonl, ground-truth, csv, tsv, s3-batch, s3-inventory, list, "
        "parquet or folder.",
    ),
]
ChunkRows = Annotated[int | None, typer.Option(min=1, max=10_000, help="Rows in each part; chosen if left out.")]
Results = Annotated[str, typer.Option(help="jsonl, jsonl.gz or parquet: what the parts are written as.")]
MaxErrorRatio = Annotated[float, typer.Option(min=0, max=1, help="Stop above it, after 1,000 rows.")]
Workers = Annotated[int, typer.Option(min=1, max=64, help="Worker processes on this machine; each holds the model.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [BLIP_DEVICE].")]
Precision = Annotated[str | None, typer.Option(help="auto, fp32, bf16, fp16, or int8 on a CPU [BLIP_PRECISION].")]
Column = Annotated[list[str] | None, typer.Option(help="image=url_col: the manifest's name for a key; repeatable.")]
Redis = Annotated[str | None, typer.Option(help="A redis-server program to use [BLIP_REDIS_BINARY].")]


def register(app: typer.Typer) -> None:
    """Adds the commands to `blip-batch`."""
    app.command()(run)
    app.command()(demo)
    app.command()(worker)
    app.command()(convert)


def run(  # noqa: PLR0913, PLR0917 - a command has as many arguments as options
    manifest: Annotated[str, typer.Argument(help="A manifest file, or a folder of images; a path or s3:// URI.")],
    task: Tasks,
    output: Annotated[str, typer.Option(help="Folder or s3:// prefix for the results.")],
    model: Model = None,
    workers: Workers = 1,
    option: Option = None,
    manifest_format: Format = None,
    column: Column = None,
    chunk_rows: ChunkRows = None,
    results: Results = "jsonl",
    max_error_ratio: MaxErrorRatio = 0.5,
    retry: Annotated[
        bool, typer.Option("--retry", help="Do the rows that failed before again, and only them.")
    ] = False,
    device: Device = None,
    precision: Precision = None,
    redis: Redis = None,
) -> None:
    """Do a whole job on this machine. The same command again goes on where it stopped."""
    from .jobs import make_spec  # noqa: PLC0415

    settings = _settings(device=device, precision=precision)
    spec = make_spec(
        manifest, task, output, model=model, manifest_format=manifest_format, columns=given_columns(column),
        options=given_options(option), chunk_rows=chunk_rows, results=results, max_error_ratio=max_error_ratio,
    )  # fmt: skip
    if retry:
        _retry(spec, settings)
    (summary,) = _run_jobs([spec], workers, redis, settings)
    _print_summary(spec, summary)
    _leave([spec], [summary], settings)


def _settings(**given: str | None) -> "Settings":
    from blip_engine.requests import check_words  # noqa: PLC0415

    from .misspelt import misspelt  # noqa: PLC0415
    from .settings import load_settings  # noqa: PLC0415

    for line in misspelt(os.environ):
        typer.echo(f"Warning: {line}", err=True)
    settings = load_settings(drain_seconds=os.environ.get("BLIP_DRAIN_SECONDS") or 5.0, **given)
    check_words(settings.device, settings.precision)
    return settings


def _retry(spec: "JobSpec", settings: "Settings") -> None:
    from .jobs import plan_to_go_on_with, read_job  # noqa: PLC0415
    from .lifecycle import next_round  # noqa: PLC0415
    from .storage import open_store  # noqa: PLC0415

    plan = plan_to_go_on_with(spec, settings)
    if plan is None and read_job(open_store(spec.output, settings)) is None:  # a misspelt output would begin a new job
        raise UsageError(f"--retry: {spec.output} holds no job; name the output of one, or leave --retry out")
    if plan is not None and (begun := next_round(plan)):
        typer.echo(f"Round {begun.round}: {begun.rows} rows without a result", err=True)


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the drawings and the results.")] = Path("blip-batch-demo"),
    count: Annotated[int, typer.Option(min=1, max=100_000, help="Drawings; each task has a row for each.")] = 500,
    workers: Workers = 1,
    device: Device = None,
    precision: Precision = None,
    redis: Redis = None,
) -> None:
    """Draw pictures, caption them, ask about them and match them, and say how often the model was right."""
    from .jobs import make_spec  # noqa: PLC0415

    settings = _settings(device=device, precision=precision)
    drawings = output / f"drawings-{count}"
    _draw(drawings, count)
    specs = [
        make_spec(str(drawings / f"{task}.jsonl"), task, str(output / f"{task}-{count}"), model="demo")
        for task in DEMO_TASKS
    ]
    summaries = _run_jobs(specs, workers, redis, settings)
    _print_demo(specs, summaries)
    _leave(specs, summaries, settings)


def worker() -> None:
    """Work for the cluster at BLIP_REDIS_URL until SIGTERM; settings are BLIP_* variables."""
    os.execv(sys.executable, [sys.executable, "-m", "workers"])  # noqa: S606 - the worker imports us, never we it


def convert(
    file: Annotated[Path, typer.Argument(help="A .pth file of Salesforce's BLIP or LAVIS.")],
    directory: Annotated[Path, typer.Argument(help="Where the checkpoint goes; made, and not there yet.")],
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels; the file's own if left out.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory with vocab.txt or tokenizer.json; else the hub's bert-base-uncased.")
    ] = None,
) -> None:
    """Turn a .pth checkpoint of Salesforce's BLIP or LAVIS into a directory for --model."""
    options = [f"--image-size={image_size}"] if image_size is not None else []
    options += [f"--tokenizer={tokenizer}"] if tokenizer is not None else []
    print_line(_engine_program("cannot convert", "salesforce", *options, "--", str(file), str(directory)).rstrip())


def given_columns(given: Sequence[str] | None) -> dict[str, str]:
    """`--column KEY=NAME` as a mapping. Raises UsageError."""
    columns: dict[str, str] = {}
    for text in given or ():
        key, equals, name = text.partition("=")
        if not equals or key in columns:
            raise UsageError(f"--column {text}: write KEY=NAME, each KEY once")
        columns[key] = name
    return columns


def given_options(given: Sequence[str] | None) -> dict[str, Any]:
    """`name=value` as a mapping; values are JSON where they can be, else text. Raises UsageError."""
    options: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not name or not equals or name in options:
            raise UsageError(f"--option {text}: write name=value, each name once")
        try:
            options[name] = json.loads(value)
        except ValueError:  # a word
            options[name] = value
        except RecursionError:
            raise UsageError(f"--option {name}: its value is nested too deeply; no option takes such a one") from None
    return options


def _run_jobs(
    specs: "Sequence[JobSpec]", workers: int, redis: str | None, settings: "Settings"
) -> list[dict[str, Any]]:
    """The jobs' summaries, computed now or found. Raises BlipBatchError when one of them failed."""
    from .embedded import Embedded, advice, finished_summary  # noqa: PLC0415
    from .errors import JobError  # noqa: PLC0415
    from .jobs import plan_to_go_on_with  # noqa: PLC0415

    for spec in specs:
        plan_to_go_on_with(spec, settings)
    found = {spec.id: summary for spec in specs if (summary := finished_summary(spec, settings)) is not None}
    missing = [spec for spec in specs if spec.id not in found]
    for spec in specs:
        if spec.id in found:
            typer.echo(f"{spec.output} is complete already; nothing to do", err=True)
    if missing:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as tidily as on Ctrl-C
        try:
            with Embedded(_preloading(settings, missing), workers, redis) as system:
                states = _seen_through(system, missing)
        except KeyboardInterrupt:
            typer.echo("Stopped. The same command goes on from here.", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        for spec, state in zip(missing, states, strict=True):
            summary = finished_summary(spec, settings)
            if state.failed and (hint := advice(spec, settings)):
                typer.echo(f"Hint: {hint}", err=True)
            if summary is None:
                error = state.error or {"code": state.status, "message": f"the job is {state.status}"}
                raise JobError(error["code"], error["message"])
            found[spec.id] = summary
    return [found[spec.id] for spec in specs]


def _seen_through(system: "Embedded", specs: "Sequence[JobSpec]") -> "list[JobState]":
    """The jobs' last states, with a progress bar until then."""
    try:
        with _progress() as bars:
            return system.run(specs, _Bars(bars, specs).update)
    except KeyboardInterrupt:  # the workers take seconds to end, and silence looks as if nobody had heard
        typer.echo("stopping… what is nearly done is finished first; Ctrl-C again ends it at once", err=True)
        raise


def _preloading(settings: "Settings", specs: "Sequence[JobSpec]") -> "Settings":
    """So that the models are loaded while the jobs are planned."""
    from blip_engine.requests import checkpoints_of  # noqa: PLC0415

    named = [f"{task}:{model}" for spec in specs for task, model in checkpoints_of(spec.task, spec.model)]
    return settings.model_copy(update={"preload": tuple(name for name in dict.fromkeys(named) if "," not in name)})


def _progress() -> "Progress":
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: PLC0415

    return Progress(  # no column has a width that it may not need: of 80, half are the note's while a model is loaded
        TextColumn("{task.description:8}"), BarColumn(24), MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}{task.fields[note]}"), console=Console(stderr=True),
    )  # fmt: skip


class _Bars:
    """One line for each job: rows done of all, rows/s, time left, errors; until the first row is done, the phase."""

    def __init__(self, progress: "Progress", specs: "Sequence[JobSpec]") -> None:
        self._progress, self._specs = progress, specs
        self._lines = [progress.add_task(spec.task, total=None, pace="", note="starting workers") for spec in specs]

    def update(self, states: "list[JobState]", done: list[int]) -> None:
        for line, spec, state, rows in zip(self._lines, self._specs, states, done, strict=True):
            self._progress.update(
                line, total=state.total or None, completed=rows, pace=_pace(self._progress.tasks[line]),
                note=_phase(spec, state, rows) or (f"{state.failed} errors" if state.failed else ""),
            )  # fmt: skip


def _pace(line: "Line") -> str:
    speed, left = line.finished_speed or line.speed, line.time_remaining
    if not speed:
        return ""
    return f"{speed:,.1f} rows/s  " + (f"{timedelta(seconds=round(left))} left  " if left else "")


def _phase(spec: "JobSpec", state: "JobState", rows: int) -> str:
    if state.status == "in_progress" and rows <= state.restored:  # parts that were there before need no model
        return "loading " + "+".join(name.rpartition("/")[2] for name in spec.model.split("+"))
    return {"validating": "planning", "finalizing": "verifying"}.get(state.status, "")


def _leave(specs: "Sequence[JobSpec]", summaries: Sequence[dict[str, Any]], settings: "Settings") -> NoReturn:
    """Ends with the worst exit code. Raises JobError, which says why, for a job without a single result."""
    from .failures import all_failed  # noqa: PLC0415
    from .plan import load_plan  # noqa: PLC0415
    from .storage import open_store  # noqa: PLC0415

    codes = []
    for spec, summary in zip(specs, summaries, strict=True):
        codes.append(exit_code(summary["status"], summary["request_counts"]["failed"]))
        if codes[-1] != EXIT_FAILED:
            continue
        if (plan := load_plan(open_store(spec.output, settings), settings)) is not None:
            raise all_failed(plan, summary["errors"], summary.get("round", 0))
    raise typer.Exit(next((code for code in (EXIT_FAILED, EXIT_ROW_ERRORS) if code in codes), EXIT_OK))


def _print_summary(spec: "JobSpec", summary: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from .failures import counted  # noqa: PLC0415

    counts, speed = summary["request_counts"], summary["images_per_second"]
    table = Table(title=f"{spec.task}: {summary['status']}", show_header=False, title_justify="left")
    table.add_row("rows", f"{counts['total']:,}")
    table.add_row("with results", f"{counts['completed']:,}")
    table.add_row("failed", f"{counts['failed']:,}")
    for code, number in summary["errors"].items():
        table.add_row(f"  {code}", f"{number:,}")
    table.add_row("rows/s", f"{speed:,.1f}" if speed else "-")
    console = Console()
    console.print(table)
    print_line(f"results      {spec.output}/results/")  # outside of the table, which would fold them
    if counts["failed"]:
        print_line(f"failed rows  {spec.output}/errors.jsonl ({counted(summary['errors'])})")


def _draw(folder: Path, count: int) -> None:
    """Writes the held-out drawings and their manifests, in a process of its own: drawing needs Pillow."""
    if all((folder / f"{task}.jsonl").exists() for task in DEMO_TASKS):
        return  # written last, and always the same
    _engine_program("cannot draw", "shapes.drawings", str(folder), "--count", str(count))


def _engine_program(failing: str, module: str, *arguments: str) -> str:
    """What a program of the engine's prints; a process of its own, for it imports what this one must not.

    Raises UsageError with the last line of its complaint.
    """
    command = [sys.executable, "-m", f"blip_engine.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
        hint = "; install blip-batch[worker]" if "No module named" in why else ""
        raise UsageError(f"{failing}: {why}{hint}")
    return done.stdout


def _print_demo(specs: "Sequence[JobSpec]", summaries: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title="Held-out drawings, the bundled checkpoints")
    for column in ("task", "image", "asked", "result", ""):
        table.add_column(column, overflow="fold")
    lines = []
    for spec, summary in zip(specs, summaries, strict=True):
        right = total = 0
        for record in _records(Path(spec.output), summary):
            expected, said, agrees = _judged(record)
            right, total = right + agrees, total + 1
            if total <= _SHOWN:
                asked = record["input"].get("question") or record["input"].get("text") or ""
                verdict = "✓" if agrees else f"✗ {expected}"  # what was expected, where it is not what came
                table.add_row(spec.task, Path(record["image"]).name, asked, said, verdict)
        table.add_section()
        speed = summary["images_per_second"]
        rate = f", {speed:.0f} rows/s" if speed else ""
        lines.append(f"{spec.task:8} {right / total:7.2%} right of {total:,}{rate}   {spec.output}/results/")
    Console().print(table)
    for line in lines:
        print_line(line)


def _records(output: Path, summary: dict[str, Any]) -> "list[dict[str, Any]]":
    return [
        json.loads(line)
        for part in summary["parts"]
        for line in (output / part["key"]).read_text(encoding="utf-8").splitlines()
    ]


def _judged(record: dict[str, Any]) -> tuple[str, str, bool]:
    """What was expected, what came, and whether they agree."""
    expected, result = record["input"]["expected"], record["result"]
    if result is None:
        return str(expected), f"error: {record['error']['code']}", False
    if record["task"] == "itm":
        match = result["match"]
        return ("match" if expected else "no match"), f"match {match:.3f}", (match >= 0.5) == expected
    said = result["caption" if record["task"] == "caption" else "answer"]
    return str(expected), said, said == expected
