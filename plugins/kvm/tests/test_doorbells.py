"""Doorbells: guest writes that wake an eventfd and never come to this process; counts are exact."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from qvmcore.api import AddressSpace, Doorbell, EventFd, MmioHandler, Window

#: Waits for a count at 0x8000 and rings as often: 2 bytes at 0x10, 7 and 8 at 0x20, a 5 at port 0x300.
RINGER = """
10000 bb000000c0  mov $0xc0000000,%ebx
10005 ba00030000  mov $0x300,%edx
1000a 8b0c2500800000  mov 0x8000,%ecx
10011 85c9  test %ecx,%ecx
10013 74f5  je 0x1000a
10015 c704250080000000000000  movl $0x0,0x8000
10020 66c743100100  movw $0x1,0x10(%rbx)
10026 c7432007000000  movl $0x7,0x20(%rbx)
1002d c7432008000000  movl $0x8,0x20(%rbx)
10034 b005  mov $0x5,%al
10036 ee  out %al,(%dx)
10037 ffc9  dec %ecx
10039 75e5  jne 0x10020
1003b e6e9  out %al,$0xe9
1003d ebcb  jmp 0x1000a
"""


@pytest.fixture
def bells() -> Iterator[list[EventFd]]:
    """Four eventfds."""
    made = [EventFd() for _ in range(4)]
    yield made
    for event in made:
        event.close()


def ring(bench: Any, times: int) -> None:
    """Have the running guest ring so often, and wait until it has."""
    bench.done.clear()
    bench.memory.write(0x8000, times.to_bytes(4, "little"))
    assert bench.done.wait(20)


def test_doorbells_are_counted_by_their_eventfds_alone(make_bench: Any, bells: list[EventFd]) -> None:
    any_value, seven, eight, port = bells
    bench = make_bench(
        doorbells=(
            (Doorbell(0x10, 2), any_value.fd),
            (Doorbell(0x20, 4, 7), seven.fd),
            (Doorbell(0x20, 4, 8), eight.fd),
        ),
        port_doorbells=((Doorbell(0, 1, 5), port.fd),),
    )
    assert bench.guest.fast_doorbells
    bench.start(RINGER)
    assert bench.guest.status()["doorbells"] == 4
    ring(bench, 1000)
    assert [bell.drain() for bell in bells] == [1000] * 4
    assert bench.accesses == []
    assert bench.guest.status()["exits"] == {"io": 1, "mmio": 0}  # the write that says done


def test_what_a_doorbell_does_not_match_goes_to_the_handler(make_bench: Any, bells: list[EventFd]) -> None:
    bench = make_bench(
        doorbells=((Doorbell(0x10, 4), bells[0].fd), (Doorbell(0x20, 4, 9), bells[1].fd)),
        port_doorbells=((Doorbell(0, 1, 6), bells[2].fd),),
    )
    bench.start(RINGER)
    ring(bench, 3)
    assert [bell.drain() for bell in bells] == [0] * 4
    assert (
        bench.accesses
        == [
            ("mem", "w", 0x10, 2, 1),
            ("mem", "w", 0x20, 4, 7),
            ("mem", "w", 0x20, 4, 8),
            ("io300", "w", 0, 1, 5),
        ]
        * 3
    )


def test_windows_that_come_and_go_take_their_doorbells_along(make_bench: Any, bells: list[EventFd]) -> None:
    bench = make_bench()
    bench.start(RINGER)
    assert bench.guest.status()["doorbells"] == 0
    page = 0xD0000000
    handler = MmioHandler(lambda _o, _s: 0, lambda _o, _s, _v: None, ((Doorbell(0x10, 2), bells[0].fd),))
    for _ in range(10):
        mapped = bench.bus.place(page, Window(0x1000), handler, "bar")
        assert bench.guest.status()["doorbells"] == 1
        bench.bus.remove(mapped)
        assert bench.guest.status()["doorbells"] == 0
    # Twice at one place: KVM would refuse the second one if the first were still there.
    mapped = bench.bus.place(page, Window(0x1000), handler, "bar")
    assert bench.guest.status()["doorbells_refused"] == 0


def test_a_doorbell_that_moved_rings_at_its_new_place(make_bench: Any, bells: list[EventFd]) -> None:
    bench = make_bench()
    (device,) = tuple(bench.bus)
    bench.bus.remove(device)
    handler = MmioHandler(lambda _o, _s: 0, lambda _o, _s, _v: None, ((Doorbell(0x10, 2), bells[0].fd),))
    mapped = bench.bus.place(0xD0000000, Window(0x1000), handler, "bar")
    bench.start(RINGER)
    ring(bench, 5)
    assert bells[0].drain() == 0
    bench.bus.remove(mapped)
    mapped = bench.bus.place(0xC0000000, Window(0x1000), handler, "bar")
    ring(bench, 5)
    assert bells[0].drain() == 5
    bench.bus.remove(mapped)
    ring(bench, 5)
    assert bells[0].drain() == 0


def test_a_refused_doorbell_takes_the_slow_way(
    make_bench: Any, bells: list[EventFd], caplog: pytest.LogCaptureFixture
) -> None:
    number = os.open("/dev/null", os.O_RDONLY)  # no eventfd
    try:
        bench = make_bench(doorbells=((Doorbell(0x10, 2), number), (Doorbell(0x20, 4), bells[0].fd)))
        bench.start(RINGER)
        status = bench.guest.status()
        assert (status["doorbells"], status["doorbells_refused"]) == (1, 1)
        assert "device: KVM refuses the doorbell at 0xc0000010 (Invalid argument)" in caplog.text
        handler = MmioHandler(lambda _o, _s: 0, lambda _o, _s, _v: None, ((Doorbell(0, 2), number),))
        for _ in range(10):
            bench.bus.remove(bench.bus.place(0xD0000000, Window(0x1000), handler, "bar"))
        assert bench.guest.status()["doorbells_refused"] == 11
        assert [record.levelname for record in caplog.records].count("WARNING") == 1
        ring(bench, 2)
        assert [access for access in bench.accesses if access[2] == 0x10] == [("mem", "w", 0x10, 2, 1)] * 2
        assert bells[0].drain() == 4
    finally:
        os.close(number)


def test_a_bus_somebody_else_watches_is_an_error_of_the_start(bench: Any) -> None:
    assert isinstance(bench.bus, AddressSpace)
    bench.bus.observe(lambda _placed: None, lambda _placed: None)
    with pytest.raises(Exception, match="the guest cannot be started: the bus has an observer already"):
        bench.start(RINGER)
    assert not bench.guest.status()["running"]
