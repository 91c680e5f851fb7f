"""Guest memory on several threads at the same time; with a GIL these tests hold anyway."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from qvmcore.memory import GuestMemory
from qvmcore.types import MemorySpec

BASE, SIZE, ROUNDS = 0x4000_0000, 1 << 20, 60_000


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory.allocate([MemorySpec(BASE, SIZE)])


def together(*works: Callable[[], None]) -> None:
    """Run them at the same time; raises what one of them raised."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        barrier.wait()
        work()

    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(run, work) for work in works]:
            done.result()


def test_views_taken_and_dropped_by_two_threads_keep_the_memory(memory: GuestMemory) -> None:
    def slices() -> None:
        for number in range(ROUNDS):
            memory.view(BASE + number % 4096, 16)

    together(slices, slices)
    memory.write(BASE, b"still there")
    assert memory.read(BASE, 11) == b"still there"
    gc.collect()
    assert memory.close()


def test_views_of_one_thread_are_dropped_by_another(memory: GuestMemory) -> None:
    kept = [[memory.view(BASE + number, 16) for number in range(ROUNDS // 4)] for _ in range(2)]
    together(kept[0].clear, kept[1].clear, lambda: memory.write(BASE, bytes(SIZE)))
    memory.write(BASE, b"still there")
    gc.collect()
    assert memory.close()


def test_closed_memory_gives_no_view_to_any_thread(memory: GuestMemory) -> None:
    region = memory.regions[0]
    assert region.view.nbytes == SIZE
    assert memory.close()
    refused: list[str] = []

    def ask() -> None:
        with pytest.raises(ValueError):
            memory.view(BASE, 1)
        refused.append("once")

    together(ask, ask)
    ask()
    assert len(refused) == 3
    assert region.close()


def test_memory_stays_while_a_thread_has_a_view_of_it(memory: GuestMemory) -> None:
    held: list[memoryview] = []
    together(lambda: held.append(memory.view(BASE, 16)))
    assert not memory.close()
    held[0][:4] = b"mine"
    assert bytes(held[0][:4]) == b"mine"
    held.clear()
    gc.collect()
    assert memory.close()
