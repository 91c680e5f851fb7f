"""The same accesses to QEMU's serial port and clock, made by a program in place of its firmware.

Only what is the same on every 16550A and MC146818 is compared: not the time a character takes (trigger
levels above 1 show it), not the modem lines' changes, not the byte an empty receiver shows.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from qvm_pc.rtc import Rtc
from qvm_pc.uart16550 import FCR, IER, LCR, LSR, MCR, MSR, RBR, SCR, THR, Uart

COM1, INDEX, DATA = 0x3F8, 0x70, 0x71
REPORT, LEAVE = 0xE9, 0xF4
TABLE, ROM = 0x100, 0x1_0000

#: (port, value to write, or None for a read)
Access = tuple[int, int | None]


def program(accesses: Sequence[Access]) -> bytes:
    """A firmware that makes the accesses, sends what it reads to REPORT, and ends QEMU."""
    start = bytes.fromhex("fa 8cc8 8ed8 be0001 fc")  # cli; ds = cs; si = TABLE; cld
    fetch = bytes.fromhex(
        "ac 3cff 7416 88c3 ac 88c1 ad 89c2 84db 7405 88c8 ee eb"
    )  # lodsb ... out dx, al; jmp
    read = bytes.fromhex("ec e6e9 eb")  # in al, dx; out REPORT, al; jmp
    leave = bytes.fromhex("30c0 e6f4 f4")  # xor al, al; out LEAVE, al; hlt
    code = start + fetch
    code += (len(start) - len(code) - 1 & 0xFF).to_bytes(1, "little")
    code += read
    code += (len(start) - len(code) - 1 & 0xFF).to_bytes(1, "little")
    code += leave
    rows = b"".join(
        bytes([value is not None, value or 0]) + port.to_bytes(2, "little") for port, value in accesses
    )
    image = bytearray(code.ljust(TABLE, b"\0") + rows + b"\xff").ljust(ROM, b"\0")
    assert len(image) == ROM, "more accesses than the image has room for"
    image[0xFFF0:0xFFF3] = b"\xe9" + (-0xFFF3 & 0xFFFF).to_bytes(2, "little")
    return bytes(image)


def qemu(folder: Path, accesses: Sequence[Access]) -> list[int]:
    """What QEMU's devices give for the reads, in their order."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    rom, report = folder / "rom", folder / "report"
    rom.write_bytes(program(accesses))
    done = subprocess.run(
        [
            "qemu-system-x86_64", "-machine", "pc", "-accel", "tcg", "-m", "16", "-nodefaults",
            "-display", "none", "-serial", "null", "-bios", rom,
            "-rtc", "base=2026-11-22T13:08:09,clock=vm", "-chardev", f"file,id=report,path={report}",
            "-device", f"isa-debugcon,iobase={REPORT:#x},chardev=report",
            "-device", f"isa-debug-exit,iobase={LEAVE:#x},iosize=1",
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    return list(report.read_bytes())


def uart_traffic(seed: int, count: int) -> list[Access]:
    """Random use of a serial port."""
    pick = random.Random(seed)
    # A divisor so high that no time-out of the receiver comes within the test.
    accesses: list[Access] = [(COM1 + LCR, 0x80), (COM1 + 1, 0xFF), (COM1 + LCR, 0x03), (COM1 + MCR, 0)]
    writes = {
        THR: range(256), IER: range(8), MCR: [0x00, 0x03, 0x0B, *range(0x10, 0x20)], SCR: range(256),
        LSR: range(256), MSR: range(256),
    }  # fmt: skip
    while len(accesses) < count:
        register = pick.choice([*writes, THR, THR, FCR, LCR])
        if register == LCR:
            accesses += [(COM1 + LCR, 0x83), (COM1, pick.randrange(256)), (COM1, None), (COM1 + 1, None)]
            accesses += [(COM1 + LCR, None), (COM1 + LCR, 0x03)]
        elif register == FCR:
            # Whether clearing an empty transmitter is an event differs from part to part: nobody looks.
            accesses += [(COM1 + IER, 0), (COM1 + FCR, pick.choice([0, 1, 1, 3, 5, 7]))]
        else:
            accesses.append((COM1 + register, pick.choice(list(writes[register]))))
        accesses += [(COM1 + pick.choice([RBR, IER, 2, LCR, MCR, LSR, MSR, SCR]), None) for _ in range(2)]
    return accesses


@pytest.mark.parametrize("seed", range(3))
def test_a_serial_port_answers_as_qemus_does(tmp_path: Path, seed: int) -> None:
    accesses = uart_traffic(seed, 12000)
    theirs = iter(qemu(tmp_path, accesses))
    uart = Uart()
    compared = 0
    for number, (port, value) in enumerate(accesses):
        register = port - COM1
        if value is not None:
            uart.write(register, value)
            continue
        ready = uart.read(LCR) & 0x80 or bool(uart._fifo)
        ours, other = uart.read(register), next(theirs)
        if register == MSR:
            ours, other = ours & 0xF0, other & 0xF0
        if register != RBR or ready:
            compared += 1
            assert f"{ours:#x}" == f"{other:#x}", f"register {register} after {accesses[:number][-12:]}"
    assert compared > 5000


def at(index: int, value: int | None) -> list[Access]:
    return [(INDEX, index), (DATA, value)]


@pytest.mark.parametrize("b", [0x82, 0x86, 0x80, 0x84], ids=["bcd", "binary", "bcd-12", "binary-12"])
def test_a_clock_answers_as_qemus_does(tmp_path: Path, b: int) -> None:
    """Read while it stands; set; then run, all but the second, and the same for alarm and memory."""
    times = {
        0x82: [0x01, 0x59, 0x23, 0x07, 0x29, 0x02, 0x28, 0x20],
        0x86: [1, 59, 23, 7, 29, 2, 28, 20],
        0x80: [0x01, 0x59, 0x91, 0x07, 0x29, 0x02, 0x28, 0x20],
        0x84: [1, 59, 0x8B, 7, 29, 2, 28, 20],
    }
    fields = (0, 2, 4, 6, 7, 8, 9, 0x32)
    accesses: list[Access] = [*at(0x0A, 0x20), *at(0x0C, None), *at(0x0B, b)]
    for index, value in zip(fields, times[b], strict=True):
        accesses += at(index, value)
    for index in (1, 3, 5, 0x0D, 0x70):
        accesses += at(index, 0x5A)
    accesses += [access for index in (*fields, 1, 3, 5, 0x0A, 0x0B, 0x0D, 0x70) for access in at(index, None)]
    accesses += at(0x0B, b & 0x7F)
    accesses += [access for index in (*fields[1:], 0x0A, 0x0B, 0x0D) for access in at(index, None)]
    # In the other code, the same time.
    accesses += at(0x0B, b & 0x7F ^ 0x04)
    accesses += [access for index in (*fields[1:], 0x0B) for access in at(index, None)]
    theirs = qemu(tmp_path, accesses)
    rtc, index, ours = Rtc(lambda: 1795352889.0), 0, []
    for port, value in accesses:
        if port == INDEX:
            index = value or 0
        elif value is None:
            ours.append(rtc.read(index))
        else:
            rtc.write(index, value)
    assert [f"{each:#x}" for each in ours] == [f"{each:#x}" for each in theirs]
