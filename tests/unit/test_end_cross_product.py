"""Every kind of end, with a vdev that misbehaves at every step of its life: the others do not notice.

The product is computed below and counted; each combination is one whole life of a machine with a console
on a terminal and three vdevs, the second of which raises, hangs, or is late, at one place. Deaths of the
process itself are in ``plugins/quiesce/tests/test_end_by_death.py``.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import termios
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from qvm_chardev.stdio import Stdio
from qvm_primecell.pl011 import Pl011

from qvmcore.machine import Machine
from qvmcore.rundir import base as run_folder
from qvmcore.termination import Phase
from qvmcore.testing.engine import ScriptedEngine, ScriptedGuest
from qvmcore.testing.host import FIRST_LOC, STRIDE, machine
from qvmcore.types import GuestEnd, Reason, Window
from qvmcore.vdev import Vdev

#: Where the three plain vdevs are: behind the console.
PLAIN = FIRST_LOC + STRIDE
MODES = ("raise", "hang", "late")
#: Seconds a callback that hangs is waited for, and others, which only a very busy host makes so late.
SHORT, PATIENT = 0.05, 10.0
#: Seconds one life may take on a busy host, whatever hangs in it: a hang itself lasts much longer.
LIMIT, HANG = 20.0, 120.0
PHASES = (Phase.STOP_DMA, Phase.MASK_IRQ, Phase.STOP_WORKERS, Phase.FLUSH, Phase.RELEASE)
LIFE = ["configured", "starting", *(phase.name for phase in PHASES), "terminate"]


def send(number: signal.Signals) -> Callable[[ScriptedGuest], None]:
    def script(guest: ScriptedGuest) -> None:
        os.kill(os.getpid(), number)

    return script


def ends_by(reason: Reason) -> Callable[[ScriptedGuest], None]:
    return lambda guest: guest.config.on_end(GuestEnd(reason, "said the engine"))


#: Kind of end -> what the guest does, and the reason it must have. The last vdev is the fatal one.
ENDS: dict[str, tuple[Callable[[ScriptedGuest], None], Reason]] = {
    "off": (ScriptedGuest.power_off, Reason.GUEST_SHUTDOWN),
    "reboot": (ScriptedGuest.reset, Reason.GUEST_RESET),
    "crash": (ends_by(Reason.GUEST_CRASH), Reason.GUEST_CRASH),
    "engine": (ends_by(Reason.HOST_ERROR), Reason.HOST_ERROR),
    "SIGTERM": (send(signal.SIGTERM), Reason.POWER_CUT),
    "SIGINT": (send(signal.SIGINT), Reason.POWER_CUT),
    "SIGHUP": (send(signal.SIGHUP), Reason.POWER_CUT),
    "SIGQUIT": (send(signal.SIGQUIT), Reason.SIGQUIT),
    "fatal": (lambda guest: guest.write32(PLAIN + 2 * STRIDE, 6), Reason.VDEV_FATAL),
    "unsupported": (lambda guest: void(guest.read32(0x3000_0000)), Reason.UNSUPPORTED_ACCESS),
}
BUTTON_ENDS = ("SIGTERM", "SIGINT", "SIGHUP")
#: Where the vdev misbehaves. "vcpu" is a register handler that still runs when the VM ends.
PLACES = (
    "configured",
    "starting",
    "register",
    "vcpu",
    "worker",
    "button",
    *(p.name for p in PHASES),
    "terminate",
)


def void(_value: object) -> None:
    """Nothing."""


class Life(Vdev):
    """Remembers what was called."""

    vdev_type = "first"
    windows = (Window(0x100, access=frozenset({4})),)
    irqs = 1

    def __init__(self, ctx: object, options: object) -> None:
        super().__init__(ctx, options)  # type: ignore[arg-type]
        self.life: list[str] = []

    def at(self, place: str) -> None:
        self.life.append(place)

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return 0

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        self.ctx.request_shutdown("asked by the guest", code=value)

    def on_configured(self) -> None:
        self.at("configured")
        for phase in PHASES:
            run = partial(self._in_phase, phase)
            self.ctx.on_terminate(run, phase=phase, deadline=self.deadline(phase))

    def deadline(self, phase: Phase) -> float:
        return PATIENT

    def _in_phase(self, phase: Phase, _end: GuestEnd) -> None:
        self.at(phase.name)

    def on_starting(self) -> None:
        self.at("starting")

    def on_terminate(self, end: GuestEnd) -> None:
        self.at("terminate")


class Last(Life):
    vdev_type = "last"


class Misbehaves(Life):
    vdev_type = "misbehaves"
    place = mode = ""
    #: What it does in a phase of the end beside misbehaving; for signals that come in the middle.
    also: Callable[[str], None] = staticmethod(lambda place: None)  # type: ignore[assignment]
    release: threading.Event
    reached: threading.Event

    def at(self, place: str) -> None:
        super().at(place)
        type(self).also(place)
        if place != self.place:
            return
        self.reached.set()
        if self.mode == "raise":
            raise RuntimeError(f"misbehaves at {place}")
        if self.mode == "late":
            time.sleep(SHORT / 10)
        if self.mode == "hang":
            end = time.monotonic() + HANG
            while not self.release.wait(0.01) and time.monotonic() < end:
                pass

    def deadline(self, phase: Phase) -> float:
        return SHORT if (self.place, self.mode) == (phase.name, "hang") else PATIENT

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        self.at("register" if offset == 0 else "vcpu")
        return 0

    def on_button(self) -> bool:
        self.at("button")
        return False

    def on_starting(self) -> None:
        super().on_starting()
        if self.place == "worker":
            self.ctx.worker.call(lambda: self.at("worker"))


@pytest.fixture(autouse=True)
def short_deadlines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setattr("qvmcore.machine.WATCH_PERIOD", SHORT)


#: What a hang would cost, shortened only where something hangs: a busy host must not make others late.
#: That of the end is all vdevs' deadline, so it is shortened less.
SHORTENED = {
    "register": ("slot.HANDLER_PATIENCE", SHORT),
    "vcpu": ("machine.VCPU_STOP_TIMEOUT", SHORT),
    "button": ("button.PATIENCE", SHORT),
    "worker": ("slot.END_DEADLINE", 20 * SHORT),
    "terminate": ("slot.END_DEADLINE", 20 * SHORT),
}


class Terminal:
    """What the machines' console is on. ``raw``: whether keys go to the guest as they are."""

    def __init__(self) -> None:
        self.master, self.fd = os.openpty()
        modes = termios.tcgetattr(self.fd)
        # Unlike those of a fresh one, so that defaults are not taken for the old ones.
        modes[3] &= ~termios.ECHOE
        termios.tcsetattr(self.fd, termios.TCSANOW, modes)

    @property
    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.fd)

    @property
    def raw(self) -> bool:
        return not self.modes[3] & (termios.ICANON | termios.ECHO)


TERMINAL = Terminal()


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input and output, for the console."""
    stdio = partial(Stdio, input_fd=TERMINAL.fd, output_fd=TERMINAL.fd)
    monkeypatch.setattr("qvm_chardev.open.Stdio", stdio)


def build(engine: ScriptedEngine, folder: Path, **system: Any) -> Machine:
    """The console first: it has the terminal before anybody misbehaves."""
    classes = (Pl011, Life, Misbehaves, Last)
    return machine(classes, engine, folder, options={"pl011": {"hostdev": "stdio"}}, **system)


class Leftovers:
    """What must be the same after a machine's life as before it."""

    def __init__(self) -> None:
        self.modes = TERMINAL.modes
        gc.collect()
        self.threads = set(threading.enumerate())
        self.fds = set(os.listdir("/proc/self/fd"))
        self.handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def check(self) -> None:
        end = time.monotonic() + LIMIT
        while set(threading.enumerate()) - self.threads and time.monotonic() < end:
            time.sleep(0.002)
        assert set(threading.enumerate()) <= self.threads
        assert TERMINAL.modes == self.modes
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == len(self.fds)
        assert {number: signal.getsignal(number) for number in signal.valid_signals()} == self.handlers
        assert not list(run_folder().glob("*")), "no run directory, no socket"


class Lives:
    """Runs machines; knows how many."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def live(self, end: str, place: str, mode: str) -> None:
        """One combination."""
        self.count += 1
        with pytest.MonkeyPatch.context() as patch:
            if mode == "hang" and place in SHORTENED:
                name, seconds = SHORTENED[place]
                patch.setattr(f"qvmcore.{name}", seconds)
            self._live(end, place, mode)

    def _live(self, end: str, place: str, mode: str) -> None:
        before, seen = Leftovers(), list[bool]()
        Misbehaves.place, Misbehaves.mode = place, mode
        Misbehaves.release, Misbehaves.reached = threading.Event(), threading.Event()
        finish, reason = ENDS[end]

        def script(guest: ScriptedGuest) -> None:
            seen.append(TERMINAL.raw)
            if place == "register":
                guest.read32(PLAIN + STRIDE)
            if place == "worker":
                Misbehaves.reached.wait(LIMIT)  # on a busy host the end could come before its thread runs
            finish(guest)
            if place == "vcpu":
                guest.read32(PLAIN + STRIDE + 4)
            guest.wait()

        vm = build(ScriptedEngine(script), self.folder, unsupported="abort")
        began = time.monotonic()
        if mode == "raise" and place in ("configured", "starting"):
            with pytest.raises(RuntimeError, match="misbehaves at"):
                vm.run()
        else:
            outcome = vm.run()
            assert seen == [True], "the console has the terminal while the guest runs"
            assert (outcome.end.reason, outcome.code) == (reason, reason.exit_code)
            self._verdicts(vm, place, mode)
        assert time.monotonic() - began < LIMIT
        first, middle, last = (slot.vdev for slot in vm.slots[1:])
        assert isinstance(first, Life) and isinstance(middle, Life) and isinstance(last, Life)
        unborn = mode == "raise" and place == "configured"
        self._whole(first, born=True, started=not (mode == "raise" and place == "configured"))
        self._whole(
            last, born=not unborn, started=not (mode == "raise" and place in ("configured", "starting"))
        )
        assert all(middle.life.count(each) <= 1 for each in LIFE), "nothing runs twice"
        Misbehaves.release.set()
        vm._memory.close()
        del vm, first, middle, last
        before.check()

    @staticmethod
    def _whole(vdev: Life, *, born: bool, started: bool) -> None:
        """The innocent ones live their whole life, in order, once."""
        expected = LIFE if born else []
        if not started:
            expected = [each for each in expected if each != "starting"]
        # Callbacks of one phase run at the same time: RELEASE beside on_terminate.
        assert [*vdev.life[:-2], *sorted(vdev.life[-2:])] == [*expected[:-2], *sorted(expected[-2:])]

    @staticmethod
    def _verdicts(vm: Machine, place: str, mode: str) -> None:
        results = vm.plan.run(GuestEnd(Reason.HOST_ERROR, "a second run gives the results of the first"))
        bad = {(each.name, each.phase.name, each.verdict) for each in results if each.verdict != "ok"}
        phase = {"terminate": "RELEASE", "worker": "STOP_WORKERS"}.get(place, place)
        if mode == "late" or phase not in Phase.__members__ or (place, mode) == ("worker", "raise"):
            assert bad == set()
        else:
            verdict = "failed" if mode == "raise" or place == "worker" else "late"
            assert bad == {("misbehaves", phase, verdict)}
        assert vm.slots[2].faulted or place not in ("register", "worker", "button") or mode != "raise"


def combinations(end: str) -> Iterator[tuple[str, str]]:
    """What makes a difference for this kind of end."""
    for place, mode in itertools.product(PLACES, MODES):
        if place == "button" and end not in BUTTON_ENDS:
            continue  # nobody presses it
        if mode == "hang" and place in ("configured", "starting"):
            continue  # the VM is not running yet: see the test below
        yield place, mode


#: Combinations each test has run.
COUNTS: dict[str, int] = {}


@pytest.mark.parametrize("end", ENDS)
def test_whatever_a_vdev_does_the_others_end_in_order(end: str, tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    for place, mode in combinations(end):
        try:
            lives.live(end, place, mode)
        except BaseException as error:
            error.add_note(f"combination: end {end}, at {place}, mode {mode}")
            raise
    COUNTS[end] = lives.count


@pytest.mark.parametrize("place", ["configured", "starting"])
@pytest.mark.parametrize(
    "requests",
    [(signal.SIGTERM,) * 2, (signal.SIGINT,) * 2, (signal.SIGQUIT, signal.SIGHUP)],
    ids=lambda numbers: "-".join(number.name for number in numbers),
)
def test_a_vdev_that_hangs_in_the_start_is_given_up_by_the_second_request(
    place: str, requests: tuple[signal.Signals, ...], tmp_path: Path
) -> None:
    before = Leftovers()
    Misbehaves.place, Misbehaves.mode = place, "hang"
    Misbehaves.release, Misbehaves.reached = threading.Event(), threading.Event()
    vm, over = build(ScriptedEngine(ScriptedGuest.wait), tmp_path), threading.Event()

    def ask() -> None:
        Misbehaves.reached.wait(LIMIT)
        for number in (signal.SIGUSR1, *requests):
            if not over.wait(SHORT):
                os.kill(os.getpid(), number)

    asker = threading.Thread(target=ask)
    asker.start()
    began = time.monotonic()
    outcome = vm.run()
    over.set()
    asker.join()
    assert time.monotonic() - began < LIMIT
    assert outcome.code == 3
    assert outcome.end.reason is Reason.POWER_CUT
    assert outcome.end.message == f"power cut by a second {requests[1].name} while the VM was starting"
    first, _, last = (slot.vdev for slot in vm.slots[1:])
    assert isinstance(first, Life) and isinstance(last, Life)
    Lives._whole(first, born=True, started=place == "starting")
    Lives._whole(last, born=place == "starting", started=False)
    vm._memory.close()
    del vm, first, last
    before.check()


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_at_any_step_neither_ends_the_plan_nor_runs_it_twice(
    number: signal.Signals, tmp_path: Path
) -> None:
    for count, step in enumerate(LIFE):
        before = Leftovers()
        Misbehaves.place = Misbehaves.mode = ""
        monkey = pytest.MonkeyPatch()

        def interrupt(at: str, step: str = step) -> None:
            # Twice in the end; in the start that would give it up.
            for _ in range((at == step) * (1 if at in LIFE[:2] else 2)):
                os.kill(os.getpid(), number)
                time.sleep(SHORT / 10)  # two at the same moment are one

        monkey.setattr(Misbehaves, "also", staticmethod(interrupt))
        engine = ScriptedEngine(lambda guest: (guest.power_off(), guest.wait())[0])
        vm = build(engine, tmp_path, dump_dir=tmp_path)
        try:
            outcome = vm.run()
        finally:
            monkey.undo()
        assert outcome.end.reason in (Reason.GUEST_SHUTDOWN, Reason.POWER_CUT, Reason.SIGQUIT)
        assert all(each.verdict == "ok" for each in outcome.steps), step
        for slot in vm.slots[1:]:
            assert isinstance(slot.vdev, Life)
            assert sorted({*slot.vdev.life} - {"button"}) == sorted(LIFE), step
            assert len(slot.vdev.life) <= len(LIFE) + 1, "nothing runs twice"
        del vm, slot
        before.check()
        COUNTS[f"{number.name} at a step"] = count + 1


def test_the_product_was_run_whole(capsys: pytest.CaptureFixture[str]) -> None:
    if set(COUNTS) != {*ENDS, *(f"{number.name} at a step" for number in SIGNALS)}:
        pytest.skip("only when the whole file runs")
    expected = sum(len(list(combinations(end))) for end in ENDS) + len(SIGNALS) * len(LIFE)
    assert sum(COUNTS.values()) == expected
    with capsys.disabled():
        print(f"\nends x life-cycle steps x behaviours: {expected} combinations run")
