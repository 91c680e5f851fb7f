"""ELF files by PVH (xen/include/public/arch-x86/hvm/start_info.h) or at their entry, and raw ones."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvmcore.engine import CpuEntry
from qvmcore.memory import GuestMemory
from qvmcore.types import MemorySpec
from tests.unit.x86_files import (
    E820_64M,
    GDT_32,
    GDT_LONG,
    LONG,
    MIB,
    Loader,
    bzimage,
    elf32,
    elf64,
    elf_note,
)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory.allocate([MemorySpec(0, 64 * MIB)])
    yield memory
    memory.close()


@pytest.fixture
def load(tmp_path: Path, memory: GuestMemory) -> Loader:
    return Loader(tmp_path, memory)


def many_segments(count: int) -> bytes:
    """An ELF file with one segment ``count`` times."""
    file = bytearray(elf64())
    file[32:40] = struct.pack("<Q", len(file))
    file[56:58] = struct.pack("<H", count)
    return bytes(file) + file[64 : 64 + 56] * count


@pytest.fixture
def elftools() -> None:
    pytest.importorskip("elftools", reason="pyelftools is not installed")


@pytest.mark.usefixtures("elftools")
@pytest.mark.parametrize("make", [elf64, elf32])
@pytest.mark.parametrize("size", [4, 8])
def test_pvh_start_info(load: Loader, make: object, size: int) -> None:
    other = elf_note(b"build", name=b"GNU\0", kind=3) + elf_note(b"\0", name=b"Linux\0", kind=18)
    other += elf_note(struct.pack("<I", MIB + 0x80), kind=17)
    note = other + elf_note((MIB + 0x40).to_bytes(size, "little"))
    entry = load(make(note=note), initrd=b"initrd!", cmdline="console=ttyS0")  # type: ignore[operator]
    assert entry == CpuEntry(MIB + 0x40, {"rflags": 2, "gdt": 0x500, "rbx": 0x6000}, "protected32")
    assert load.memory.read(0x500, 32) == GDT_32
    assert load.memory.read(MIB, 17) == b"\xf4" * 16 + b"\0"
    info = struct.unpack("<IIIIQQQQII", load.memory.read(0x6000, 56))
    magic, version, flags, modules, module_list, cmdline, rsdp, map_at, count, zero = info
    assert (magic, version, flags, modules, rsdp, zero) == (0x336EC578, 1, 0, 1, 0xE0000, 0)
    assert load.text(cmdline) == b"console=ttyS0"
    assert struct.unpack("<4Q", load.memory.read(module_list, 32)) == (64 * MIB - 4096, 7, 0, 0)
    table = list(struct.iter_unpack("<QQII", load.memory.read(map_at, 24 * count)))
    assert table == [(*entry, 0) for entry in E820_64M]


@pytest.mark.usefixtures("elftools")
def test_pvh_without_initrd_and_command_line(load: Loader) -> None:
    load(elf64(note=elf_note(struct.pack("<I", MIB))))
    info = struct.unpack("<IIIIQQQQII", load.memory.read(0x6000, 56))
    assert info[3:6] == (0, 0, 0)


@pytest.mark.usefixtures("elftools")
def test_elf_without_a_note_starts_at_its_entry(load: Loader) -> None:
    entry = load(elf64(), initrd=b"initrd!", cmdline="quiet")
    assert entry == CpuEntry(MIB + 4, LONG, "long64")
    assert load.text(load.params(0x228, 4)) == b"quiet"
    assert (load.params(0x218, 4), load.params(0x21C, 4)) == (64 * MIB - 4096, 7)
    assert load.params(0x070, 8) == 0xE0000
    assert load.params(0x202, 4) == 0  # no setup header
    assert load.e820() == E820_64M
    entry = load(elf32())
    assert entry == CpuEntry(MIB + 8, {"rflags": 2, "gdt": 0x500, "rbx": 0x6000}, "protected32")


@pytest.mark.usefixtures("elftools")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (elf64(machine=183), "DIR/kernel: an ELF file for EM_AARCH64, not for x86-64 or x86; "
                             'write board = "arm64-virt" instead of "x86_64-pc"'),
        (elf64(machine=8), "DIR/kernel: an ELF file for EM_MIPS, not for x86-64 or x86"),
        (elf64(machine=60000), "DIR/kernel: an ELF file for 60000, not for x86-64 or x86"),
        (elf64(address=65 * MIB), "DIR/kernel: the kernel (12K at 0x4100000) does not fit into RAM; "
                                  "RAM is [0x0, 0x4000000); give the guest more"),
        (elf64(entry=1 << 40), "DIR/kernel: the entry point 0x10000000000 of the ELF file is not in RAM"),
        (elf64(address=0x8000),
         "the boot page tables [0x9000, 0xf000) and DIR/kernel: the kernel [0x8000, 0xb000) overlap; "
         "load the kernel elsewhere"),
        (elf64(note=elf_note(b"abc")), "DIR/kernel: damaged ELF file: a PVH entry of 3 bytes"),
        (elf64(note=elf_note(b"\xff" * 8)), "DIR/kernel: the entry point 0xffffffffffffffff of the ELF file "
                                            "is not in RAM"),
        (elf64(body=bytes(0x3001)),
         "DIR/kernel: damaged ELF file: a segment is larger in the file than in memory"),
        (elf64()[:180], "DIR/kernel: damaged ELF file: a segment ends behind the end of the file"),
        (elf64(address=1 << 31)[:64 + 8].ljust(176, b"\0"),
         "DIR/kernel: the ELF file has nothing to load (no PT_LOAD segment)"),
        (many_segments(257), "DIR/kernel: damaged ELF file: 257 segments; a kernel has a handful"),
        (elf64()[:5] + b"\x02\x01" + bytes(11) + b"\x3e" + elf64()[19:],
         "DIR/kernel: a big-endian ELF file; only little-endian guests can be started"),
        (elf64()[:70], "DIR/kernel: damaged ELF file: "),
    ],
)  # fmt: skip
def test_elf_files_that_cannot_be_started(load: Loader, data: bytes, message: str) -> None:
    text = load.error(data)
    assert text == message or (message.endswith(": ") and text.startswith(message))


@pytest.mark.usefixtures("elftools")
@pytest.mark.parametrize(
    "note",
    [
        b"\0" * 11,
        b"\0" * 4096,
        struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 18) + b"Xen\0",
        struct.pack("<III", 4, 5, 18) + b"Xen\0" + b"\0" * 4,
        elf_note(b"\0" * 4, name=b"Xem\0"),
    ],
    ids=["short", "zeros", "huge", "behind-the-end", "another-owner"],
)
def test_notes_that_are_damaged_or_foreign_are_no_pvh_note(load: Loader, note: bytes) -> None:
    assert load(elf64(note=note)).mode == "long64"


def test_elf_by_name_and_by_mistake(load: Loader) -> None:
    assert load.error(b"no", kind="elf") == (
        "DIR/kernel: is not a kernel: first bytes 6e 6f; expected an ELF file"
    )
    assert "is not a kernel" in load.error(elf64(), kind="linux")
    assert load.error(bzimage(), kind="elf").startswith("DIR/kernel: is not a kernel")


def test_raw_below_1_mib_starts_in_real_mode(load: Loader) -> None:
    # All of low memory is the image's: nothing is put where the others have their tables.
    body = bytes(range(1, 251)) * 100
    assert load(body, kind="raw", address=0x400) == CpuEntry(0x400, {"rflags": 2}, "real16")
    assert load.memory.read(0x400, len(body) + 8) == body + bytes(8)
    assert load.memory.read(0, 0x400) == bytes(0x400)
    assert load.memory.read(0xE0000, 8) == b"RSD PTR "


def test_raw_from_1_mib_on_starts_in_long_mode(load: Loader) -> None:
    entry = load(b"\xf4", kind="raw", address=MIB, initrd=b"x", cmdline="y")
    assert entry == CpuEntry(MIB, LONG, "long64")
    assert load.memory.read(0x500, 32) == GDT_LONG
    assert load.text(load.params(0x228, 4)) == b"y" and load.params(0x21C, 4) == 1


def test_raw_mode_is_chosen(load: Loader) -> None:
    entry = load(b"\xf4", kind="raw", address=0x10000, mode="long64")
    assert (entry.pc, entry.mode) == (0x10000, "long64")
    entry = load(b"\xf4", kind="raw", address=2 * MIB, mode="protected32")
    assert entry == CpuEntry(2 * MIB, {"rflags": 2, "gdt": 0x500, "rbx": 0x6000}, "protected32")
    assert load.memory.read(0x500, 32) == GDT_32
    assert load(b"\xf4", kind="raw", address=0, mode="real16").pc == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "DIR/kernel: a raw kernel needs a place; write address = 0x7c00 in [load]"),
        ({"address": 0x10000},
         "DIR/kernel: a raw kernel at 0x10000 cannot start in real mode, where the first instruction is "
         'below 0x10000; lower address, or write mode = "protected32" or "long64"'),
        ({"address": MIB, "mode": "real16"},
         "DIR/kernel: a raw kernel at 0x100000 cannot start in real mode, where the first instruction is "
         'below 0x10000; lower address, or write mode = "protected32" or "long64"'),
        ({"address": 0, "cmdline": "x"},
         "DIR/kernel: a kernel in real mode is told of no initrd and no command line; "
         "remove initrd and cmdline, or choose another mode"),
        ({"address": 0, "initrd": b"x"},
         "DIR/kernel: a kernel in real mode is told of no initrd and no command line; "
         "remove initrd and cmdline, or choose another mode"),
        ({"address": 0x8FFF, "mode": "long64"},
         "the boot page tables [0x9000, 0xf000) and DIR/kernel: the kernel [0x8fff, 0x9001) overlap; "
         "load the kernel elsewhere"),
        ({"address": 0xE0000 - 1, "mode": "long64"},
         "DIR/kernel: the kernel [0xdffff, 0xe0001) and an ACPI table [0xe0000, 0xe0008) overlap; "
         "load the kernel elsewhere"),
        ({"address": 64 * MIB - 1}, "DIR/kernel: the kernel (2 bytes at 0x3ffffff) does not fit into RAM; "
                                    "RAM is [0x0, 0x4000000); give the guest more"),
    ],
)  # fmt: skip
def test_raw_that_cannot_be_started(load: Loader, arguments: dict[str, object], message: str) -> None:
    assert load.error(b"\xf4\xf4", kind="raw", **arguments) == message


def test_raw_of_no_bytes_is_refused(load: Loader) -> None:
    text = "DIR/kernel: there is nothing to start: the file is empty"
    assert load.error(b"", kind="raw", address=64 * MIB) == text
    assert load.error(b"", kind="raw", address=0) == text


def test_raw_above_4_gib_is_out_of_reach(tmp_path: Path) -> None:
    memory = GuestMemory.allocate([MemorySpec(0, MIB), MemorySpec(1 << 32, MIB)])
    assert Loader(tmp_path, memory).error(b"\xf4", kind="raw", address=1 << 32) == (
        "DIR/kernel: the entry point 0x100000000 is above 4 GiB, where no CPU starts here"
    )
    memory.close()


def test_mode_is_for_raw_kernels(load: Loader) -> None:
    assert load.error(bzimage(), mode="long64") == (
        "mode = 'long64' is for raw kernels; others say themselves how they start; "
        'remove mode, or write format = "raw"'
    )
