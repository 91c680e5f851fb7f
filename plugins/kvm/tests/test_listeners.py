"""Eventfds that KVM listens to: what of the kernel's table they use, with no kernel and no guest."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from qvm_kvm import listeners
from qvm_kvm.listeners import Listeners
from qvm_kvm.routes import Routes

ADDRESS = 0xFEE0_0000
PINS = 24


class FakeVm:
    """The kernel's side: ``attached`` is (GSI, resample) by eventfd, ``table`` the message's data by GSI."""

    def __init__(self) -> None:
        self.attached: dict[int, tuple[int, int]] = {}
        self.table: dict[int, int] = {}
        self.sets = 0
        self.errors: dict[str, int] = {}

    def _call(self, name: str) -> None:
        if name in self.errors:
            raise OSError(self.errors[name], os.strerror(self.errors[name]))

    def set_routes(self, routes: list[Any]) -> None:
        self._call("routes")
        self.table = {route.gsi: route.u.msi.data for route in routes}
        assert len(self.table) == len(routes), "two routes of one GSI"
        self.sets += 1

    def attach_irqfd(self, fd: int, gsi: int, resample: int = -1) -> None:
        self._call("attach")
        if fd in self.attached:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        self.attached[fd] = gsi, resample

    def detach_irqfd(self, fd: int, gsi: int) -> None:
        assert self.attached.pop(fd)[0] == gsi
        self._call("detach")

    def sends(self, fd: int) -> int:
        return self.table[self.attached[fd][0]]


def made(*, resample: bool = True) -> tuple[FakeVm, Listeners]:
    vm: Any = FakeVm()
    return vm, Listeners(vm, Routes(vm, [], PINS), resample=resample)


def stopper(stop: Callable[[], None] | None) -> Callable[[], None]:
    assert stop is not None
    return stop


def test_each_eventfd_is_its_message() -> None:
    vm, engine = made()
    for fd in range(10):
        assert engine.message(fd, ADDRESS, 0x40 + fd)
    assert [vm.sends(fd) for fd in range(10)] == list(range(0x40, 0x4A))
    assert (engine.count, engine.routes) == (10, 10)


def test_two_eventfds_of_one_message_are_two() -> None:
    vm, engine = made()
    first = stopper(engine.message(1, ADDRESS, 0x40))
    assert engine.message(2, ADDRESS, 0x40)
    first()
    assert vm.sends(2) == 0x40
    assert list(vm.attached) == [2]


def test_who_masks_and_unmasks_changes_no_route() -> None:
    vm, engine = made()
    stopper(engine.message(1, ADDRESS, 0x40))()
    sets = vm.sets
    for _ in range(1000):
        stopper(engine.message(1, ADDRESS, 0x40))()
    assert (vm.sets, engine.routes, vm.attached) == (sets, 1, {})


def test_a_guest_that_writes_new_messages_for_ever_uses_few_routes() -> None:
    """100,000 of them, on 8 vectors of which some are masked at any time."""
    vm, engine = made()
    stops: dict[int, Callable[[], None]] = {}
    random.seed(1)
    for number in range(100_000):
        fd = random.randrange(8)
        if fd in stops:
            stops.pop(fd)()
        if random.random() < 0.8:
            stops[fd] = stopper(engine.message(fd, ADDRESS, number))
            assert vm.sends(fd) == number
    assert engine.routes <= 8
    assert len(vm.table) <= 8


def test_the_table_has_an_end_and_what_is_given_back_serves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "MAX_MESSAGES", 4)
    vm, engine = made()
    stops = [stopper(engine.message(fd, ADDRESS, fd)) for fd in range(4)]
    assert engine.message(9, ADDRESS, 9) is None
    stops[2]()
    assert engine.message(9, ADDRESS, 9)
    assert vm.sends(9) == 9
    assert engine.message(10, ADDRESS, 2) is None


def test_a_stop_is_idempotent_and_never_stops_another_one() -> None:
    vm, engine = made()
    stop = stopper(engine.message(1, ADDRESS, 0x40))
    stop()
    engine.message(1, ADDRESS, 0x41)
    stop()
    assert vm.sends(1) == 0x41


@pytest.mark.parametrize("call", ["routes", "attach"])
def test_what_the_kernel_refuses_is_none_and_costs_nothing(call: str) -> None:
    vm, engine = made()
    vm.errors[call] = errno.ENOMEM
    for fd in range(1000):
        assert engine.message(fd, ADDRESS, fd) is None
    vm.errors.clear()
    assert engine.message(1, ADDRESS, 0x40)
    assert (vm.sends(1), engine.count) == (0x40, 1)
    assert engine.routes <= 1


def test_a_change_the_kernel_refuses_is_none() -> None:
    vm, engine = made()
    stopper(engine.message(1, ADDRESS, 0x40))()
    vm.errors["routes"] = errno.ENOMEM
    assert engine.message(1, ADDRESS, 0x41) is None
    assert engine.message(1, ADDRESS, 0x40), "the table still has that one"
    assert vm.sends(1) == 0x40


def test_a_kernel_that_does_not_let_go_is_said(caplog: pytest.LogCaptureFixture) -> None:
    vm, engine = made()
    stop = stopper(engine.message(1, ADDRESS, 0x40))
    vm.errors["detach"] = errno.EBADF
    stop()
    assert "KVM keeps an eventfd on GSI 24" in caplog.text


def test_a_line_needs_a_kernel_that_tells_when_it_was_served() -> None:
    vm, engine = made()
    stop = stopper(engine.line(1, 20, 2))
    assert vm.attached == {1: (20, 2)}
    assert engine.routes == 0
    stop()
    assert vm.attached == {}
    assert made(resample=False)[1].line(1, 20, 2) is None


def test_after_close_nothing_is_attached_and_nothing_can_be() -> None:
    vm, engine = made()
    stop = stopper(engine.message(1, ADDRESS, 0x40))
    engine.line(2, 20, 3)
    engine.close()
    engine.close()
    assert vm.attached == {}
    stop()
    assert engine.message(1, ADDRESS, 0x40) is None
    assert engine.line(2, 20, 3) is None
