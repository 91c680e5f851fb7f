"""Whole machines from VM files on KVM: how they end when a vdev or the guest misbehaves (exit codes)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from plugins.kvm.tests.conftest import usable
from plugins.kvm.tests.guests.asm import assemble
from qvmcore.api import NoOptions, Reason, Vdev, VdevContext, Window
from qvmcore.compose import compose
from qvmcore.machine import Machine, Outcome
from qvmcore.plugins import PluginHost

ORIGIN = 0x10_0000
DEVICE = 0xC000_0000
#: A stack, and a second CPU that counts in real mode for ever.
START = """
        movl    $0x200000, %esp
        movl    $0x900006ff, 0x8000             # incw 0x9000
        movw    $0xfaeb, 0x8004                 # jmp back
        poke    0xfee00310, 0x1000000
        poke    0xfee00300, 0x4500
        poke    0xfee00310, 0x1000000
        poke    0xfee00300, 0x4608
9:      cmpw    $0, 0x9000
        je      9b
        movl    $0xc0000000, %ebx
"""
POWER_OFF = "movw $0x604, %dx; movw $0x3400, %ax; outw %ax, %dx; 7: hlt; jmp 7b"
RESET = "movw $0x60c, %dx; movb $1, %al; outb %al, %dx; 7: hlt; jmp 7b"
SPIN = "8: incl 0x300000; jmp 8b"
FILE = """
[system]
name = "freestanding"
board = "x86_64-pc"
engine = "kvm"
ram = "16M"
cpus = 2
{system}
[load]
kernel = "guest.bin"
format = "raw"
address = 0x100000
mode = "long64"
[[vdev]]
type = "ser8250"
name = "uart0"
hostdev = "null"
"""
TABLE = '[[vdev]]\ntype = "odd"\nloc = 0xc0000000\nintr = "{intr}"\non-fault = "{on_fault}"\n'


@pytest.fixture(autouse=True)
def needs_kvm() -> None:
    reason = usable()
    if reason:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def nothing_is_left(needs_kvm: None) -> Iterator[None]:
    """No thread, no descriptor."""
    threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors


class Odd(Vdev):
    """Logs its accesses; a subclass misbehaves in :meth:`act`."""

    vdev_type = "odd"
    Options = NoOptions
    windows = (Window(0x1000),)
    irqs = 1

    def __init__(self, ctx: VdevContext, options: NoOptions) -> None:
        super().__init__(ctx, options)
        self.log: list[tuple[int, int]] = []

    def act(self) -> None:
        """What a store to 0x10 does."""

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return 0x1234

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        self.log.append((offset, value))
        if offset == 0x10:
            self.act()


class Host(PluginHost):
    """What is installed, and one vdev of the test."""

    def __init__(self, odd: type[Odd]) -> None:
        super().__init__()
        self._odd = odd

    def vdev_class(self, vdev_type: str) -> type[Vdev]:
        return self._odd if vdev_type == "odd" else super().vdev_class(vdev_type)


def vm_file(folder: Path, text: str, *, system: str = "", vdevs: str = "") -> Path:
    """A VM file whose guest is ``text``."""
    (folder / "guest.bin").write_bytes(assemble(START + text, "long64", ORIGIN).code)
    path = folder / "vm.toml"
    path.write_text(FILE.format(system=system) + vdevs)
    return path


def run(
    folder: Path, odd: type[Odd], text: str, *, on_fault: str = "isolate", intr: str = "ioapic:5"
) -> tuple[Outcome, Machine]:
    """Run it in this process."""
    host = Host(odd)
    path = vm_file(folder, text, vdevs=TABLE.format(on_fault=on_fault, intr=intr))
    machine = Machine.build(compose([path], (), host), host)
    return machine.run(), machine


def odd_of(machine: Machine) -> tuple[Odd, str]:
    """The vdev of the test and its fault."""
    (slot,) = [slot for slot in machine.slots if slot.spec.type == "odd"]
    assert isinstance(slot.vdev, Odd)
    return slot.vdev, slot.faulted


def qvm(path: Path) -> subprocess.Popen[str]:
    """``qvm run``."""
    command = [sys.executable, "-m", "qvmcore", "run", str(path)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said."""
    try:
        _, text = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return process.returncode, text


# ---- vdevs --------------------------------------------------------------------------------------


class Raises(Odd):
    def act(self) -> None:
        raise RuntimeError("as broken as can be")


def test_a_vdev_that_raises_is_isolated_and_the_guest_powers_off(tmp_path: Path) -> None:
    """Its registers read all ones from then on."""
    text = f"""
        movl    (%rbx), %eax
        movl    %eax, 0x14(%rbx)
        movl    $1, 0x10(%rbx)
        movl    $2, 0x18(%rbx)                  # nobody hears this
        movl    (%rbx), %eax
        incl    %eax
        jnz     .
        {POWER_OFF}
"""
    outcome, machine = run(tmp_path, Raises, text)
    vdev, fault = odd_of(machine)
    assert (outcome.end.reason, outcome.code) == (Reason.GUEST_SHUTDOWN, 0)
    assert vdev.log == [(0x14, 0x1234), (0x10, 1)]
    assert "as broken as can be" in fault
    assert outcome.vcpus_stopped


def test_a_vdev_that_raises_ends_the_vm_with_6_when_told_so(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, Raises, f"movl $1, 0x10(%rbx); {SPIN}", on_fault="shutdown")
    assert (outcome.end.reason, outcome.code) == (Reason.VDEV_FATAL, 6)
    assert "as broken as can be" in outcome.end.message
    assert outcome.vcpus_stopped


class Hangs(Odd):
    def act(self) -> None:
        while True:
            time.sleep(0.01)


def test_a_vdev_that_hangs_is_interrupted_and_the_guest_powers_off(tmp_path: Path) -> None:
    outcome, machine = run(tmp_path, Hangs, f"movl $1, 0x10(%rbx); {POWER_OFF}")
    assert (outcome.end.reason, outcome.code) == (Reason.GUEST_SHUTDOWN, 0)
    assert odd_of(machine)[1]
    assert outcome.vcpus_stopped


class Ends(Odd):
    code = 6

    def act(self) -> None:
        self.ctx.request_shutdown("enough", code=self.code)


class EndsByWorker(Ends):
    code = 42

    def act(self) -> None:
        self.ctx.worker.call(super().act)


@pytest.mark.parametrize("odd", [Ends, EndsByWorker])
def test_a_vdev_ends_the_vm_while_both_cpus_compute(tmp_path: Path, odd: type[Ends]) -> None:
    """From a register handler, and from its worker; 6 or a code of its own."""
    outcome, _ = run(tmp_path, odd, f"movl $1, 0x10(%rbx); {SPIN}")
    assert outcome.code == odd.code
    assert "enough" in outcome.end.message
    assert outcome.vcpus_stopped
    assert [step for step in outcome.steps if step.verdict != "ok"] == []


class Interrupts(Odd):
    def act(self) -> None:
        self.ctx.worker.call(self.ctx.irq().pulse)


@pytest.mark.parametrize("intr", ["ioapic:5", "ioapic:20", "apic:0x45"])
def test_the_interrupt_of_a_vdev_reaches_the_guest(tmp_path: Path, intr: str) -> None:
    """By its name in the VM file; 50 times, each asked for by the one before."""
    pin = "" if intr.startswith("apic") else f"pin {intr.partition(':')[2]}, 0x45"
    text = f"""
        pics_off
        idt
        gate    0x45, h
        {pin}
        apic_on
        sti
        movl    $1, 0x10(%rbx)
1:      hlt
        jmp     1b
h:      incl    0x300000
        eoi
        cmpl    $50, 0x300000
        je      2f
        movl    $1, 0x10(%rbx)
        iretq
2:      {POWER_OFF}
"""
    outcome, machine = run(tmp_path, Interrupts, text, intr=intr)
    assert (outcome.end.reason, outcome.code) == (Reason.GUEST_SHUTDOWN, 0)
    assert odd_of(machine)[0].log == [(0x10, 1)] * 50


def test_one_process_runs_one_vm_after_the_other(tmp_path: Path) -> None:
    for _ in range(5):
        outcome, _ = run(tmp_path, Odd, RESET)
        assert (outcome.end.reason, outcome.code) == (Reason.GUEST_RESET, 0)


# ---- qvm run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "system", "code", "words"),
    [
        (POWER_OFF, "", 0, "guest-shutdown"),
        (RESET, "", 0, "guest-reset"),
        ("lidt 1f; ud2; 1: .word 0; .quad 0", "", 7, "triple fault (vCPU 0"),
        (f"movl $1, (%rbx); {SPIN}", 'unsupported = "abort"', 5, "0xc0000000"),
        (f"movl (%rbx), %eax; incl %eax; jnz .; {POWER_OFF}", "", 0, "guest-shutdown"),
        ("fildl (%rbx)", "", 96, "KVM internal error"),
    ],
    ids=["off", "reset", "triple fault", "abort", "ignore", "internal error"],
)
def test_exit_codes(tmp_path: Path, text: str, system: str, code: int, words: str) -> None:
    found, said = ended(qvm(vm_file(tmp_path, text, system=system)))
    assert (found, words in said) == (code, True), said
    assert "Traceback" not in said


@pytest.mark.parametrize("text", [SPIN, "cli; 8: hlt; jmp 8b"], ids=["computes", "sleeps"])
@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGTERM])
def test_a_signal_cuts_the_power_of_a_guest_that_does_not_listen(
    tmp_path: Path, text: str, number: signal.Signals
) -> None:
    """3, whatever the guest does; nothing in it has enabled the button."""
    says = "movw $0x3f8, %dx; movb $0x52, %al; outb %al, %dx"
    path = vm_file(tmp_path, f"{says}; {text}")
    path.write_text(path.read_text().replace('"null"', '">said"'))
    process = qvm(path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "said").exists() or (tmp_path / "said").read_bytes() != b"R":
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    code, said = ended(process)
    assert code == 3, said
