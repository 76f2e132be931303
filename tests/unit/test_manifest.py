"""Manifests: detection, scanning without parsing, and the rows that come out."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import planned

from orchestrator.contract import BadRow, Chunk, JobSpec, Row, error_row, result_row, to_line
from orchestrator.errors import JobError, ManifestError
from orchestrator.manifest import choose_chunk_rows, chunking, scan
from orchestrator.plan import PAGE_CHUNKS, load_plan, make_plan
from orchestrator.rows import BOM, MAX_DEPTH, parse_rows
from orchestrator.settings import load_settings
from orchestrator.storage import open_store

blank = st.sampled_from([b"", b" ", b"\t", b"\r", b"  \r", b"\x0b\x0c"])
line = st.one_of(
    blank,
    st.text(max_size=30).map(lambda text: json.dumps({"image": "x" + text, "id": text}).encode()),
    st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b"")),
)


def scan_bytes(data: bytes, chunk_rows: int) -> list[Chunk]:
    def read(start: int, end: int) -> bytes:
        assert 0 <= start <= end <= len(data)
        return data[start:end]

    return list(scan(read, len(data), chunk_rows))


def reference_rows(data: bytes) -> list[bytes]:
    """A whole manifest's rows: a byte order mark counts only at its very start."""
    return lines_of(data.removeprefix(BOM))


def lines_of(data: bytes) -> list[bytes]:
    return [line for line in data.split(b"\n") if line.strip()]


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(line, max_size=40), ended=st.booleans(), bom=st.booleans(), crlf=st.booleans(),
    chunk_rows=st.integers(1, 9), block=st.integers(1, 64), longest=st.integers(1, 200),
)  # fmt: skip
def test_scanning_finds_exactly_the_lines_that_are_not_blank(
    lines: list[bytes], ended: bool, bom: bool, crlf: bool, chunk_rows: int, block: int, longest: int
) -> None:
    newline = b"\r\n" if crlf else b"\n"
    data = (BOM if bom else b"") + newline.join(lines) + (newline if ended else b"")
    expected = reference_rows(data)
    longest = max([longest, *(len(row) + 2 * block + 80 for row in data.split(b"\n"))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "BLOCK", block)
        patch.setattr(chunking, "LONGEST_CHUNK", longest)
        chunks = scan_bytes(data, chunk_rows)
    assert [chunk.id for chunk in chunks] == list(range(len(chunks)))
    position = row = 0
    found: list[bytes] = []
    for chunk in chunks:
        assert (chunk.start, chunk.first_row) == (position, row)
        assert 1 <= chunk.rows <= chunk_rows
        position, row = chunk.end, row + chunk.rows
        rows = parse_rows(data[chunk.start : chunk.end], chunk, "caption", "list")
        assert [parsed.number for parsed in rows] == list(range(chunk.first_row, row))
        found += (lines_of if chunk.start else reference_rows)(data[chunk.start : chunk.end])
    assert found == expected
    assert not data[position:].removeprefix(BOM if position == 0 else b"").strip()


rows = st.fixed_dictionaries(
    {"image": st.text(min_size=1, max_size=20).filter(str.strip)},
    optional={
        "id": st.one_of(st.text(max_size=8), st.integers()),
        "question": st.text(min_size=1, max_size=20).filter(str.strip),
        "extra": st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                              lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    },
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(given_rows=st.lists(rows, min_size=1, max_size=20))
def test_rows_round_trip_through_a_manifest(given_rows: list[dict[str, object]]) -> None:
    data = b"".join(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n" for row in given_rows)
    chunk = Chunk(0, 0, len(data), 0, len(given_rows))
    for raw, row in zip(given_rows, parse_rows(data, chunk, "vqa", "jsonl"), strict=True):
        if "question" not in raw:
            assert isinstance(row, BadRow)
            assert (row.code, row.image, row.id) == ("text_missing", raw["image"], raw.get("id"))
            continue
        assert isinstance(row, Row)
        assert (row.image, row.id, row.texts, row.several) == (
            raw["image"], raw.get("id"), (raw["question"],), False,
        )  # fmt: skip
        assert row.passthrough == {key: value for key, value in raw.items() if key not in {"image", "id"}}


def parse_one(text: str | bytes, task: str = "caption", fmt: str = "jsonl") -> Row | BadRow:
    data = text if isinstance(text, bytes) else text.encode()
    return parse_rows(data, Chunk(0, 0, len(data), 5, 1), task, fmt)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "task", "code", "says"),
    [
        ("nonsense", "caption", "row_invalid", "not JSON"),
        ('"text"', "caption", "row_invalid", "not a JSON object"),
        ("{}", "caption", "row_invalid", "no `image`"),
        ('{"image": ""}', "caption", "row_invalid", "no `image`"),
        ('{"image": 7}', "caption", "row_invalid", "`image` must be a string, a path or an s3:// URI, not 7"),
        ('{"image": ["a"]}', "caption", "row_invalid", 'not ["a"]'),
        ('{"image": "%s"}' % ("x" * 5000), "caption", "row_invalid", "4096"),
        ('{"image": "a", "id": []}', "caption", "row_invalid", "`id`"),
        ('{"image": "a", "id": true}', "caption", "row_invalid", "`id`"),
        ('{"image": "a", "prompt": 7}', "caption", "row_invalid", "`prompt`"),
        ('{"image": "a", "x": NaN}', "caption", "row_invalid", "NaN"),
        ('{"image": "a", "x": 1e999}', "caption", "row_invalid", "1e999"),
        ('{"image": "a", "x": %s}' % ("[" * 5000 + "]" * 5000), "caption", "row_invalid", "nested"),
        ('{"image": "a", "x": %s}' % ("[" * MAX_DEPTH + "]" * MAX_DEPTH), "caption", "row_invalid", "nested"),
        ('{"image": "a", "x": %s}' % ('{"x":' * 974 + "1" + "}" * 974), "caption", "row_invalid", "nested"),
        (b'{"image": "\xff"}', "caption", "row_invalid", "UTF-8"),
        ('{"image": "a"}', "vqa", "text_missing", "`question`"),
        ('{"image": "a", "question": "  "}', "vqa", "text_missing", "`question`"),
        ('{"image": "a", "questions": []}', "vqa", "text_missing", "`questions`"),
        ('{"image": "a", "questions": "x"}', "vqa", "row_invalid", "`questions`"),
        ('{"image": "a", "questions": ["x", null]}', "vqa", "text_missing", "no `questions[1]`"),
        ('{"image": "a", "questions": ["x", "y", " "]}', "vqa", "text_missing", "`questions[2]` is blank"),
        ('{"image": "a", "question": "x", "questions": ["y"]}', "vqa", "row_invalid", "both"),
        ('{"image": "a", "question": "x", "answers": []}', "vqa", "row_invalid", "`answers`"),
        ('{"image": "a", "question": "x", "answers": "red"}', "vqa", "row_invalid", "`answers`"),
        ('{"image": "a", "question": "x", "answers": [{"answer": "red"}]}', "vqa", "row_invalid", "`answers[0]`"),
        ('{"image": "a", "text": "%s"}' % ("x" * 30_000), "itm", "text_too_long", "`text`"),
        ('{"image": "a", "texts": [%s"x"]}' % ('"x",' * 1000), "itm", "row_invalid", "1000"),
    ],
)
def test_a_bad_row_says_what_is_wrong(text: str | bytes, task: str, code: str, says: str) -> None:
    row = parse_one(text, task)
    assert isinstance(row, BadRow)
    assert (row.number, row.code) == (5, code)
    assert says in row.message
    assert "\n" not in row.message
    to_line({"input": row.passthrough})  # and it can be written


def test_what_is_not_refused_for_its_depth_can_be_written() -> None:
    deepest = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    row = parse_one(f'{{"image": "a", "x": {deepest}, "y": {json.dumps([{}] * 300)}}}')
    assert isinstance(row, Row)
    line = to_line(result_row(row, "caption", {"caption": "x"}))
    assert json.loads(line)["input"] == row.passthrough


def test_texts_by_task() -> None:
    assert parse_one('{"image": "a"}').texts == ("",)  # type: ignore[union-attr]
    assert parse_one('{"image": "a", "prompt": "a photo of"}').texts == ("a photo of",)  # type: ignore[union-attr]
    row = parse_one('{"image": "a", "texts": ["x", "y"], "custom_id": "c"}', "itm")
    assert isinstance(row, Row)
    assert (row.texts, row.several, row.id, row.passthrough) == (("x", "y"), True, "c", {"texts": ["x", "y"]})
    row = parse_one("s3://b/a%20b.jpg \r", fmt="list")
    assert isinstance(row, Row)
    assert (row.image, row.passthrough) == ("s3://b/a%20b.jpg", {})


@pytest.mark.parametrize("cell", ["[NaN]", "[-Infinity]", "[1e999]", "[" * 60_000, "[" * 300 + "]" * 300])
@pytest.mark.parametrize("key", ["questions", "answers"])
def test_a_list_that_is_no_json_is_a_bad_row_that_can_be_written(tmp_path: Path, cell: str, key: str) -> None:
    other = "question" if key == "answers" else "note"
    data = f'image,{other},{key}\na.jpg,x,"{cell}"\nb.jpg,y,"[""red""]"\n'.encode()
    bad, good = planned(tmp_path, "m.csv", data, "vqa")
    assert isinstance(bad, BadRow)
    assert isinstance(good, Row)
    assert (bad.code, bad.image, bad.passthrough) == ("row_invalid", "a.jpg", {other: "x", key: cell})
    assert bad.message == f'`{key}` must be a JSON list of strings, as ["a", "b"]'
    to_line(error_row(bad, "vqa", bad.code, bad.message))


@pytest.mark.parametrize(
    ("task", "own"),
    [("caption", ()), ("embed", ()), ("vqa", ("questions", "answers")), ("itm", ("texts",)), ("capfilt", ("texts",))],
)
def test_list_columns_of_other_tasks_pass_through_a_table(tmp_path: Path, task: str, own: tuple[str, ...]) -> None:
    keys = ("questions", "answers", "texts")
    cells = ['"[""x""]"' if key in own else "yes" for key in keys]
    data = f"image,{','.join(keys)}\na.jpg,{','.join(cells)}\n".encode()
    (row,) = planned(tmp_path, "m.csv", data, task)
    assert isinstance(row, Row)
    assert row.passthrough == {key: ["x"] if key in own else "yes" for key in keys}
    assert row.texts == (("x",) if own else ("",))


def test_a_changed_chunk_is_noticed() -> None:
    with pytest.raises(ManifestError, match="2 rows where 1 were planned"):
        parse_rows(b"a\nb\n", Chunk(0, 0, 4, 0, 1), "caption", "list")


def test_an_endless_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "BLOCK", 1000)
    monkeypatch.setattr(chunking, "LONGEST_CHUNK", 5000)
    with pytest.raises(ManifestError, match="row 2 is longer"):
        scan_bytes(b"a\nb\n" + b"x" * 9000, 2)
    long_rows = (b"y" * 900 + b"\n") * 20
    chunks = scan_bytes(long_rows, 512)
    assert sum(chunk.rows for chunk in chunks) == 20
    assert max(chunk.end - chunk.start for chunk in chunks) <= 6000


def test_chunk_sizes_suit_the_job() -> None:
    head = b"x" * 99 + b"\n"
    assert choose_chunk_rows(100, head) == 16
    assert choose_chunk_rows(2_000 * 100, head * 2000) == 31
    assert choose_chunk_rows(100_000_000 * 100, head * 1000) == 512


def spec(manifest_path: Path, out: Path, chunk_rows: int | None = None) -> JobSpec:
    return JobSpec(
        id="j", task="caption", model="demo", manifest=str(manifest_path), output=str(out), chunk_rows=chunk_rows,
        created_at=0,
    )  # fmt: skip


def test_a_plan_is_written_once_and_read_back_page_by_page(tmp_path: Path) -> None:
    count = 2 * PAGE_CHUNKS + 100
    (tmp_path / "m.txt").write_text("".join(f"{n}.jpg\n" for n in range(count)))
    settings, store = load_settings(), open_store(str(tmp_path / "out"))
    plan = make_plan(spec(tmp_path / "m.txt", tmp_path / "out", 1), store, settings)
    assert (plan.rows, plan.chunks, plan.format) == (count, count, "list")
    assert len(list((tmp_path / "out/plan" / plan.hash).iterdir())) == 3
    again = load_plan(store, settings)
    assert again == plan
    chunks = list(plan.all_chunks())
    assert [chunk.id for chunk in chunks] == list(range(count))
    for number in (0, PAGE_CHUNKS - 1, PAGE_CHUNKS, count - 1):
        assert plan.chunk(number) == chunks[number]
        (row,) = plan.read_rows(chunks[number], "caption")
        assert (row.number, row.image) == (number, f"{number}.jpg")
    with pytest.raises(IndexError):
        plan.chunk(count)
    # Another planner, later and with another idea, gets the plan that is there.
    other = make_plan(spec(tmp_path / "m.txt", tmp_path / "out", 7), store, settings)
    assert other.hash == plan.hash


def test_a_plan_pins_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("a.jpg\nb.jpg\n")
    plan = make_plan(spec(tmp_path / "m.txt", tmp_path / "out"), open_store(str(tmp_path / "out")), load_settings())
    plan.check_manifest()
    (tmp_path / "m.txt").write_text("c.jpg\nd.jpg\n")
    with pytest.raises(JobError, match="changed or removed"):
        plan.check_manifest()
    with pytest.raises(JobError, match="changed or removed"):
        plan.read_rows(plan.chunk(0), "caption")
    (tmp_path / "m.txt").unlink()
    with pytest.raises(JobError, match="changed or removed"):
        plan.read_rows(plan.chunk(0), "caption")


def test_the_line_is_shown_only_of_what_is_no_row() -> None:
    def shown(line: str) -> object:
        (row,) = parse_rows(line.encode(), Chunk(0, 0, len(line), 0, 1), "itm", "jsonl")
        assert isinstance(row, BadRow)
        return row.passthrough

    assert shown('{"image": "x.png"}') == shown("{}") == {}
    assert shown('{"image": "x.png", "k": 1}') == {"k": 1}
    assert shown("[1] ") == {"line": "[1]"}
    assert shown("{") == {"line": "{"}
