"""Register accesses of a soft stop that go into the evidence."""

from __future__ import annotations

from qvm_quiesce.subject import Subject


def read(subject: Subject, bar: int, name: str, offset: int, size: int = 4) -> int:
    """A register of a BAR."""
    value = subject.hardware.bar_read(bar, offset, size)
    subject.saw(name, value, size)
    return value


def write(subject: Subject, bar: int, name: str, offset: int, value: int, size: int = 4) -> None:
    """Write a register of a BAR."""
    subject.hardware.bar_write(bar, offset, size, value)
    subject.step.wrote.append(f"{name}={value:#0{2 + 2 * size}x}")
