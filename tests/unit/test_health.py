"""When a probe should end a worker, and when it must not; on a clock that the test turns."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from orchestrator.errors import RedisUnavailable
from orchestrator.ledger import Lease
from orchestrator.settings import Settings
from workers.health import DEAF_SECONDS, Health
from workers.leases import Held

SETTINGS = Settings()
HANG = SETTINGS.engine_timeout_seconds + SETTINGS.loader_timeout_seconds + 2 * SETTINGS.storage_retry_seconds


@dataclass
class Work:
    """What `Health` sees of a worker."""

    chunks: list[Held] = field(default_factory=list)
    hints_taken: int = 0
    waiting: Callable[[], int] = lambda: 0
    draining: bool = False
    fault: str = "the engine cannot start"
    faulty: threading.Event = field(default_factory=threading.Event)

    def held(self) -> list[Held]:
        return self.chunks

    def hints_waiting(self) -> int:
        return self.waiting()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def a_chunk() -> Held:
    return Held(Lease("job-1", 0, "plan", 0, 1, 1, "w"), 1e9, 15.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def health(work: Work, clock: Clock) -> Health:
    return Health(work, SETTINGS, clock)  # type: ignore[arg-type]


def test_an_idle_worker_is_well_for_ever(health: Health, clock: Clock) -> None:
    for _ in range(5):
        health.look()
        assert health.problem() is None
        clock.now += 10_000


def test_work_that_does_not_move_is_a_problem_once_the_watchdogs_had_their_time(
    health: Health, work: Work, clock: Clock
) -> None:
    work.chunks = [a_chunk()]
    assert health.problem() is None
    clock.now += HANG - 1
    assert health.problem() is None
    clock.now += 2
    assert health.problem() == f"no row of 1 chunks in hand was done for {HANG + 1:.0f} s"


def test_any_row_done_and_any_hint_taken_is_progress(health: Health, work: Work, clock: Clock) -> None:
    work.chunks = [a_chunk(), a_chunk()]
    for _ in range(5):
        assert health.problem() is None
        clock.now += HANG - 1
        work.chunks[0].rows_done += 1
        assert health.problem() is None
        clock.now += HANG - 1
        work.hints_taken += 1


def test_a_model_may_take_as_long_as_its_setting_says(health: Health, work: Work, clock: Clock) -> None:
    work.chunks = [a_chunk()]
    work.chunks[0].loading = True
    assert health.problem() is None
    clock.now += SETTINGS.model_timeout_seconds
    assert health.problem() is None
    clock.now += HANG
    assert health.problem() is not None


def test_hints_that_an_idle_thread_leaves_lying_are_a_problem(health: Health, work: Work, clock: Clock) -> None:
    work.waiting = lambda: 3
    work.chunks = [a_chunk()]  # one thread of two is busy
    health.look()
    clock.now += DEAF_SECONDS - 1
    work.chunks[0].rows_done += 1
    health.look()
    assert health.problem() is None
    clock.now += 2
    assert health.problem() == f"hints wait, and none was taken for {DEAF_SECONDS + 1:.0f} s"
    work.hints_taken += 1  # it hears again
    health.look()
    assert health.problem() is None


def test_hints_that_wait_while_all_threads_are_busy_are_none(health: Health, work: Work, clock: Clock) -> None:
    work.waiting = lambda: 3
    work.chunks = [a_chunk() for _ in range(SETTINGS.worker_threads)]
    for _ in range(5):
        health.look()
        assert health.problem() is None
        clock.now += DEAF_SECONDS
        work.chunks[0].rows_done += 1


def test_a_redis_that_is_away_is_no_reason_to_restart(health: Health, work: Work, clock: Clock) -> None:
    work.waiting = lambda: 3
    health.look()

    def away() -> int:
        raise RedisUnavailable("gone")

    work.waiting = away
    health.look()
    clock.now += 10 * DEAF_SECONDS
    assert health.problem() is None


def test_a_worker_that_is_about_to_end_is_left_to_it(health: Health, work: Work, clock: Clock) -> None:
    work.chunks = [a_chunk()]
    health.problem()
    clock.now += 10 * HANG
    work.draining = True
    assert health.problem() is None
    work.draining = False
    work.faulty.set()
    assert health.problem() is None


def test_ready_from_the_first_hint_it_could_take_until_the_drain(health: Health, work: Work) -> None:
    assert health.unready() == "starting"
    health.consuming()
    try:
        assert health.unready() is None
        work.draining = True
        assert health.unready() == "draining"
        work.faulty.set()
        assert health.unready() == "the engine cannot start"
    finally:
        health.stop()
