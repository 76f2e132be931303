"""Rounds against a model of them: whatever fails in which round, the merged view has each row's last outcome."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.contract import Hint, Row, error_row, result_row
from orchestrator.jobs import make_spec
from orchestrator.parts import PartError, part_key, put_part
from orchestrator.plan import Plan, load_plan, make_plan
from orchestrator.rounds import (
    Round,
    begin_round,
    failures_by_chunk,
    is_complete,
    latest_records,
    load_rounds,
    numbers_to_do,
)
from orchestrator.settings import load_settings
from orchestrator.storage import LocalStore, ObjectInfo, open_store


def a_plan(folder: Path, rows: int, chunk_rows: int) -> Plan:
    (folder / "m.txt").write_text("".join(f"{n}.jpg\n" for n in range(rows)))
    spec = make_spec(str(folder / "m.txt"), "caption", str(folder / "out"), model="demo", chunk_rows=chunk_rows)
    return make_plan(spec, open_store(spec.output), load_settings())


def work(plan: Plan, chunks: Sequence[int], fails: set[int], this: Round | None = None) -> dict[int, str]:
    """Writes the parts of a round as a worker would; row -> what became of it."""
    number, done = (this.number if this else 0), {}
    for chunk in map(plan.chunk, chunks):
        todo = this.rows_of(chunk.id) if this else 0
        hint = Hint.of("job", plan.hash, chunk, number, todo)
        rows = (
            numbers_to_do(plan.store, chunk, number, todo)
            if this
            else list(range(hint.first_row, hint.first_row + hint.rows))
        )
        records: list[dict[str, Any]] = []
        for row in (Row(n, f"{n}.jpg", None, ("",), False, {}) for n in rows):
            text = f"round {number}"
            failed = row.number in fails
            records.append(
                error_row(row, "caption", "crashed", text) if failed else result_row(row, "caption", {"caption": text})
            )
            done[row.number] = f"failed in {text}" if failed else text
        put_part(plan.store, hint, records, "w", rows)
    return done


def outcome(record: dict[str, Any]) -> str:
    return f"failed in {record['error']['message']}" if record["error"] else str(record["result"]["caption"])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=st.integers(1, 20), chunk_rows=st.integers(1, 7))
def test_the_latest_round_wins(data: st.DataObject, rows: int, chunk_rows: int) -> None:
    some = st.sets(st.integers(0, rows - 1))
    with tempfile.TemporaryDirectory() as folder:
        plan = a_plan(Path(folder), rows, chunk_rows)
        every = range(plan.chunks)
        begun = data.draw(st.sets(st.sampled_from(every)))  # the first pass may have been stopped
        expected = work(plan, sorted(begun), data.draw(some))
        for number in range(1, 4):
            rounds = load_rounds(plan)
            without = sorted(row for row in range(rows) if "failed" in expected.get(row, "failed"))
            this = begin_round(plan, rounds)
            assert begin_round(plan, rounds) == this  # again after a crash: the same
            if this is None:
                assert not without
                break
            assert (this.number, sum(this.rows)) == (number, len(without))
            assert not is_complete(plan, load_rounds(plan))
            if number == 1 and data.draw(st.booleans()):  # a worker of the first pass writes late
                work(plan, sorted(set(every) - begun), data.draw(some))
            done = work(plan, this.chunks, data.draw(some), this)
            assert sorted(done) == without
            expected |= done
            assert is_complete(plan, load_rounds(plan))
        if is_complete(plan, load_rounds(plan)):
            records = list(latest_records(plan))
            assert [record["row"] for record in records] == list(range(rows))
            assert {record["row"]: outcome(record) for record in records} == expected
            failed = [record for _, failures in failures_by_chunk(plan) for record in failures]
            assert failed == [record for record in records if record["error"]]


def test_a_part_that_does_not_fit_its_round_is_named(tmp_path: Path) -> None:
    plan = a_plan(tmp_path, 9, 3)
    work(plan, range(3), {1, 2, 4})
    this = begin_round(plan, [])
    assert this is not None
    assert list(zip(this.chunks, this.rows, strict=True)) == [(0, 2), (1, 1)]
    work(plan, this.chunks, set(), this)
    first = tmp_path / "out" / part_key(1)
    first.write_bytes(first.read_bytes().replace(b'"error":{"code":"crashed","message":"round 0"}', b'"error":null'))
    with pytest.raises(PartError, match=r"part-00000001\.jsonl: row 4 has neither result nor error"):
        list(latest_records(plan))
    with pytest.raises(PartError, match="0 rows have no result, round 1 was begun with 1"):
        numbers_to_do(plan.store, plan.chunk(1), 1, 1)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are read, and the prefixes that are listed, from now on."""
    asked: list[str] = []
    get, listed = LocalStore.get, LocalStore.list

    def counted_get(store: LocalStore, key: str, *args: Any, **named: Any) -> bytes:
        asked.append(key)
        return get(store, key, *args, **named)

    def counted_list(store: LocalStore, prefix: str = "") -> Iterator[ObjectInfo]:
        asked.append(f"LIST {prefix}")
        return listed(store, prefix)

    monkeypatch.setattr(LocalStore, "get", counted_get)
    monkeypatch.setattr(LocalStore, "list", counted_list)
    return asked


@pytest.mark.parametrize("summed_up", [True, False])
def test_a_page_of_errors_reads_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summed_up: bool) -> None:
    monkeypatch.setattr("orchestrator.plan.PAGE_CHUNKS", 4)
    plan = a_plan(tmp_path, 60, 3)
    work(plan, range(20), {40, 50})
    keys = [part_key(n) for n in range(20)]
    if summed_up:
        parts = [{"key": key, "failed": int(n in {13, 16})} for n, key in enumerate(keys)]
        plan.store.put("summary.json", json.dumps({"round": 0, "parts": parts}).encode())
    fresh = load_plan(plan.store, plan.settings)
    assert fresh is not None
    asked = recorded(monkeypatch)
    pages = failures_by_chunk(fresh, 41)
    assert [record["row"] for _, failures in islice(pages, 4) for record in failures] == [40, 50]
    assert sorted(asked) == sorted([
        "rounds/1/round.json", "summary.json", *(f"plan/{plan.hash}/chunks-0000{page}.json" for page in (3, 4)),
        *([keys[13], keys[16]] if summed_up else ["LIST results/part-0000", *keys[13:17]]),
    ])  # fmt: skip


def test_chunks_from_any_row_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where long rows made chunks that hold fewer."""
    monkeypatch.setattr("orchestrator.plan.PAGE_CHUNKS", 2)
    monkeypatch.setattr("orchestrator.manifest.chunking.BLOCK", 50)
    monkeypatch.setattr("orchestrator.manifest.chunking.LONGEST_CHUNK", 150)
    (tmp_path / "m.txt").write_text("".join(f"{'x' * (90 * (n % 3 == 0))}{n}.jpg\n" for n in range(40)))
    spec = make_spec(str(tmp_path / "m.txt"), "caption", str(tmp_path / "out"), model="demo", chunk_rows=5)
    plan = make_plan(spec, open_store(spec.output), load_settings())
    chunks = list(plan.all_chunks())
    assert len({chunk.rows for chunk in chunks}) > 1
    for row in range(42):
        expected = [chunk for chunk in chunks if chunk.first_row + chunk.rows > row]
        assert list(plan.chunks_from(row)) == expected
