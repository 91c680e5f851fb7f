"""Eventfds of somebody else as interrupts of a guest on the machine's own KVM, with no thread of ours."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from typing import Any

import pytest

from plugins.kvm.tests.kvm_bench import APIC, descriptors, one_by_one, taken
from qvmcore.api import IntrSpec

#: Vector 0x42 of the guest.
LEVEL = IntrSpec("ioapic", 6)


@pytest.fixture
def fds() -> Iterator[tuple[int, int]]:
    """What a device signals, and what it is told."""
    made = (os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK))
    yield made
    for fd in made:
        os.close(fd)


def has_count(fd: int) -> bool:
    """Without taking it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def test_each_signal_of_the_eventfd_is_one_message_and_is_taken(ready: Any, fds: tuple[int, int]) -> None:
    stop = ready.guest.listen(fds[0], APIC, 0x40)
    one_by_one(ready, 0x40, 200, lambda: os.eventfd_write(fds[0], 1))
    assert not has_count(fds[0])
    assert ready.guest.status()["straight"] == ready.guest.status()["irqfds"] == 1
    stop()
    assert ready.guest.status()["straight"] == 0


def test_a_count_from_before_is_a_message_at_once(ready: Any, fds: tuple[int, int]) -> None:
    os.eventfd_write(fds[0], 3)
    ready.guest.listen(fds[0], APIC, 0x40)
    assert ready.wait(lambda: taken(ready)[0x40] == 1)
    assert has_count(fds[0]), "it is left to whoever asked"


def test_a_stop_takes_what_is_left_in_the_eventfd(ready: Any, fds: tuple[int, int]) -> None:
    """Kernels before 5.11 leave all counts until then: none of them may be a pending interrupt."""
    os.eventfd_write(fds[0], 3)
    stop = ready.guest.listen(fds[0], APIC, 0x40)
    assert ready.wait(lambda: taken(ready)[0x40] == 1)
    assert has_count(fds[0])
    stop()
    assert not has_count(fds[0])


def test_after_a_stop_counts_stay_and_no_message_comes(ready: Any, fds: tuple[int, int]) -> None:
    for number in range(1, 101):
        stop = ready.guest.listen(fds[0], APIC, 0x40)
        os.eventfd_write(fds[0], 1)
        stop()
        assert ready.wait(lambda number=number: taken(ready)[0x40] == number), "it was under way, not lost"
        os.eventfd_write(fds[0], 1)
        assert os.eventfd_read(fds[0]) == 1
    one_by_one(ready, 0x41, 1, lambda: ready.guest.signal_msi(APIC, 0x41))
    assert taken(ready)[0x40] == 100


def test_a_rewritten_message_is_the_new_one(ready: Any, fds: tuple[int, int]) -> None:
    for number in range(50):
        vector = 0x40 + number % 2
        stop = ready.guest.listen(fds[0], APIC, vector)
        os.eventfd_write(fds[0], 1)
        assert ready.wait(lambda v=vector, n=number: taken(ready)[v] == n // 2 + 1)
        stop()


def test_what_is_no_message_is_not_listened_to(ready: Any, fds: tuple[int, int]) -> None:
    for address in (0, 0xFEDF_FFFF, 0xFEF0_0000, 1 << 32 | APIC, (1 << 64) - 4):
        assert ready.guest.listen(fds[0], address, 0x40) is None
    assert ready.guest.listen_level(IntrSpec("apic", 0x40), *fds) is None
    stops = [ready.guest.listen(fds[0], APIC, data) for data in (0, 0xFFFF_FFFF)]
    os.eventfd_write(fds[0], 1)
    for stop in stops:
        if stop is not None:
            stop()


def test_a_thousand_cycles_leave_nothing_behind(ready: Any, fds: tuple[int, int]) -> None:
    ready.guest.listen(fds[0], APIC, 0x40)()
    before = descriptors()
    for number in range(1000):
        ready.guest.listen(fds[0], APIC + 0x1000 * (number % 7), 0x40 + number % 3)()
        ready.guest.listen_level(LEVEL, *fds)()
    assert descriptors() == before
    assert ready.guest.status()["irqfds"] == 0
    stop = ready.guest.listen(fds[0], APIC, 0x40)
    one_by_one(ready, 0x40, 10, lambda: os.eventfd_write(fds[0], 1))
    stop()


def test_a_level_is_high_until_it_was_served_and_the_device_is_told(ready: Any, fds: tuple[int, int]) -> None:
    stop = ready.guest.listen_level(LEVEL, *fds)

    def signal() -> None:
        os.eventfd_write(fds[0], 1)
        assert ready.wait(lambda: has_count(fds[1]))
        assert os.eventfd_read(fds[1]) == 1

    one_by_one(ready, 0x42, 100, signal)
    stop()
    os.eventfd_write(fds[0], 1)
    one_by_one(ready, 0x40, 1, lambda: ready.guest.signal_msi(APIC, 0x40))
    assert taken(ready)[0x42] == 100
    assert not has_count(fds[1])


def test_a_shared_line_is_the_or_of_eventfds_and_levels(ready: Any, fds: tuple[int, int]) -> None:
    """The other function's level stays though the eventfd's was served, and the other way round."""
    other = ready.guest.irq_line(LEVEL)
    ready.guest.listen_level(LEVEL, *fds)
    other.set(True)
    assert ready.wait(lambda: taken(ready)[0x42] >= 3)
    os.eventfd_write(fds[0], 1)
    assert ready.wait(lambda: has_count(fds[1]))
    seen = taken(ready)[0x42]
    assert ready.wait(lambda: taken(ready)[0x42] >= seen + 3)
    other.set(False)
    one_by_one(ready, 0x40, 1, lambda: ready.guest.signal_msi(APIC, 0x40))
    seen = taken(ready)[0x42]
    os.eventfd_read(fds[1])
    os.eventfd_write(fds[0], 1)
    assert ready.wait(lambda: has_count(fds[1]) and taken(ready)[0x42] > seen)


def test_close_ends_it_and_a_late_stop_does_nothing(ready: Any, fds: tuple[int, int]) -> None:
    stop, line = ready.guest.listen(fds[0], APIC, 0x40), ready.guest.listen_level(LEVEL, fds[1], fds[0])
    assert ready.guest.stop(10.0)
    ready.guest.close()
    os.eventfd_write(fds[0], 1)
    assert has_count(fds[0])
    stop()
    line()
    assert ready.guest.listen(fds[0], APIC, 0x40) is None
    assert ready.guest.listen_level(LEVEL, *fds) is None
