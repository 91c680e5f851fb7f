"""Bus 0: ECAM (PCI Express Base, 7.2.2) and where BARs are decoded, whatever the guest does."""

from __future__ import annotations

import logging
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qvmcore.bus import AddressSpace
from qvmcore.pci import spec
from qvmcore.pci.bar import Bar
from qvmcore.pci.function import PciFunction
from qvmcore.pci.host import ECAM_WINDOW, HostBridge
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.pci.intx import SharedLine
from qvmcore.testing.fakes import FakeIrq
from qvmcore.testing.pci import EcamConfig, enumerate_bus
from qvmcore.types import MmioHandler, PciAddress, PciId, Window

ECAM, LOW, HIGH = 0x1000_0000, 0x2000_0000, 0x80_0000_0000
APERTURES = ((LOW, 0x10000), (HIGH, 1 << 32))


def constant(value: int) -> MmioHandler:
    return MmioHandler(lambda offset, size: value & (1 << 8 * size) - 1, lambda offset, size, new: None)


def simple(number: int, *bars: Bar, vectors: int = 0) -> PciFunction:
    return PciFunction(
        PciId(0x1234, number), 0xFF0000, bars=bars, interrupts=PciInterrupts(vectors, intx=False)
    )


class Rig:
    """A bridge on a bus with some functions."""

    def __init__(self, functions: dict[PciAddress, PciFunction], line: SharedLine | None = None) -> None:
        self.bus = AddressSpace()
        self.messages: list[tuple[int, int]] = []
        self.functions = functions
        self.bridge = HostBridge(self.bus, APERTURES, lambda *message: self.messages.append(message))
        for address, function in functions.items():
            config = MmioHandler(function.config_read, function.config_write)
            self.bridge.add(address, function, config, line, f"dev{address}")
        self.bridge.start()
        handler = MmioHandler(self.bridge.ecam_read, self.bridge.ecam_write)
        self.bus.insert(ECAM, ECAM_WINDOW, handler, "ecam")
        self.bus.insert(0x2000_4000, Window(0x1000), constant(0x77), "somebody")
        self.bus.freeze()

    def config(self, device: int, function: int = 0) -> EcamConfig:
        return EcamConfig(self.bus, ECAM, PciAddress(device, function))

    def place(self, device: int, address: int, bar: int = 0, wide: bool = False) -> None:
        config = self.config(device)
        config.config_write(spec.BAR0 + 4 * bar, 4, address & 0xFFFFFFFF)
        if wide:
            config.config_write(spec.BAR0 + 4 * bar + 4, 4, address >> 32)
        config.config_write(spec.COMMAND, 2, spec.COMMAND_MEMORY)


def four_kib(value: int) -> Bar:
    return Bar(0, Window(0x1000), constant(value))


def test_the_host_bridge_is_qnx_s() -> None:
    config = Rig({}).config(0)
    assert [config.config_read(at, 4) for at in (0, 8, 0x2C)] == [0x00021C05, 0x06000000, 0]


def test_7_2_2_ecam_reaches_every_function_and_nobody_else() -> None:
    rig = Rig({PciAddress(31, 7): simple(7), PciAddress(31): simple(0), PciAddress(5): simple(5)})
    present = {
        (device, function): rig.config(device, function).config_read(2, 2)
        for device in range(32)
        for function in range(8)
        if rig.config(device, function).config_read(0, 4) != 0xFFFFFFFF
    }
    assert present == {(0, 0): 2, (5, 0): 5, (31, 0): 0, (31, 7): 7}


def test_6_2_1_the_multifunction_bit_is_on_every_function_of_such_a_device() -> None:
    rig = Rig({PciAddress(3): simple(0), PciAddress(3, 5): simple(5), PciAddress(4): simple(4)})
    header = [rig.config(*place).config_read(0x0E, 1) for place in ((0, 0), (3, 0), (3, 5), (4, 0))]
    assert header == [0, 0x80, 0x80, 0]
    assert list(enumerate_bus(rig.bus, ECAM, LOW)) == [
        PciAddress(0), PciAddress(3), PciAddress(3, 5), PciAddress(4),
    ]  # fmt: skip


def test_ecam_access_sizes_and_edges() -> None:
    rig = Rig({PciAddress(1): simple(1), PciAddress(1, 1): simple(2), PciAddress(31, 7): simple(7)})
    base = ECAM + (1 << 15)
    assert [rig.bus.read(base, size) for size in (1, 2, 4)] == [0x34, 0x1234, 0x00011234]
    assert rig.bus.read(base, 8) == (1 << 64) - 1  # not defined for ECAM
    assert rig.bus.read(base + 1, 2) == 0x0112
    # Across the border of two functions, and out of the window at its end.
    assert rig.bus.read(base + 0xFFE, 4) == 0xFFFFFFFF
    rig.bus.write(base + 0xFFE, 4, 0)
    assert rig.bus.read(base + 0xFFC, 4) == 0
    assert rig.bus.read(ECAM + (1 << 20) - 4, 4) == 0
    assert rig.bus.read(ECAM + (1 << 20) - 2, 4) == 0xFFFFFFFF
    rig.bus.write(ECAM + (2 << 15), 4, 0)  # nobody there


def test_a_place_is_taken_once() -> None:
    bridge = HostBridge(AddressSpace(), APERTURES, lambda address, data: None)
    function = simple(1)
    with pytest.raises(ValueError, match=r"late: 00:00\.0 is taken"):
        bridge.add(PciAddress(0), function, constant(0), None, "late")


def test_interrupts_leave_through_the_bridge() -> None:
    irq = FakeIrq()
    functions = {PciAddress(n): PciFunction(PciId(1, n), 0, interrupts=PciInterrupts(1)) for n in (1, 2)}
    rig = Rig(functions, SharedLine(irq))
    one, two = (function.interrupts for function in functions.values())
    one.set_intx(True)
    two.set_intx(True)
    one.set_intx(False)
    assert irq.level
    two.set_intx(False)
    one.pulse_intx()
    assert (irq.level, irq.rises, irq.pulses) == (False, 1, 1)
    one.table_write(0, 8, 0x8020040)
    one.table_write(8, 8, 0x99)
    rig.config(1).config_write(spec.COMMAND, 2, spec.COMMAND_BUS_MASTER)
    rig.config(1).config_write(0x42, 2, spec.MSIX_ENABLE)
    one.signal(0)
    assert rig.messages == [(0x8020040, 0x99)]


def test_a_bar_outside_of_the_apertures_is_not_decoded_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig({PciAddress(1): simple(1, four_kib(1))})
    with caplog.at_level(logging.WARNING, "qvm.pci"):
        for address in (0x4000_0000, LOW - 0x1000, LOW + 0x10000, ECAM, 0x0800_0000) * 3:
            rig.place(1, address)
    assert [mapped.owner for mapped in rig.bus] == ["ecam", "somebody"]
    assert [record.getMessage() for record in caplog.records] == [
        "00:01.0: not decoded (said once): dev00:01.0 BAR 0 at 0x40000000 is outside of the PCI windows"
    ]


def test_a_bar_that_sticks_out_of_its_aperture_is_not_decoded() -> None:
    rig = Rig({PciAddress(1): simple(1, Bar(0, Window(0x20000), constant(1)))})
    rig.place(1, LOW)
    assert [mapped.owner for mapped in rig.bus] == ["ecam", "somebody"]
    high = Rig({PciAddress(1): simple(1, Bar(0, Window(1 << 33), constant(1), wide=True))})
    high.place(1, HIGH, wide=True)
    assert high.bus.read(HIGH, 4) == 0xFFFFFFFF


def test_sizing_while_decoding_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig({PciAddress(1): simple(1, four_kib(1))})
    rig.place(1, 0)
    rig.place(1, 0xFFFFFFFF)
    assert caplog.records == []


def test_a_bar_over_another_window_loses_only_itself() -> None:
    rig = Rig({PciAddress(1): simple(1, four_kib(1)), PciAddress(2): simple(2, four_kib(2))})
    rig.place(1, 0x2000_4000)
    assert rig.bus.read(0x2000_4000, 4) == 0x77
    rig.place(1, 0x2000_8000)
    rig.place(2, 0x2000_8000)
    assert rig.bus.read(0x2000_8000, 4) == 1
    # When the first one goes, the second one is there.
    rig.place(1, 0x2000_9000)
    assert (rig.bus.read(0x2000_8000, 4), rig.bus.read(0x2000_9000, 4)) == (2, 1)


def test_a_wide_bar_in_the_high_aperture() -> None:
    rig = Rig({PciAddress(1): simple(1, Bar(2, Window(1 << 20), constant(9), wide=True))})
    rig.place(1, HIGH + (1 << 20), bar=2, wide=True)
    assert [rig.bus.read(HIGH + (1 << 20) + at, 4) for at in (-4, 0, 0xFFFFC, 0x100000)] == [
        0xFFFFFFFF, 9, 9, 0xFFFFFFFF,
    ]  # fmt: skip


def test_lookups_run_while_bars_move() -> None:
    rig = Rig({PciAddress(1): simple(1, four_kib(1)), PciAddress(2): simple(2, four_kib(2))})
    rig.place(2, 0x2000_0000)
    wrong: list[int] = []
    ready, stop = threading.Event(), threading.Event()

    def look() -> None:
        while not stop.is_set():
            for _ in range(100):
                value = rig.bus.read(0x2000_0000, 4)
                if value != 2:
                    wrong.append(value)
            ready.set()

    thread = threading.Thread(target=look)
    thread.start()
    ready.wait()
    for _ in range(300):
        rig.place(1, LOW + 0x8000)
        rig.place(1, LOW + 0x9000)
    stop.set()
    thread.join()
    assert wrong == []


ADDRESSES = [
    0, 0xFFFFFFFF, LOW, LOW + 0x1000, LOW + 0x2000, LOW + 0x3000, 0x2000_4000, LOW + 0xF000,
    LOW + 0x10000, LOW - 0x1000, 0x4000_0000, ECAM, HIGH, HIGH + 0x2000, HIGH + (1 << 32),
]  # fmt: skip


class BarModel(RuleBasedStateMachine):
    """BARs of several functions at any places, in any order: what is decoded follows from the rules."""

    @initialize()
    def start(self) -> None:
        functions = {
            PciAddress(1): simple(
                1, Bar(0, Window(0x1000), constant(10)), Bar(1, Window(0x2000), constant(11))
            ),
            PciAddress(2): simple(2, Bar(0, Window(0x4000), constant(20))),
            PciAddress(3): simple(3, Bar(0, Window(0x2000), constant(30), wide=True)),
        }
        self.rig = Rig(functions)
        self.kinds = {(1, 0): 0x1000, (1, 1): 0x2000, (2, 0): 0x4000, (3, 0): 0x2000}
        self.values = {key: 10 * key[0] + key[1] for key in self.kinds}
        self.registers = dict.fromkeys(self.kinds, 0)
        self.enabled = dict.fromkeys((1, 2, 3), False)

    @rule(key=st.sampled_from([(1, 0), (1, 1), (2, 0), (3, 0)]), address=st.sampled_from(ADDRESSES))
    def move(self, key: tuple[int, int], address: int) -> None:
        device, bar = key
        config = self.rig.config(device)
        config.config_write(spec.BAR0 + 4 * bar, 4, address & 0xFFFFFFFF)
        if device == 3:
            config.config_write(spec.BAR0 + 4, 4, address >> 32)
        bits = 64 if device == 3 else 32
        self.registers[key] = address & -self.kinds[key] & (1 << bits) - 1

    @rule(device=st.integers(1, 3), memory=st.booleans())
    def command(self, device: int, memory: bool) -> None:
        self.rig.config(device).config_write(spec.COMMAND, 2, spec.COMMAND_MEMORY * memory)
        self.enabled[device] = memory

    @invariant()
    def decoded_as_the_rules_say(self) -> None:
        if not hasattr(self, "rig"):
            return
        wanted = {
            f"dev00:0{device}.0 BAR {bar}": (self.registers[device, bar], size)
            for (device, bar), size in self.kinds.items()
            if self.enabled[device] and inside(self.registers[device, bar], size)
        }
        mapped = {each.owner: (each.base, each.window.size) for each in self.rig.bus}
        assert mapped.pop("ecam") == (ECAM, 1 << 20)
        fixed = mapped.pop("somebody")
        assert fixed == (0x2000_4000, 0x1000)
        # Decoded is only what is wanted, where it is wanted, and nothing overlaps.
        assert mapped.items() <= wanted.items()
        taken = [fixed, *mapped.values()]
        assert not any(overlap(a, b) for i, a in enumerate(taken) for b in taken[:i])
        # What is wanted and not decoded is in the way of something that is.
        for owner, place in wanted.items() - mapped.items():
            assert any(overlap(place, other) for other in taken), f"{owner} should decode"
        for (device, bar), value in self.values.items():
            owner = f"dev00:0{device}.0 BAR {bar}"
            if owner in mapped:
                assert self.rig.bus.read(mapped[owner][0], 4) == value


def inside(base: int, size: int) -> bool:
    return any(start <= base and base + size <= start + length for start, length in APERTURES)


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


TestBarModel = BarModel.TestCase
TestBarModel.settings = settings(max_examples=60, deadline=None)
