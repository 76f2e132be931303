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
    Backlog,
    Demand,
    Remaining,
    backlog_of,
    chunk_rows_for,
    holders,
    queue_of,
    rooms,
    route,
    servers,
    serves,
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


@pytest.mark.parametrize(
    ("jobs", "busy", "slots", "desired"),
    [
        ([], 0, 2, 0),
        ([Remaining(1, 1, None)], 0, 2, 1),  # not planned yet: someone should be there when it is
        ([Remaining(10**8, 10**5, None)], 0, 2, 1),  # of unknown speed: one measures
        ([Remaining(60_000, 600, 10.0)], 0, 2, 10),  # 6,000 seconds of one worker, in 600
        ([Remaining(60_001, 600, 10.0)], 0, 2, 11),
        ([Remaining(60_000, 600, 10.0), Remaining(6000, 60, 1.0)], 0, 2, 20),
        ([Remaining(60_000, 600, 10.0), Remaining(10**6, 10, None)], 0, 2, 10),
        ([Remaining(60_000, 6, 10.0)], 0, 2, 3),  # no more than find a chunk
        ([Remaining(60_000, 5, 10.0)], 0, 2, 3),
        ([Remaining(60, 6, 10.0)], 6, 2, 6),  # near the end: nobody who works is taken away
        ([Remaining(10**9, 10**6, 10.0)], 0, 2, 50),  # the bound that was set
        ([Remaining(60, 6, 10.0)], 70, 2, 50),
    ],
)
def test_workers_that_an_autoscaler_should_run(
    jobs: list[Remaining], busy: int, slots: float, desired: int
) -> None:  # fmt: skip
    found = backlog_of(jobs, busy, slots, 600, 50)
    assert found == Backlog(sum(job.rows for job in jobs), sum(job.chunks for job in jobs), desired)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**9), st.integers(1, 10**6), st.none() | st.floats(1e-6, 1e6)).map(
            lambda job: Remaining(max(job[:2]), *job[1:])
        ),
        max_size=20,
    ),
    st.floats(1, 64), st.floats(1, 1e5), st.integers(1, 1000), st.integers(0, 2000),
)  # fmt: skip
def test_zero_workers_are_desired_only_when_nothing_is_left(
    jobs: list[Remaining], slots: float, seconds: float, most: int, busy: int
) -> None:
    desired = backlog_of(jobs, busy, slots, seconds, most).desired_workers
    assert (desired == 0) == (not jobs and not busy)
    assert min(busy, most) <= desired <= most
    more = backlog_of([*jobs, Remaining(1, 1, 1.0)], busy, slots, seconds, most).desired_workers
    assert more >= desired  # work that comes takes nobody away


def test_pools_serve_the_jobs_whose_models_they_all_hold() -> None:
    assert serves(["a", "b"], "a")
    assert serves(["a", "b"], "a+b")
    assert not serves(["a"], "a+b")
    assert not serves([], "a")
