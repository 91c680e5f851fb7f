"""AHCI: stop every port's command engine and FIS reception (Serial ATA AHCI 1.3.1, 10.1.2)."""

from __future__ import annotations

from functools import partial

from qvm_quiesce.softstop.registers import read, write
from qvm_quiesce.subject import Steps, Subject

_BAR = 5
_GHC, _PORTS = 0x04, 0x0C
_INTERRUPTS = 1 << 1
_PORT, _PORT_SIZE, _COMMAND = 0x100, 0x80, 0x18
_START, _RECEIVE, _RECEIVING, _RUNNING = 1 << 0, 1 << 4, 1 << 14, 1 << 15


def stop(subject: Subject) -> Steps:
    """ST = 0 until CR = 0, then FRE = 0 until FR = 0, on each implemented port."""
    write(subject, _BAR, "GHC", _GHC, read(subject, _BAR, "GHC", _GHC) & ~_INTERRUPTS)
    implemented = read(subject, _BAR, "PI", _PORTS)
    for bit, busy in ((_START, _RUNNING), (_RECEIVE, _RECEIVING)):
        for port in (number for number in range(32) if implemented >> number & 1):
            at, name = _PORT + _PORT_SIZE * port + _COMMAND, f"P{port}CMD"
            write(subject, _BAR, name, at, read(subject, _BAR, name, at) & ~bit)
            idle = partial(_idle, subject, name, at, busy)
            yield from subject.wait_until(idle, subject.policy.soft_stop_deadline)


def _idle(subject: Subject, name: str, at: int, busy: int) -> bool:
    return not read(subject, _BAR, name, at) & busy
