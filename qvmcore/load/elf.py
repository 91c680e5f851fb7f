"""ELF kernels (floor 8): reading the headers, placing the segments. For every architecture.

Parsed with pyelftools, the optional extra ``qvmcore[elf]``. Segments go to their physical addresses.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from qvmcore.errors import QvmError
from qvmcore.load.common import file_size, load_part, open_file, ram_hint
from qvmcore.memory import GuestMemory

#: Boards by what ELF calls their machine.
_BOARDS = {"EM_AARCH64": "arm64-virt", "EM_X86_64": "x86_64-pc", "EM_386": "x86_64-pc"}

_NOTE = struct.Struct("<III")  # n_namesz, n_descsz, n_type
#: Notes of a kernel are a few hundred bytes; more is not looked at.
_NOTES_MAX = 64 << 10
_SEGMENTS_MAX = 256


class Segment(NamedTuple):
    """A PT_LOAD segment: physical place and size in memory, offset and size in the file; bytes."""

    address: int
    size: int
    offset: int
    stored: int

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.address + self.size


class ElfKernel(NamedTuple):
    """The headers of an ELF file; ``segments`` are those that take memory, ``notes`` raw PT_NOTE content."""

    path: Path
    machine: str
    entry: int
    segments: tuple[Segment, ...]
    notes: tuple[bytes, ...]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Address and size of every segment."""
        return [(segment.address, segment.size) for segment in self.segments]


def read_elf(path: Path, machines: Mapping[str, str], board: str) -> ElfKernel:
    """The headers of a file for one of ``machines`` (ELF's name: the user's name).

    Raises QvmError for a damaged file, one of another machine (``board`` is named in it), and one
    without a segment; HostError when it cannot be read.
    """
    size = file_size(path)
    machine, entry, segments, notes = _parse(path, size)
    if machine not in machines:
        expected, right = " or ".join(machines.values()), _BOARDS.get(machine, "")
        hint = f'write board = "{right}" instead of "{board}"' if right else ""
        raise QvmError(f"{path}: an ELF file for {machine}, not for {expected}", hint=hint)
    if not segments:
        raise QvmError(f"{path}: the ELF file has nothing to load (no PT_LOAD segment)")
    if len(segments) > _SEGMENTS_MAX:
        raise QvmError(f"{path}: damaged ELF file: {len(segments)} segments; a kernel has a handful")
    for segment in segments:
        if segment.offset + segment.stored > size:
            raise QvmError(f"{path}: damaged ELF file: a segment ends behind the end of the file")
        if segment.stored > segment.size:
            raise QvmError(f"{path}: damaged ELF file: a segment is larger in the file than in memory")
    return ElfKernel(path, machine, entry, segments, notes)


def place_elf(elf: ElfKernel, memory: GuestMemory) -> None:
    """Read every segment to its place. Raises QvmError when one or the entry is not in RAM, HostError."""
    for segment in elf.segments:
        if not memory.contains(segment.address, segment.size):
            message = f"{elf.path}: the ELF segment [{segment.address:#x}, +{segment.size:#x}) is not in RAM"
            raise QvmError(message, hint=ram_hint(memory))
    for segment in elf.segments:
        load_part(elf.path, segment.offset, memory.view(segment.address, segment.stored))
    check_entry(elf, elf.entry, memory)


def check_entry(elf: ElfKernel, entry: int, memory: GuestMemory) -> None:
    """Raise QvmError when the first instruction is not in RAM."""
    if not memory.contains(entry, 4):
        raise QvmError(f"{elf.path}: the entry point {entry:#x} of the ELF file is not in RAM")


def find_note(elf: ElfKernel, name: bytes, kind: int) -> bytes | None:
    """The content of the note ``kind`` of the owner ``name``; None without one. Never raises.

    Notes are a name and a content behind three numbers, both padded to 4 bytes (gABI, "Note Section").
    """
    for data in elf.notes:
        at = 0
        while at + _NOTE.size <= len(data):
            name_size, size, found = _NOTE.unpack_from(data, at)
            start = at + _NOTE.size
            content = start + (name_size + 3 & ~3)
            if content + size > len(data):
                break
            if found == kind and data[start : start + name_size].rstrip(b"\0") == name:
                return data[content : content + size]
            at = content + (size + 3 & ~3)
    return None


def _parse(path: Path, size: int) -> tuple[str, int, tuple[Segment, ...], tuple[bytes, ...]]:
    """Machine, entry point, segments that take memory, notes."""
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise QvmError(f"{path}: ELF kernels need pyelftools", hint="pip install 'qvmcore[elf]'") from None
    open_file(path).close()  # so that a file that cannot be opened is not called damaged
    with path.open("rb") as file:
        try:
            elf = ELFFile(file)
            machine, entry = str(elf.header.e_machine), int(elf.header.e_entry)
            if not elf.little_endian:
                raise QvmError(f"{path}: a big-endian ELF file; only little-endian guests can be started")
            headers = [segment.header for segment in elf.iter_segments()] if machine in _BOARDS else []
            segments = tuple(
                Segment(int(h.p_paddr), int(h.p_memsz), int(h.p_offset), int(h.p_filesz))
                for h in headers
                if h.p_type == "PT_LOAD" and (h.p_memsz or h.p_filesz)
            )
            spans = [(int(h.p_offset), int(h.p_filesz)) for h in headers if h.p_type == "PT_NOTE"]
            notes = []
            for offset, length in spans[:_SEGMENTS_MAX]:
                if offset < size:
                    file.seek(offset)
                    notes.append(file.read(min(length, _NOTES_MAX)))
        except QvmError:
            raise
        except Exception as error:
            # pyelftools trusts what it reads: damaged headers end in OSError, KeyError, TypeError ...
            raise QvmError(f"{path}: damaged ELF file: {error}") from error
    return machine, entry, segments, tuple(notes)
