"""Configuration space of a function: what a guest may write, capabilities, BAR sizing (PCI 3.0, 6)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvmcore.pci import spec
from qvmcore.pci.bar import Bar
from qvmcore.pci.capability import Capability, ConfigWindow
from qvmcore.pci.function import PciFunction
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.types import MmioHandler, PciAddress, PciId, Window

IDENTITY = PciId(0x1AF4, 0x1042, 0x1C05, 0x0042, 1)


class Log:
    """A handler that records its accesses and answers with a constant."""

    def __init__(self, value: int = 0xA5A5A5A5A5A5A5A5) -> None:
        self.value = value
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []
        self.handler = MmioHandler(self._read, lambda *access: self.writes.append(access))

    def _read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.value & (1 << 8 * size) - 1


class Port:
    """A bus that records where BARs are."""

    def __init__(self) -> None:
        self.placed: dict[int, int | None] = {}
        self.moves = 0

    def place(self, bar: Bar, address: int | None) -> None:
        self.placed[bar.number] = address
        self.moves += 1

    def message(self, address: int, data: int) -> None: ...

    def set_intx(self, level: bool) -> None: ...

    def pulse_intx(self) -> None: ...

    def listen(self, fd: int, address: int, data: int) -> None: ...

    def listen_intx(self, fd: int, resample: int) -> None: ...


def bar(number: int, size: int, *, wide: bool = False, prefetchable: bool = False) -> Bar:
    return Bar(number, Window(size), Log().handler, wide, prefetchable)


VENDOR_CAP = Capability(spec.CAP_VENDOR, bytes([7, 0xAA, 0xBB, 0xCC, 0xDD]), b"\0\0\xff\x0f\0")


def function(
    bars: Sequence[Bar] = (), capabilities: Sequence[Capability] = (), vectors: int = 0, intx: bool = True
) -> PciFunction:
    return PciFunction(
        IDENTITY, 0x018000, bars=bars, capabilities=capabilities, interrupts=PciInterrupts(vectors, intx=intx)
    )


def full() -> PciFunction:
    """One of everything: a 32-bit BAR, a wide prefetchable one, MSI-X with 3 vectors, a vendor capability."""
    return function([bar(0, 0x1000), bar(2, 0x4000, wide=True, prefetchable=True)], [VENDOR_CAP], 3)


#: Initial bytes and writable bits of :func:`full`, written down by hand: offset -> (value, mask).
HEADER = {
    0x00: (0xF4, 0), 0x01: (0x1A, 0), 0x02: (0x42, 0), 0x03: (0x10, 0),
    0x04: (0, 0x06), 0x05: (0, 0x04), 0x06: (0x10, 0),
    0x08: (0x01, 0), 0x09: (0, 0), 0x0A: (0x80, 0), 0x0B: (0x01, 0), 0x0C: (0, 0xFF),
    0x11: (0, 0xF0), 0x12: (0, 0xFF), 0x13: (0, 0xFF),  # BAR 0: 4 KiB
    0x15: (0, 0xF0), 0x16: (0, 0xFF), 0x17: (0, 0xFF),  # BAR 1: the MSI-X table, 4 KiB
    0x18: (0x0C, 0), 0x19: (0, 0xC0), **dict.fromkeys(range(26, 32), (0, 255)),  # BARs 2 and 3: 16 KiB
    0x2C: (0x05, 0), 0x2D: (0x1C, 0), 0x2E: (0x42, 0), 0x34: (0x40, 0), 0x3C: (0, 0xFF), 0x3D: (1, 0),
    0x40: (0x11, 0), 0x41: (0x4C, 0), 0x42: (0x02, 0), 0x43: (0, 0xC0),
    0x44: (0x01, 0), 0x48: (0x31, 0),  # table at 0 of BAR 1, pending bits at 0x30
    0x4C: (0x09, 0), 0x4E: (7, 0), 0x4F: (0xAA, 0), 0x50: (0xBB, 0xFF), 0x51: (0xCC, 0x0F), 0x52: (0xDD, 0),
}  # fmt: skip

writes = st.lists(
    st.tuples(
        st.integers(-9, 4105) | st.sampled_from(sorted(HEADER)),
        st.integers(1, 9),
        st.integers(0, (1 << 72) - 1) | st.just((1 << 72) - 1),
    ),
    max_size=30,
)


@given(writes)
def test_6_2_every_byte_takes_the_writable_bits_and_no_other(accesses: list[tuple[int, int, int]]) -> None:
    device = full()
    model = bytearray(HEADER.get(at, (0, 0))[0] for at in range(4096))
    for offset, size, value in accesses:
        device.config_write(offset, size, value)
        for index in range(size):
            at, bits = offset + index, value >> 8 * index & 0xFF
            if at in HEADER:
                mask = HEADER[at][1]
                model[at] = model[at] & ~mask | bits & mask
    assert bytes(device.config_read(at, 1) for at in range(4096)) == bytes(model)
    for offset, size, _ in accesses:
        expected = bytes(model[at] if 0 <= at < 4096 else 0xFF for at in range(offset, offset + size))
        assert device.config_read(offset, size) == int.from_bytes(expected, "little")


@given(st.integers(4, 31), st.integers(0, 5), st.booleans(), st.booleans())
def test_6_2_5_1_the_sizing_protocol(order: int, number: int, wide: bool, prefetchable: bool) -> None:
    if wide and number == 5:
        number = 4
    device = function([bar(number, 1 << order, wide=wide, prefetchable=prefetchable)])
    at = spec.BAR0 + 4 * number
    assert device.config_read(at, 4) == 4 * wide | 8 * prefetchable
    device.config_write(at, 4, 0xFFFFFFFF)
    low = device.config_read(at, 4)
    assert low & 0xF == 4 * wide | 8 * prefetchable
    if wide:
        device.config_write(at + 4, 4, 0xFFFFFFFF)
        assert -(device.config_read(at + 4, 4) << 32 | low & ~0xF) & (1 << 64) - 1 == 1 << order
    else:
        assert -(low & ~0xF) & 0xFFFFFFFF == 1 << order
    others = [n for n in range(6) if n != number and not (wide and n == number + 1)]
    for other in others:
        device.config_write(spec.BAR0 + 4 * other, 4, 0xFFFFFFFF)
        assert device.config_read(spec.BAR0 + 4 * other, 4) == 0


def test_6_2_5_1_a_huge_wide_bar() -> None:
    device = function([bar(0, 1 << 36, wide=True)])
    device.config_write(0x10, 4, 0xFFFFFFFF)
    device.config_write(0x14, 4, 0xFFFFFFFF)
    assert (device.config_read(0x10, 4), device.config_read(0x14, 4)) == (0x4, 0xFFFFFFF0)


def test_6_2_2_a_bar_decodes_while_memory_space_is_enabled() -> None:
    device, port = full(), Port()
    device.connect(port)
    device.config_write(0x10, 4, 0x20000000)
    device.config_write(0x18, 8, 0x80_0000_4000)
    assert port.moves == 0
    device.config_write(spec.COMMAND, 2, spec.COMMAND_MEMORY)
    assert port.placed == {0: 0x20000000, 1: 0, 2: 0x80_0000_4000}
    device.config_write(spec.COMMAND + 1, 1, 0)
    device.config_write(0x10, 4, 0x20000FFF)  # the same address: its low bits do not exist
    assert port.moves == 3
    device.config_write(0x11, 1, 0x10)
    assert (port.placed[0], device.bar_address(0)) == (0x20001000, 0x20001000)
    device.config_write(spec.COMMAND, 1, 0)
    assert port.placed == {0: None, 1: None, 2: None}
    assert device.bar_address(0) is None


def test_6_2_2_a_function_without_bars_or_interrupts_has_a_constant_command_register() -> None:
    device = PciFunction(IDENTITY, 0x060000)
    device.config_write(0, 8, (1 << 64) - 1)
    device.config_write(0x3C, 4, 0xFFFFFFFF)
    assert (device.config_read(spec.COMMAND, 2), device.config_read(0x3C, 4)) == (0, 0)
    assert not device.bus_master


def test_6_2_3_interrupt_status_follows_the_device() -> None:
    device = full()
    assert device.config_read(spec.STATUS, 2) == spec.STATUS_CAPABILITIES
    device.interrupts.set_intx(True)
    device.config_write(spec.COMMAND, 2, spec.COMMAND_INTX_DISABLE)
    assert device.config_read(spec.STATUS, 2) == spec.STATUS_CAPABILITIES | spec.STATUS_INTERRUPT
    device.interrupts.set_intx(False)
    assert device.config_read(spec.STATUS, 1) == spec.STATUS_CAPABILITIES


def test_6_7_the_chain_has_msix_first_and_dword_alignment() -> None:
    second = Capability(spec.CAP_VENDOR, b"\4\1")
    device = function(capabilities=[VENDOR_CAP, second], vectors=1)
    assert [device.config_read(at, 2) for at in (0x40, 0x4C, 0x54)] == [0x4C11, 0x5409, 0x0009]
    assert (device.offset_of(VENDOR_CAP), device.offset_of(second)) == (0x4C, 0x54)
    device.config_write(0x50, 1, 0x99)
    assert device.read_capability(VENDOR_CAP) == bytes([9, 0x54, 7, 0xAA, 0x99, 0xCC, 0xDD])
    assert device.read_capability(second) == bytes([9, 0, 4, 1])


def test_a_capability_window_answers_accesses_that_lie_inside() -> None:
    log = Log()
    cap = Capability(spec.CAP_VENDOR, bytes(18), bytes(12) + b"\xff" * 6, ConfigWindow(16, 4, log.handler))
    device = function(capabilities=[cap])
    at = device.offset_of(cap) + 16
    assert [device.config_read(at, 4), device.config_read(at + 3, 1)] == [0xA5A5A5A5, 0xA5]
    device.config_write(at + 2, 2, 0x1234)
    assert (log.reads, log.writes) == ([(0, 4), (3, 1)], [(2, 2, 0x1234)])
    # An access over its edge is one to stored bytes, of which the window has none.
    device.config_write(at - 2, 4, 0xFFFFFFFF)
    assert device.config_read(at - 2, 4) == 0xFFFF
    assert len(log.reads + log.writes) == 3


def test_private_registers_are_what_nobody_else_has() -> None:
    log = Log()
    device = PciFunction(IDENTITY, 0, capabilities=[Capability(9, b"\5abc")], private=log.handler)
    assert device.config_read(0x48, 4) == 0xA5A5A5A5
    device.config_write(0xFF8, 8, 7)
    for offset, size in ((0x44, 4), (0x3F, 2), (0x45, 4), (0xFFD, 4), (-1, 1), (0x1000, 1)):
        device.config_write(offset, size, 7)
        device.config_read(offset, size)
    assert (log.reads, log.writes) == ([(0x48, 4)], [(0xFF8, 8, 7)])


def test_bar_accesses_without_the_bus_are_checked() -> None:
    log = Log()
    device = function([Bar(1, Window(0x20, frozenset({2, 4})), log.handler)])
    device.bar_write(1, 0x1C, 4, 5)
    assert device.bar_read(1, 0x1E, 2) == 0xA5A5
    for number, offset, size in ((1, 0x1D, 4), (1, -4, 4), (1, 0, 1), (1, 0, 8), (0, 0, 4), (9, 0, 4)):
        assert device.bar_read(number, offset, size) == (1 << 8 * size) - 1
        device.bar_write(number, offset, size, 5)
    assert (log.reads, log.writes) == ([(0x1E, 2)], [(0x1C, 4, 5)])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: bar(0, 24), "24 bytes; expected a power of two"),
        (lambda: bar(0, 8), "8 bytes; expected a power of two, at least 16"),
        (lambda: bar(6, 16), "a 32-bit BAR is number 0 to 5"),
        (lambda: bar(5, 16, wide=True), "a 64-bit BAR is number 0 to 4"),
        (lambda: bar(0, 1 << 32), "make it wide"),
        (lambda: function([bar(0, 16, wide=True), bar(1, 16)]), "BAR 1 is used twice"),
        (lambda: function([bar(n, 16, wide=True) for n in (0, 2, 4)], vectors=1), "no BAR is left"),
        (lambda: function(capabilities=[Capability(9, bytes(200))]), "do not fit into 256 bytes"),
        (lambda: Capability(256, b""), "expected one byte"),
        (lambda: Capability(9, b"a", b"ab"), "the mask is longer than the body"),
        (lambda: Capability(9, b"ab", window=ConfigWindow(2, 4, Log().handler)), "its window is not inside"),
        (lambda: PciFunction(IDENTITY, 1 << 24), "expected 24 bits"),
        (lambda: PciInterrupts(2049), "expected 0 to 2048"),
        (lambda: PciId(1 << 16, 0), "vendor 0x10000: expected 16 bits"),
        (lambda: PciId(0, 0, revision=256), "expected 8 bits"),
        (lambda: full().offset_of(Capability(9, b"")), "is not one of this function"),
    ],
)
def test_impossible_functions(make: object, text: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("text", "address", "loc", "short"),
    [
        ("pci:0:5", PciAddress(5), "pci:0:5", "00:05.0"),
        (" pci:0:0x1f.7 ", PciAddress(31, 7), "pci:0:31.7", "00:1f.7"),
    ],
)
def test_addresses(text: str, address: PciAddress, loc: str, short: str) -> None:
    parsed = PciAddress.parse(text)
    assert (parsed, parsed.loc, str(parsed)) == (address, loc, short)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pci:5", "expected pci:0:DEVICE"), ("pci:0:5.1.1", "expected pci:0:DEVICE"),
        ("pci:0:zz", "expected numbers"), ("pci:1:5", "there is only PCI bus 0"),
        ("pci:0:32", "devices 0 to 31"), ("pci:0:1.8", "functions 0 to 7"),
    ],
)  # fmt: skip
def test_bad_addresses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PciAddress.parse(text)
