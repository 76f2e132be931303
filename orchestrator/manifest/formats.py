"""Which format a manifest is, from its name and its first bytes."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final
from urllib.parse import unquote_plus

from ..contract import ManifestFormat
from ..errors import ManifestError
from ..rows import BOM

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

#: Formats whose rows are lines: planned as they are, unless compressed. The others are staged as JSON Lines.
LINE_FORMATS: Final[frozenset[ManifestFormat]] = frozenset({"jsonl", "ground-truth", "list", "s3-batch"})
#: Formats whose rows have names, which `--column` can change.
NAMED_FORMATS: Final[frozenset[ManifestFormat]] = frozenset({"jsonl", "ground-truth", "csv", "tsv", "parquet"})
DELIMITERS: Final = {"csv": ",", "tsv": "\t"}
COMPRESSED_SUFFIXES: Final = (".gz", ".gzip", ".zst", ".zstd")

HEAD: Final = 65_536  # bytes that tell the format
#: First bytes of what is surely no text, and what to call it.
_MAGIC: Final = {
    b"ORC": "ORC",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip within a compressed file",
    b"\x28\xb5\x2f\xfd": "Zstandard within a compressed file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
PARQUET: Final = b"PAR1"
_UNSUPPORTED: Final = (".orc", ".xml", ".yaml", ".yml", ".xlsx")
_WAY_OUT: Final = (
    "give JSON Lines, CSV or TSV with a header, Parquet, a list of one image a line, an S3 Inventory's manifest.json, "
    "or a folder or prefix that ends with /"
)
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def is_image(key: str) -> bool:
    """Whether a key's extension is that of an image."""
    return key.lower().endswith(IMAGE_SUFFIXES)


def detect(
    uri: str, head: bytes, given: ManifestFormat | None, columns: Mapping[str, str] | None = None
) -> ManifestFormat:
    """The format of a manifest whose first (decompressed) bytes are `head`.

    Raises ManifestError that names the way out, also when a table's header lacks a column that is needed.
    """
    text = head.removeprefix(BOM).lstrip()
    if not text:
        raise ManifestError(f"{uri} is empty; a manifest needs at least one row")
    if head.startswith(PARQUET) or given == "parquet":
        return _parquet(uri, head, given)
    binary = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "no text")
    if binary != "no text" or b"\0" in head:
        raise ManifestError(f"{uri} is {binary}, which cannot be read; {_WAY_OUT}")
    found = given or _text_format(uri, text, columns or {})
    if found in DELIMITERS:
        lines = io.StringIO(head.decode("utf-8-sig", errors="surrogateescape"), newline="")
        read_header(uri, lines, found, columns or {}, whole=len(head) < HEAD)
    if columns and found not in NAMED_FORMATS:
        raise ManifestError(f"{uri} is read as {found}, which has no columns to rename; leave --column out")
    return found


def _parquet(uri: str, head: bytes, given: ManifestFormat | None) -> ManifestFormat:
    if not head.startswith(PARQUET):
        raise ManifestError(f"{uri} is no Parquet file: it does not begin with PAR1; leave --format out")
    if given not in {None, "parquet"}:
        raise ManifestError(f"{uri} is Parquet, not {given}; leave --format out")
    return "parquet"


def _text_format(uri: str, text: bytes, columns: Mapping[str, str]) -> ManifestFormat:
    first = text.split(b"\n", 1)[0].strip()
    name = uri.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    if first.startswith((b"{", b"[")):
        return _json_format(uri, name, text, first)
    if name.endswith((".jsonl", ".ndjson", ".jsonlines", ".manifest")):
        return "jsonl"
    if name.endswith(_UNSUPPORTED):
        raise ManifestError(f"{uri}: {name.rpartition('.')[2]} manifests are not read; {_WAY_OUT}")
    try:
        line = first.decode()
    except UnicodeDecodeError:
        raise ManifestError(f"{uri}: line 1 is not UTF-8 text; {_WAY_OUT}") from None
    return _table_format(name, line, columns) or "list"


def _json_format(uri: str, name: str, text: bytes, first: bytes) -> ManifestFormat:
    if first.startswith(b"["):
        raise ManifestError(f"{uri} is a JSON array; write one object a line instead")
    if b'"fileSchema"' in text and b'"sourceBucket"' in text:
        return "s3-inventory"
    row = _object(first)
    if first == b"{" or (row is None and name.endswith(".json")):
        raise ManifestError(f"{uri} holds JSON over several lines; write one object a line instead")
    return "ground-truth" if row is not None and "source-ref" in row and "image" not in row else "jsonl"


def _object(line: bytes) -> dict[str, object] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _table_format(name: str, line: str, columns: Mapping[str, str]) -> ManifestFormat | None:
    """CSV and TSV by name, or by a first line of several names of which one is the image's."""
    wanted = columns.get("image", "image")
    if name.endswith((".tsv", ".tab")) or ("\t" in line and wanted in line.split("\t")):
        return "tsv"
    cells = next(csv.reader([line]), [])
    if name.endswith(".csv"):
        return "s3-batch" if _is_batch_row(cells) else "csv"
    return "csv" if len(cells) > 1 and wanted in cells else None


def _is_batch_row(cells: Sequence[str]) -> bool:
    """Whether a CSV's first line is S3 Batch Operations' bucket,key[,version] rather than a header."""
    return len(cells) in {2, 3} and bool(_BUCKET.fullmatch(cells[0])) and is_image(unquote_plus(cells[1]))


def read_header(
    uri: str, lines: Iterable[str], fmt: ManifestFormat, columns: Mapping[str, str], whole: bool = True
) -> list[str]:
    """The names in a table's first line that is not blank. Raises ManifestError unless all that is needed is there.

    `whole`: `lines` are all lines of the table; else what cannot be read may be a cell that is cut, and gives no names.
    """
    reader = csv.reader(lines, delimiter=DELIMITERS[fmt], strict=True)
    try:
        header = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        if not whole:
            return []
        raise ManifestError(
            f"{uri}: line {reader.line_num}: the header cannot be read: {error}; check its quotes"
        ) from None
    check_names(f"{uri}: line {reader.line_num}: the header", header, columns)
    return header


def check_names(where: str, names: Sequence[str], columns: Mapping[str, str]) -> None:
    """Raises ManifestError unless a table's `names` are unique and hold the image's and those of `--column`."""
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ManifestError(f"{where} has `{twice}` twice; give the columns different names")
    for key, name in {"image": "image", **columns}.items():
        if name not in names:
            there = ", ".join(names[:20]) or "none"
            raise ManifestError(f"{where} has no column `{name}`, but {there}; {_way_out(key, names)}")


def _way_out(key: str, names: Sequence[str]) -> str:
    """What to do where a table's `names` lack that of `key`."""
    mark = next((mark for mark in ";|" if len(names) == 1 and mark in names[0]), None)
    if mark:
        return f"its cells seem to be separated by `{mark}`: write it with commas, or with tabs and --format tsv"
    headerless = "; a headerless bucket,key file needs --format s3-batch" if key == "image" else ""
    return f"name one with --column {key}=NAME{headerless}"
