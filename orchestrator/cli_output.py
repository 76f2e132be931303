"""`blip-batch export`, `recover` and `report`: what is done with an output in object storage."""

from dataclasses import asdict
from typing import Annotated

import typer

from .report import print_json, print_line

Output = Annotated[str, typer.Argument(help="A job's output: folder or s3:// URI.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def register_output(app: typer.Typer) -> None:
    """Adds the commands to `blip-batch`."""
    app.command()(export)
    app.command()(recover)
    app.command()(report)


def export(
    output: Output,
    file: Annotated[str, typer.Argument(help="What to write, .jsonl, .jsonl.gz, .csv or .parquet; a path or s3://.")],
    as_json: JsonFlag = False,
) -> None:
    """Merge the parts into one file: every row once, in manifest order, the latest retry's outcome."""
    from .export import export as write_file  # noqa: PLC0415 - heavy, as in `cli`

    done = write_file(output, file)
    if as_json:
        print_json(asdict(done))
    else:
        print_line(f"{done.file}: {done.rows:,} rows, {done.failed:,} with errors")


def recover(output: Output, as_json: JsonFlag = False) -> None:
    """Make a job that Redis lost known to it again, from its output; it goes on where its parts end."""
    from .recover import recover as submit_again  # noqa: PLC0415 - heavy, as in `cli`

    found = submit_again(output)
    if as_json:
        print_json(asdict(found))
        return
    print_line(found.id)
    where = f" of retry {found.round}" if found.round else ""
    left = "nothing is left to do" if found.complete else "the rest goes on"
    print_line(f"{found.parts:,} of {found.chunks:,} parts{where} are there: {left}")


def report(
    output: Output,
    file: Annotated[str, typer.Argument(help="The page to write; a path or s3:// URI.")] = "report.html",
    sample: Annotated[int, typer.Option(min=0, max=1000, help="Rows that are shown with their images.")] = 24,
) -> None:
    """Write one self-contained HTML page: a sample of images with their results, scores, errors by code."""
    from .page import write_page  # noqa: PLC0415 - heavy, as in `cli`

    pictures, rows = write_page(output, file, sample)
    print_line(f"{file}: {pictures} of {rows} thumbnails")
