"""Rows of every format, as they were written: round trips of whatever a format can hold."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import plan_of, planned, rows_of, zstd
from pyarrow import parquet

from orchestrator.contract import Row
from orchestrator.rows import BOM

cell = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(st.tuples(cell.filter(str.strip), cell, cell), min_size=1, max_size=12), bom=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]), fmt=st.sampled_from(["csv", "tsv"]),
    packing=st.sampled_from([None, gzip.compress, zstd]), everything=st.booleans(),
)  # fmt: skip
def test_tables_round_trip(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str, str]], bom: bool, newline: str, fmt: str,
    packing: Any, everything: bool,
) -> None:  # fmt: skip
    everything = everything or any("\r" in cell for row in cells for cell in row)  # the writer forgets about it
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if fmt == "tsv" else ",", lineterminator=newline,
                        quoting=csv.QUOTE_ALL if everything else csv.QUOTE_MINIMAL)  # fmt: skip
    writer.writerow(["other", "url", "id"])
    writer.writerows((other, url, name) for url, name, other in cells)
    data = (BOM if bom else b"") + text.getvalue().encode()
    folder = tmp_path_factory.mktemp("table")
    rows = planned(folder, f"m.{fmt}", packing(data) if packing else data, columns={"image": "url"})
    assert [row.number for row in rows] == list(range(len(cells)))
    for row, (url, name, other) in zip(rows, cells, strict=True):
        assert isinstance(row, Row)
        assert (row.image, row.id, row.passthrough) == (url, name or None, {"other": other})


value = st.one_of(st.none(), st.booleans(), st.text(max_size=5), st.integers(-(2**63), 2**63 - 1))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.lists(st.text(min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=9),
    extra=st.sampled_from([None, 7, -1.5, "x", [1, 2], {"a": [None, "é"]}]), packing=st.sampled_from(["zstd", "NONE"]),
)  # fmt: skip
def test_parquet_round_trips(
    tmp_path_factory: pytest.TempPathFactory, images: list[str], extra: Any, packing: str
) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    table = [{"image": image, "id": number, "extra": extra} for number, image in enumerate(images)]
    parquet.write_table(pyarrow.Table.from_pylist(table), folder / "m", compression=packing, row_group_size=2)
    rows = rows_of(plan_of(folder / "m", folder / "out"))
    assert [(row.image, row.id, row.passthrough) for row in rows] == [
        (image, number, {"extra": extra}) for number, image in enumerate(images)
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.binary(max_size=20).map(lambda line: line.translate(None, b"\n\0")), min_size=1, max_size=9),
    packing=st.sampled_from([gzip.compress, zstd]), more=st.booleans(),
)  # fmt: skip
def test_compressed_lines_are_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], packing: Any, more: bool
) -> None:
    data = b'{"image": "first"}\n' + b"\n".join(lines) + b"\n"
    packed = packing(data[:7]) + packing(data[7:]) if more else packing(data)  # files may be concatenated
    folder = tmp_path_factory.mktemp("packed")
    plain, unpacked = planned(folder, "m.jsonl", data), planned(folder, "packed.jsonl", packed)
    assert plain == unpacked


keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    given_keys=st.lists(keys, min_size=1, max_size=9), encode=st.sampled_from([quote, quote_plus]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), newline=st.sampled_from(["\n", "\r\n"]),
)  # fmt: skip
def test_s3_batch_round_trips(
    tmp_path_factory: pytest.TempPathFactory, given_keys: list[str], encode: Any, quoting: int, newline: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=quoting, lineterminator=newline)  # type: ignore[arg-type]
    writer.writerows(["my-bucket", encode(key)] for key in given_keys)
    rows = planned(tmp_path_factory.mktemp("batch"), "m.csv", text.getvalue().encode(), manifest_format="s3-batch")
    assert [row.image for row in rows] == [f"s3://my-bucket/{key}" for key in given_keys]


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)  # fmt: skip
labels = st.dictionaries(st.text(max_size=9).map(lambda name: f"my-{name}"), json_value, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    objects=st.lists(st.tuples(st.text(min_size=1, max_size=20).filter(str.strip), labels), min_size=1, max_size=9),
    ascii_only=st.booleans(), newline=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(), packed=st.booleans(),
)  # fmt: skip
def test_ground_truth_round_trips(
    tmp_path_factory: pytest.TempPathFactory, objects: list[tuple[str, dict[str, Any]]], ascii_only: bool, newline: str,
    bom: bool, packed: bool,
) -> None:  # fmt: skip
    lines = [json.dumps({**more, "source-ref": image}, ensure_ascii=ascii_only) + newline for image, more in objects]
    data = (BOM if bom else b"") + "".join(lines).encode()
    data = gzip.compress(data) if packed else data
    plan_folder = tmp_path_factory.mktemp("truth")
    (plan_folder / "output.manifest").write_bytes(data)
    plan = plan_of(plan_folder / "output.manifest", plan_folder / "out")
    assert plan.format == "ground-truth"
    assert [(row.number, row.image, row.passthrough) for row in rows_of(plan)] == [
        (number, image, more) for number, (image, more) in enumerate(objects)
    ]


listed = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.lists(listed.map(lambda name: f"x{name}.jpg"), min_size=1, max_size=9),
    blanks=st.booleans(), newline=st.sampled_from(["\n", "\r\n"]), ended=st.booleans(), bom=st.booleans(),
    packing=st.sampled_from([None, gzip.compress, zstd]),
)  # fmt: skip
def test_lists_round_trip(
    tmp_path_factory: pytest.TempPathFactory, images: list[str], blanks: bool, newline: str, ended: bool, bom: bool,
    packing: Any,
) -> None:  # fmt: skip
    text = (newline + (" " + newline if blanks else "")).join(images) + (newline if ended else "")
    data = (BOM if bom else b"") + text.encode()
    rows = planned(tmp_path_factory.mktemp("list"), "m.txt", packing(data) if packing else data, manifest_format="list")
    assert [(row.number, row.image, row.passthrough) for row in rows] == [
        (number, image, {}) for number, image in enumerate(images)
    ]


name = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), max_size=9)
files = st.tuples(st.lists(name.map(lambda name: f"d{name}"), max_size=2), name.map(lambda name: f"x{name}.JPG"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths=st.lists(files.map(lambda file: "/".join([*file[0], file[1]])), min_size=1, max_size=9, unique=True))
def test_folders_round_trip(tmp_path_factory: pytest.TempPathFactory, paths: list[str]) -> None:
    folder = tmp_path_factory.mktemp("folder")
    for path in [*paths, "notes.txt", ".hidden.jpg"]:
        (folder / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "in" / path).write_bytes(path.encode())
    plan = plan_of(folder / "in", folder / "out")
    rows, policy = rows_of(plan), plan.image_policy()
    assert plan.format == "folder"
    assert [row.image for row in rows] == sorted(paths, key=str.encode)
    for row in rows:
        assert Path(policy.resolve(str(row.image))).read_bytes() == str(row.image).encode()
