"""Targets for PCI: one function, a bus of them, and shared memory, which is a function with an aperture."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

from qvmcore.bus import AddressSpace, all_ones
from qvmcore.pci.bar import Bar
from qvmcore.pci.capability import Capability
from qvmcore.pci.function import PciFunction
from qvmcore.pci.host import ECAM_WINDOW, HostBridge
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.pci.intx import SharedLine
from qvmcore.testing.fakes import FakeIrq, plug
from qvmcore.types import MmioHandler, PciAddress, PciId, Window
from tests.fuzz.bytesource import ByteSource

_SILENT = MmioHandler(lambda offset, size: 0, lambda offset, size, value: None)


class _Port:
    """A bus that checks what a function asks of it."""

    def __init__(self) -> None:
        self.intx = False
        self.messages = 0

    def place(self, bar: Bar, address: int | None) -> None:
        if address is not None:
            assert address % bar.window.size == 0
            assert 0 <= address < 1 << bar.bits

    def message(self, address: int, data: int) -> None:
        assert 0 <= address < 1 << 64
        assert 0 <= data < 1 << 32
        self.messages += 1

    def set_intx(self, level: bool) -> None:
        assert level != self.intx, "INTx was told without a change"
        self.intx = level

    def pulse_intx(self) -> None:
        assert not self.intx

    def listen(self, fd: int, address: int, data: int) -> None: ...

    def listen_intx(self, fd: int, resample: int) -> None: ...


def pci_function(data: bytes) -> None:
    """Any configuration and table accesses: identity and structure stay, places are possible ones."""
    source = ByteSource(data)
    interrupts = PciInterrupts(source.pick((0, 1, 3, 33)), intx=bool(source.byte() & 1))
    function = PciFunction(
        PciId(0x1C05, 0x1042, 0x1C05, 0x42, 1),
        0x018000,
        bars=[
            Bar(0, Window(0x1000), _SILENT),
            Bar(2, Window(1 << 33), _SILENT, wide=True, prefetchable=True),
        ],
        capabilities=[Capability(9, bytes([18]) + bytes(15), bytes(4) + b"\xff" * 8)],
        interrupts=interrupts,
    )
    port = _Port()
    function.connect(port, multifunction=bool(source.byte() & 1))
    fixed = [(0, 4), (8, 4), (14, 1), (0x2C, 4), (0x34, 1), (0x3D, 1), (0x40, 2)]
    before = [function.config_read(*place) for place in fixed]
    while source:
        action, size = source.byte() % 8, source.pick((4, 4, 1, 2, 8))
        offset = source.byte() if source.byte() & 7 else source.value(2)
        if action < 2:
            assert 0 <= function.config_read(offset, size) < 1 << 8 * size
        elif action < 5:
            function.config_write(offset, size, source.value(size))
        elif action == 5:
            number = source.byte() % 8
            function.bar_write(number, offset, size, source.value(size))
            assert 0 <= function.bar_read(number, offset, size) < 1 << 8 * size
        elif action == 6:
            interrupts.signal(source.value(2))
        else:
            interrupts.set_intx(bool(source.byte() & 1), source.byte() % 3)
        assert [function.config_read(*place) for place in fixed] == before
    for source_number in range(3):
        interrupts.set_intx(False, source_number)
    function.config_write(4, 2, 0)
    assert all(function.bar_address(number) is None for number in range(6))
    assert not port.intx


#: Where the bus of the target decodes BARs, and a device that is no PCI function, inside of the first.
ECAM, APERTURES = 0x1000_0000, ((0x2000_0000, 0xF8_0800), (0x80_0000_0000, 1 << 36))
OTHER, OTHER_WINDOW = 0x2000_8000, Window(0x1000)


def pci_bus(data: bytes) -> None:
    """Any ECAM accesses to a bus of functions: BARs are where the guest put them, or not decoded."""
    source = ByteSource(data)
    bus, line, messages = AddressSpace(), FakeIrq(), []
    bridge = HostBridge(bus, APERTURES, lambda address, value: messages.append((address, value)))
    shared, interrupts = SharedLine(line), []
    for number, place in enumerate((PciAddress(1), PciAddress(1, 1), PciAddress(31, 7))):
        interrupts.append(PciInterrupts(number, intx=True))
        bars = [Bar(0, Window(0x1000), _SILENT), Bar(2, Window(1 << 20), _SILENT, wide=True)]
        function = PciFunction(PciId(0x1C05, number), 0xFF0000, bars=bars, interrupts=interrupts[-1])
        config = MmioHandler(function.config_read, function.config_write)
        bridge.add(place, function, config, shared, f"function {number}")
    bus.insert(ECAM, ECAM_WINDOW, MmioHandler(bridge.ecam_read, bridge.ecam_write), "ecam")
    bus.insert(OTHER, OTHER_WINDOW, MmioHandler(lambda offset, size: 7, _SILENT.write), "other")
    bridge.start()
    bus.freeze()
    while source:
        action, size = source.byte() % 8, source.pick((4, 4, 2, 1, 8))
        where = source.pick((1 << 15, 1 << 15 | 1 << 12, 31 << 15 | 7 << 12, 0))
        offset = (where | source.byte()) if source.byte() & 7 else source.uint(3) % ECAM_WINDOW.size
        if action == 0:
            assert 0 <= bus.read(ECAM + offset, size) <= all_ones(size)
        elif action < 6:
            # Mostly addresses at the edges of what can be decoded.
            value = source.pick((0, 0x2000_0000, OTHER, 0x20F8_0000, 0x80, 7, all_ones(4)))
            bus.write(ECAM + offset, size, value & all_ones(size) if action < 4 else source.value(size))
        elif action == 6:
            bus.write(source.pick((0x2000_0000, 0x2000_1000, OTHER, 1 << 39)) + source.byte(), size, 1)
        else:
            interrupts[source.byte() % 3].line(source.byte() & 1).set(bool(source.byte() & 1))
        mapped = list(bus)
        assert all(one.end <= two.base for one, two in itertools.pairwise(mapped))
        for each in mapped:
            if each.owner.startswith("function"):
                assert any(base <= each.base and each.end <= base + size for base, size in APERTURES)
        assert bus.read(OTHER, 4) == 7, "a BAR hides another device"


def shmem(data: bytes) -> None:
    """Any accesses to factory and regions: names, sizes, notifications, detaching."""
    from qvm_shmem.device import Shmem

    source = ByteSource(data)
    folder = Path(tempfile.mkdtemp(prefix="qvm-fuzz-"))
    options = {"directory": str(folder / "regions"), "create": [{"name": "a", "size": "8K"}]}
    try:
        with plug(Shmem, options, base_dir=folder) as device:
            assert device.device is not None
            aperture = device.device.bars[1][0]
            while source:
                action, size = source.byte() % 8, source.pick((4, 4, 1, 2, 8))
                if action < 2:
                    device.write(0x1C + source.byte() % 40, source.value(size), size)
                elif action == 2:
                    device.write(0x1C, source.pick((0x61, 0x62, 0x2E, 0x2F2E2E)))
                    device.write(source.pick((0x18, 0x18, 0x3C)), source.byte() & 3)
                elif action == 3:
                    device.write(source.uint(2) & 0xFFF, source.value(size), size)
                elif action == 4:
                    assert 0 <= device.read(source.uint(2) & 0xFFF, size) <= all_ones(size)
                elif action == 5:
                    at = aperture + (source.byte() % 8) * 4096 + 4 * (source.byte() % 5)
                    device.bus.write(at, size, source.value(size))
                elif action == 6:
                    assert 0 <= device.bus.read(aperture + source.uint(3), size) <= all_ones(size)
                else:
                    device.vdev.on_reset()
            device.settle()
            assert device.ctx.faults == [], device.ctx.faults
            assert [result for result in device.terminate() if result.verdict != "ok"] == []
        inside = {path.resolve().is_relative_to(folder) for path in folder.rglob("*")}
        assert inside <= {True}
    finally:
        shutil.rmtree(folder)
