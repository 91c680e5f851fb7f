"""Exits that are no accesses: what they mean for the guest."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from qvm_kvm import exits, runpage
from qvm_kvm.arch import Backend
from qvm_kvm.vcpu import Vcpu
from qvmcore.api import GuestEnd, Reason

log = logging.getLogger(__name__)

_SYSTEM_EVENTS = {
    exits.SYSTEM_SHUTDOWN: GuestEnd(Reason.GUEST_SHUTDOWN, "the guest powered off"),
    exits.SYSTEM_RESET: GuestEnd(Reason.GUEST_RESET, "the guest reset"),
    exits.SYSTEM_CRASH: GuestEnd(Reason.GUEST_CRASH, "the guest reported a crash"),
}


def end_of(vcpu: Vcpu, reason: int, backend: Backend) -> GuestEnd | None:
    """How the guest ends by an exit of ``vcpu``, or None when it goes on; on the vCPU's thread.

    What KVM cannot go on from is logged with the registers and the instruction.
    """
    page = vcpu.page
    if reason == exits.EXIT_INTR:
        return None
    if reason == exits.EXIT_SYSTEM_EVENT:
        kind = page.u32[runpage.EVENT_TYPE]
        known = _SYSTEM_EVENTS.get(kind)
        return known or GuestEnd(Reason.HOST_ERROR, f"KVM reports a system event of kind {kind}")
    registers = _registers(vcpu, backend)
    where = f"vCPU {vcpu.index}, {backend.where(registers)}"
    if reason == exits.EXIT_SHUTDOWN:
        _log("triple fault", where, registers, backend.code(vcpu.fd, registers))
        return GuestEnd(Reason.GUEST_CRASH, f"triple fault ({where})")
    if reason == exits.EXIT_FAIL_ENTRY:
        what = f"the CPU refuses to run the guest, hardware reason {page.u64[runpage.FAIL_REASON]:#x}"
    elif reason == exits.EXIT_INTERNAL_ERROR:
        what = f"KVM internal error: {exits.suberror(page.u32[runpage.SUBERROR])}"
    else:
        what = f"KVM gives an exit this engine does not know, {exits.name(reason)}"
    code = _reported_code(vcpu, reason) or backend.code(vcpu.fd, registers)
    _log(what, where, registers, code)
    return GuestEnd(Reason.HOST_ERROR, f"{what} ({where}, instruction {code.hex(' ') or 'unknown'})")


def _registers(vcpu: Vcpu, backend: Backend) -> Mapping[str, int]:
    try:
        return backend.registers(vcpu.fd)
    except OSError:
        return {}


def _reported_code(vcpu: Vcpu, reason: int) -> bytes:
    """The bytes KVM says it could not emulate."""
    page = vcpu.page
    if reason != exits.EXIT_INTERNAL_ERROR or page.u32[runpage.SUBERROR] != exits.EMULATION:
        return b""
    has_bytes = page.u32[runpage.SUBERROR_NDATA] and (
        page.u64[runpage.SUBERROR_DATA] & exits.EMULATION_HAS_BYTES
    )
    size = min(page.u8[runpage.INSTRUCTION_SIZE], 15) if has_bytes else 0
    return bytes(page.u8[runpage.INSTRUCTION : runpage.INSTRUCTION + size])


def _log(what: str, where: str, registers: Mapping[str, int], code: bytes) -> None:
    pairs = [f"{name}={value:#x}" for name, value in registers.items()]
    lines = [" ".join(pairs[start : start + 4]) for start in range(0, len(pairs), 4)]
    log.error("%s (%s)\n  %s\n  code: %s", what, where, "\n  ".join(lines), code.hex(" ") or "unknown")
