"""A guest dump (floor 8): an ELF64 core with the vCPU registers as notes and guest memory as segments.

The name is QNX's: ``<system>-YYYYMMDD-hhmmss.gcore``, with ``-1`` to ``-9`` behind it when taken.
Pages of zeros become holes, so a dump takes the room of what the guest really used.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvmcore.errors import HostError
from qvmcore.memory import GuestMemory, MemoryRegion

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_NHDR = struct.Struct("<III")
_ET_CORE, _PT_LOAD, _PT_NOTE, _NT_PRSTATUS = 4, 1, 4, 1
#: struct elf_prstatus of 64-bit Linux: pr_pid, pr_reg, and pr_fpvalid with its padding behind that.
_PRSTATUS_PID, _PRSTATUS_REGISTERS, _PRSTATUS_REST = 32, 112, 8


@dataclass(frozen=True, slots=True)
class _Arch:
    """What a core says of its architecture: e_machine, and pr_reg by the names of ``Guest.registers``."""

    machine: int
    registers: tuple[str, ...]

    @property
    def prstatus_size(self) -> int:
        return _PRSTATUS_REGISTERS + 8 * len(self.registers) + _PRSTATUS_REST


_ARCHS = {
    # struct user_pt_regs
    "aarch64": _Arch(183, (*(f"x{number}" for number in range(31)), "sp", "pc", "pstate")),
    # struct user_regs_struct; a stopped vCPU has no orig_rax
    "x86_64": _Arch(
        62,
        (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
            *("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "rflags", "rsp", "ss"),
            *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
        ),
    ),
}
_PAGE = 4096
#: Compared with memory at a time; a multiple of the page.
_CHUNK = 64 * 1024
_ALTERNATES = 9


def write_dump(
    folder: Path, name: str, arch: str, memory: GuestMemory, cpus: Sequence[Mapping[str, int]]
) -> Path:
    """Write a core of the stopped guest into ``folder`` and return its path.

    ``cpus`` are the registers of each vCPU by name, as ``Guest.registers`` gives them. Raises
    HostError when the file cannot be written; nothing is left of it then. Which register goes where
    is known for the architectures in ``_ARCHS``; one that is not among the names given is 0.
    """
    layout = _ARCHS[arch]
    path, fd = _create(folder, name)
    try:
        with os.fdopen(fd, "wb") as file:
            notes = b"".join(_prstatus(layout, number, registers) for number, registers in enumerate(cpus))
            loads = memory.regions
            offset = _EHDR.size + _PHDR.size * (1 + len(loads))
            file.write(_header(layout.machine, 1 + len(loads)))
            file.write(_PHDR.pack(_PT_NOTE, 0, offset, 0, 0, len(notes), 0, 4))
            at = _round_up(offset + len(notes))
            for region in loads:
                size = region.size
                file.write(_PHDR.pack(_PT_LOAD, 7, at, region.start, region.start, size, size, _PAGE))
                at += size
            file.write(notes)
            file.seek(_round_up(offset + len(notes)))
            for region in loads:
                _write_region(file.fileno(), file.tell(), region)
                file.seek(region.size, os.SEEK_CUR)
            # The last pages may be holes; the file has its whole length all the same.
            file.truncate()
    except OSError as error:
        path.unlink(missing_ok=True)
        raise HostError.from_os("write the guest dump", path, error) from error
    return path


def _create(folder: Path, name: str) -> tuple[Path, int]:
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{number}" for number in range(1, _ALTERNATES + 1))):
        path = folder / f"{stem}{suffix}.gcore"
        try:
            # A dump holds whatever the guest's memory held: for the owner only.
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        except OSError as error:
            raise HostError.from_os("write the guest dump", path, error) from error
    raise HostError(f"cannot write the guest dump: {folder}/{stem}.gcore and its alternates exist")


def _header(machine: int, segments: int) -> bytes:
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    return _EHDR.pack(
        identity, _ET_CORE, machine, 1, 0, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, segments, 0, 0, 0
    )


def _prstatus(layout: _Arch, number: int, registers: Mapping[str, int]) -> bytes:
    body = bytearray(layout.prstatus_size)
    # Debuggers list the vCPUs as threads by pr_pid.
    struct.pack_into("<I", body, _PRSTATUS_PID, number + 1)
    values = (registers.get(name, 0) & (1 << 64) - 1 for name in layout.registers)
    struct.pack_into(f"<{len(layout.registers)}Q", body, _PRSTATUS_REGISTERS, *values)
    return _NHDR.pack(5, len(body), _NT_PRSTATUS) + b"CORE\0\0\0\0" + body


def _write_region(fd: int, offset: int, region: MemoryRegion) -> None:
    zeros = bytes(_CHUNK)
    for start in range(0, region.size, _CHUNK):
        chunk = region.view[start : start + _CHUNK]
        if chunk == zeros[: len(chunk)]:
            continue
        done = 0
        while done < len(chunk):
            done += os.pwrite(fd, chunk[done:], offset + start + done)


def _round_up(offset: int) -> int:
    return (offset + _PAGE - 1) // _PAGE * _PAGE
