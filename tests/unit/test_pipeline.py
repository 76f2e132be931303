"""Rows to records, with children that answer from this thread: grouping, order, bounds, and every failure's rows."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import pytest

from blip_engine.requests import Answer, Caption, options_for
from orchestrator.contract import BadRow, Row
from orchestrator.errors import FetchError
from workers.messages import Checkpoint, Failure, Run
from workers.pipeline import CarefulRun, ChunkRun, JobContext, Lane


class Children:
    """Loaders and engine in one: what they are asked for is noted, and answered at once by the two functions."""

    def __init__(self, load: Callable[[str], Any] = lambda _: None, run: Callable[[Run], Any] | None = None) -> None:
        self._load, self._run = load, run or (lambda run: [Answer(text.upper(), -0.5) for text in run.texts])
        self.loads: list[str] = []
        self.runs: list[Run] = []
        self.slots_used: set[int] = set()

    def load(
        self, slot: int, location: str, size: object, replies: "SimpleQueue[tuple[Any, Any]]", token: object
    ) -> None:
        self.loads.append(location)
        self.slots_used.add(slot)
        replies.put((token, self._load(location) or (8, 8)))

    def submit(self, run: Run, replies: "SimpleQueue[tuple[Any, Any]]", token: object) -> None:
        self.runs.append(run)
        replies.put((token, self._run(run)))


def locate(image: str) -> str:
    if image.startswith("http"):
        raise FetchError("uri_not_allowed", "no")
    return f"/{image}"


CONTEXT = JobContext("vqa", options_for("vqa"), Checkpoint("m", "m", None, "0" * 64, (8, 8)), locate)


def row(number: int, image: str, *texts: str, several: bool = False) -> Row:
    return Row(number, image, None, texts, several, {})


def work(children: Children, rows: list[Row | BadRow], slots: int = 4) -> list[dict[str, Any]]:
    lane = Lane(range(slots), children, children)  # type: ignore[arg-type]
    return lane.run(ChunkRun(CONTEXT, rows, lambda: None))


def outcomes(records: list[dict[str, Any]]) -> list[Any]:
    return [record["error"]["code"] if record["error"] else record["result"]["answer"] for record in records]


def test_rows_of_one_image_share_its_load_and_its_run() -> None:
    children = Children()
    rows = [row(10, "a", "x"), row(11, "b", "y"), row(12, "a", "z"), row(13, "a", "x")]
    records = work(children, rows)
    assert outcomes(records) == ["X", "Y", "Z", "X"]
    assert [record["row"] for record in records] == [10, 11, 12, 13]
    assert sorted(children.loads) == ["/a", "/b"]
    assert sorted(run.texts for run in children.runs) == [("x", "z"), ("y",)]  # the repeated text is run once


def test_one_image_under_several_names_is_loaded_once() -> None:
    children = Children()
    context = replace(CONTEXT, locate=lambda image: f"/{image.rpartition('/')[2]}")
    rows = [row(0, "a", "x"), row(1, "./a", "y"), row(2, "b", "z"), row(3, "sub/../a", "w"), row(4, "a", "v")]
    lane = Lane(range(4), children, children)  # type: ignore[arg-type]
    assert outcomes(lane.run(ChunkRun(context, rows, lambda: None))) == ["X", "Y", "Z", "W", "V"]
    assert sorted(children.loads) == ["/a", "/b"]
    assert len(children.runs) == 2


def test_rows_of_one_image_that_choose_from_different_answers_share_its_load_only() -> None:
    children = Children()
    few, more = ("red", "blue"), ("red", "blue", "green")
    given = [few, more, (), few]
    rows = [replace(row(n, "a", text), candidates=given[n]) for n, text in enumerate("xyzw")]
    assert outcomes(work(children, rows)) == ["X", "Y", "Z", "W"]
    assert children.loads == ["/a"]
    assert [(run.texts, run.candidates) for run in children.runs] == [(("x", "w"), few), (("y",), more), (("z",), ())]
    broken = Children(load=lambda _: Failure("image_truncated", "cut"))
    assert outcomes(work(broken, rows)) == ["image_truncated"] * 4
    assert not broken.runs


def test_several_texts_of_a_row_are_a_list() -> None:
    (record,) = work(Children(), [row(0, "a", "x", "y", "x", several=True)])
    assert [answer["answer"] for answer in record["result"]["answers"]] == ["X", "Y", "X"]


def test_many_rows_of_one_image_are_several_runs() -> None:
    children = Children()
    records = work(children, [row(n, "a", f"t{n}") for n in range(600)])
    assert outcomes(records) == [f"T{n}" for n in range(600)]
    assert [len(run.texts) for run in children.runs] == [256, 256, 88]
    assert len(children.loads) == 1


def test_a_run_has_so_many_texts_or_one_row() -> None:
    children = Children()
    counts = [100, 100, 57, 300, 1, 255, 1]
    rows = [row(n, "a", *(f"t{n}-{k}" for k in range(count)), several=True) for n, count in enumerate(counts)]
    assert len(work(children, rows)) == 7
    assert [len(run.texts) for run in children.runs] == [200, 57, 300, 256, 1]


def test_images_in_flight_are_bounded_by_the_slots() -> None:
    children = Children()
    work(children, [row(n, f"i{n}", "x") for n in range(100)], slots=3)
    assert children.slots_used == {0, 1, 2}


def test_bad_rows_and_places_need_no_work() -> None:
    children = Children()
    bad = BadRow(1, "text_missing", "the row has no `question`", "b", None, {"k": 1})
    records = work(children, [row(0, "http://a", "x"), bad, row(2, "c", "x")])
    assert outcomes(records) == ["uri_not_allowed", "text_missing", "X"]
    assert records[1]["input"] == {"k": 1}
    assert children.loads == ["/c"]


def test_a_chunk_of_bad_rows_only() -> None:
    assert outcomes(work(Children(), [BadRow(5, "row_invalid", "no", None, None, {})])) == ["row_invalid"]


def test_an_image_that_cannot_be_loaded_fails_all_its_rows() -> None:
    children = Children(load=lambda place: Failure("image_truncated", "cut") if place == "/a" else None)
    assert outcomes(work(children, [row(0, "a", "x"), row(1, "b", "y"), row(2, "a", "z")])) == [
        "image_truncated", "Y", "image_truncated",
    ]  # fmt: skip
    assert [run.texts for run in children.runs] == [("y",)]


def test_a_text_that_is_refused_fails_only_its_row() -> None:
    def run(asked: Run) -> Any:
        if "long" in asked.texts:
            return Failure("text_too_long", "too long")
        return [Answer(text.upper(), -0.5) for text in asked.texts]

    children = Children(run=run)
    assert outcomes(work(children, [row(0, "a", "x"), row(1, "a", "long"), row(2, "a", "z")])) == [
        "X", "text_too_long", "Z",
    ]  # fmt: skip
    assert [asked.texts for asked in children.runs] == [("x", "long", "z"), ("x",), ("long",), ("z",)]
    assert children.loads == ["/a"]


def test_an_image_that_crashes_the_engine_is_not_tried_for_each_of_its_rows() -> None:
    children = Children(run=lambda _: Failure("crashed", "died"))
    assert outcomes(work(children, [row(n, "a", f"t{n}") for n in range(3)])) == ["crashed"] * 3
    assert len(children.runs) == 1


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_result_that_is_no_json_is_an_error_record(score: float) -> None:
    children = Children(run=lambda asked: [Answer(text, score if text == "bad" else -1.0) for text in asked.texts])
    assert outcomes(work(children, [row(0, "a", "bad"), row(1, "a", "good")])) == ["internal", "good"]


def test_an_abandoned_chunk_leaves_the_slots_to_the_next_one() -> None:
    held: list[tuple[Any, Any]] = []
    children = Children()
    children.submit = lambda run, replies, token: held.append((replies, token))  # type: ignore[method-assign]
    lane = Lane(range(2), children, children)  # type: ignore[arg-type]
    looks = iter(range(3))

    def check() -> None:
        if next(looks) == 2:
            raise RuntimeError("lease lost")

    with pytest.raises(RuntimeError, match="lease lost"):
        lane.run(ChunkRun(CONTEXT, [row(n, f"i{n}", "x") for n in range(5)], check))
    assert len(held) == 2
    del children.submit
    for replies, token in held:  # the old chunk's answers come while the next one runs
        replies.put((token, [Answer("OLD", 0.0)]))
    records = lane.run(ChunkRun(CONTEXT, [row(n, f"j{n}", "y") for n in range(5)], lambda: None))
    assert outcomes(records) == ["Y"] * 5


def test_careful_runs_name_each_row_first_and_never_two_at_once() -> None:
    notes: list[object] = []
    children = Children(
        load=lambda place: notes.append(("load", place)),
        run=lambda run: (notes.append(run.texts), [Answer("A", 0.0)])[1],
    )
    rows: list[Row | BadRow] = [row(0, "a", "x"), row(1, "a", "y"), row(2, "b", "z")]
    lane = Lane(range(4), children, children)  # type: ignore[arg-type]
    run = CarefulRun(CONTEXT, rows, lambda: None, notes.append, {1: "seen in two deaths"})
    records = lane.run(run)
    assert outcomes(records) == ["A", "crashed", "A"]
    assert records[1]["error"]["message"] == "seen in two deaths"
    assert notes == [0, ("load", "/a"), ("x",), 2, ("load", "/b"), ("z",)]


def turns_of(numbers: Sequence[int], blamed: Collection[int], slots: int = 4) -> list[tuple[int, list[int]]]:
    """The turns of a careful run, each with the rows that were loaded in it; none of them while another one's ran."""
    turns: list[tuple[int, list[int]]] = []
    flying: set[str] = set()

    def begin(turn: int) -> None:
        assert not flying
        turns.append((turn, []))

    def load(place: str) -> None:
        flying.add(place)
        turns[-1][1].append(int(place[1:]))

    def run(asked: Run) -> list[Answer]:
        flying.remove(f"/{asked.texts[0]}")
        return [Answer("A", 0.0)]

    children = Children(load=load, run=run)
    rows: list[Row | BadRow] = [row(number, str(number), str(number)) for number in numbers]
    rows[1] = BadRow(numbers[1], "row_invalid", "no", None, None, {})
    lane = Lane(range(slots), children, children)  # type: ignore[arg-type]
    records = lane.run(CarefulRun(CONTEXT, rows, lambda: None, begin, {numbers[2]: "seen in two deaths"}, blamed))
    assert outcomes(records) == ["A", "row_invalid", "crashed", *["A"] * (len(rows) - 3)]
    return turns


def test_a_large_chunk_goes_in_groups_and_those_with_the_blame_row_by_row() -> None:
    numbers = [*range(100, 200), *range(1000, 1050)]  # of a retry, say
    worked = [numbers[0], *numbers[3:]]
    groups = [(~100, [100, *range(103, 164)]), (~164, worked[62:126]), (~1028, worked[126:])]
    assert turns_of(numbers, ()) == groups
    alone = [(number, [number]) for number in groups[1][1]]
    assert turns_of(numbers, {~164}) == turns_of(numbers, {~164, 170, 1000}) == [groups[0], *alone, groups[2]]


def test_rows_of_a_small_chunk_and_of_one_with_much_blame_go_alone() -> None:
    for numbers, blamed in ((range(64), ()), (range(65), {~0, 3, ~200, ~300})):
        assert turns_of(numbers, blamed) == [(number, [number]) for number in numbers if number not in {1, 2}]


def test_a_group_is_in_flight_together() -> None:
    begun: list[int] = []
    children = Children(run=lambda _: (begun.append(len(children.loads)), [Answer("A", 0.0)])[1])
    rows: list[Row | BadRow] = [row(number, str(number), "x") for number in range(100)]
    lane = Lane(range(50), children, children)  # type: ignore[arg-type]
    assert len(lane.run(CarefulRun(CONTEXT, rows, lambda: None, lambda _: None, {}))) == 100
    assert (begun[0], max(begun[:64])) == (50, 64)  # all slots, and none of the next group's rows


def test_captions_without_prompt_of_a_repeated_image_are_computed_once() -> None:
    children = Children(run=lambda run: [Caption("a cat", -0.1, (1, 2)) for _ in run.texts])
    context = JobContext("caption", options_for("caption"), CONTEXT.checkpoint, locate)
    lane = Lane(range(2), children, children)  # type: ignore[arg-type]
    records = lane.run(ChunkRun(context, [row(0, "a", ""), row(1, "a", "")], lambda: None))
    assert [record["result"]["tokens"] for record in records] == [2, 2]
    assert [run.texts for run in children.runs] == [("",)]
