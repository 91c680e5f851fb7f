"""Small kernels of every kind on the machine's own CPU: each finds its command line and prints it."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.x86_files import MIB, bzimage, elf32, elf64, elf_note

# Each prints the text that (r/e)cx or si points to on COM1 and writes 1 to the reset register.
_PRINT_64 = """
    66 ba f8 03         mov dx, 0x3f8
    8a 01               print: mov al, [rcx]
    84 c0               test al, al
    74 06               jz done
    ee                  out dx, al
    48 ff c1            inc rcx
    eb f4               jmp print
    66 ba 0c 06         done: mov dx, 0x60c
    b0 01               mov al, 1
    ee                  out dx, al
    f4                  hlt
    eb fd               jmp hlt
"""
_LONG = "8b 8e 28 02 00 00   mov ecx, [rsi + cmd_line_ptr]" + _PRINT_64
_PROTECTED = """
    8b 4b 18            mov ecx, [ebx + cmdline_paddr]
    66 ba f8 03         mov dx, 0x3f8
    8a 01               print: mov al, [ecx]
    84 c0               test al, al
    74 04               jz done
    ee                  out dx, al
    41                  inc ecx
    eb f6               jmp print
    66 ba 0c 06         done: mov dx, 0x60c
    b0 01               mov al, 1
    ee                  out dx, al
    f4                  hlt
    eb fd               jmp hlt
"""
_REAL = """
    be 15 7c            mov si, text
    ba f8 03            mov dx, 0x3f8
    ac                  print: lodsb
    84 c0               test al, al
    74 03               jz done
    ee                  out dx, al
    eb f8               jmp print
    ba 0c 06            done: mov dx, 0x60c
    b0 01               mov al, 1
    ee                  out dx, al
    f4                  hlt
"""


def code(listing: str) -> bytes:
    """The bytes of a listing: two hexadecimal digits each, in front of three spaces and the text."""
    return b"".join(bytes.fromhex(line.strip().split("   ")[0]) for line in listing.splitlines())


KERNELS = {
    "bzimage": (bzimage(b"\xcc" * 0x200 + code(_LONG) + bytes(512)), ""),
    "elf-entry-64": (elf64(body=b"\xcc" * 4 + code(_LONG)), ""),
    "elf-entry-32": (elf32(body=b"\xcc" * 8 + code(_PROTECTED)), ""),
    "elf-pvh": (elf64(body=b"\xcc" * 8 + code(_PROTECTED), note=elf_note(struct.pack("<I", MIB + 8))), ""),
    "raw-long64": (code(_LONG), 'format = "raw"\naddress = 0x200000'),
    "raw-protected32": (code(_PROTECTED), 'format = "raw"\naddress = 0x10000\nmode = "protected32"'),
    "raw-real16": (code(_REAL) + b"hello, raw-real16\0", 'format = "raw"\naddress = 0x7c00'),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_starts_and_finds_its_command_line(name: str, tmp_path: Path) -> None:
    kvm = pytest.importorskip("qvm_kvm.engine", reason="qvm-kvm is not installed")
    pytest.importorskip("qvm_pc", reason="qvm-pc is not installed")
    if "elf" in name:
        pytest.importorskip("elftools", reason="pyelftools is not installed")
    if reason := kvm.KvmEngine().unusable("x86_64"):
        pytest.skip(reason)
    content, keys = KERNELS[name]
    (tmp_path / "kernel").write_bytes(content)
    cmdline = "" if name == "raw-real16" else f'cmdline = "hello, {name}"'
    (tmp_path / "vm.toml").write_text(
        f'[system]\nboard = "x86_64-pc"\nengine = "kvm"\nram = "64M"\n'
        f'[load]\nkernel = "kernel"\n{cmdline}\n{keys}\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "qvmcore", "run", "vm.toml"],
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"hello, {name}" in done.stdout + done.stderr
    assert "guest-reset" in done.stderr
