"""NVMe: clear CC.EN and wait for CSTS.RDY = 0 (NVM Express Base 2.0, 3.5.3)."""

from __future__ import annotations

from qvm_quiesce.softstop.registers import read, write
from qvm_quiesce.subject import Steps, Subject

_CC, _CSTS = 0x14, 0x1C
_ENABLE, _READY = 1 << 0, 1 << 0


def stop(subject: Subject) -> Steps:
    """Disable the controller: it drops its queues and stops fetching commands."""
    write(subject, 0, "CC", _CC, read(subject, 0, "CC", _CC) & ~_ENABLE)
    yield from subject.wait_until(
        lambda: not read(subject, 0, "CSTS", _CSTS) & _READY, subject.policy.soft_stop_deadline
    )
