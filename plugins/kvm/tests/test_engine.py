"""The engine's life with guests: errors of creation, nothing left behind, two at once, written pages."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from qvm_kvm import guest as guest_module
from qvm_kvm import kick, qvm_engines
from qvm_kvm.engine import KvmEngine
from qvm_kvm.system import KvmSystem
from qvm_kvm.vcpu import Vcpu
from qvm_kvm.vm import Vm
from qvm_kvm.x86 import cpuid
from qvm_kvm.x86.backend import X86Backend

from plugins.kvm.tests.kvm_bench import Bench, descriptors
from qvmcore.api import Controller, CpuEntry, EngineError, IntrSpec, MemorySpec

#: Counts at 0x8000.
COUNTING = """
10000 31c0  xor %eax,%eax
10002 48ffc0  inc %rax
10005 4889042500800000  mov %rax,0x8000
1000d ebf3  jmp 0x10002
"""

#: Waits for 0x8000, then writes to the pages 0x20000, 0x23000 and 0xff000.
WRITING = """
10000 f390  pause
10002 803c250080000000  cmpb $0x0,0x8000
1000a 74f4  je 0x10000
1000c c604250000020001  movb $0x1,0x20000
10014 c60425ff3f020001  movb $0x1,0x23fff
1001c c6042500f00f0001  movb $0x1,0xff000
10024 e6e9  out %al,$0xe9
10026 ebfe  jmp 0x10026
"""


def vcpu_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("qvm-vcpu")]


def test_is_offered_under_its_name() -> None:
    assert [(engine.name, engine.native) for engine in qvm_engines()] == [("kvm", True)]


def test_two_hundred_guests_leave_nothing_behind(kvm: None) -> None:
    def once() -> None:
        bench = Bench(cpus=2)
        bench.guest.irq_line(IntrSpec("ioapic", 5)).pulse()
        bench.guest.signal_msi(0xFEE00000, 0x40)
        bench.start(COUNTING)
        bench.close()
        assert bench.ends == []

    once()
    before = descriptors()
    for _ in range(200):
        once()
    assert descriptors() == before
    assert vcpu_threads() == []
    assert kick._users == 0


def test_two_vms_in_one_process(make_bench: Callable[..., Bench]) -> None:
    first, second = make_bench(), make_bench(cpus=2)
    first.start(COUNTING)
    second.start(COUNTING)
    assert first.wait(lambda: first.word() > 100 and second.word() > 100)
    assert first.guest.pause(20)
    held, going = first.word(), second.word()
    assert second.wait(lambda: second.word() > going)
    assert first.word() == held
    first.close()
    going = second.word()
    assert second.wait(lambda: second.word() > going)
    assert second.guest.pause(20)  # the kick signal is still there


def test_a_guest_starts_once(bench: Bench) -> None:
    bench.start(COUNTING)
    with pytest.raises(EngineError, match="was started already"):
        bench.guest.start(CpuEntry(0x10000, {}, "real16"))


def test_a_guest_that_never_started_can_be_asked_stopped_and_closed(bench: Bench) -> None:
    assert bench.guest.registers()[0]["rip"] == 0xFFF0
    assert bench.guest.pause(1)
    bench.guest.resume()
    assert bench.guest.status()["running"] is False
    assert bench.guest.stop(0)
    bench.guest.close()
    bench.guest.close()
    with pytest.raises(EngineError, match="started already"):
        bench.guest.start(CpuEntry(0x10000, {}, "real16"))


def test_stop_before_start_keeps_the_guest_still(bench: Bench) -> None:
    assert bench.guest.stop(1)
    bench.start(COUNTING)
    assert bench.guest.stop(20)
    assert bench.word() == 0
    assert bench.ends == []


def test_registers_survive_the_close(bench: Bench) -> None:
    bench.start(COUNTING)
    assert bench.wait(lambda: bench.word() > 0)
    bench.guest.close()
    (registers,) = bench.guest.registers()
    assert registers["rax"] - bench.word() in (0, 1)
    assert bench.guest.status()["running"] is False


def test_more_cpus_than_kvm_allows(kvm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvmSystem, "max_vcpus", 3)
    with pytest.raises(EngineError, match="the guest has 4 CPUs, KVM here allows 3; lower cpus"):
        Bench(cpus=4)


def test_more_cpus_than_an_apic_can_name(kvm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvmSystem, "max_vcpus", 4096)
    with pytest.raises(EngineError, match="an x86 guest has at most 255 CPUs, not 256; lower cpus"):
        Bench(cpus=256)


def test_addresses_wider_than_the_host(kvm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpuid, "physical_bits", lambda _leaves: 36)
    with pytest.raises(EngineError, match="needs physical addresses of 39 bits, this host's CPU has 36"):
        Bench()


def test_a_controller_kvm_does_not_have(bench: Bench) -> None:
    for controller, text in (
        (Controller("gicv2", "gic", ((0x8000000, 0x10000),), range(32, 64)), "gicv2 at 0x8000000"),
        (Controller("ioapic", "ioapic", ((0xFEC10000, 0x1000),), range(1, 24)), "ioapic at 0xfec10000"),
    ):
        with pytest.raises(EngineError, match=f"KVM has no interrupt controller {text}; it has ioapic at"):
            KvmEngine().create_guest(replace(bench.config(), controllers=(controller,)))


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (0xFEC00000, "fec00000, 0xfec01000"),
        (0xFEEFF000, "fee00000, 0xfef00000"),
        (0xFFFBF000, "fffbc000, 0xfffc0000"),
    ],
)
def test_memory_over_what_kvm_needs_is_refused(kvm: None, start: int, what: str) -> None:
    with pytest.raises(EngineError, match=rf"memory \[{start:#x}, .*\) covers \[0x{what}\)"):
        Bench(specs=(MemorySpec(0, 0x200000), MemorySpec(start, 0x1000)))


def test_memory_kvm_refuses(kvm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vm, "_map", _fail)
    with pytest.raises(
        EngineError, match="KVM refuses memory at 0x0, 0x200000 bytes: Cannot allocate memory"
    ):
        Bench()


def _fail(*_args: object) -> Any:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (Vm, "create_vcpu"),
        (Vm, "set_routes"),
        (Vm, "add_memory"),
        (X86Backend, "prepare_vm"),
        (X86Backend, "prepare_vcpu"),
        (guest_module.kick, "acquire"),
    ],
)
def test_a_half_made_guest_is_given_back(
    kvm: None, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> None:
    Bench().close()
    before, users = descriptors(), kick._users
    with monkeypatch.context() as patch:
        patch.setattr(place, name, _fail)
        with pytest.raises(EngineError, match="Cannot allocate memory"):
            Bench()
    assert descriptors() == before
    assert kick._users == users


def test_the_second_vcpus_failure_gives_back_the_first(kvm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Bench().close()
    before = descriptors()
    real = Vm.create_vcpu
    monkeypatch.setattr(Vm, "create_vcpu", lambda vm, index: _fail() if index else real(vm, index))
    with pytest.raises(EngineError, match="KVM cannot build the guest: Cannot allocate memory"):
        Bench(cpus=2)
    assert descriptors() == before


def test_a_thread_that_cannot_start_stops_those_that_did(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(cpus=3)
    real = Vcpu.start

    def start(vcpu: Vcpu, *rest: Any) -> None:
        if vcpu.index == 2:
            raise RuntimeError("can't start new thread")
        real(vcpu, *rest)

    monkeypatch.setattr(Vcpu, "start", start)
    with pytest.raises(EngineError, match="the guest cannot be started: can't start new thread"):
        bench.start(COUNTING)
    assert vcpu_threads() == []
    assert bench.ends == []


def test_a_vm_whose_vcpu_hangs_is_not_freed_under_it(bench: Bench, caplog: Any) -> None:
    bench.start(COUNTING)
    try:
        bench.guest.stop = lambda _timeout: False
        bench.guest.close()
    finally:
        del bench.guest.stop
    assert "a vCPU does not stop; its VM stays until this process ends" in caplog.text
    assert bench.guest.pause(20)  # it is all still there


def test_pages_the_guest_writes(bench: Bench) -> None:
    low, rom, high = bench.memory.regions
    with pytest.raises(EngineError, match="not being recorded"):
        bench.guest.dirty_pages(low)
    bench.guest.log_dirty_pages()
    bench.start(WRITING)
    bench.guest.dirty_pages(low)  # what comes before the loop: accessed bits of the page tables
    assert bench.wait(lambda: bench.guest.dirty_pages(low) == [])
    bench.memory.write(0x8000, b"\1")  # a device's write: not the guest's
    assert bench.done.wait(20)
    found = bench.guest.dirty_pages(low)
    assert [page for page in found if page >= 0x8000] == [0x20000, 0x23000, 0xFF000]
    assert bench.guest.dirty_pages(low) == []
    assert bench.guest.dirty_pages(high) == []
    with pytest.raises(EngineError, match="0x200000 is not the start of a writable region"):
        bench.guest.dirty_pages(rom)
    bench.guest.log_dirty_pages(False)
    with pytest.raises(EngineError, match="not being recorded"):
        bench.guest.dirty_pages(low)
    bench.guest.close()
    with pytest.raises(EngineError, match="the guest is closed"):
        bench.guest.log_dirty_pages()


def test_the_kick_is_a_free_real_time_signal_and_given_back(kvm: None) -> None:
    assert kick._users == 0
    taken = signal.SIGRTMIN
    old = signal.signal(taken, lambda _number, _frame: None)
    try:
        bench = Bench()
        assert bench.guest._signal == signal.SIGRTMIN + 1
        assert kick._sigaction(signal.SIGRTMIN + 1, None).handler
        bench.close()
        assert not kick._sigaction(signal.SIGRTMIN + 1, None).handler
    finally:
        signal.signal(taken, old)


def test_no_free_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kick, "_sigaction", lambda _number, _new: kick._SigAction(handler=1))
    with pytest.raises(EngineError, match="every real-time signal of this process is in use"):
        kick.acquire()
    assert kick._users == 0
