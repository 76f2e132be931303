"""When a probe should end a worker, and when it must not; on a clock that the test turns."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from orchestrator.errors import RedisUnavailable
from orchestrator.ledger import Lease
from orchestrator.settings import Settings
from workers.health import DEAF_SECONDS, Health
from workers.leases import Held

SETTINGS = Settings()
HANG = SETTINGS.engine_timeout_seconds + SETTINGS.loader_timeout_seconds + 2 * SETTINGS.storage_retry_seconds


@dataclass
class Engine:
    """What `Health` sees of the engine process."""

    loading: bool = False
    loads: int = 0
    restarts: int = 0


@dataclass
class Work:
    """What `Health` sees of a worker."""

    chunks: list[Held] = field(default_factory=list)
    engine: Engine = field(default_factory=Engine)
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


def a_chunk(clock: Clock) -> Held:
    return Held(Lease("job-1", 0, "plan", 0, 1, 1, "w"), 1e9, 15.0, started=clock.now, moved=clock.now)


def a_row_more(chunk: Held) -> None:
    chunk.done(chunk.rows_done + 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("workers.leases.time", SimpleNamespace(monotonic=clock))
    return clock


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
    work.chunks = [a_chunk(clock)]
    assert health.problem() is None
    clock.now += HANG - 1
    assert health.problem() is None
    clock.now += 2
    assert health.problem() == f"no row of 1 chunks in hand was done for {HANG + 1:.0f} s"


def test_any_row_done_and_any_chunk_begun_is_progress(health: Health, work: Work, clock: Clock) -> None:
    work.chunks = [a_chunk(clock), a_chunk(clock)]
    for _ in range(5):
        assert health.problem() is None
        clock.now += HANG - 1
        a_row_more(work.chunks[0])
        assert health.problem() is None
        clock.now += HANG - 1
        work.chunks[1] = a_chunk(clock)
        work.hints_taken += 1


def test_a_chunk_that_stands_still_is_a_problem_whatever_the_other_thread_does(
    health: Health, work: Work, clock: Clock
) -> None:
    stuck, other = work.chunks = [a_chunk(clock), a_chunk(clock)]
    for _ in range(2):  # it may be behind the other's images: twice the time, then
        assert health.problem() is None
        clock.now += HANG - 1
        a_row_more(other)
        work.hints_taken += 1
    assert health.problem() is None
    clock.now += 2
    assert health.problem() == f"no row of a chunk in hand was done for {2 * HANG:.0f} s, while others moved"
    a_row_more(stuck)
    assert health.problem() is None


def test_hints_that_come_to_nothing_are_no_progress(health: Health, work: Work, clock: Clock) -> None:
    work.chunks = [a_chunk(clock)]
    for _ in range(10):
        assert health.problem() is None
        clock.now += HANG / 10
        work.hints_taken += 1
    assert health.problem() is not None


def test_a_model_may_take_as_long_as_its_setting_says(health: Health, work: Work, clock: Clock) -> None:
    work.chunks = [a_chunk(clock)]
    work.engine.loading = True
    assert health.problem() is None
    clock.now += SETTINGS.model_timeout_seconds
    assert health.problem() is None
    clock.now += HANG
    assert health.problem() is not None


def test_work_that_waited_for_a_load_has_its_time_anew_when_that_ends(health: Health, work: Work, clock: Clock) -> None:
    """Another chunk's model is loaded, or after a restart everybody's: no run is done meanwhile."""
    work.chunks = [a_chunk(clock), a_chunk(clock)]
    work.engine.restarts += 1
    work.engine.loading = True
    for _ in range(2):  # two models, one after the other
        health.look()
        clock.now += SETTINGS.model_timeout_seconds
        assert health.problem() is None
        work.engine.loads += 1
    work.engine.loading = False
    assert health.problem() is None
    clock.now += HANG - 1
    assert health.problem() is None
    clock.now += 2
    assert health.problem() is not None


def test_hints_that_an_idle_thread_leaves_lying_are_a_problem(health: Health, work: Work, clock: Clock) -> None:
    work.waiting = lambda: 3
    work.chunks = [a_chunk(clock)]  # one thread of two is busy
    health.look()
    clock.now += DEAF_SECONDS - 1
    a_row_more(work.chunks[0])
    health.look()
    assert health.problem() is None
    clock.now += 2
    assert health.problem() == f"hints wait, and none was taken for {DEAF_SECONDS + 1:.0f} s"
    work.hints_taken += 1  # it hears again
    health.look()
    assert health.problem() is None


def test_hints_that_wait_while_all_threads_are_busy_are_none(health: Health, work: Work, clock: Clock) -> None:
    work.waiting = lambda: 3
    work.chunks = [a_chunk(clock) for _ in range(SETTINGS.worker_threads)]
    for _ in range(5):
        health.look()
        assert health.problem() is None
        clock.now += DEAF_SECONDS
        a_row_more(work.chunks[0])


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
    work.chunks = [a_chunk(clock)]
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
