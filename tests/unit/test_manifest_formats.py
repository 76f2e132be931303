"""Which format a manifest is, and what each of them becomes: rows, bad rows, or one line that says what is wrong."""

import bz2
import gzip
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import plan_of, planned, rows_of, zstd
from pyarrow import parquet

from orchestrator import storage
from orchestrator.contract import FORMATS, BadRow, Row
from orchestrator.dry_run import dry_run
from orchestrator.errors import ManifestError
from orchestrator.manifest import detect


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("m.jsonl", b"not json at all\n", "jsonl"),
        ("m.jsonl.gz", b"not json at all\n", "jsonl"),
        ("m.txt", b'\xef\xbb\xbf\r\n {"image": "x"}\n', "jsonl"),
        ("m.json", b'{"image": "x"}\n{"image": "y"}\n', "jsonl"),
        ("m.manifest", b'{"source-ref": "s3://b/a.jpg"}\n', "ground-truth"),
        ("m.jsonl", b'{"source-ref": "s3://b/a.jpg", "image": "x"}\n', "jsonl"),
        ("m.csv", b"image,id\r\n", "csv"),
        ("m.csv", b"image\n", "csv"),
        ("m.csv.gz", b'\xef\xbb\xbf"id","image"\n', "csv"),
        ("m", b"id,image\n", "csv"),
        ("m.csv", b'"a\nb","c\x0cd",image\n', "csv"),
        ("m.tsv", b"image\tid\n", "tsv"),
        ("m", b"id\timage\n", "tsv"),
        ("m.csv", b"my-bucket,photos/a%20b.jpg\n", "s3-batch"),
        ("m.csv", b'"my-bucket","photos/a.PNG","3HL4kqtJlcpXroDTDmjVBH40Nr"\n', "s3-batch"),
        ("manifest.json", b'{\n "sourceBucket": "b",\n "fileSchema": "Bucket, Key"', "s3-inventory"),
        ("manifest.json", b'{"sourceBucket":"b","fileSchema":"Bucket, Key","files":[]}', "s3-inventory"),
        ("m.txt", b"a.jpg\nb.jpg\n", "list"),
        ("m", b"s3://bucket/a.jpg", "list"),
        ("m", b"a,b.jpg\n", "list"),
        ("m.parquet", b"PAR1\x15\x04\x15", "parquet"),
    ],
)
def test_formats_are_detected(name: str, head: bytes, expected: str) -> None:
    assert detect(name, head, None) == expected


def test_a_given_format_is_not_detected() -> None:
    assert detect("m.jsonl", b'{"image": "x"}\n', "list") == "list"
    assert detect("m.txt", b"bucket,key\n", "s3-batch") == "s3-batch"
    assert detect("m.txt", b"url,image\n", "csv", {"image": "url"}) == "csv"


@pytest.mark.parametrize(
    ("name", "head", "given", "columns", "says"),
    [
        ("m.json", b'{\n "files": []}', None, {}, "one object a line"),
        ("m.json", b'{"files": [\n', None, {}, "one object a line"),
        ("m.json", b'[{"image": 1}]', None, {}, "one object a line"),
        ("m", b"\xff\xfea\0", None, {}, "UTF-16"),
        ("m", b"abc\0def", None, {}, "no text"),
        ("m", bz2.compress(b"a.jpg\n"), None, {}, "not UTF-8|no text"),
        ("m.orc", b"ORC\x00", None, {}, "is ORC"),
        ("m.xlsx", b"PK\x03\x04", None, {}, "zip archive"),
        ("m.xml", b"<a/>", None, {}, "xml manifests are not read"),
        ("m", b"\xe9t\xe9.jpg\n", None, {}, "not UTF-8"),
        ("m", b"", None, {}, "empty"),
        ("m", b"\xef\xbb\xbf \n", None, {}, "empty"),
        ("m.csv", b"\n  \r\n", "csv", {}, "empty"),
        (
            "m.csv",
            b"id,url\n",
            None,
            {},
            "line 1: the header has no column `image`, but id, url; .*--column image=NAME",
        ),
        ("m.csv", b"\n\nid,url\n", None, {}, "line 3: the header|line 1: the header"),
        ("m.csv", b"image,url\n", None, {"image": "link"}, "no column `link`, but image, url"),
        ("m.csv", b"image,id,id\n", None, {}, "`id` twice"),
        (
            "m.csv",
            b"image;id\na.jpg;1\n",
            None,
            {},
            "but image;id; its cells seem to be separated by `;`: ",
        ),
        ("m.txt", b"a.jpg\n", None, {"image": "url"}, "no columns to rename"),
        ("m.parquet", b"image\na\n", "parquet", {}, "does not begin with PAR1"),
        ("m.parquet", b"PAR1\x15\x04", "csv", {}, "is Parquet, not csv"),
    ],
)
def test_what_is_no_manifest_is_refused_with_a_way_out(
    name: str, head: bytes, given: Any, columns: dict[str, str], says: str
) -> None:
    with pytest.raises(ManifestError, match=says) as caught:
        detect(name, head, given, columns)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_table_may_have_lists_and_empty_cells(tmp_path: Path) -> None:
    data = b'image,question,questions,id\na.jpg,what?,,\nb.jpg,,"[""x"", ""y""]",7\nc.jpg,,x and y,\n,what?,,8\n'
    one, several, bad, missing = planned(tmp_path, "m.csv", data, "vqa")
    assert isinstance(one, Row)
    assert isinstance(several, Row)
    assert (one.texts, one.several, one.id, one.passthrough) == (("what?",), False, None, {"question": "what?"})
    assert (several.texts, several.several, several.id) == (("x", "y"), True, "7")
    assert isinstance(bad, BadRow)
    assert isinstance(missing, BadRow)
    assert "JSON list" in bad.message
    assert (missing.code, missing.id) == ("row_invalid", "8")


def test_bad_rows_of_a_table_leave_their_neighbours_alone(tmp_path: Path) -> None:
    data = b'image,note\na.jpg,"two\nlines"\n\nb.jpg\nc.jpg,x,y\n\xff.jpg,z\nd.jpg,"a"b\ne.jpg,"q ""r"""\n'
    rows = planned(tmp_path, "m.csv", data)
    assert [row.number for row in rows] == list(range(6))
    messages = {row.number: row.message for row in rows if isinstance(row, BadRow)}
    assert messages[1] == "line 5: 1 cells where the header has 2"
    assert messages[2] == "line 6: 3 cells where the header has 2"
    assert messages[3] == "line 7: not UTF-8"
    assert messages[4].startswith("line 8: not CSV")
    assert rows[3].passthrough == {"line": "\ufffd.jpg,z"}
    assert [rows[0].passthrough, rows[5].passthrough] == [{"note": "two\nlines"}, {"note": 'q "r"'}]


@pytest.mark.parametrize("name", ["m.csv", "m.csv.gz"])
@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b'"a"b,image\n1,x.jpg\n', "line 1: the header cannot be read: ',' expected after '\"'; check its quotes"),
        (b'image,"open\nx.jpg,1\n', "line 2: the header cannot be read: unexpected end of data; check its quotes"),
    ],
)
def test_a_header_that_is_no_csv_fails_the_job(tmp_path: Path, name: str, header: bytes, says: str) -> None:
    for rows in (b"", b"y.jpg,2\n" * 20_000 + b'y.jpg,"quoted"\n'):  # and where the header is cut as its format is told
        data = header + rows
        with pytest.raises(ManifestError, match=says if not rows else "the header cannot be read") as caught:
            planned(tmp_path, name, gzip.compress(data) if name.endswith("gz") else data)
        assert "\n" not in str(caught.value)


def test_a_header_longer_than_what_tells_the_format(tmp_path: Path) -> None:
    data = ",".join(["image", *(f'"name ""{n}"""' for n in range(6000))]) + "\n" + "x.jpg" + "," * 6000 + "\n"
    assert len(data) > 80_000
    (row,) = planned(tmp_path, "m.csv", data.encode())
    assert row.image == "x.jpg"
    assert len(row.passthrough) == 6000


def test_no_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows, and of a copy of Parquet. The room is a limit of the process: EFBIG comes from the kernel."""
    (tmp_path / "m.csv").write_bytes(b"image\n" + b"%s\n" % (b"x" * 1000) * 4000)
    numbers = pyarrow.array(range(300_000))
    parquet.write_table(pyarrow.table({"image": numbers.cast("string"), "n": numbers}), tmp_path / "m.parquet")
    plans = """
import resource, sys
from orchestrator.errors import StorageError
from orchestrator.manifest import open_manifest, staged
from orchestrator.settings import load_settings
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
settings = load_settings()
for name in sys.argv[1:]:
    try:
        with staged(open_manifest(name, None, settings), settings):
            pass
    except StorageError as error:
        print(error)
"""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-c", plans, str(tmp_path / "m.csv"), str(tmp_path / "m.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    rows, copy = done.stdout.splitlines()
    assert "blip-rows-" in rows
    assert "blip-copy-" in copy
    assert all(line.endswith("File too large; give TMPDIR a folder with more room") for line in (rows, copy))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv", "m.parquet"]


def test_an_open_quote_fails_the_job_where_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"m\.csv: line 3: a quoted cell is never closed"):
        planned(tmp_path, "m.csv", b'image,note\na.jpg,x\nb.jpg,"open\nc.jpg,y\n')


@pytest.mark.parametrize("packing", [gzip.compress, zstd])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:4] + b"\xff" * 12 + data[16:]])
def test_damaged_compression_fails_the_job(tmp_path: Path, packing: Any, damage: Any) -> None:
    lines = b"".join(b"%x-%d.jpg\n" % (n * n * 7919, n) for n in range(60_000))
    with pytest.raises(ManifestError, match=r"packed: the (gzip|zstd) data is damaged or incomplete"):
        planned(tmp_path, "packed", damage(packing(lines)))


def test_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    long = "x" * 10_000_000
    line = json.dumps({"image": "a.jpg", "note": long}).encode() + b"\n"
    for name, data in {
        "m.jsonl": line + b'{"image": "b.jpg"}\n',
        "m.jsonl.gz": gzip.compress(line + b'{"image": "b.jpg"}\n', 1),
        "m.csv": f'image,note\na.jpg,"{long}"\nb.jpg,\n'.encode(),
    }.items():
        first, second = planned(tmp_path, name, data)
        assert (first.image, len(first.passthrough["note"]), second.image) == ("a.jpg", 10_000_000, "b.jpg")


def test_parquet_of_many_types(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "image": pyarrow.array([b"a.jpg", b"b.jpg"], pyarrow.binary()),
            "score": [float("nan"), 0.5],
            "when": pyarrow.array([1, None], pyarrow.timestamp("ns")),  # as pandas writes them
            "zoned": pyarrow.array([0, None], pyarrow.timestamp("ns", "Europe/Paris")),
            "day": pyarrow.array([0, None], pyarrow.date32()),
            "price": [Decimal("1.50"), None],
            "lasts": pyarrow.array([1_500_000_001, None], pyarrow.duration("ns")),
            "raw": [b"\xff\x00", b"text"],
            "texts": [["x", "y"], ["z"]],
        }
    )
    parquet.write_table(table, tmp_path / "m.parquet")
    first, second = rows_of(plan_of(tmp_path / "m.parquet", tmp_path / "out", "itm"), "itm")
    assert first.image == "a.jpg"
    assert first.passthrough == {
        "score": None, "when": "1970-01-01T00:00:00", "zoned": "1970-01-01T00:00:00Z", "day": "1970-01-01",
        "price": "1.50", "lasts": 1.5, "raw": "/wA=", "texts": ["x", "y"],
    }  # fmt: skip
    assert isinstance(second, Row)
    assert (second.texts, second.passthrough["raw"]) == (("z",), "text")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"url": ["a.jpg"]}, "no column `image`, but url"),
        ({"image": [{"bytes": b"x"}]}, "column `image` is struct"),
        ({"image": pyarrow.array([], pyarrow.string())}, "is empty"),
    ],
)
def test_parquet_that_is_no_manifest(tmp_path: Path, table: dict[str, Any], says: str) -> None:
    parquet.write_table(pyarrow.table(table), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=says):
        plan_of(tmp_path / "m.parquet", tmp_path / "out")


def test_damaged_parquet(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="Parquet data cannot be read"):
        planned(tmp_path, "m.parquet", b"PAR1" + b"\x15" * 500 + b"PAR1")
    with pytest.raises(ManifestError, match="does not end with PAR1"):
        planned(tmp_path, "m.parquet", b"PAR1" + b"\x15" * 500)


def test_ground_truth(tmp_path: Path) -> None:
    lines = [
        {"source-ref": "s3://b/a.jpg", "class": 3, "class-metadata": {"confidence": 0.9}, "id": "x"},
        {"source": "inline text", "class": 1},
    ]
    good, bad = planned(tmp_path, "m.manifest", b"\n".join(json.dumps(line).encode() for line in lines))
    assert (good.image, good.id) == ("s3://b/a.jpg", "x")
    assert good.passthrough == {"class": 3, "class-metadata": {"confidence": 0.9}}
    assert isinstance(bad, BadRow)


@pytest.mark.parametrize(
    ("line", "image"),
    [
        ("bucket,a/b%20c%2Bd+e.jpg", "s3://bucket/a/b c+d e.jpg"),
        ('"bucket","%C3%A9%2C.jpg"', "s3://bucket/é,.jpg"),
        ("bucket, a.jpg\r", "s3://bucket/a.jpg"),
        ("bucket,a.jpg,3HL4.kq_t-J", "s3://bucket/a.jpg?versionId=3HL4.kq_t-J"),
        ("bucket,a.jpg,", "s3://bucket/a.jpg"),
        ("bucket", None),
        ("bucket,", None),
        ("a,b,c,d", None),
        ("bucket,%FF.jpg", None),
        ('bucket,"open', None),
    ],
)
def test_s3_batch_rows(tmp_path: Path, line: str, image: str | None) -> None:
    (row,) = planned(tmp_path, "m.csv", line.encode(), manifest_format="s3-batch")
    assert row.image == image
    assert isinstance(row, BadRow) == (image is None)


def test_zstandard_of_parallel_writers(tmp_path: Path) -> None:
    data = b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstd(b"a.jpg\n") + b"\x5f\x2a\x4d\x18\x01\0\0\0z" + zstd(b"b.jpg\n")
    assert [row.image for row in planned(tmp_path, "m.txt.zst", data)] == ["a.jpg", "b.jpg"]


def test_renamed_columns_of_lines(tmp_path: Path) -> None:
    data = b'{"url": "a.jpg", "image": "thumb.jpg", "q": "what?"}\n{"image": "b.jpg", "question": "why?"}\n'
    first, second = planned(tmp_path, "m.jsonl", data, "vqa", columns={"image": "url", "question": "q"})
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert (first.image, first.texts) == ("a.jpg", ("what?",))
    assert (second.image, second.texts) == ("b.jpg", ("why?",))  # as errors.jsonl has it


def test_duplicate_ids_are_echoed(tmp_path: Path) -> None:
    rows = planned(tmp_path, "m.csv", b"image,id\na.jpg,7\na.jpg,7\n")
    assert [(row.number, row.id) for row in rows] == [(0, "7"), (1, "7")]


def test_mixed_formats_are_bad_rows(tmp_path: Path) -> None:
    good, *bad = planned(tmp_path, "m.jsonl", b'{"image": "a.jpg"}\ns3://b/c.jpg\nimage,id\n["a.jpg", {}]\n')
    assert isinstance(good, Row)
    assert [row.code for row in bad if isinstance(row, BadRow)] == ["row_invalid"] * 3


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.text(st.sampled_from('ai,"\\r\n\t{}[]:; é\x0c\u2028'), max_size=60).map(str.encode),
        st.sampled_from(
            [b"image,id\n", b'{"image": ', b"image\tid\n", b"PAR1", b"\x1f\x8b\x08", b"bucket,a.jpg\n"]
        ).flatmap(lambda head: st.binary(max_size=60).map(lambda tail: head + tail)),
    ),
    name=st.sampled_from(["m", "m.csv", "m.jsonl", "m.tsv", "m.txt.gz", "manifest.json"]),
    fmt=st.sampled_from([None, *(fmt for fmt in FORMATS if fmt != "folder")]),
)
def test_any_bytes_are_rows_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str, fmt: str | None
) -> None:
    folder = tmp_path_factory.mktemp("any")
    told, rows = None, []
    try:
        rows = planned(folder, name, data, manifest_format=fmt)
    except ManifestError as error:
        told = str(error)
    assert bool(rows) == (told is None)
    assert told is None or (name in told and "\n" not in told)
    assert [row.number for row in rows] == list(range(len(rows)))


def test_the_dry_run_tells_format_rows_and_bad_ones(tmp_path: Path) -> None:
    (tmp_path / "m.csv.gz").write_bytes(gzip.compress(b"url\n" + b"a.jpg\n" * 40 + b"x,y\n"))
    report = dry_run(str(tmp_path / "m.csv.gz"), "caption", None, 10, {"image": "url"})
    assert (report["format"], report["compression"], report["rows"], report["bad_rows"], report["chunks"]) == (
        "csv", "gzip", 41, 1, 5,
    )  # fmt: skip
    assert report["first_rows"][0]["image"] == "a.jpg"
    assert report["first_bad_rows"][0]["message"] == "line 42: 2 cells where the header has 1"
    (tmp_path / "a.png").touch()
    assert dry_run(str(tmp_path), "caption", None, None, {})["skipped"] == {"keys that are no images": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "m.csv.gz"]


def test_the_dry_run_counts_images_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to("/etc")
    images = [*["s3://p/1.jpg"] * 9, "https://x.org/1.jpg", "file:///x.jpg", "/etc/passwd", "link/passwd", "absent.png"]
    (tmp_path / "in/m.csv").write_text("image\n" + "\n".join(images))

    def plan() -> dict[str, Any]:
        return dry_run(str(tmp_path / "in/m.csv"), "caption", None, None, {})

    report = plan()
    assert (report["rows"], report["bad_rows"]) == (14, 13)
    assert report["bad_codes"] == {"uri_not_allowed": 11, "unsupported_uri": 2}
    assert [row["row"] for row in report["first_bad_rows"]] == [0, 1, 2, 3, 4, 9]
    assert "add p to BLIP_ALLOWED_BUCKETS" in report["first_bad_rows"][0]["message"]
    assert [row["image"] for row in report["first_rows"]] == ["absent.png"]
    monkeypatch.setenv("BLIP_ALLOWED_BUCKETS", "p")
    monkeypatch.setenv("BLIP_ALLOWED_FOLDERS", "/etc")
    assert plan()["bad_codes"] == {"unsupported_uri": 2}


def test_two_planners_at_once_make_one_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find no rows staged and write them: the version that a plan pins must stay."""
    (tmp_path / "m.csv").write_text("image\na.jpg\n")
    both, write = threading.Barrier(2), storage._temporary

    def together(path: Path, *data: bytes) -> Any:
        if path.name.startswith("rows-"):
            both.wait(30)
        return write(path, *data)

    monkeypatch.setattr(storage, "_temporary", together)
    with ThreadPoolExecutor(2) as pool:
        plans = list(pool.map(lambda _: plan_of(tmp_path / "m.csv", tmp_path / "out"), range(2)))
    for plan in plans:
        plan.check_manifest()
        assert [row.image for row in rows_of(plan)] == ["a.jpg"]
    assert plans[0] == plans[1]


def test_a_staged_plan_is_its_own_copy(tmp_path: Path) -> None:
    """Overwriting a staged manifest mid-job changes nothing; the plan knows which version it came from."""
    (tmp_path / "m.csv").write_text("image\na.jpg\n")
    plan = plan_of(tmp_path / "m.csv", tmp_path / "out")
    assert plan.source_etag
    (tmp_path / "m.csv").write_text("image\nb.jpg\nc.jpg\n")
    plan.check_manifest()
    again = plan_of(tmp_path / "m.csv", tmp_path / "out")
    assert again.hash == plan.hash
    assert [row.image for row in rows_of(again)] == ["a.jpg"]
