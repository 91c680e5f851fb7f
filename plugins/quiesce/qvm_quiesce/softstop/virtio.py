"""virtio over PCI, modern: write 0 to device_status and wait until it reads 0 (virtio 1.4, 4.1.4.3.2)."""

from __future__ import annotations

from qvm_quiesce import pci
from qvm_quiesce.softstop.registers import read, write
from qvm_quiesce.subject import Skip, Steps, Subject

_CAP_VENDOR, _COMMON = 0x09, 1
_STATUS = 0x14


def stop(subject: Subject) -> Steps:
    """Reset the device: it must not use memory or interrupts once its status reads 0."""
    bar, base = _common(subject)
    write(subject, bar, "device_status", base + _STATUS, 0, 1)
    yield from subject.wait_until(
        lambda: read(subject, bar, "device_status", base + _STATUS, 1) == 0, subject.policy.soft_stop_deadline
    )


def _common(subject: Subject) -> tuple[int, int]:
    """BAR and offset of the common configuration, from the vendor capabilities (4.1.4)."""
    hardware = subject.hardware
    at = hardware.config_read(pci.CAPABILITIES, 1) & 0xFC
    for _ in range(48):
        if at < pci.HEADER_SIZE:
            break
        kind = hardware.config_read(at + 3, 1)
        if hardware.config_read(at, 1) == _CAP_VENDOR and kind == _COMMON:
            return hardware.config_read(at + 4, 1), hardware.config_read(at + 8, 4)
        at = hardware.config_read(at + 1, 1) & 0xFC
    raise Skip("a legacy virtio device: it has no common configuration")
