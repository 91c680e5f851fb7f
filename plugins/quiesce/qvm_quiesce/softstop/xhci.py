"""xHCI: clear Run/Stop and wait for HCHalted (xHCI 1.2, 5.4.1)."""

from __future__ import annotations

from qvm_quiesce.softstop.registers import read, write
from qvm_quiesce.subject import Steps, Subject

_COMMAND, _STATUS = 0x00, 0x04
_RUN, _INTERRUPTS, _HALTED = 1 << 0, 1 << 2, 1 << 0


def stop(subject: Subject) -> Steps:
    """Stop the schedule; the operational registers begin behind CAPLENGTH bytes."""
    base = read(subject, 0, "CAPLENGTH", 0, 1)
    command = read(subject, 0, "USBCMD", base + _COMMAND)
    write(subject, 0, "USBCMD", base + _COMMAND, command & ~(_RUN | _INTERRUPTS))
    yield from subject.wait_until(
        lambda: bool(read(subject, 0, "USBSTS", base + _STATUS) & _HALTED), subject.policy.soft_stop_deadline
    )
