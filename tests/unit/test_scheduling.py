"""Who gets the workers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.ledger import QUEUE
from orchestrator.scheduling import (
    LEAST_IN_FLIGHT,
    MOST_IN_FLIGHT,
    PER_SLOT,
    Demand,
    chunk_rows_for,
    holders,
    queue_of,
    rooms,
    route,
    servers,
    slots_per_worker,
)  # fmt: skip

ANY: dict[str, Any] = {"slots": 4, "models": ["a", "b"], "only": []}
ONLY_M: dict[str, Any] = {"slots": 10, "models": [], "only": ["m", "n"]}


def test_hints_go_to_the_queue_of_their_model_where_someone_listens() -> None:
    workers = {"w1": ANY, "w2": ONLY_M}
    assert route("m", workers) == queue_of("m") != queue_of("n")
    assert route("a", workers) == QUEUE
    assert route("m", {"w1": ANY}) == QUEUE
    assert route("m+n", workers) == queue_of("m")  # a task of two models
    assert route("m+x", workers) == QUEUE
    assert list(servers("m", workers)) == ["w2"]
    assert list(servers("a", workers)) == ["w1"]
    assert servers("a", {"w2": ONLY_M}) == {}
    assert holders("b", workers) == ["w1"]
    assert holders("a+b", workers) == ["w1"]
    assert holders("m", workers) == []
    assert slots_per_worker(workers) == 7
    assert slots_per_worker({}) == 1


def test_shares_follow_the_weights_and_the_workers() -> None:
    workers = {"w1": ANY, "w2": ONLY_M, "old": {}}
    assert rooms([Demand("j", "a", 1)], workers) == {"j": PER_SLOT * 5}  # a worker that tells nothing has one slot
    assert rooms([Demand("j", "a", 1), Demand("k", "a", 4)], workers) == {"j": 2, "k": 8}
    assert rooms([Demand("j", "a", 1), Demand("k", "m", 1)], workers) == {"j": 5, "k": 10}
    assert rooms([Demand("j", "x", 1)], {}) == {"j": LEAST_IN_FLIGHT}
    assert rooms([Demand("j", "a", 1, 100.0)], workers)["j"] == PER_SLOT * 5 + 200  # many short chunks wait
    assert rooms([], workers) == {}


@given(st.lists(st.tuples(st.floats(0.001, 1000), st.floats(0, 1e6)), min_size=1, max_size=50), st.integers(0, 5000))
def test_every_job_gets_some_and_none_too_much(jobs: list[tuple[float, float]], slots: int) -> None:
    demands = [Demand(str(number), "m", *job) for number, job in enumerate(jobs)]
    found = rooms(demands, {"w": {"slots": slots}})
    assert all(1 <= room <= MOST_IN_FLIGHT for room in found.values())


@pytest.mark.parametrize(
    ("speed", "rows"), [(None, None), (0.0, None), (0.1, 64), (10.0, 300), (100.0, 3000), (1e6, 4096)]
)
def test_chunks_of_automatic_size_take_half_a_minute(speed: float | None, rows: int | None) -> None:
    assert chunk_rows_for(speed) == rows
