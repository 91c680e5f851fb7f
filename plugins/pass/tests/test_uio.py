"""``pass-uio``: registers, interrupt and end of a platform device, on a UIO that is not there."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import qvm_pass
from click.testing import CliRunner
from qvm_pass import uio
from qvm_quiesce import plugin
from qvm_quiesce import state as files
from qvm_quiesce.attach import attach
from qvm_quiesce.cli import quiesce
from qvm_quiesce.evidence import Verdict
from qvm_quiesce.guard import Guard
from qvm_quiesce.runner import Quiesce
from qvm_quiesce.subject import Policy
from qvm_quiesce.vdev import QuiesceVdev
from qvm_vfio.uio import UioHardware
from qvm_vfio.uio_fake import FakeUio

from qvmcore.api import ConfigError, HostError
from qvmcore.machine import Outcome
from qvmcore.testing.engine import ScriptedEngine, ScriptedGuest
from qvmcore.testing.fakes import plug
from qvmcore.testing.host import FIRST_LOC, machine

PassUio = uio.PassUio
CONTROL, STATUS = 0x14, 0x1C
#: What stops the device of these tests.
SCRIPT: list[dict[str, Any]] = [
    {"bar": 0, "offset": CONTROL, "mask": 1, "write": 0},
    {"bar": 0, "offset": STATUS, "mask": 1, "equals": 0, "within": 0.2},
]
Host = Callable[..., FakeUio]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """``host(maps)``: this machine has a UIO device with these maps, by default one of two pages."""
    made: list[FakeUio] = []

    def make(maps: Any = None, label: str = "motor") -> FakeUio:
        made.append(FakeUio(tmp_path / f"uio{len(made)}", maps or {0: (0x2000, 0)}, label))
        monkeypatch.setattr(PassUio, "kernel", made[-1])
        return made[-1]

    yield make
    for kernel in made:
        assert not kernel.opened, "the device was given back"
        kernel.close_all()


# -- registers -----------------------------------------------------------------------------------------


def test_each_access_of_the_guest_is_one_of_the_device(host: Host) -> None:
    kernel = host()
    with plug(PassUio, uio="uio0", size=0x2000) as plugged:
        for size in (1, 2, 4, 8):
            value = 0x8877_6655_4433_2211 & (1 << 8 * size) - 1
            plugged.write(0x1040, value, size)
            assert plugged.read(0x1040, size) == value
        assert kernel.register(0x1040) == 0x4433_2211
        kernel.poke(0x1FFC, 0xCAFE)
        assert plugged.read(0x1FFC) == 0xCAFE
        assert plugged.vdev.status()["reads"] == 5


def test_only_the_bytes_of_the_option_are_the_guest_s(host: Host) -> None:
    kernel = host({0: (0x800, 0x400), 1: (0x1000, 0)})
    with plug(PassUio, uio="uio0", size=0x100, irq="none") as plugged:
        plugged.write(0xFC, 0xBEEF)
        assert kernel.register(0x4FC) == 0xBEEF, "the range begins inside its page"
        assert plugged.vdev.mmio_read(0, 0x100, 4) == 0xFFFF_FFFF
        plugged.vdev.mmio_write(0, 0x100, 4, 1)
        plugged.vdev.mmio_write(0, 0xFE, 4, 1)
        assert kernel.register(0x500) == 0
        assert plugged.vdev.status()["direct"] == 0, "nothing but whole pages can be mapped"
    with plug(PassUio, uio="uio0", map=1) as plugged:
        plugged.write(0, 7)
        assert kernel.register(0, number=1) == 7


def test_an_access_across_a_register_fails_and_the_device_lives_on(host: Host) -> None:
    host()
    with plug(PassUio, uio="uio0") as plugged:
        assert plugged.read(0x41, 4) == 0xFFFF_FFFF
        plugged.write(0x42, 1, 4)
        assert plugged.vdev.status()["failures"] == 2
        assert not plugged.ctx.faults


@pytest.mark.parametrize("irq", ["edge", "none"])
def test_registers_are_mapped_into_the_guest_and_covered_at_the_end(host: Host, irq: str) -> None:
    kernel = host()
    with plug(PassUio, uio="uio0", irq=irq) as plugged:
        handler = qvm_pass.qvm_bind_mmio(plugged.vdev, 0, plugged.vdev.windows[0])
        assert handler is not None
        (part,) = handler.direct
        assert (part.offset, part.size) == (0, 0x1000)
        ctypes.c_uint32.from_address(part.host_address + 0x10).value = 0xF00D
        assert kernel.register(0x10) == handler.read(0x10, 4) == 0xF00D
        (hardware,) = plugged.vdev.hardware()
        hardware.revoke()
        page = (ctypes.c_char * 16).from_address(part.host_address)
        reader, writer = os.pipe()
        with pytest.raises(OSError, match="Bad address"):
            os.write(writer, page)
        for fd in (reader, writer):
            os.close(fd)
        plugged.write(0x10, 0xBAD)
        assert plugged.read(0x10) == 0xFFFF_FFFF
        assert kernel.register(0x10) == 0xF00D
        assert hardware.bar_read(0, 0x10, 4) == 0xF00D, "its script still reaches it"


@pytest.mark.parametrize("options", [{"irq": "level"}, {"irq": "none", "direct": False}])
def test_registers_of_a_device_with_a_level_are_not_mapped(host: Host, options: dict[str, Any]) -> None:
    """The guest's accesses tell when it has served the line."""
    host()
    with plug(PassUio, {"uio": "uio0", **options}) as plugged:
        assert plugged.vdev.handler().direct == ()


# -- interrupt -----------------------------------------------------------------------------------------


def test_a_level_holds_until_the_guest_looks_at_the_device(host: Host) -> None:
    kernel = host()
    with plug(PassUio, uio="uio0") as plugged:
        assert kernel.enabled
        assert kernel.fire()
        plugged.settle()
        assert plugged.irq.level
        assert not kernel.fire(), "masked in the kernel"
        plugged.read(STATUS)
        assert not plugged.irq.level
        assert kernel.fire(), "it still wants something"
        plugged.settle()
        assert plugged.irq.level
        plugged.write(STATUS, 1)
        assert not plugged.irq.level
        assert plugged.vdev.status()["interrupts"] == 2


def test_an_edge_is_passed_on_and_unmasked_at_once(host: Host) -> None:
    kernel = host()
    with plug(PassUio, uio="uio0", irq="edge") as plugged:
        for count in (1, 2):
            assert kernel.fire()
            plugged.settle()
            assert (plugged.irq.pulses, kernel.enabled) == (count, True)


def test_a_device_without_an_interrupt_has_no_line(host: Host) -> None:
    kernel = host()
    assert kernel.fire()
    with plug(PassUio, uio="uio0", irq="none") as plugged:
        assert plugged.vdev.irqs == 0
        assert not kernel.enabled, "nobody touched it"


def test_a_driver_without_control_of_the_interrupt_is_refused_in_words(host: Host) -> None:
    kernel = host()
    kernel.errors["control"] = errno.ENOSYS
    with pytest.raises(HostError, match=r"interrupt cannot be unmasked.*irq = \"none\""):
        plug(PassUio, uio="uio0")


# -- the end -------------------------------------------------------------------------------------------


def run(
    tmp_path: Path, guest: Callable[[ScriptedGuest], None] = ScriptedGuest.power_off, **options: Any
) -> Outcome:
    require = options.pop("require", False)
    values = {"pass-uio": {"uio": "uio0"}, "quiesce": {"watch": 0.02, "guard": False, **options}}
    return machine(
        (PassUio, QuiesceVdev), ScriptedEngine(guest), tmp_path, options=values,
        plugins=[plugin, qvm_pass], require_quiesce=require,
    ).run()  # fmt: skip


def device() -> dict[str, Any]:
    """The record of the last end."""
    _, body = next(files.records())
    assert body is not None
    (found,) = body["devices"]
    return {**found, "steps": {step["step"]: step for step in found["steps"]}}


@pytest.mark.parametrize("require", [True, False])
def test_its_script_stops_it_and_is_the_proof(tmp_path: Path, host: Host, require: bool) -> None:
    kernel = host()

    def guest(guest: ScriptedGuest) -> None:
        guest.write32(FIRST_LOC + CONTROL, 0x31)
        guest.power_off()

    outcome = run(tmp_path, guest, script=SCRIPT, require=require)
    assert (outcome.code, outcome.quiet) == (0, True), outcome.steps
    assert kernel.register(CONTROL) == 0x30
    assert not kernel.enabled
    found = device()
    assert (found["device"], found["verdict"]) == ("uio:uio0", "QUIESCED")
    assert found["steps"]["soft-stop"]["wrote"] == ["bar0+0x14=0x00000030"]
    assert found["steps"]["bus-master-off"]["detail"] == "a platform device"
    assert found["steps"]["verify"]["verdict"] == "ok"


def test_a_device_that_does_not_stop_is_quarantined_and_refused(tmp_path: Path, host: Host) -> None:
    kernel = host()

    def guest(guest: ScriptedGuest) -> None:
        kernel.poke(STATUS, 1)
        guest.power_off()

    assert run(tmp_path, guest, script=SCRIPT).code == 8
    found = device()
    assert (found["verdict"], found["reason"]) == ("QUARANTINED", "its script did not end as it should")
    with pytest.raises(HostError, match=r"uio:uio0 is quarantined.* when you know that it is quiet"):
        run(tmp_path, guest, script=SCRIPT)
    for command in ("run", "plan"):
        refused = CliRunner().invoke(quiesce, [command, "uio:uio0"]).exception
        assert "only the script in its VM file can stop it" in str(refused)
    assert CliRunner().invoke(quiesce, ["release", "uio:uio0"]).exit_code == 0
    assert not files.quarantined()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "it has no register script"),
        ({"script": SCRIPT[:1]}, "its script waits for no register"),
        ({"script": SCRIPT, "soft_stop": "none"}, "its script waits for no register"),
    ],
)
def test_without_a_script_that_waits_nothing_is_proven(
    tmp_path: Path, host: Host, options: dict[str, Any], why: str
) -> None:
    kernel = host()
    outcome = run(tmp_path, **options)
    assert (outcome.code, outcome.quiet) == (8, False)
    found = device()
    assert found["verdict"] == "DEGRADED"
    assert found["reason"] == f"a platform device that cannot be proven quiet: {why}"
    assert not kernel.enabled, "its interrupt is off all the same"
    with pytest.raises(HostError, match=r"require-quiesce: only a register script can prove uio:uio0"):
        run(tmp_path, require=True, **options)


def test_an_interrupt_after_it_was_masked_is_seen(host: Host) -> None:
    class Storming(UioHardware):
        counts = itertools.count()

        def interrupts(self) -> int:
            return next(self.counts)

    kernel = host()
    hardware = Storming(kernel, "uio0", kernel.open(kernel.dev / "uio0"))
    policy = Policy(script=tuple(SCRIPT), watch=0.01)
    work = Quiesce("vm", "vm", [(hardware, attach(hardware), policy)])
    work.stop_dma("test")
    assert work.prove() is Verdict.QUARANTINED
    assert work.evidence.devices[0].reason == "1 interrupts came after they were turned off"
    hardware.close()


def test_a_guard_runs_the_script_when_the_vm_is_gone(tmp_path: Path, host: Host) -> None:
    kernel = host()
    with plug(PassUio, uio="uio0") as plugged:
        (hardware,) = plugged.vdev.hardware()
        policy = Policy(script=tuple(SCRIPT), watch=0.01)
        guard = Guard.start("test", [(hardware, attach(hardware), policy)], files.folder())
        plugged.write(CONTROL, 1)
        guard._channel.close()
        limit = time.monotonic() + 20
        while not any(files.records()):
            assert time.monotonic() < limit
            time.sleep(0.005)
        assert device()["verdict"] == "QUIESCED"
        assert kernel.register(CONTROL) == 0
        assert not kernel.enabled
        guard._process.wait(20)


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"uio": "uio7"}, r"there is no UIO device 'uio7'.*there are: uio0 \(motor\)"),
        ({"uio": "pump"}, "there is no UIO device 'pump'"),
        ({"uio": "/dev/../etc/passwd"}, "there is no UIO device"),
        ({"uio": "uio0", "map": 3}, "uio:uio0 has no map 3.*its maps: 0"),
        ({"uio": "uio0", "size": 0x3000}, r"has 0x2000 bytes, less than 0x3000.*size = 0x2000"),
    ],
)
def test_a_device_that_is_not_there_or_too_small(host: Host, options: dict[str, Any], said: str) -> None:
    host()
    with pytest.raises(HostError, match=said):
        plug(PassUio, options)


@pytest.mark.parametrize("name", ["uio0", "/dev/uio0", "motor"])
def test_a_device_has_three_names(host: Host, name: str) -> None:
    host()
    with plug(PassUio, uio=name) as plugged:
        assert plugged.vdev.status()["name"] == "uio:uio0"


def test_a_device_is_one_vm_s_at_a_time(host: Host) -> None:
    host()
    with plug(PassUio, uio="motor"), pytest.raises(HostError, match="is in use by another VM"):
        plug(PassUio, uio="uio0")
    with plug(PassUio, uio="uio0"):
        pass


def test_a_file_that_may_not_be_opened_is_told_with_the_way_to_get_it(host: Host) -> None:
    kernel = host()
    kernel.errors["open"] = errno.EACCES
    with pytest.raises(HostError, match=r"no permission to open .*sudo chown"):
        plug(PassUio, uio="uio0")


def test_options_that_name_no_device() -> None:
    for options in ({}, {"uio": ""}, {"uio": "uio0", "irq": "both"}, {"uio": "uio0", "size": 0}):
        with pytest.raises(ConfigError):
            plug(PassUio, options)
