"""Who gets the workers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.ledger import QUEUE
from orchestrator.scheduling import (
    LEAST_IN_FLIGHT,
    MOST_IN_FLIGHT,
    PER_SLOT_UNKNOWN,
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
    workers = {"w1": ANY, "w2": ONLY_M, "old": {}}  # a worker that tells nothing has one slot
    assert rooms([Demand("j", "a", 1, 99)], workers) == {"j": PER_SLOT_UNKNOWN * 5}
    assert rooms([Demand("j", "a", 1, 99), Demand("k", "a", 4, 99)], workers) == {"j": 2, "k": 8}
    assert rooms([Demand("j", "a", 1, 99), Demand("k", "m", 1, 99)], workers) == {"j": 10, "k": 20}
    assert rooms([Demand("j", "x", 1, 99)], {}) == {"j": LEAST_IN_FLIGHT}
    assert rooms([], workers) == {}


def test_little_waits_but_enough() -> None:
    workers = {"w": {"slots": 32}}
    assert rooms([Demand("j", "a", 1, 999, 0.1)], workers) == {"j": 41}  # of long chunks few wait
    assert rooms([Demand("j", "a", 1, 999, 100.0)], workers) == {"j": 240}  # of short ones two seconds of work
    both = [Demand("j", "a", 1, 999, 100.0), Demand("k", "a", 1, 999, 0.5)]
    assert rooms(both, workers) == {"j": 121, "k": 120}  # who came late gets the same share of it


def test_what_a_job_does_not_need_the_others_get() -> None:
    workers = {"w": {"slots": 40}}
    jobs = [Demand("small", "a", 9, 2, 1.0), Demand("j", "a", 1, 999, 1.0), Demand("k", "a", 1, 999, 1.0)]
    assert rooms(jobs, workers) == {"small": 2, "j": 27, "k": 27}


@given(
    st.lists(st.tuples(st.floats(0.001, 1000), st.integers(1, 10**6), st.floats(0, 1e4)), min_size=1, max_size=50),
    st.integers(0, 5000),
)
def test_every_job_gets_some_and_all_get_what_there_is(jobs: list[tuple[float, int, float]], slots: int) -> None:
    demands = [Demand(str(number), "m", *job) for number, job in enumerate(jobs)]
    found = rooms(demands, {"w": {"slots": slots}})
    assert all(1 <= found[demand.job] <= min(MOST_IN_FLIGHT, demand.chunks) for demand in demands)
    wanted = min(sum(min(demand.chunks, MOST_IN_FLIGHT) for demand in demands), slots)
    assert sum(found.values()) >= min(wanted, MOST_IN_FLIGHT)  # no slot is left without work


@pytest.mark.parametrize(
    ("speed", "rows"), [(None, None), (0.0, None), (0.1, 64), (10.0, 300), (100.0, 3000), (1e6, 4096)]
)
def test_chunks_of_automatic_size_take_half_a_minute(speed: float | None, rows: int | None) -> None:
    assert chunk_rows_for(speed) == rows
