"""A bzImage ends up where the boot protocol of Linux wants it; bad files are named."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvmcore.acpi import AcpiTables
from qvmcore.engine import CpuEntry
from qvmcore.errors import HostError, QvmError
from qvmcore.load.common import load_part
from qvmcore.load.x86 import load_pc
from qvmcore.memory import GuestMemory
from qvmcore.types import LoadSpec, MemorySpec
from tests.unit.test_load import image, zboot
from tests.unit.x86_files import (
    ACPI,
    E820_64M,
    GDT_LONG,
    LONG,
    MIB,
    Loader,
    bzimage,
    elf32,
    elf64,
)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory.allocate([MemorySpec(0, 64 * MIB)])
    yield memory
    memory.close()


@pytest.fixture
def load(tmp_path: Path, memory: GuestMemory) -> Loader:
    return Loader(tmp_path, memory)


def test_boot_rst_64_bit_protocol_where_things_are(load: Loader) -> None:
    body = bytes(range(256)) * 8
    entry = load(bzimage(body), initrd=b"initrd!", cmdline="console=ttyS0")
    assert entry == CpuEntry(16 * MIB + 0x200, LONG, "long64")
    assert load.memory.read(16 * MIB, len(body)) == body
    assert load.text(load.params(0x228, 4)) == b"console=ttyS0"
    # As high as possible, on a page.
    assert (load.params(0x218, 4), load.params(0x21C, 4)) == (64 * MIB - 4096, 7)
    assert load.memory.read(64 * MIB - 4096, 8) == b"initrd!\0"
    assert load.memory.read(0x500, 32) == GDT_LONG
    assert load.memory.read(0xE0000, 8) == b"RSD PTR "
    assert load.memory.read(0xE0040, 36) == b"XSDT" * 9


def test_boot_rst_setup_header_is_copied_and_completed(load: Loader) -> None:
    load(bzimage(patch={0x1F2: b"\x01\0", 0x24B: b"\x77", 0x26B: b"\x99", 0x26C: b"\x55" * 8}))
    header = load.memory.read(0x7000, 4096)
    assert header[0x1F2] == 1 and header[0x24B] == 0x77
    # The header ends where the jump at 0x200 leads to; what is behind is another field's.
    assert header[0x26B] == 0x99 and header[0x26C:0x274] == bytes(8)
    assert header[0x202:0x206] == b"HdrS"
    assert load.params(0x210, 1) == 0xFF  # type_of_loader: no assigned one
    assert load.params(0x1FA, 2) == 0xFFFF  # vid_mode: normal
    assert load.params(0x214, 4) == 16 * MIB  # code32_start
    assert load.params(0x070, 8) == 0xE0000  # acpi_rsdp_addr
    assert load.params(0x1EF, 1) == 0  # sentinel
    assert load.params(0x250, 8) == 0  # setup_data
    assert header[:0x070] == bytes(0x70)
    assert load.e820() == E820_64M


def test_boot_rst_header_longer_than_its_room_is_cut(load: Loader) -> None:
    load(bzimage(patch={0x201: b"\xff", 0x290: b"\x55" * 16, 0x2D0: b"\x55" * 16}))
    assert load.memory.read(0x7290, 16) == bytes(16)
    assert load.e820() == E820_64M


def test_without_command_line_and_initrd_the_fields_are_zero(load: Loader) -> None:
    stale = struct.pack("<I", 0x1234)
    load(bzimage(patch={0x218: stale, 0x21C: stale, 0x228: stale, 0x250: stale}))
    assert [load.params(field, 4) for field in (0x218, 0x21C, 0x228, 0x250, 0x0C0, 0x0C4, 0x0C8)] == [0] * 7


def test_page_tables_map_the_first_4_gib_to_themselves(load: Loader) -> None:
    cr3 = load(bzimage()).registers["cr3"]

    def walk(address: int) -> int:
        table = cr3
        for shift in (39, 30, 21):
            item = load.number(table + 8 * (address >> shift & 511), 8)
            assert item & 1, f"nothing at {address:#x}"
            assert item & 2, f"{address:#x} cannot be written"
            table = item & ~0xFFF
            if shift == 21:
                assert item & 0x80
        return table + (address & 0x1FFFFF)

    for address in [*range(0, 1 << 32, 2 * MIB), 0x7000, 0xE0000, 0xFEE00000, (1 << 32) - 1]:
        assert walk(address) == address
    assert load.number(cr3 + 8, 4088) == 0
    assert load.number(cr3 + 4096 + 4 * 8, 4096 - 32) == 0


@pytest.mark.parametrize(
    ("patch", "place"),
    [
        ({}, 16 * MIB),
        ({0x258: struct.pack("<Q", 0x1234)}, 2 * MIB),  # pref_address in memory that is a PC's own
        ({0x258: struct.pack("<Q", 16 * MIB + 1)}, 18 * MIB),
        ({0x258: bytes(8), 0x230: b"\0\x10\0\0", 0x260: bytes(4)}, MIB),  # 4 KiB would fit into low memory
        ({0x234: b"\0", 0x258: struct.pack("<Q", MIB)}, MIB),
        ({0x230: struct.pack("<I", 32 * MIB)}, 32 * MIB),
    ],
    ids=[
        "pref_address",
        "low",
        "low-and-small",
        "kernel_alignment",
        "relocatable_kernel=0",
        "large-alignment",
    ],
)
def test_boot_rst_pref_address_and_kernel_alignment(
    load: Loader, patch: dict[int, bytes], place: int
) -> None:
    assert load(bzimage(patch=patch)).pc == place + 0x200
    assert load.memory.read(place, 1024) == b"\xf4" * 1024


def test_a_kernel_goes_above_what_is_in_its_way(load: Loader) -> None:
    load.acpi = AcpiTables(0xE0000, (*ACPI.blobs, (17 * MIB, b"table")))
    assert load(bzimage()).pc == 18 * MIB + 0x200
    assert load.memory.read(17 * MIB, 5) == b"table"
    assert (17 * MIB, 4096, 2) in load.e820()
    assert "and an ACPI table [0x1100000, 0x1100005) overlap" in load.error(elf64(address=17 * MIB))


def test_boot_rst_init_size_is_kept_free_of_the_initrd(load: Loader) -> None:
    size = struct.pack("<I", 40 * MIB)
    load(bzimage(patch={0x260: size}), initrd=bytes(8 * MIB))
    assert load.params(0x218, 4) == 56 * MIB
    # 8 MiB are above the kernel, the rest of what is free is below it.
    load(bzimage(patch={0x260: size}), initrd=bytes(8 * MIB + 1))
    assert load.params(0x218, 4) == 8 * MIB - 4096
    assert load.error(bzimage(patch={0x260: size}), initrd=bytes(15 * MIB + 1)) == (
        "DIR/initrd: the initrd (15.0M) does not fit into the RAM below 0x80000000 that is left; "
        "RAM is [0x0, 0x4000000); give the guest more"
    )


def test_boot_rst_initrd_addr_max(load: Loader) -> None:
    load(bzimage(patch={0x22C: struct.pack("<I", 0x37FFFFF)}), initrd=bytes(5000))
    assert load.params(0x218, 4) == 0x3800000 - 8192


def test_what_is_behind_syssize_is_not_loaded(load: Loader) -> None:
    load(bzimage(b"\x11" * 1024) + b"signature")
    assert load.memory.read(16 * MIB, 1040) == b"\x11" * 1024 + bytes(16)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"12345")
    view = memoryview(bytearray(8))
    load_part(tmp_path / "kernel", 2, view[:3])
    assert bytes(view) == b"345" + bytes(5)
    with pytest.raises(HostError, match=r"^cannot read .*kernel: the file ends after 5 bytes$"):
        load_part(tmp_path / "kernel", 2, view)


def test_ram_in_two_ranges(tmp_path: Path) -> None:
    memory = GuestMemory.allocate([MemorySpec(0, 32 * MIB), MemorySpec(1 << 32, 16 * MIB)])
    load = Loader(tmp_path, memory)
    load(bzimage(), initrd=b"x")
    # A 32-bit address is what every kernel takes.
    assert load.params(0x218, 4) == 32 * MIB - 4096
    assert load.e820()[2:] == [(MIB, 31 * MIB, 1), (1 << 32, 16 * MIB, 1)]
    assert load(elf32()).mode == "protected32"
    memory.close()


def test_boot_rst_cmdline_size(load: Loader) -> None:
    load.memory.write(0x20000, b"\xff" * 4096)
    small = bzimage(patch={0x238: struct.pack("<I", 10)})
    load(small, cmdline="0123456789")
    assert load.text(load.params(0x228, 4)) == b"0123456789"
    assert load.error(small, cmdline="0123456789a") == (
        "the command line has 11 bytes; this kernel takes at most 10"
    )
    assert load(bzimage(), cmdline="bytes that are no text: \udcff")
    assert load.text(load.params(0x228, 4)).endswith(b"text: \xff")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bzimage(patch={0x206: b"\x0b\x02"}),
         "DIR/kernel: an x86 kernel of boot protocol 2.11; 2.12 is the first with a 64-bit entry; "
         "use a 64-bit kernel of Linux 3.8 or later"),
        (bzimage(patch={0x236: b"\xfe"}),
         "DIR/kernel: a 32-bit x86 kernel (bzImage without a 64-bit entry); "
         "use a kernel for x86-64 (amd64), or the vmlinux of this one"),
        (bzimage(patch={0x211: b"\xfe"}),
         "DIR/kernel: a zImage, which is loaded below 1 MiB; build a bzImage"),
        (bzimage()[:0x280],
         "DIR/kernel: damaged bzImage: the file ends in the header; the file may be cut short; get it again"),
        (bzimage()[:-1], "DIR/kernel: damaged bzImage: the kernel [0x600, +0x400) is not inside the file; "
                         "the file may be cut short; get it again"),
        (bzimage(patch={0x1F1: b"\xff"}), "DIR/kernel: damaged bzImage: the kernel [0x20000, +0x400) is not "
                                          "inside the file; the file may be cut short; get it again"),
        (bzimage(patch={0x1F4: b"\x20\0\0\0"}), "DIR/kernel: damaged bzImage: a kernel of 512 bytes; "
                                                "the file may be cut short; get it again"),
        (bzimage(patch={0x230: b"\0\0\0\0"}), "DIR/kernel: damaged bzImage: an alignment of 0x0; "
                                              "the file may be cut short; get it again"),
        (bzimage(patch={0x230: b"\x00\x00\x30\x00"}),
         "DIR/kernel: damaged bzImage: an alignment of 0x300000; "
         "the file may be cut short; get it again"),
        (bzimage(patch={0x260: struct.pack("<I", 49 * MIB)}),
         "DIR/kernel: the kernel with its work space (49M at 0x1000000 or above) does not fit into RAM; "
         "RAM is [0x0, 0x4000000); give the guest more"),
        (bzimage(patch={0x258: b"\xff" * 8}),
         "DIR/kernel: the kernel with its work space (8M at 0xffffffffffffffff or above) does not fit into "
         "RAM; RAM is [0x0, 0x4000000); give the guest more"),
        (bzimage(patch={0x234: b"\0", 0x258: bytes(8)}),
         "DIR/kernel: the kernel with its work space (8M at 0x0) does not fit into RAM; "
         "RAM is [0x0, 0x4000000); give the guest more"),
        (image(), 'DIR/kernel: an arm64 Linux kernel (Image), which x86_64-pc cannot start; '
                  'write board = "arm64-virt"'),
        (zboot(b"x"), "DIR/kernel: an EFI zboot image, which x86_64-pc cannot start; "
                      'x86 kernels come as bzImage; for an arm64 kernel write board = "arm64-virt"'),
        (gzip.compress(elf64(), mtime=0),
         "DIR/kernel: a gzip file; expected a Linux bzImage or an ELF file (vmlinux); "
         "unpack it with gunzip, or use the bzImage of this kernel"),
        (b"", "DIR/kernel: is not a kernel: first bytes none, the file is empty; "
              "expected a Linux bzImage or an ELF file (vmlinux)"),
        (b"#!/bin/sh\n", "DIR/kernel: is not a kernel: first bytes 23 21 2f 62 69 6e 2f 73; "
                         "expected a Linux bzImage or an ELF file (vmlinux)"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_started(load: Loader, data: bytes, message: str) -> None:
    assert load.error(data) == message


@pytest.mark.parametrize("size", [1, 0x1FE, 0x200, 0x205, 0x206, 0x264, 0x28F, 0x290, 0x600, 0x9FF])
def test_a_bzimage_cut_anywhere_is_refused(load: Loader, size: int) -> None:
    text = load.error(bzimage()[:size])
    assert "damaged bzImage" in text if size >= 0x206 else "is not a kernel" in text


def test_little_ram(tmp_path: Path) -> None:
    memory = GuestMemory.allocate([MemorySpec(0, 0x80000), MemorySpec(0xE0000, 0x20000)])
    load = Loader(tmp_path, memory)
    for kernel in (bzimage(), elf32(address=0x10000), elf64(address=0x10000)):
        assert load.error(kernel) == (
            'RAM does not hold [0x0, 0xa0000), where a PC starts a kernel from; write ram = "64M" or more'
        )
    load.acpi = AcpiTables(0x90000, ((0x90000, b"RSD PTR "),))
    assert load.error(bzimage()) == (
        "an ACPI table (8 bytes at 0x90000) does not fit into RAM; "
        "RAM is [0x0, 0x80000), [0xe0000, 0x100000); give the guest more"
    )
    memory.close()


def test_missing_files(load: Loader, memory: GuestMemory) -> None:
    with pytest.raises(HostError, match=r"^cannot read .*gone: No such file or directory$"):
        load_pc(LoadSpec(load.folder / "gone"), memory, ACPI)
    with pytest.raises(QvmError, match="nothing to start: the VM file has no kernel"):
        load_pc(LoadSpec(), memory, ACPI)
    (load.folder / "k").write_bytes(bzimage())
    with pytest.raises(HostError, match=r"^cannot read .*gone: No such file or directory$"):
        load_pc(LoadSpec(load.folder / "k", load.folder / "gone"), memory, ACPI)
