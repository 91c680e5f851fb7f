"""The memory and interrupt map of a machine."""

from __future__ import annotations

from qvmcore import boards
from qvmcore.layout import layout_of, place_windows
from qvmcore.types import IntrSpec, MemorySpec, VdevSpec, Window
from tests.unit.vmfiles import CLASSES


def test_windows_follow_one_another() -> None:
    assert place_windows(0x1000, [Window(0x200), Window(0x1000)]) == [(0x1000, 0x200), (0x1200, 0x1000)]


def test_rows_are_sorted_and_complete() -> None:
    board = boards.get("arm64-virt")
    vdevs = [
        VdevSpec("net", "net0", loc=0x1C0D0000, intr=IntrSpec("gic", 50)),
        VdevSpec("pl011", "uart0", loc=0x09000000, intr=IntrSpec("gic", 33)),
        VdevSpec("silent", "quiet"),
        VdevSpec("unknown", "lost", loc=0),
    ]
    memory = [MemorySpec(0x40000000, 0x1000), MemorySpec(0, 0x1000, rom=True)]
    layout = layout_of(board, memory, vdevs, CLASSES)
    assert [(row.start, row.size, row.kind, row.owner) for row in layout.memory] == [
        (0x0, 0x1000, "rom", "rom"),
        (0x08000000, 0x10000, "controller", "gic"),
        (0x08010000, 0x10000, "controller", "gic"),
        (0x09000000, 0x1000, "vdev", "uart0"),
        (0x1C0D0000, 0x200, "vdev", "net0"),
        (0x1C0D0200, 0x1000, "vdev", "net0"),
        (0x40000000, 0x1000, "ram", "ram"),
    ]
    assert [(str(row.intr), row.owner, row.trigger) for row in layout.interrupts] == [
        ("gic:33", "uart0", "level"), ("gic:50", "net0", "edge"), ("gic:51", "net0", "edge"),
    ]  # fmt: skip
