"""The board x86_64-pc: its map has no clash, RAM is where it says, and a loaded guest finds its tables."""

from __future__ import annotations

import struct
from contextlib import closing
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvmcore.boards import Board, Placement
from qvmcore.boards.x86_64_pc import X86Pc
from qvmcore.errors import QvmError
from qvmcore.layout import MemoryRow, layout_of
from qvmcore.memory import GuestMemory
from qvmcore.types import LoadSpec, MachineSpec, MemorySpec, VdevSpec
from tests.unit.acpifiles import DIRECT, FIXED, PCI, image_of

BOARD: Board = X86Pc()
GIB, TIB = 1 << 30, 1 << 40
CLASSES = {each.spec.type: type(each.vdev) for each in FIXED}
IMPLICIT = [
    VdevSpec(each.type, each.name, None, each.loc, each.intr, space=each.space) for each in BOARD.implicit
]


def test_ram_goes_below_the_devices_then_above_4_gib() -> None:
    assert BOARD.ram(512 << 20) == (MemorySpec(0, 512 << 20),)
    assert BOARD.ram(3 * GIB) == (MemorySpec(0, 3 * GIB),)
    assert BOARD.ram(3 * GIB + 4096) == (MemorySpec(0, 3 * GIB), MemorySpec(4 * GIB, 4096))
    assert BOARD.ram(100 * GIB) == (MemorySpec(0, 3 * GIB), MemorySpec(4 * GIB, 97 * GIB))


@given(st.integers(1, TIB >> 12))
def test_ram_of_any_size_is_complete_and_leaves_the_devices_alone(pages: int) -> None:
    ranges = BOARD.ram(pages << 12)
    assert sum(each.size for each in ranges) == pages << 12
    assert all(each.end <= 3 * GIB or each.start >= 4 * GIB for each in ranges)


def test_nothing_of_the_board_clashes() -> None:
    ram = BOARD.ram(250 * GIB)
    layout = layout_of(BOARD, ram, IMPLICIT, CLASSES, pci=True)
    space = BOARD.vdev_space
    rows = [
        *layout.memory,
        MemoryRow(space.start, space.stop - space.start, "vdev", "suggested places"),
        # KVM keeps a page table and three more pages here.
        MemoryRow(0xFFFB_C000, 0x4000, "controller", "kvm"),
    ]
    assert [(one, other) for one, other in combinations(rows, 2) if one.overlaps(other)] == []
    assert [(one, other) for one, other in combinations(layout.ports, 2) if one.overlaps(other)] == []
    assert all(row.end <= BOARD.address_limit for row in rows)
    assert all(row.end <= BOARD.port_space for row in layout.ports)
    assert sum(row.kind == "pci" for row in rows) == 3


def test_interrupts_of_the_board_are_lines_it_has_and_are_not_shared() -> None:
    lines = {each.name: each.lines for each in BOARD.controllers}
    assert BOARD.pci is not None
    used = [each.intr for each in BOARD.implicit if each.intr is not None] + list(BOARD.pci.intx)
    assert len(used) == len(set(used)) == 7
    assert all(intr.number in lines[intr.controller] for intr in used)
    # Suggestions are for the first controller and avoid the INTx lines; taken ones are passed over.
    assert BOARD.controllers[0].name == "ioapic"
    assert set(BOARD.vdev_lines) < set(lines["ioapic"])
    assert not {intr.number for intr in BOARD.pci.intx} & set(BOARD.vdev_lines)


def test_there_is_no_device_tree() -> None:
    spec = MachineSpec("vm", BOARD.name, "auto", 1, BOARD.ram(GIB), LoadSpec(), ())
    for placement in (None, Placement(0, 0, 0)):
        with pytest.raises(QvmError, match="x86_64-pc is not described by a device tree; qvm acpi writes"):
            BOARD.build_fdt(spec, (), placement)


def scan(memory: GuestMemory) -> list[int]:
    """Where an operating system finds root pointers (ACPI 6.3, 5.2.5.1)."""
    found = []
    for at in range(0xE_0000, 0x10_0000, 16):
        raw = bytes(memory.read(at, 36)) if at + 36 <= 0x10_0000 else b""
        if raw[:8] == b"RSD PTR " and sum(raw[:20]) & 0xFF == 0 and sum(raw) & 0xFF == 0:
            found.append(at)
    return found


def test_5_2_5_1_a_loaded_guest_finds_the_tables_by_itself(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.bin"
    kernel.write_bytes(b"\xf4")
    vdevs = (*FIXED, *DIRECT, *PCI)
    load = LoadSpec(kernel, format="raw", address=0x7C00)
    ram = BOARD.ram(4 << 20)
    spec = MachineSpec("vm", BOARD.name, "auto", 2, ram, load, tuple(each.spec for each in vdevs), pci=True)
    with closing(GuestMemory.allocate(ram)) as memory:
        entry = BOARD.load(spec, vdevs, memory)
        assert (entry.pc, entry.mode) == (0x7C00, "real16")
        assert scan(memory) == [0xE_0000]
        (xsdt,) = struct.unpack("<Q", memory.read(0xE_0018, 8))
        assert bytes(memory.read(xsdt, 4)) == b"XSDT"
        for at, blob in image_of(vdevs, cpus=2, pci=True).blobs:
            assert bytes(memory.read(at, len(blob))) == blob


def test_ram_without_room_for_the_tables_is_refused(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.bin"
    kernel.write_bytes(b"\xf4")
    ram = BOARD.ram(0xE_0000)
    load = LoadSpec(kernel, format="raw", address=0x7C00)
    spec = MachineSpec("vm", BOARD.name, "auto", 1, ram, load, tuple(each.spec for each in FIXED))
    with (
        closing(GuestMemory.allocate(ram)) as memory,
        pytest.raises(QvmError, match=r"ACPI table.* at 0xe0000\) does not fit into RAM; RAM is .* give"),
    ):
        BOARD.load(spec, FIXED, memory)
