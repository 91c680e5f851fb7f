"""A machine's life and end, with a scripted guest: every kind of end, isolation, nothing left."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pluggy
import pytest
from elftools.elf.elffile import ELFFile

from qvmcore.dump import write_dump
from qvmcore.engine import GuestConfig
from qvmcore.errors import EngineError, HostError
from qvmcore.hookspecs import hookimpl
from qvmcore.machine import Machine, Outcome
from qvmcore.memory import GuestMemory
from qvmcore.slot import VdevSlot
from qvmcore.termination import Phase, TerminationCallback
from qvmcore.testing.engine import ScriptedEngine, ScriptedGuest
from qvmcore.testing.host import FIRST_INTR, FIRST_LOC, STRIDE, machine
from qvmcore.types import GuestEnd, MemorySpec, MmioHandler, Reason, Window
from qvmcore.vdev import Vdev

ONES = 0xFFFFFFFF


class Probe(Vdev):
    """Remembers its life in ``ctx.log``-free lists, for the tests to read."""

    vdev_type = "probe"
    windows = (Window(0x100, access=frozenset({4})),)
    irqs = 1

    def __init__(self, ctx: object, options: object) -> None:
        super().__init__(ctx, options)  # type: ignore[arg-type]
        self.life: list[str] = []
        self.ends: list[GuestEnd] = []
        self.values: dict[int, int] = {}

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return self.values.get(offset, 0)

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        self.values[offset] = value
        self.ctx.irq().pulse()

    def on_configured(self) -> None:
        self.life.append("configured")
        for phase in (Phase.STOP_DMA, Phase.FLUSH):
            self.ctx.on_terminate(lambda end, p=phase: self.life.append(p.name), phase=phase)

    def on_starting(self) -> None:
        self.life.append("starting")

    def on_terminate(self, end: GuestEnd) -> None:
        self.life.append("terminate")
        self.ends.append(end)


class Other(Probe):
    vdev_type = "other"


FULL_LIFE = ["configured", "starting", "STOP_DMA", "FLUSH", "terminate"]


def probe(vm: Machine, index: int = 0) -> Probe:
    vdev = vm.slots[index].vdev
    assert isinstance(vdev, Probe)
    return vdev


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread, no descriptor and no signal handler survives a run."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
    }
    threads, fds = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) == fds
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def run(
    tmp_path: Path, script: Callable[[ScriptedGuest], None], *classes: type[Vdev], **more: object
) -> tuple[Outcome, Machine]:
    vm = machine(classes or (Probe,), ScriptedEngine(script), tmp_path, **more)  # type: ignore[arg-type]
    return vm.run(), vm


def send(number: signal.Signals) -> Callable[[ScriptedGuest], None]:
    def script(guest: ScriptedGuest) -> None:
        os.kill(os.getpid(), number)
        guest.wait()

    return script


@pytest.mark.parametrize(
    ("script", "reason", "code"),
    [
        (ScriptedGuest.power_off, Reason.GUEST_SHUTDOWN, 0),
        (ScriptedGuest.reset, Reason.GUEST_RESET, 0),
        (
            lambda guest: guest.config.on_end(GuestEnd(Reason.GUEST_CRASH, "triple fault")),
            Reason.GUEST_CRASH,
            7,
        ),
        (lambda guest: guest.config.on_end(GuestEnd(Reason.HOST_ERROR, "engine")), Reason.HOST_ERROR, 96),
        (send(signal.SIGQUIT), Reason.SIGQUIT, 3),
        (send(signal.SIGTERM), Reason.POWER_CUT, 3),
        (send(signal.SIGINT), Reason.POWER_CUT, 3),
        (send(signal.SIGHUP), Reason.POWER_CUT, 3),
    ],
    ids=["off", "reset", "crash", "engine", "SIGQUIT", "SIGTERM", "SIGINT", "SIGHUP"],
)
def test_every_kind_of_end_runs_the_whole_plan_once(
    tmp_path: Path, script: Callable[[ScriptedGuest], None], reason: Reason, code: int
) -> None:
    outcome, vm = run(tmp_path, script)
    assert (outcome.end.reason, outcome.code) == (reason, code)
    assert outcome.vcpus_stopped
    assert probe(vm).life == FULL_LIFE
    assert probe(vm).ends == [outcome.end]


def test_guest_accesses_reach_the_vdev_and_interrupts_the_guest(tmp_path: Path) -> None:
    seen: list[int] = []

    def script(guest: ScriptedGuest) -> None:
        guest.write32(FIRST_LOC + 8, 0x1234)
        seen.append(guest.read32(FIRST_LOC + 8))
        seen.append(guest.read32(0x3000_0000))
        seen.append(guest.irqs[FIRST_INTR].pulses)
        guest.power_off()

    run(tmp_path, script)
    assert seen == [0x1234, ONES, 1]


def test_unsupported_access_set_to_abort_ends_with_5(tmp_path: Path) -> None:
    outcome, _ = run(
        tmp_path, lambda guest: (guest.read32(0x3000_0000), guest.wait())[0], unsupported="abort"
    )
    assert outcome.code == 5
    assert "read of unmapped address 0x30000000" in outcome.end.message


class Raising(Probe):
    vdev_type = "raising"

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        raise RuntimeError("bug in the vdev")


def test_a_vdev_that_raises_is_isolated_logged_once_and_reads_all_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []

    def script(guest: ScriptedGuest) -> None:
        seen.extend(guest.read32(FIRST_LOC) for _ in range(3))
        guest.write32(FIRST_LOC + STRIDE, 5)
        seen.append(guest.read32(FIRST_LOC + STRIDE))
        guest.power_off()

    outcome, vm = run(tmp_path, script, Raising, Other)
    assert seen == [ONES, ONES, ONES, 5]
    assert outcome.code == 0
    records = [r for r in caplog.records if "bug in the vdev" in r.getMessage()]
    assert len(records) == 1
    assert "Traceback" in records[0].getMessage()
    assert probe(vm).life == FULL_LIFE
    assert probe(vm, 1).life == FULL_LIFE


def test_on_fault_shutdown_ends_with_6(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, lambda g: (g.read32(FIRST_LOC), g.wait())[0], Raising, on_fault="shutdown")
    assert (outcome.end.reason, outcome.code) == (Reason.VDEV_FATAL, 6)


class Misled(Probe):
    """Follows an address the guest gave."""

    vdev_type = "misled"

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        self.values[0] = self.ctx.memory.read(value, 4)[0]


def test_a_guest_error_is_no_fault_of_the_vdev_and_cannot_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []

    def script(guest: ScriptedGuest) -> None:
        for _ in range(1000):
            guest.write32(FIRST_LOC, 0xFFFF_FFF0)
        guest.write32(FIRST_LOC, 0x4000_0000)
        seen.append(guest.read32(FIRST_LOC))
        guest.power_off()

    _, vm = run(tmp_path, script, Misled)
    assert seen == [0]
    assert (vm.slots[0].faulted, vm.slots[0].guest_errors) == ("", 1000)
    assert len([r for r in caplog.records if "guest error" in r.getMessage()]) == 10


class Nonsense(Probe):
    vdev_type = "nonsense"

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return 1 << 70 | 7 if offset == 0 else "text"  # type: ignore[return-value]


def test_values_of_a_vdev_are_cut_to_the_access_and_other_things_are_faults(tmp_path: Path) -> None:
    seen: list[int] = []

    def script(guest: ScriptedGuest) -> None:
        seen.extend(guest.read32(FIRST_LOC + offset) for offset in (0, 4))
        guest.power_off()

    _, vm = run(tmp_path, script, Nonsense)
    assert seen == [7, ONES]
    assert vm.slots[0].faulted.startswith("TypeError")


class Hanging(Probe):
    vdev_type = "hanging"

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        while True:
            time.sleep(0.01)


def test_a_register_handler_that_hangs_is_interrupted_and_isolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvmcore.slot.HANDLER_PATIENCE", 0.05)
    monkeypatch.setattr("qvmcore.machine.WATCH_PERIOD", 0.05)
    seen: list[int] = []
    outcome, vm = run(
        tmp_path, lambda g: (seen.append(g.read32(FIRST_LOC)), g.power_off())[0], Hanging, Other
    )
    assert seen == [ONES]
    assert outcome.code == 0
    assert vm.slots[0].faulted.startswith("VdevHung")
    assert probe(vm, 1).life == FULL_LIFE


def read_and_power_off(seen: list[int]) -> Callable[[ScriptedGuest], None]:
    """Also when the read ends the vCPU's thread: the test must not wait for the guest for ever."""

    def script(guest: ScriptedGuest) -> None:
        try:
            seen.append(guest.read32(FIRST_LOC))
        finally:
            guest.power_off()

    return script


def test_the_report_of_a_hang_is_not_interrupted_however_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy host it takes longer than the patience that was short: the vCPU lives."""
    monkeypatch.setattr("qvmcore.slot.HANDLER_PATIENCE", 0.05)
    monkeypatch.setattr("qvmcore.machine.WATCH_PERIOD", 0.01)
    fault = VdevSlot.fault

    def slow(self: VdevSlot, error: BaseException) -> None:
        for _ in range(200):
            time.sleep(0.001)
        fault(self, error)

    monkeypatch.setattr(VdevSlot, "fault", slow)
    seen: list[int] = []
    outcome, vm = run(tmp_path, read_and_power_off(seen), Hanging, Other)
    assert seen == [ONES]
    assert outcome.code == 0
    assert vm.slots[0].faulted.startswith("VdevHung")


class Stubborn(Probe):
    vdev_type = "stubborn"

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        self.interrupts = 0
        while self.interrupts < 3:
            try:
                while True:
                    time.sleep(0.001)
            except Exception:
                self.interrupts += 1
        return 7


def test_a_handler_that_goes_on_after_an_interrupt_is_interrupted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvmcore.slot.HANDLER_PATIENCE", 0.05)
    monkeypatch.setattr("qvmcore.machine.WATCH_PERIOD", 0.01)
    seen: list[int] = []
    outcome, vm = run(tmp_path, read_and_power_off(seen), Stubborn, Other)
    assert seen == [7]
    assert outcome.code == 0
    assert vm.slots[0].faulted == ""


class Slow(Probe):
    vdev_type = "slow"
    ready = threading.Event()

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        self.ready.wait(20)
        return 7


def test_a_handler_that_ends_while_its_hang_is_reported_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is the vCPU, which would be hit instead."""
    monkeypatch.setattr("qvmcore.slot.HANDLER_PATIENCE", 0.05)
    monkeypatch.setattr("qvmcore.machine.WATCH_PERIOD", 0.01)
    Slow.ready.clear()
    out, told = threading.Event(), threading.Event()

    def report(_thread: int) -> str:
        Slow.ready.set()
        assert out.wait(20)
        told.set()
        return ""

    monkeypatch.setattr("qvmcore.slot.stack_of", report)
    seen: list[int] = []

    def script(guest: ScriptedGuest) -> None:
        try:
            seen.append(guest.read32(FIRST_LOC))
            out.set()
            for _ in range(200):
                time.sleep(0.001)
            seen.append(told.is_set())
        finally:
            guest.power_off()

    outcome, vm = run(tmp_path, script, Slow, Other)
    assert seen == [7, True]
    assert outcome.code == 0
    assert vm.slots[0].faulted == ""


class BusyWorker(Probe):
    vdev_type = "busy"
    release = threading.Event()

    def on_starting(self) -> None:
        self.ctx.worker.call(lambda: self.release.wait(20))


def test_a_worker_that_hangs_neither_blocks_a_register_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvmcore.slot.LOCK_PATIENCE", 0.05)
    monkeypatch.setattr("qvmcore.slot.END_DEADLINE", 0.1)
    BusyWorker.release.clear()
    seen: list[int] = []

    def script(guest: ScriptedGuest) -> None:
        time.sleep(0.05)
        seen.append(guest.read32(FIRST_LOC))
        guest.power_off()

    vm = machine((BusyWorker, Other), ScriptedEngine(script), tmp_path)
    outcome = vm.run()
    BusyWorker.release.set()
    vm._memory.close()  # kept mapped for the thread left behind
    assert seen == [ONES]
    verdicts = {(s.name, s.phase): s.verdict for s in outcome.steps}
    assert verdicts["busy", Phase.STOP_WORKERS] == "failed"
    assert verdicts["other", Phase.STOP_WORKERS] == "ok"
    assert probe(vm, 1).life == FULL_LIFE


class Fatal(Probe):
    vdev_type = "fatal"

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        self.ctx.request_shutdown("asked by the guest", code=value)


@pytest.mark.parametrize("code", [0, 3, 6, 32, 63])
def test_a_vdev_may_end_the_vm_with_its_own_code(tmp_path: Path, code: int) -> None:
    outcome, _ = run(tmp_path, lambda g: (g.write32(FIRST_LOC, code), g.wait())[0], Fatal)
    assert outcome.code == code
    assert outcome.end.message == "fatal: asked by the guest"


@pytest.mark.parametrize("code", [1, 31, 64])
def test_a_vdev_cannot_take_another_exit_code(tmp_path: Path, code: int) -> None:
    _, vm = run(tmp_path, lambda g: (g.write32(FIRST_LOC, code), g.power_off())[0], Fatal)
    assert vm.slots[0].faulted == f"ValueError: exit code {code}: a vdev may choose 0, 3, 6, or 32 to 63"


class Button(Probe):
    """A guest with this device powers off when the button is pressed."""

    vdev_type = "button"
    pressed: threading.Event

    def on_configured(self) -> None:
        self.pressed = threading.Event()

    def on_button(self) -> bool:
        self.pressed.set()
        return True


def test_sigterm_presses_the_button_and_a_guest_that_listens_ends_with_0(tmp_path: Path) -> None:
    def script(guest: ScriptedGuest) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        vdev = vm.slots[0].vdev
        assert isinstance(vdev, Button)
        assert vdev.pressed.wait(10)
        guest.power_off()

    vm = machine((Button,), ScriptedEngine(script), tmp_path)
    assert vm.run().end.reason is Reason.GUEST_SHUTDOWN


def test_a_second_sigterm_cuts_the_power(tmp_path: Path) -> None:
    def script(guest: ScriptedGuest) -> None:
        vdev = vm.slots[0].vdev
        assert isinstance(vdev, Button)
        os.kill(os.getpid(), signal.SIGTERM)
        assert vdev.pressed.wait(10)
        os.kill(os.getpid(), signal.SIGTERM)
        guest.wait()

    vm = machine((Button,), ScriptedEngine(script), tmp_path)
    end = vm.run().end
    assert (end.reason, end.message) == (Reason.POWER_CUT, "power cut by a second SIGTERM")


def test_a_guest_that_ignores_the_button_is_cut_after_the_time_out(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, send(signal.SIGTERM), Button, shutdown_timeout=0.05)
    assert (outcome.end.reason, outcome.code) == (Reason.POWER_CUT, 3)
    assert "did not power off within 0.05 s" in outcome.end.message


class HangingButton(Probe):
    vdev_type = "hangbutton"

    def on_button(self) -> bool:
        time.sleep(0.5)
        return True


def test_a_hanging_on_button_does_not_stop_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvmcore.button.PATIENCE", 0.02)
    outcome, _ = run(tmp_path, send(signal.SIGTERM), HangingButton)
    assert outcome.end.reason is Reason.POWER_CUT


class RefusesConfigured(Probe):
    vdev_type = "refuses"

    def on_configured(self) -> None:
        super().on_configured()
        raise HostError("cannot open the disk")


class RefusesStarting(Probe):
    vdev_type = "refuses"

    def on_starting(self) -> None:
        raise HostError("cannot open the disk")


@pytest.mark.parametrize("cls", [RefusesConfigured, RefusesStarting])
def test_a_failed_start_releases_what_was_opened(tmp_path: Path, cls: type[Probe]) -> None:
    engine = ScriptedEngine(ScriptedGuest.power_off)
    vm = machine((Probe, cls, Other), engine, tmp_path)
    with pytest.raises(HostError, match="cannot open the disk"):
        vm.run()
    assert not vm.started
    assert probe(vm).life[-1] == "terminate"
    assert probe(vm, 1).life[-1] == "terminate"
    assert engine.guest is not None
    assert engine.guest.closed


class NoGuest(ScriptedEngine):
    """Cannot build a guest."""

    def create_guest(self, config: GuestConfig) -> ScriptedGuest:
        raise EngineError("no virtual CPU is left")


def test_an_engine_that_cannot_build_a_guest_leaves_nothing_open(tmp_path: Path) -> None:
    """Descriptors are counted by the fixture: that of guest memory is among them."""
    vm = machine((Probe,), NoGuest(ScriptedGuest.power_off), tmp_path)
    with pytest.raises(EngineError, match="no virtual CPU is left"):
        vm.run()
    assert not vm.started
    (region,) = vm._memory.regions
    assert region.fd == -1
    assert probe(vm).life == []


class BadEnd(Probe):
    vdev_type = "badend"

    def on_terminate(self, end: GuestEnd) -> None:
        raise RuntimeError("cannot end")


def test_an_exception_in_on_terminate_is_reported_and_others_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome, vm = run(tmp_path, ScriptedGuest.power_off, Other, BadEnd)
    assert probe(vm).life == FULL_LIFE
    assert [s.name for s in outcome.steps if s.verdict == "failed"] == ["badend"]
    assert "cannot end" in caplog.text


def test_a_vcpu_that_does_not_stop_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvmcore.machine.VCPU_STOP_TIMEOUT", 0.05)
    release = threading.Event()

    def script(guest: ScriptedGuest) -> None:
        guest.power_off()
        release.wait(20)

    engine = ScriptedEngine(script)
    vm = machine((Probe,), engine, tmp_path)
    outcome = vm.run()
    assert not outcome.vcpus_stopped
    assert probe(vm).life == FULL_LIFE
    assert engine.guest is not None
    assert not engine.guest.closed  # its thread still uses it
    release.set()
    vm._memory.close()


def test_hooks_observe_inject_and_add_steps(tmp_path: Path) -> None:
    calls: list[str] = []

    class Observer:
        @hookimpl(wrapper=True)
        def qvm_bind_mmio(self, vdev: Vdev, index: int) -> Iterator[None]:
            handler: MmioHandler = yield  # type: ignore[assignment]
            calls.append(f"bound {vdev.vdev_type}[{index}]")
            return MmioHandler(lambda o, s: handler.read(o, s) + 1, handler.write)  # type: ignore[return-value]

        @hookimpl
        def qvm_termination_callbacks(self, machine: Machine) -> list[TerminationCallback]:
            return [
                TerminationCallback("observer", Phase.STOP_DMA, lambda end: calls.append(end.reason.label))
            ]

    seen: list[int] = []
    run(tmp_path, lambda g: (seen.append(g.read32(FIRST_LOC)), g.power_off())[0], plugins=[Observer()])
    assert seen == [1]
    assert calls == ["bound probe[0]", "guest-shutdown"]


def test_a_misspelt_hook_is_refused(tmp_path: Path) -> None:
    class Misspelt:
        @hookimpl
        def qvm_bind_mimo(self) -> None:
            """Never called."""

    with pytest.raises(pluggy.PluginValidationError, match="unknown hook"):
        machine((Probe,), ScriptedEngine(ScriptedGuest.power_off), tmp_path, plugins=[Misspelt()])


def test_no_thread_before_on_configured(tmp_path: Path) -> None:
    class Early(Probe):
        vdev_type = "early"

        def __init__(self, ctx: object, options: object) -> None:
            super().__init__(ctx, options)
            self.ctx.worker  # noqa: B018

    with pytest.raises(RuntimeError, match="allowed from on_configured"):
        machine((Early,), ScriptedEngine(ScriptedGuest.power_off), tmp_path)


def test_sigusr1_logs_the_status_and_the_vm_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class BadStatus(Probe):
        vdev_type = "badstatus"

        def status(self) -> dict[str, object]:
            raise RuntimeError("no status")

    logged = threading.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "badstatus" in record.getMessage():
                logged.set()

    def script(guest: ScriptedGuest) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert logged.wait(10)
        guest.power_off()

    watch = Watch()
    logger = logging.getLogger("qvm")
    logger.addHandler(watch)
    caplog.set_level(logging.INFO, "qvm")
    outcome, _ = run(tmp_path, script, Probe, BadStatus)
    logger.removeHandler(watch)
    assert outcome.code == 0
    assert "status() raised RuntimeError: no status" in caplog.text


def test_sigusr2_writes_an_elf_core_and_the_vm_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def script(guest: ScriptedGuest) -> None:
        guest.config.memory.write(0x4010_0000, b"guest memory")
        os.kill(os.getpid(), signal.SIGUSR2)
        while guest.pauses < 1 or not list(tmp_path.glob("*.gcore")):
            time.sleep(0.01)
        guest.power_off()

    caplog.set_level(logging.INFO, "qvm")
    outcome, _ = run(tmp_path, script, dump_dir=tmp_path)
    assert outcome.code == 0
    (core,) = tmp_path.glob("test-????????-??????.gcore")
    assert f"guest dump in {core}" in caplog.text
    assert core.stat().st_mode & 0o777 == 0o600
    assert core.stat().st_blocks * 512 < 1 << 20  # 8 MiB of RAM, nearly all of it holes
    with core.open("rb") as file:
        elf = ELFFile(file)
        assert (elf["e_type"], elf["e_machine"]) == ("ET_CORE", "EM_AARCH64")
        (load,) = (s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD")
        assert (load["p_paddr"], load["p_filesz"]) == (0x4000_0000, 8 << 20)
        assert load.data()[0x10_0000:][:12] == b"guest memory"
        (notes,) = (s for s in elf.iter_segments() if s["p_type"] == "PT_NOTE")
        (note,) = notes.iter_notes()
        assert (note["n_name"], note["n_type"]) == ("CORE", "NT_PRSTATUS")
        status = note["n_descdata"]
        assert (len(status), status[112:120]) == (392, (0x1234).to_bytes(8, "little"))
        assert status[112 + 8 * 32 :][:8] == (0x4000_0000).to_bytes(8, "little")


def crash(guest: ScriptedGuest) -> None:
    guest.config.on_end(GuestEnd(Reason.GUEST_CRASH, "triple fault"))


def test_a_crash_leaves_a_dump_where_the_vm_file_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "dumps"
    folder.mkdir()
    outcome, _ = run(tmp_path, crash, dump_dir=folder)
    (core,) = folder.iterdir()
    assert outcome.code == 7
    assert f"crash: guest dump in {core}" in caplog.text
    with core.open("rb") as file:
        assert ELFFile(file)["e_type"] == "ET_CORE"


def test_a_crash_says_how_to_get_a_dump_of_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert run(tmp_path, crash)[0].code == 7
    assert 'write dump = "DIRECTORY" under [system]' in caplog.text
    assert not list(tmp_path.glob("*.gcore"))


def test_a_crash_that_cannot_be_dumped_ends_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome, _ = run(tmp_path, crash, dump_dir=tmp_path / "absent")
    assert outcome.code == 7
    assert "crash: cannot write the guest dump" in caplog.text


def test_a_dump_that_cannot_be_written_is_told_and_the_vm_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def script(guest: ScriptedGuest) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        while "cannot write the guest dump" not in caplog.text:
            time.sleep(0.01)
        guest.power_off()

    outcome, _ = run(tmp_path, script, dump_dir=tmp_path / "absent")
    assert outcome.code == 0
    assert "No such file or directory" in caplog.text


def test_dumps_of_one_second_take_alternate_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvmcore.dump.time.strftime", lambda text: "20261122-120000")
    memory = GuestMemory.allocate([MemorySpec(0, 1 << 16)])
    names = [write_dump(tmp_path, "vm", "aarch64", memory, [{}]).name for _ in range(10)]
    assert names[:2] == ["vm-20261122-120000.gcore", "vm-20261122-120000-1.gcore"]
    assert names[9] == "vm-20261122-120000-9.gcore"
    with pytest.raises(HostError, match="alternates exist"):
        write_dump(tmp_path, "vm", "aarch64", memory, [{}])
    memory.close()
