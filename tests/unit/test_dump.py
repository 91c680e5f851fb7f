"""Guest dumps: each architecture's layout, read back by foreign tools."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from qvmcore.dump import write_dump
from qvmcore.memory import GuestMemory
from qvmcore.types import MemorySpec

X86_NAMES = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16))),
    *("rip", "rflags", "cs", "ss", "ds", "es", "fs", "gs", "fs_base", "gs_base"),
)
X86_CONTROL = {"cr0": 0x80050033, "cr2": 0, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD01}
ARM_NAMES = (*(f"x{number}" for number in range(31)), "sp", "pc", "pstate")

#: Low memory with the PCI hole behind it, as on the x86 board.
RAM = (MemorySpec(0, 1 << 20), MemorySpec(1 << 32, 1 << 16))
WORDS = b"in high memory\0"


def numbered(names: Iterable[str], cpu: int) -> dict[str, int]:
    """A value of its own for each register of each vCPU."""
    return {name: (cpu << 16) + 0x1000 + 16 * index for index, name in enumerate(names)}


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory.allocate(RAM)
    memory.write((1 << 32) + 0x2000, WORDS)
    yield memory
    memory.close()


@pytest.fixture
def x86(tmp_path: Path, memory: GuestMemory) -> Path:
    """A dump of a guest with two vCPUs."""
    cpus = [numbered(X86_NAMES, cpu) | X86_CONTROL for cpu in range(2)]
    return write_dump(tmp_path, "vm", "x86_64", memory, cpus)


def run(tool: str, *arguments: str) -> str:
    """What a foreign tool says, or a skip where it is not installed."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout + done.stderr


def notes_of(core: Path) -> list[bytes]:
    with core.open("rb") as file:
        elf = ELFFile(file)
        (segment,) = (each for each in elf.iter_segments() if each["p_type"] == "PT_NOTE")
        return [note["n_descdata"] for note in segment.iter_notes()]


@pytest.mark.parametrize(
    ("arch", "machine", "size", "places"),
    [
        # struct elf_prstatus: 112 bytes, pr_reg, pr_fpvalid and padding. Places are indices in pr_reg.
        ("aarch64", "EM_AARCH64", 392, dict(zip(ARM_NAMES, range(34), strict=True))),
        (
            "x86_64", "EM_X86_64", 336,
            {
                "r15": 0, "r14": 1, "r13": 2, "r12": 3, "rbp": 4, "rbx": 5, "r11": 6, "r10": 7, "r9": 8,
                "r8": 9, "rax": 10, "rcx": 11, "rdx": 12, "rsi": 13, "rdi": 14, "rip": 16, "cs": 17,
                "rflags": 18, "rsp": 19, "ss": 20, "fs_base": 21, "gs_base": 22, "ds": 23, "es": 24,
                "fs": 25, "gs": 26,
            },
        ),
    ],
)  # fmt: skip
def test_every_register_is_where_the_kernels_structure_has_it(
    tmp_path: Path, memory: GuestMemory, arch: str, machine: str, size: int, places: Mapping[str, int]
) -> None:
    cpus = [numbered(places, cpu) for cpu in range(3)]
    core = write_dump(tmp_path, "vm", arch, memory, cpus)
    with core.open("rb") as file:
        elf = ELFFile(file)
        assert (elf["e_type"], elf["e_machine"]) == ("ET_CORE", machine)
    notes = notes_of(core)
    assert [len(note) for note in notes] == [size] * 3
    for number, (note, registers) in enumerate(zip(notes, cpus, strict=True)):
        assert struct.unpack_from("<I", note, 32) == (number + 1,)
        words = struct.unpack_from(f"<{(size - 120) // 8}Q", note, 112)
        assert {name: words[place] for name, place in places.items()} == registers
        assert [word for place, word in enumerate(words) if place not in places.values()] == [0] * (
            len(words) - len(places)
        )


def test_both_pieces_of_ram_are_segments_at_their_addresses(x86: Path) -> None:
    with x86.open("rb") as file:
        loads = [each for each in ELFFile(file).iter_segments() if each["p_type"] == "PT_LOAD"]
        found = [(each["p_vaddr"], each["p_paddr"], each["p_filesz"], each["p_memsz"]) for each in loads]
        assert found == [(0, 0, 1 << 20, 1 << 20), (1 << 32, 1 << 32, 1 << 16, 1 << 16)]
        assert loads[1].data()[0x2000:][: len(WORDS)] == WORDS


def test_a_register_wider_than_its_place_is_cut(tmp_path: Path, memory: GuestMemory) -> None:
    core = write_dump(tmp_path, "vm", "x86_64", memory, [{"r15": 1 << 64 | 5}])
    assert struct.unpack_from("<Q", notes_of(core)[0], 112) == (5,)


def test_readelf_sees_a_core_with_a_status_for_each_vcpu(x86: Path) -> None:
    said = run("readelf", "--wide", "--file-header", "--segments", "--notes", str(x86))
    assert re.search(r"Type: +CORE", said)
    assert "X86-64" in said
    assert len(re.findall(r"^ +LOAD ", said, re.MULTILINE)) == 2
    assert said.count("NT_PRSTATUS") == 2
    assert "Warning" not in said


def test_gdb_shows_registers_of_both_vcpus_and_guest_memory(x86: Path) -> None:
    names = {name: {"rflags": "eflags"}.get(name, name) for name in X86_NAMES}
    show = "info registers " + " ".join(names.values())
    said = run(
        "gdb", "-nx", "-batch", "-ex", f"core-file {x86}",
        "-ex", "thread 1", "-ex", show, "-ex", "thread 2", "-ex", show, "-ex", f"x/s {(1 << 32) + 0x2000:#x}",
    )  # fmt: skip
    if "i386:x86-64" not in run("gdb", "-nx", "-batch", "-ex", "complete set architecture i386:x86-64"):
        pytest.skip("this gdb does not know x86-64")
    assert WORDS[:-1].decode() in said
    shown: dict[str, list[int]] = {}
    for name, value in re.findall(r"^(\w+) +(0x[0-9a-f]+) ", said, re.MULTILINE):
        shown.setdefault(name, []).append(int(value, 16))
    for name, theirs in names.items():
        assert shown[theirs] == [numbered(X86_NAMES, cpu)[name] for cpu in range(2)], name
