"""`blip-batch`: the commands. Heavy imports wait inside them, so that `--help` is quick."""

import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.main import get_command

from blip_engine.errors import BlipError

from .cli_jobs import register_jobs
from .cli_output import register_output
from .cli_run import ChunkRows, Column, Format, given_columns, register
from .collector import collect_rarely
from .errors import BlipBatchError
from .report import EXIT_FAILED, EXIT_INTERRUPTED, print_error, print_json, print_line

if TYPE_CHECKING:
    from typer.models import CommandInfo

    from .verify import Audit

_SHOWN: Final = 10  # problems of an audit
#: The commands as `--help` lists them.
_GROUPS: Final = {
    "On this machine": ("demo", "run", "plan"),
    "Jobs of a cluster": (
        "submit", "list", "status", "watch", "errors", "pause", "resume", "cancel", "retry", "recover",
    ),
    "Results and models": ("verify", "export", "report", "convert"),
    "Services of a cluster": ("orchestrator", "worker"),
}  # fmt: skip
app = typer.Typer(
    name="blip-batch",
    help="Caption, question and match images with BLIP: one command, correct files.",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from blip_engine import __version__  # noqa: PLC0415

        print_line(f"blip-batch {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """What can be asked without a command."""


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def plan(  # noqa: PLR0913, PLR0917 - a command has as many arguments as options
    manifest: Annotated[str, typer.Argument(help="Manifest file, folder or s3:// URI.")],
    task: Annotated[
        str, typer.Option(help="caption, vqa, itm, embed or capfilt; decides which rows are bad.")
    ] = "caption",
    manifest_format: Format = None,
    column: Column = None,
    chunk_rows: ChunkRows = None,
    model: Annotated[str | None, typer.Option(help="As of `run`, for the estimate.")] = None,
    rows_per_second: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1e9, help="Of one worker, for the estimate; left out: as the cluster measured."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=100_000, help="Workers, for the estimate.")] = 1,
    cost_per_hour: Annotated[
        float | None, typer.Option(min=0, max=1e9, help="Of one worker, for the estimate [BLIP_PRICE_PER_WORKER_HOUR].")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Dry run: what a manifest holds, how it would be cut into chunks, and how long it would take. Writes nothing."""
    from .dry_run import Known, dry_run  # noqa: PLC0415

    known = Known(model, rows_per_second, workers, cost_per_hour)
    report = dry_run(manifest, task, manifest_format, chunk_rows, given_columns(column), known)
    if as_json:
        print_json(report)
    else:
        _print_plan(report)


def _print_plan(report: dict[str, Any]) -> None:
    codes = ", ".join(f"{code}: {count}" for code, count in report["bad_codes"].items())
    for name in ("manifest", "format", "compression", "rows", "bad_rows", "chunks", "chunk_rows"):
        if report[name] is not None:
            print_line(f"{name:<12}{report[name]}{f' ({codes})' if name == 'bad_rows' and codes else ''}")
    for name, count in report["skipped"].items():
        print_line(f"{'skipped':<12}{count} {name}")
    for name, value in (report["estimate"] or {}).items():
        print_line(f"{name:<12}{value}")
    for row in report["first_rows"]:
        print_line(f"row {row['row']:<8}{row['image']}")
    for bad in report["first_bad_rows"]:
        print_line(f"row {bad['row']:<8}{bad['code']}: {bad['message']}")
    print_line(f"{'estimate':<12}{report['estimate_note']}")


@app.command()
def verify(
    output: Annotated[str, typer.Argument(help="A job's output: folder or s3:// URI.")],
    as_json: JsonFlag = False,
) -> None:
    """Audit the parts against the plan: every row exactly once, checksums. Exit code 1 if anything is wrong."""
    from .verify import verify as audit_output  # noqa: PLC0415

    audit = audit_output(output)
    if as_json:
        print_json(audit.as_dict())
    else:
        _print_audit(audit)
    if not audit.ok:
        raise typer.Exit(EXIT_FAILED)


def _print_audit(audit: "Audit") -> None:
    for problem in audit.problems[:_SHOWN]:
        print_line(problem)
    if audit.problem_count > _SHOWN:
        print_line(f"… and {audit.problem_count - _SHOWN} more; --json lists the first hundred")
    verdict = "ok: every row exactly once" if audit.ok else f"{audit.problem_count} problem(s)"
    # A chunk has a part in every round that it belongs to, so after a retry there are more parts than chunks.
    where = f"{audit.parts} of {audit.chunks}" if audit.rounds == 1 else f"{audit.parts}"
    print_line(
        f"{verdict}; {audit.rows_found} of {audit.rows_planned} rows in {where} parts, {audit.failed} with errors"
    )


@app.command()
def orchestrator(
    redis_url: Annotated[str | None, typer.Option(help="Instead of BLIP_REDIS_URL.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run the control loop, which sees all jobs through, and the HTTP API. Any number may run; one leads."""
    from .service import serve  # noqa: PLC0415
    from .settings import load_settings  # noqa: PLC0415

    serve(load_settings(redis_url=redis_url), log_level)


register(app)
register_jobs(app)
register_output(app)


def _arrange(commands: "list[CommandInfo]") -> None:
    """In the order and the groups of `_GROUPS`. Raises KeyError for a command that is in none."""
    places = {name: (group, number) for group, names in _GROUPS.items() for number, name in enumerate(names)}
    groups = list(_GROUPS)

    def place(info: "CommandInfo") -> tuple[int, int]:
        info.rich_help_panel, number = places[info.name or str(getattr(info.callback, "__name__", ""))]
        return groups.index(info.rich_help_panel), number

    commands.sort(key=place)


_arrange(app.registered_commands)


def main() -> None:
    """The console script. Every expected error is one line on standard error, and the contract's exit code."""
    if isinstance(sys.stdout, TextIOWrapper):  # rows may hold what a terminal has no bytes for
        sys.stdout.reconfigure(errors="backslashreplace")
    collect_rarely()
    sys.exit(_run(sys.argv[1:] or ["--help"]))


def _run(arguments: list[str]) -> int:
    try:
        code: Any = get_command(app)(arguments, prog_name="blip-batch", standalone_mode=False)
    except (BlipBatchError, BlipError) as error:
        print_error(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = None
    except Exception as error:
        as_line = getattr(error, "format_message", None)  # a wrong command line; its class has no public name
        if as_line is None:
            raise
        context = getattr(error, "ctx", None)
        command = f" {context.info_name}" if context is not None and context.parent is not None else ""
        print_error(f"{as_line()} (see blip-batch{command} --help)")
    else:
        return code if isinstance(code, int) else 0
    return EXIT_FAILED


if __name__ == "__main__":
    main()
