"""DEVICE_GET_IRQ_INFO, DEVICE_SET_IRQS, and interrupts of the device through the client's eventfds."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest
from qvm_vfio_user.testing import CONFIG_REGION, INFO, INTX, MSI, MSIX, SET_IRQS, Command, Irq

from plugins.vfio_user.tests.vfio_bench import COMMAND, Bench, Event, Probe, open_fds, serving

NONE, BOOL, EVENTFD = Irq.NONE, Irq.BOOL, Irq.EVENTFD
MASK, UNMASK, TRIGGER = Irq.MASK, Irq.UNMASK, Irq.TRIGGER
FIRE = EVENTFD | TRIGGER


def ask(
    bench: Bench,
    flags: int,
    index: int,
    start: int = 0,
    count: int = 1,
    *,
    data: bytes = b"",
    fds: Any = (),
    argsz: int = 20,
) -> int:
    """The errno of a SET_IRQS, 0 when it is done."""
    payload = SET_IRQS.pack(argsz, flags, index, start, count) + data
    return bench.client.ask(Command.SET_IRQS, payload, fds=fds).errno


def enable_msix(bench: Bench) -> None:
    """As a guest does: the Message Control register of the MSI-X capability."""
    at = bench.client.read(CONFIG_REGION, 0x34, 1)
    assert bench.client.read(CONFIG_REGION, at, 1) == 0x11
    bench.client.write(CONFIG_REGION, at + 2, 2, 0x8000)


def test_DEVICE_GET_IRQ_INFO_says_intx_and_the_vectors() -> None:
    with serving() as bench:
        bench.client.version()
        # INTx: eventfd, maskable, masks itself. MSI-X: eventfds, each set by itself. No others.
        assert [bench.client.irq(index) for index in range(3)] == [(7, 1), (0, 0), (1, 2)]
        # QEMU warns of a type for errors that has none, and says nothing of one that is not there.
        for argsz, index in ((15, 0), (16, 3), (16, 4), (16, 0xFFFFFFFF)):
            assert bench.client.ask(Command.GET_IRQ_INFO, INFO.pack(argsz, 0, index, 0)).errno == errno.EINVAL


def test_intx_masks_itself_when_it_fires_and_fires_again_while_the_level_stays() -> None:
    with serving() as bench, Event() as event:
        client = bench.ready()
        line = bench.vdev.ctx.irq(0)
        client.set_irqs(FIRE, INTX, fds=[event.fd])
        line.set(True)
        assert event.count() == 1
        line.set(False)
        line.set(True)
        assert event.count() == 0
        client.set_irqs(NONE | UNMASK, INTX)
        assert event.count() == 1
        line.set(False)
        client.set_irqs(BOOL | UNMASK, INTX, data=b"\1")
        assert event.count() == 0
        line.set(True)
        assert event.count() == 1


def test_intx_that_is_masked_does_not_fire() -> None:
    with serving() as bench, Event() as event:
        client = bench.ready()
        client.set_irqs(FIRE, INTX, fds=[event.fd])
        client.set_irqs(BOOL | MASK, INTX, data=b"\1")
        bench.vdev.ctx.irq(0).set(True)
        assert event.count() == 0
        client.set_irqs(BOOL | UNMASK, INTX, data=b"\0")
        assert event.count() == 0
        client.set_irqs(NONE | UNMASK, INTX)
        assert event.count() == 1


def test_an_eventfd_unmasks_intx_as_kvm_does_at_the_end_of_interrupt() -> None:
    before = open_fds()
    with serving() as bench, Event() as event, Event() as resample, Event() as other:
        client = bench.ready()
        client.set_irqs(FIRE, INTX, fds=[event.fd])
        client.set_irqs(EVENTFD | UNMASK, INTX, fds=[resample.fd])
        bench.vdev.ctx.irq(0).set(True)
        for _ in range(3):
            assert event.count(5) == 1
            assert event.count() == 0
            os.eventfd_write(resample.fd, 1)
        assert event.count(5) == 1
        # Messages are answered as before, and unmask as well.
        client.set_irqs(NONE | UNMASK, INTX)
        assert event.count() == 1
        # Another one takes its place, and then none.
        client.set_irqs(EVENTFD | UNMASK, INTX, fds=[other.fd])
        os.eventfd_write(resample.fd, 1)
        client.info()
        assert event.count() == 0
        os.eventfd_write(other.fd, 1)
        assert event.count(5) == 1
        client.set_irqs(EVENTFD | UNMASK, INTX)
        os.eventfd_write(other.fd, 1)
        client.info()
        assert event.count() == 0
        for wrong in ([event.fd, event.fd], [0]):
            assert ask(bench, EVENTFD | UNMASK, INTX, fds=wrong) == errno.EINVAL
        client.set_irqs(EVENTFD | UNMASK, INTX, fds=[other.fd])
        bench.connection.shutdown(socket.SHUT_RDWR)
        assert bench.ended() is None
    assert open_fds() == before


def test_a_client_that_takes_the_signals_of_its_eventfd_away_does_not_hold_the_session_up() -> None:
    with serving() as bench:
        client = bench.ready()
        blocking = os.eventfd(0, os.EFD_CLOEXEC)
        client.set_irqs(EVENTFD | UNMASK, INTX, fds=[blocking])
        for _ in range(200):
            os.eventfd_write(blocking, 1)
            os.eventfd_read(blocking)
        assert client.info() == (3, 9, 3)
        os.close(blocking)


def test_a_pulse_of_intx_while_it_is_masked_is_not_lost() -> None:
    with serving() as bench, Event() as event:
        client = bench.ready()
        bench.vdev.ctx.irq(0).pulse()
        client.set_irqs(FIRE, INTX, fds=[event.fd])
        assert event.count() == 1
        bench.vdev.ctx.irq(0).pulse()
        bench.vdev.ctx.irq(0).pulse()
        assert event.count() == 0
        client.set_irqs(NONE | UNMASK, INTX)
        assert event.count() == 1
        client.set_irqs(NONE | UNMASK, INTX)
        assert event.count() == 0


def test_an_eventfd_for_intx_that_comes_late_gets_the_level() -> None:
    with serving() as bench, Event() as event, Event() as other:
        client = bench.ready()
        bench.vdev.ctx.irq(0).set(True)
        client.set_irqs(FIRE, INTX, fds=[event.fd])
        assert event.count() == 1
        client.set_irqs(FIRE, INTX, fds=[other.fd])
        assert (event.count(), other.count()) == (0, 1)


def test_intx_is_silent_while_the_guest_disables_it() -> None:
    """PCI 3.0, 6.2.2: Interrupt Disable, Command bit 10."""
    with serving() as bench, Event() as event:
        client = bench.ready()
        client.set_irqs(FIRE, INTX, fds=[event.fd])
        client.write(CONFIG_REGION, COMMAND, 2, 0x400)
        bench.vdev.ctx.irq(0).set(True)
        assert event.count() == 0
        client.write(CONFIG_REGION, COMMAND, 2, 0)
        assert event.count() == 1


def test_every_msix_vector_signals_its_own_eventfd() -> None:
    with serving() as bench, Event() as zero, Event() as one:
        client = bench.ready()
        enable_msix(bench)
        client.set_irqs(FIRE, MSIX, count=2, fds=[zero.fd, one.fd])
        bench.vdev.ctx.irq(1).pulse()
        assert (zero.count(), one.count()) == (0, 1)
        bench.vdev.ctx.irq(0).pulse()
        bench.vdev.ctx.irq(0).pulse()
        assert (zero.count(), one.count()) == (2, 0)


def test_the_table_in_the_device_does_not_mask_the_clients_vectors() -> None:
    """The client keeps the table; ours stays as it was at power-on, all masked."""
    with serving() as bench, Event() as event:
        client = bench.ready()
        enable_msix(bench)
        client.set_irqs(FIRE, MSIX, fds=[event.fd])
        assert client.read(3, 12, 4) == 1
        bench.vdev.ctx.irq(0).pulse()
        assert event.count() == 1


def test_a_vector_signalled_before_it_has_an_eventfd_is_pending() -> None:
    with serving() as bench, Event() as event:
        client = bench.ready()
        enable_msix(bench)
        bench.vdev.ctx.irq(1).pulse()
        client.set_irqs(FIRE, MSIX, start=1, fds=[event.fd])
        assert event.count() == 1
        bench.vdev.ctx.irq(0).pulse()
        client.set_irqs(NONE | TRIGGER, MSIX, count=0)
        client.set_irqs(FIRE, MSIX, fds=[event.fd])
        assert event.count() == 0


def test_DEVICE_SET_IRQS_without_descriptors_takes_eventfds_back_and_closes_them() -> None:
    before = open_fds()
    with serving() as bench, Event() as zero, Event() as one:
        client = bench.ready()
        enable_msix(bench)
        client.set_irqs(FIRE, MSIX, count=2, fds=[zero.fd, one.fd])
        with_both = len(open_fds())
        client.set_irqs(FIRE, MSIX, count=1)
        assert len(open_fds()) == with_both - 1
        for index in (0, 1):
            bench.vdev.ctx.irq(index).pulse()
        assert (zero.count(), one.count()) == (0, 1)
        client.set_irqs(NONE | TRIGGER, MSIX, count=0)
        assert len(open_fds()) == with_both - 2
        bench.vdev.ctx.irq(1).pulse()
        assert one.count() == 0
    assert open_fds() == before


def test_DEVICE_SET_IRQS_again_replaces_and_closes_the_old_eventfd() -> None:
    with serving() as bench, Event() as old, Event() as new:
        client = bench.ready()
        enable_msix(bench)
        client.set_irqs(FIRE, MSIX, fds=[old.fd])
        count = len(open_fds())
        client.set_irqs(FIRE, MSIX, fds=[new.fd])
        assert len(open_fds()) == count
        bench.vdev.ctx.irq(0).pulse()
        assert (old.count(), new.count()) == (0, 1)


def test_DEVICE_SET_IRQS_triggers_what_the_client_chooses() -> None:
    with serving() as bench, Event() as zero, Event() as one, Event() as line:
        client = bench.ready()
        client.set_irqs(FIRE, MSIX, count=2, fds=[zero.fd, one.fd])
        client.set_irqs(NONE | TRIGGER, MSIX, start=1)
        assert (zero.count(), one.count()) == (0, 1)
        client.set_irqs(BOOL | TRIGGER, MSIX, count=2, data=b"\1\0")
        assert (zero.count(), one.count()) == (1, 0)
        client.set_irqs(NONE | TRIGGER, INTX)
        client.set_irqs(FIRE, INTX, fds=[line.fd])
        client.set_irqs(NONE | TRIGGER, INTX)
        assert line.count() == 1


@pytest.mark.parametrize(
    "flags, index, start, count, data",
    [
        (0, MSIX, 0, 1, b""),
        (TRIGGER, MSIX, 0, 1, b""),
        (NONE, MSIX, 0, 1, b""),
        (NONE | BOOL | TRIGGER, MSIX, 0, 1, b"\1"),
        (NONE | MASK | UNMASK, INTX, 0, 1, b""),
        (NONE | TRIGGER | 0x40, MSIX, 0, 1, b""),
        (NONE | TRIGGER, 5, 0, 1, b""),
        (NONE | TRIGGER, 0xFFFFFFFF, 0, 0, b""),
        (NONE | TRIGGER, MSIX, 0, 3, b""),
        (NONE | TRIGGER, MSIX, 2, 1, b""),
        (NONE | TRIGGER, MSIX, 0xFFFFFFFF, 0xFFFFFFFF, b""),
        (NONE | TRIGGER, MSI, 0, 1, b""),
        (NONE | TRIGGER, 3, 0, 1, b""),
        (NONE | TRIGGER, MSIX, 1, 0, b""),
        (NONE | MASK, MSIX, 0, 0, b""),
        (BOOL | TRIGGER, MSIX, 0, 0, b""),
        (FIRE, MSIX, 0, 0, b""),
        (BOOL | TRIGGER, MSIX, 0, 2, b"\1"),
        (BOOL | TRIGGER, MSIX, 0, 2, b"\1\1\1"),
        (NONE | TRIGGER, MSIX, 0, 1, b"\1"),
        (NONE | MASK, MSIX, 0, 1, b""),
        (EVENTFD | MASK, INTX, 0, 1, b""),
        (EVENTFD | UNMASK, MSIX, 0, 1, b""),
    ],
)
def test_DEVICE_SET_IRQS_of_what_cannot_be_is_refused(
    flags: int, index: int, start: int, count: int, data: bytes
) -> None:
    with serving() as bench:
        bench.client.version()
        assert ask(bench, flags, index, start, count, data=data) == errno.EINVAL
        assert ask(bench, NONE | TRIGGER, MSIX, 0, 0, argsz=19) == errno.EINVAL


@pytest.mark.parametrize(
    "flags, count, fds", [(FIRE, 2, 1), (FIRE, 1, 2), (NONE | TRIGGER, 1, 1), (BOOL | TRIGGER, 1, 1)]
)
def test_DEVICE_SET_IRQS_with_the_wrong_number_of_descriptors_is_refused(
    flags: int, count: int, fds: int
) -> None:
    before = open_fds()
    with serving() as bench, Event() as event:
        bench.client.version()
        data = b"\1" * count if flags & BOOL else b""
        assert ask(bench, flags, MSIX, 0, count, data=data, fds=[event.fd] * fds) == errno.EINVAL
    assert open_fds() == before


def test_DEVICE_SET_IRQS_with_something_else_than_eventfds_is_refused() -> None:
    before = open_fds()
    read, write = os.pipe()
    with serving() as bench, Event() as event, open("/dev/null") as file:
        client = bench.ready()
        enable_msix(bench)
        client.set_irqs(FIRE, MSIX, fds=[event.fd])
        for other in (write, file.fileno()):
            assert ask(bench, FIRE, MSIX, 0, 2, fds=[event.fd, other]) == errno.EINVAL
        bench.vdev.ctx.irq(0).pulse()
        assert event.count() == 1, "what was there before stays"
    os.close(read)
    os.close(write)
    assert open_fds() == before


def test_an_eventfd_that_blocks_and_is_full_holds_nobody_up() -> None:
    full = os.eventfd((1 << 32) - 1, os.EFD_CLOEXEC)
    os.eventfd_write(full, (1 << 64) - 2 - ((1 << 32) - 1))
    with serving() as bench, Event() as event:
        client = bench.ready()
        enable_msix(bench)
        client.set_irqs(FIRE, MSIX, count=2, fds=[full, event.fd])
        for index in (0, 1):
            bench.vdev.ctx.irq(index).pulse()
        assert event.count() == 1
        client.set_irqs(NONE | TRIGGER, MSIX, count=2)
        assert event.count() == 1
    os.close(full)


def test_an_eventfd_that_does_not_block_and_is_full_loses_nothing_that_counts() -> None:
    with serving() as bench, Event() as event:
        os.eventfd_write(event.fd, (1 << 64) - 2)
        client = bench.ready()
        enable_msix(bench)
        client.set_irqs(FIRE, MSIX, fds=[event.fd])
        bench.vdev.ctx.irq(0).pulse()
        assert event.count() == (1 << 64) - 2


def test_when_the_client_goes_its_eventfds_are_closed_and_interrupts_reach_nobody() -> None:
    with serving() as bench, Event() as line, Event() as vector:
        client = bench.ready()
        before = len(open_fds())
        client.set_irqs(FIRE, INTX, fds=[line.fd])
        client.set_irqs(FIRE, MSIX, fds=[vector.fd])
        enable_msix(bench)
        client.close()
        assert bench.ended() is None
        bench.vdev.ctx.irq(0).pulse()
        bench.vdev.ctx.irq(0).set(True)
        assert (line.count(), vector.count()) == (0, 0)
        assert len(open_fds()) == before - 2, "both ends of the connection"


def test_DEVICE_RESET_clears_the_mask_and_what_is_pending_but_not_the_eventfds() -> None:
    class Quiet(Probe):
        def on_reset(self) -> None:
            super().on_reset()
            self.ctx.irq(0).set(False)

    with serving(Quiet) as bench, Event() as event:
        client = bench.ready()
        client.set_irqs(FIRE, INTX, fds=[event.fd])
        line = bench.vdev.ctx.irq(0)
        line.set(True)
        assert event.count() == 1
        client.reset()
        assert (event.count(), bench.vdev.resets) == (0, 1)
        line.set(True)
        assert event.count() == 1
