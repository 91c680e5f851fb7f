"""What the rare exits of KVM mean for the guest; the page of the kernel is written by the test."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
from qvm_kvm import exits, runpage
from qvm_kvm.ending import end_of

from qvmcore.api import GuestEnd, Reason


class Backend:
    """At rip 0x1000, where a HLT is."""

    def __init__(self, known: bool = True) -> None:
        self.known = known

    def registers(self, _fd: int) -> Mapping[str, int]:
        if not self.known:
            raise OSError("gone")
        return {"rip": 0x1000, "rax": 7}

    def code(self, _fd: int, registers: Mapping[str, int]) -> bytes:
        return b"\xf4\x90" if registers else b""

    def where(self, registers: Mapping[str, int]) -> str:
        return f"rip {registers.get('rip', 0):#x}"


class Page:
    """A page as the kernel fills it."""

    def __init__(self) -> None:
        self.u8 = memoryview(bytearray(4096))
        self.u32, self.u64 = self.u8.cast("I"), self.u8.cast("Q")


def end(page: Page, reason: int, backend: Any = None) -> GuestEnd | None:
    vcpu = cast(Any, SimpleNamespace(index=2, fd=-1, page=page))
    return end_of(vcpu, reason, cast(Any, backend or Backend()))


@pytest.mark.parametrize(
    ("kind", "reason", "code"),
    [
        (exits.SYSTEM_SHUTDOWN, Reason.GUEST_SHUTDOWN, 0),
        (exits.SYSTEM_RESET, Reason.GUEST_RESET, 0),
        (exits.SYSTEM_CRASH, Reason.GUEST_CRASH, 7),
        (9, Reason.HOST_ERROR, 96),
    ],
)
def test_system_events(kind: int, reason: Reason, code: int) -> None:
    page = Page()
    page.u32[runpage.EVENT_TYPE] = kind
    found = end(page, exits.EXIT_SYSTEM_EVENT)
    assert found is not None
    assert (found.reason, found.code) == (reason, code)


def test_an_interrupted_run_is_no_end() -> None:
    assert end(Page(), exits.EXIT_INTR) is None


def test_an_emulation_error_shows_the_bytes_kvm_tells(caplog: pytest.LogCaptureFixture) -> None:
    page = Page()
    page.u32[runpage.SUBERROR], page.u32[runpage.SUBERROR_NDATA] = exits.EMULATION, 3
    page.u64[runpage.SUBERROR_DATA] = exits.EMULATION_HAS_BYTES
    page.u8[runpage.INSTRUCTION_SIZE] = 3
    page.u8[runpage.INSTRUCTION : runpage.INSTRUCTION + 4] = b"\x0f\x28\x03\xff"
    found = end(page, exits.EXIT_INTERNAL_ERROR)
    assert found == GuestEnd(
        Reason.HOST_ERROR,
        "KVM internal error: instruction emulation failed (vCPU 2, rip 0x1000, instruction 0f 28 03)",
    )
    assert "rip=0x1000 rax=0x7" in caplog.text
    assert "code: 0f 28 03\n" in caplog.text


@pytest.mark.parametrize(("ndata", "flags", "size"), [(0, 1, 3), (3, 0, 3), (3, 1, 0)])
def test_without_bytes_from_kvm_the_guests_memory_tells(ndata: int, flags: int, size: int) -> None:
    page = Page()
    page.u32[runpage.SUBERROR], page.u32[runpage.SUBERROR_NDATA] = exits.EMULATION, ndata
    page.u64[runpage.SUBERROR_DATA] = flags
    page.u8[runpage.INSTRUCTION_SIZE] = size
    found = end(page, exits.EXIT_INTERNAL_ERROR)
    assert found is not None
    assert found.message.endswith("instruction f4 90)")


def test_a_length_of_nonsense_is_bounded() -> None:
    page = Page()
    page.u32[runpage.SUBERROR], page.u32[runpage.SUBERROR_NDATA] = exits.EMULATION, 3
    page.u64[runpage.SUBERROR_DATA] = exits.EMULATION_HAS_BYTES
    page.u8[runpage.INSTRUCTION_SIZE] = 255
    found = end(page, exits.EXIT_INTERNAL_ERROR)
    assert found is not None
    assert found.message.endswith(f"instruction {bytes(15).hex(' ')})")


@pytest.mark.parametrize(
    ("number", "text"), [(2, "an exception while another was being raised"), (99, "suberror 99")]
)
def test_other_internal_errors_are_named(number: int, text: str) -> None:
    page = Page()
    page.u32[runpage.SUBERROR] = number
    found = end(page, exits.EXIT_INTERNAL_ERROR)
    assert found is not None
    assert found.message.startswith(f"KVM internal error: {text} (")


def test_a_refused_entry_gives_the_hardwares_reason() -> None:
    page = Page()
    page.u64[runpage.FAIL_REASON] = 0x80000021
    found = end(page, exits.EXIT_FAIL_ENTRY)
    assert found is not None
    assert found.reason is Reason.HOST_ERROR
    assert found.message.startswith("the CPU refuses to run the guest, hardware reason 0x80000021 (vCPU 2")


def test_an_exit_nobody_knows() -> None:
    found = end(Page(), 77)
    assert found is not None
    assert found.message.startswith("KVM gives an exit this engine does not know, exit-77 (")


def test_registers_kvm_does_not_give_are_no_second_error() -> None:
    found = end(Page(), exits.EXIT_SHUTDOWN, Backend(known=False))
    assert found == GuestEnd(Reason.GUEST_CRASH, "triple fault (vCPU 2, rip 0x0)")
