"""Starting an x86 guest (floor 8): kernel, initrd, ACPI tables and what the CPU starts from.

========  =========================  ===========  ==============================================
format    file                       CPU mode     starts at, with
========  =========================  ===========  ==============================================
linux     bzImage, protocol >= 2.12  long64       64-bit entry, RSI = boot_params
elf       ELF with a PVH note        protected32  address in the note, RBX = hvm_start_info
elf       ELF, 64-bit                long64       e_entry, RSI = boot_params
elf       ELF, 32-bit                protected32  e_entry, RBX = hvm_start_info
raw       anything                   ``mode``     ``address``, long64 and protected32 as with ELF
========  =========================  ===========  ==============================================

The mode of a raw file is real16 below 1 MiB and long64 above, unless ``mode`` says otherwise. real16
starts with segment 0, has all of memory but the ACPI tables to itself, and is told nothing. Stack
pointer and interrupts are the guest's business: RSP is 0, interrupts are off. Where things are below
1 MiB: :mod:`qvmcore.load.x86_boot`. The initrd is as high as it can be below 4 GiB.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qvmcore.engine import CpuEntry
from qvmcore.errors import QvmError
from qvmcore.load import x86_boot
from qvmcore.load.bzimage import entry_of, place_bzimage, put_boot_params, read_bzimage
from qvmcore.load.common import file_size, load_file, ram_hint, read_head
from qvmcore.load.elf import check_entry, find_note, place_elf, read_elf
from qvmcore.load.kinds import ELF_MAGIC, is_x86_linux, not_a_kernel, refuse_foreign
from qvmcore.load.room import Room
from qvmcore.load.x86_boot import FOUR_GIB, ONE_MIB, PAGE
from qvmcore.memory import GuestMemory
from qvmcore.options import format_size
from qvmcore.types import LoadSpec

if TYPE_CHECKING:
    from qvmcore.acpi import AcpiTables

_BOARD = "x86_64-pc"
_MACHINES = {"EM_X86_64": "x86-64", "EM_386": "x86"}
_EXPECTED = "expected a Linux bzImage or an ELF file (vmlinux)"
_REAL16_END = 0x1_0000
#: XEN_ELFNOTE_PHYS32_ENTRY of xen/include/public/elfnote.h.
_PVH_OWNER, _PVH_ENTRY = b"Xen", 18
#: IF off and the bit that is always set.
_RFLAGS = 0x2


def load_pc(spec: LoadSpec, memory: GuestMemory, acpi: AcpiTables) -> CpuEntry:
    """Place everything ``spec`` names and the ACPI tables, and say where the boot CPU starts.

    Raises HostError for a file that cannot be read, QvmError for one that is no kernel or does not fit.
    """
    if spec.kernel is None:
        raise QvmError(
            "nothing to start: the VM file has no kernel", hint='write kernel = "bzImage" in [load]'
        )
    loader = _Loader(spec, memory, acpi)
    if spec.format == "raw":
        return loader.raw(spec.kernel)
    if spec.mode:
        raise QvmError(
            f"mode = {spec.mode!r} is for raw kernels; others say themselves how they start",
            hint='remove mode, or write format = "raw"',
        )
    head = read_head(spec.kernel)
    if head.startswith(ELF_MAGIC) and spec.format in ("auto", "elf"):
        return loader.elf(spec.kernel)
    refuse_foreign(spec.kernel, head, _BOARD)
    if spec.format == "elf":
        raise not_a_kernel(spec.kernel, head, "expected an ELF file")
    if not is_x86_linux(head):
        raise not_a_kernel(spec.kernel, head, _EXPECTED)
    return loader.bzimage(spec.kernel, head)


class _Loader:
    """One load: what is placed, and what the guest is told of it."""

    def __init__(self, spec: LoadSpec, memory: GuestMemory, acpi: AcpiTables) -> None:
        self._spec, self._memory, self._rsdp = spec, memory, acpi.rsdp_address
        self._room = Room(memory)
        blobs = [(address, len(data)) for address, data in acpi.blobs]
        self._room.take("an ACPI table", blobs)
        for address, data in acpi.blobs:
            memory.write(address, data)
        self._map = x86_boot.memory_map(memory, blobs)

    def bzimage(self, path: Path, head: bytes) -> CpuEntry:
        """By the 64-bit protocol of Linux."""
        image = read_bzimage(path, head)
        entry = self._prepare_long()
        cmdline = x86_boot.put_cmdline(self._memory, self._room, self._spec.cmdline, image.cmdline_max)
        start = place_bzimage(image, self._memory, self._room)
        initrd = self._place_initrd(image.initrd_max + 1)
        params = put_boot_params(
            self._memory, self._room, self._map,
            header=image.header, start=start, cmdline=cmdline, initrd=initrd, rsdp=self._rsdp,
        )  # fmt: skip
        return CpuEntry(entry_of(start), {**entry, "rsi": params}, "long64")

    def elf(self, path: Path) -> CpuEntry:
        """By the PVH note, else at the entry point."""
        kernel = read_elf(path, _MACHINES, _BOARD)
        note = find_note(kernel, _PVH_OWNER, _PVH_ENTRY)
        if note is not None and len(note) not in (4, 8):
            raise QvmError(f"{path}: damaged ELF file: a PVH entry of {len(note)} bytes")
        mode = "long64" if note is None and kernel.machine == "EM_X86_64" else "protected32"
        start = kernel.entry if note is None else int.from_bytes(note, "little")
        self._room.take(f"{path}: the kernel", kernel.ranges)
        place_elf(kernel, self._memory)
        check_entry(kernel, start, self._memory)
        return self._start(path, mode, start)

    def raw(self, path: Path) -> CpuEntry:
        """At its first byte."""
        address = self._spec.address
        if address is None:
            raise QvmError(f"{path}: a raw kernel needs a place", hint="write address = 0x7c00 in [load]")
        mode = self._spec.mode or ("real16" if address < ONE_MIB else "long64")
        if mode != "real16":
            self._take_raw(path, address)
            return self._start(path, mode, address)
        if address >= _REAL16_END:
            raise QvmError(
                f"{path}: a raw kernel at {address:#x} cannot start in real mode, where the first"
                f" instruction is below {_REAL16_END:#x}",
                hint='lower address, or write mode = "protected32" or "long64"',
            )
        if self._spec.initrd is not None or self._spec.cmdline:
            raise QvmError(
                f"{path}: a kernel in real mode is told of no initrd and no command line",
                hint="remove initrd and cmdline, or choose another mode",
            )
        self._take_raw(path, address)
        return CpuEntry(address, {"rflags": _RFLAGS}, mode)

    def _take_raw(self, path: Path, address: int) -> None:
        size = file_size(path)
        if not size:
            raise QvmError(f"{path}: there is nothing to start: the file is empty")
        self._room.take(f"{path}: the kernel", [(address, size)])
        load_file(path, self._memory, address, "kernel")

    def _start(self, path: Path, mode: str, pc: int) -> CpuEntry:
        """The state of a kernel that is in place and has no setup header."""
        if pc >= FOUR_GIB:
            raise QvmError(f"{path}: the entry point {pc:#x} is above 4 GiB, where no CPU starts here")
        room, memory = self._room, self._memory
        entry = self._prepare_long() if mode == "long64" else self._prepare_32()
        cmdline = x86_boot.put_cmdline(memory, room, self._spec.cmdline)
        initrd = self._place_initrd(FOUR_GIB)
        if mode == "long64":
            params = put_boot_params(memory, room, self._map, cmdline=cmdline, initrd=initrd, rsdp=self._rsdp)
            return CpuEntry(pc, {**entry, "rsi": params}, mode)
        info = x86_boot.put_start_info(
            memory, room, self._map, cmdline=cmdline, initrd=initrd, rsdp=self._rsdp
        )
        return CpuEntry(pc, {**entry, "rbx": info}, mode)

    def _prepare_long(self) -> dict[str, int]:
        x86_boot.need_low_ram(self._memory)
        gdt = x86_boot.put_gdt(self._memory, self._room, long=True)
        return {"rflags": _RFLAGS, "gdt": gdt, "cr3": x86_boot.put_page_tables(self._memory, self._room)}

    def _prepare_32(self) -> dict[str, int]:
        x86_boot.need_low_ram(self._memory)
        return {"rflags": _RFLAGS, "gdt": x86_boot.put_gdt(self._memory, self._room, long=False)}

    def _place_initrd(self, below: int) -> tuple[int, int] | None:
        """Read the initrd as high as possible below ``below``, which is at most 4 GiB; (address, size)."""
        path = self._spec.initrd
        if path is None:
            return None
        size, what = file_size(path), f"{path}: the initrd"
        address = self._room.highest(size, ONE_MIB, below, PAGE)
        if address is None:
            message = f"{what} ({format_size(size)}) does not fit into the RAM below {below:#x} that is left"
            raise QvmError(message, hint=ram_hint(self._memory))
        self._room.take(what, [(address, size)])
        return address, load_file(path, self._memory, address, "initrd")
