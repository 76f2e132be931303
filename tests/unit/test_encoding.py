"""Parts in each format: what is read back is what was written, and what is damaged is told."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip_engine.requests import JOB_TASKS, Task
from orchestrator.contract import ERROR_CODES, RESULT_FORMATS, Hint, ResultFormat
from orchestrator.encoding import CsvWriter, decode, encode, schema_of
from orchestrator.parts import PartError, check, chunk_of, describe, part_key, put_part
from orchestrator.storage import open_store

HINT = Hint("job-1", 2, "p" * 32, 100, 200, 20, 3)
numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
chances = st.floats(0, 1)
captions = st.fixed_dictionaries({"caption": words, "score": numbers, "tokens": st.integers(0, 256)})
answers = st.fixed_dictionaries(
    {"answer": words, "score": numbers},
    optional={"ranking": st.lists(st.fixed_dictionaries({"answer": words, "score": numbers}), min_size=1, max_size=3)},
)
matches = st.fixed_dictionaries({"match": chances, "similarity": numbers})


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=1, max_size=3)


def vectors(size: int) -> st.SearchStrategy[list[float]]:
    narrow = st.floats(-1, 1, width=32).map(lambda value: float(f"{value:.8e}"))
    return st.lists(narrow, min_size=size, max_size=size)


RESULTS: dict[Task, st.SearchStrategy[Any]] = {
    "caption": captions | st.tuples(captions, some(captions)).map(lambda both: {**both[0], "captions": both[1]}),
    "vqa": answers | st.fixed_dictionaries({"answers": some(answers)}),
    "itm": matches | st.fixed_dictionaries({"matches": some(matches)}),
    "embed": st.fixed_dictionaries({"embedding": vectors(4)}, optional={"text_embedding": vectors(4)}),
    "capfilt": st.fixed_dictionaries(
        {
            "caption": words, "caption_match": chances, "text_match": st.none() | chances,
            "kept": st.lists(words, max_size=2),
        },
        optional={"text_matches": some(chances)},
    ),
}  # fmt: skip
inputs = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4)


@st.composite
def parts(draw: st.DrawFn, task: Task) -> list[dict[str, Any]]:
    records = []
    for row in range(draw(st.integers(1, 5))):
        fails = draw(st.booleans())
        error = {"code": draw(st.sampled_from(ERROR_CODES)), "message": draw(words)}
        records.append({
            "row": row, "id": draw(st.none() | words | st.integers(-(2**70), 2**70) | numbers),
            "image": draw(st.none() | words), "task": task, "result": None if fails else draw(RESULTS[task]),
            "error": error if fails else None, "input": draw(st.dictionaries(st.text(max_size=5), inputs, max_size=3)),
        })  # fmt: skip
    return records


@pytest.mark.parametrize("results", RESULT_FORMATS)
@pytest.mark.parametrize("task", JOB_TASKS)
@given(data=st.data())
def test_what_is_read_is_what_was_written(task: Task, results: ResultFormat, data: st.DataObject) -> None:
    records = data.draw(parts(task))
    written = encode(records, results, task)
    assert list(decode(written, results)) == records
    assert encode(records, results, task) == written  # nothing of the clock in it


def record(row: int, result: dict[str, Any] | None, task: Task = "caption", **fields: Any) -> dict[str, Any]:
    error = None if result else {"code": "image_truncated", "message": "it ends early"}
    plain = {"row": row, "id": None, "image": f"{row}.jpg", "task": task, "result": result, "error": error, "input": {}}
    return plain | fields


CAPTION = {"caption": "a dog", "score": -0.25, "tokens": 3}


def test_parquet_has_typed_columns_that_others_can_read() -> None:
    vector = [0.6, -0.8, 0.0]
    rows = [record(0, {"embedding": vector}, "embed", id=7, input={"k": [1]}), record(1, None, "embed", id="x")]
    table = pq.read_table(io.BytesIO(encode(rows, "parquet", "embed")))
    assert table.schema == schema_of("embed", 3)
    embedding = table.column("result").combine_chunks().field("embedding")
    assert embedding.type == pa.list_(pa.float32(), 3)
    np.testing.assert_array_equal(np.float32(embedding[0].as_py()), np.float32(vector))
    assert table.column("row").to_pylist() == [0, 1]
    assert table.column("id").to_pylist() == ["7", "x"]
    assert table.column("error").to_pylist() == [None, {"code": "image_truncated", "message": "it ends early"}]
    assert json.loads(table.column("input")[0].as_py()) == {"k": [1]}


def test_text_that_no_parquet_string_can_hold() -> None:
    (read,) = decode(encode([record(0, CAPTION, image="a\ud800b.jpg", id="\udfff")], "parquet", "caption"), "parquet")
    assert (read["image"], read["id"]) == ("a?b.jpg", "?")


@pytest.mark.parametrize("results", ["jsonl", "jsonl.gz"])
def test_what_is_no_number_is_never_written(results: ResultFormat) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        encode([record(0, CAPTION | {"score": math.nan})], results, "caption")


@pytest.mark.parametrize("results", RESULT_FORMATS)
def test_parts_are_known_by_their_names_and_damage_is_told(tmp_path: Path, results: ResultFormat) -> None:
    store, key = open_store(str(tmp_path)), part_key(2, results=results)
    records = [record(20, CAPTION), record(21, None), record(22, CAPTION)]
    info = put_part(store, HINT, records, "w", results=results)
    assert (info.rows, info.failed) == (3, 1)
    assert [file.name for file in (tmp_path / "results").iterdir()] == [f"part-00000002.{results}"]
    assert put_part(store, HINT, records[::1], "other", results=results) == info == describe(store, key, HINT.plan)
    assert check(store, HINT.as_chunk(), results=results).failures == [records[1]]
    assert chunk_of(key, results) == 2
    assert not [other for other in RESULT_FORMATS if other != results and chunk_of(key, other) is not None]
    whole = (tmp_path / key).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-3], b"", b"PAR1", whole[1:]):
        (tmp_path / key).write_bytes(content)
        with pytest.raises(PartError, match="part-00000002"):
            check(store, HINT.as_chunk(), results=results)


def test_csv_has_a_column_for_each_field(tmp_path: Path) -> None:
    with CsvWriter(tmp_path / "x.csv", "vqa") as writer:
        writer.write([record(0, {"answer": 'two,\n"or" so', "score": -1.5}, "vqa", input={"question": "é?"})])
        writer.write([record(1, None, "vqa", id=5)])
        writer.write([record(2, {"answers": [{"answer": "a", "score": 0.0}]}, "vqa", image="\ud800")])
    assert (tmp_path / "x.csv").read_text() == (
        "row,id,image,answer,score,ranking,answers,error_code,error_message,input\n"
        '0,,0.jpg,"two,\n""or"" so",-1.5,,,,,"{""question"": ""é?""}"\n'
        "1,5,1.jpg,,,,,image_truncated,it ends early,{}\n"
        '2,,?,,,,"[{""answer"": ""a"", ""score"": 0.0}]",,,{}\n'
    )


def test_parquet_is_read_without_threads_that_outlive_it() -> None:
    """pyarrow's own: a process that ended while they started, as `run` does behind a last look, was aborted."""
    code = (
        "import os, pyarrow.parquet\n"
        "from orchestrator.contract import error_row, Row\n"
        "from orchestrator.encoding import decode, encode\n"
        "rows = [error_row(Row(0, 'a.jpg', None, ('',), False, {}), 'caption', 'crashed', 'x')]\n"
        "part = encode(rows, 'parquet', 'caption')\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "assert list(decode(part, 'parquet')) == rows\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "0"
