"""Which entries share a batch, in which order, and how long they wait."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_engine.batcher import Batcher


@dataclass(frozen=True)
class Entry:
    number: int
    group: str = "a"
    capacity: int = 4
    weight: int = 1
    least: int = 1


def drained(entries: list[Entry]) -> list[list[int]]:
    batcher: Batcher[Entry] = Batcher()
    for entry in entries:
        assert batcher.put(entry)
    batcher.close()
    batches = []
    while (batch := batcher.take()) is not None:
        batches.append([entry.number for entry in batch])
    return batches


def test_a_group_is_cut_into_batches_in_order() -> None:
    assert drained([Entry(number) for number in range(10)]) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_groups_do_not_mix_and_the_one_that_waits_longest_goes_first() -> None:
    entries = [Entry(0), Entry(1, "b"), Entry(2), Entry(3, "b"), Entry(4, "c")]
    assert drained(entries) == [[0, 2], [1, 3], [4]]


def test_a_group_left_over_keeps_its_place() -> None:
    entries = [*(Entry(number) for number in range(5)), Entry(5, "b"), Entry(6)]
    assert drained(entries) == [[0, 1, 2, 3], [4, 6], [5]]


def test_heavy_entries_make_smaller_batches() -> None:
    entries = [Entry(number, weight=weight) for number, weight in enumerate([3, 1, 1, 2, 2, 9, 1, 1])]
    assert drained(entries) == [[0, 1], [2, 3], [4], [5], [6, 7]]


def test_the_least_number_of_entries_may_exceed_the_capacity_four_times() -> None:
    entries = [Entry(number, weight=weight, least=3) for number, weight in enumerate([3, 3, 3, 3, 8, 8, 1, 99, 1])]
    assert drained(entries) == [[0, 1, 2], [3, 4], [5, 6], [7], [8]]


@settings(max_examples=100, deadline=None)
@given(st.text("abc", max_size=30))
def test_every_entry_comes_out_once_and_fits(groups: str) -> None:
    entries = [Entry(number, group) for number, group in enumerate(groups)]
    batches = drained(entries)
    assert sorted(number for batch in batches for number in batch) == list(range(len(entries)))
    for batch in batches:
        assert len({entries[number].group for number in batch}) == 1
        assert len(batch) <= 4
    for group in "abc":
        mine = [number for batch in batches for number in batch if entries[number].group == group]
        assert mine == sorted(mine)


def timed(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


class TestWaiting:
    def test_a_full_batch_does_not_wait(self) -> None:
        batcher: Batcher[Entry] = Batcher(patience=30)
        for number in range(4):
            batcher.put(Entry(number))
        assert timed(batcher.take) < 5

    def test_a_batch_that_is_heavy_enough_does_not_wait(self) -> None:
        for weights in ((4, 1, 1), (16,)):
            batcher: Batcher[Entry] = Batcher(patience=30)
            for number, weight in enumerate(weights):
                batcher.put(Entry(number, weight=weight, least=3))
            assert timed(batcher.take) < 5

    def test_a_half_empty_batch_waits_its_patience_only(self) -> None:
        batcher: Batcher[Entry] = Batcher(patience=0.1)
        batcher.put(Entry(0))
        assert 0.09 <= timed(batcher.take) < 10

    def test_it_waits_while_more_keep_coming(self) -> None:
        batcher: Batcher[Entry] = Batcher(patience=2.0)
        with ThreadPoolExecutor(1) as pool:
            taken = pool.submit(batcher.take)
            for number in range(4):
                time.sleep(0.02)
                assert not taken.done()
                batcher.put(Entry(number))
            assert len(taken.result(timeout=30) or []) == 4

    def test_close_wakes_a_waiting_taker_and_refuses_more(self) -> None:
        batcher: Batcher[Entry] = Batcher()
        with ThreadPoolExecutor(1) as pool:
            taken = pool.submit(batcher.take)
            batcher.close()
            assert taken.result(timeout=30) is None
        assert not batcher.put(Entry(0))
        assert batcher.take() is None

    def test_close_gives_out_what_is_queued_at_once(self) -> None:
        batcher: Batcher[Entry] = Batcher(patience=30)
        batcher.put(Entry(0))
        batcher.close()
        assert timed(batcher.take) < 5
        assert batcher.take() is None

    @pytest.mark.parametrize("writers", [4])
    def test_many_threads_lose_nothing(self, writers: int) -> None:
        batcher: Batcher[Entry] = Batcher(patience=0.001)

        def write(first: int) -> None:
            for number in range(first, first + 50):
                batcher.put(Entry(number, group=str(number % 3)))

        threads = [threading.Thread(target=write, args=(writer * 50,)) for writer in range(writers)]
        for thread in threads:
            thread.start()
        found: list[int] = []
        while len(found) < writers * 50:
            found += [entry.number for entry in batcher.take() or []]
        for thread in threads:
            thread.join()
        assert sorted(found) == list(range(writers * 50))
