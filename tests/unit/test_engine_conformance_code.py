"""The guest programs of the engine conformance suite are what their sources say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import qvmcore.testing
from qvmcore.testing.access_server import PROGRAM, Order
from qvmcore.testing.guest_archs import ARCHS, Aarch64

SOURCES = Path(qvmcore.testing.__file__).parent / "guest_programs"
#: Prefixes the assembler of an architecture may have, the cross tools' first.
PREFIXES = {"aarch64": ("aarch64-linux-gnu-",), "x86_64": ("x86_64-linux-gnu-", "")}


def assembled(name: str, folder: Path) -> bytes:
    """The source of an architecture's program as machine code; skips without its assembler."""
    prefix = next((each for each in PREFIXES[name] if shutil.which(f"{each}as")), None)
    if prefix is None:
        pytest.skip(f"no assembler for {name}: apt-get install binutils-{name.replace('_', '-')}-linux-gnu")
    target, image = folder / "program.o", folder / "program.bin"
    done = subprocess.run(
        [f"{prefix}as", "-o", target, SOURCES / f"{name}.s"], capture_output=True, text=True
    )
    if done.returncode and "" in PREFIXES[name]:
        pytest.skip(f"the assembler here is not one for {name}: {done.stderr.splitlines()[1:2]}")
    assert done.returncode == 0, done.stderr
    subprocess.run([f"{prefix}objcopy", "-O", "binary", "-j", ".text", target, image], check=True)
    return image.read_bytes()


@pytest.mark.parametrize("name", sorted(ARCHS))
def test_the_listing_is_its_source_assembled(name: str, tmp_path: Path) -> None:
    assert ARCHS[name].code() == assembled(name, tmp_path).rstrip(b"\0")


@pytest.mark.parametrize("name", sorted(ARCHS))
def test_the_routines_are_where_the_host_looks_for_them(name: str) -> None:
    code = ARCHS[name].code()
    assert len(code) <= 0x1000
    orders = [Order.LOAD, Order.STORE, Order.SPIN, Order.SLEEP, Order.END]
    if ARCHS[name].has_ports:
        orders += [Order.IN, Order.OUT]
    for order in orders:
        assert any(code[order : order + 4])


def test_what_both_sides_use_is_in_the_memory_of_the_program() -> None:
    assert PROGRAM.start % 0x1000 == 0
    assert Aarch64().entry().pc == PROGRAM.start
