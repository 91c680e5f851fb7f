"""Intel e1000e: no interrupts, receive and transmit off, bus master requests stopped (82574 datasheet)."""

from __future__ import annotations

from qvm_quiesce.softstop.registers import read, write
from qvm_quiesce.subject import Steps, Subject

_CONTROL, _STATUS, _MASK_CLEAR, _RECEIVE, _TRANSMIT = 0x0000, 0x0008, 0x00D8, 0x0100, 0x0400
_ENABLE = 1 << 1
_MASTER_DISABLE, _MASTER_ENABLED = 1 << 2, 1 << 19


def stop(subject: Subject) -> Steps:
    """Interrupts, receiver, transmitter, then GIO Master Disable until GIO Master Enable Status is 0."""
    write(subject, 0, "IMC", _MASK_CLEAR, 0xFFFF_FFFF)
    for name, at in (("RCTL", _RECEIVE), ("TCTL", _TRANSMIT)):
        write(subject, 0, name, at, read(subject, 0, name, at) & ~_ENABLE)
    write(subject, 0, "CTRL", _CONTROL, read(subject, 0, "CTRL", _CONTROL) | _MASTER_DISABLE)
    yield from subject.wait_until(
        lambda: not read(subject, 0, "STATUS", _STATUS) & _MASTER_ENABLED, subject.policy.soft_stop_deadline
    )
