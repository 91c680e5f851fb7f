"""Asking a device politely, by the registers of its class, before its bus mastering is cut.

A soft stop is never trusted and never needed for the proof; but some devices only survive a reset when
they were told first (an NVMe drive whose controller is enabled may freeze in its reset).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qvm_quiesce import pci
from qvm_quiesce.softstop import ahci, e1000e, nvme, script, virtio, xhci
from qvm_quiesce.subject import Skip, StepFailed, Steps, Subject

Stop = Callable[[Subject], Steps]

STOPS: Mapping[str, Stop] = {
    "virtio": virtio.stop,
    "nvme": nvme.stop,
    "ahci": ahci.stop,
    "xhci": xhci.stop,
    "e1000e": e1000e.stop,
    "script": script.stop,
}
_BY_CLASS = {0x010802: "nvme", 0x010601: "ahci", 0x0C0330: "xhci"}
_VIRTIO_VENDOR, _INTEL, _ETHERNET = 0x1AF4, 0x8086, 0x020000
#: 82571 to 82583 and the parts in Intel's chipsets: all have the registers of e1000e.
_E1000E = frozenset({0x10D3, 0x10EA, 0x10EB, 0x10F6, 0x1502, 0x1503, 0x150C, 0x153A, 0x153B, 0x15A2, 0x15A3})


def kind_of(subject: Subject) -> str:
    """Which soft stop a device gets: the policy's, else by its class; empty when there is none."""
    attached, wanted = subject.attached, subject.policy.soft_stop
    if wanted == "none":
        return ""
    if attached.platform:
        return "script" if subject.policy.script else ""
    if wanted != "auto":
        return wanted
    if subject.policy.script:
        return "script"
    if attached.vendor == _VIRTIO_VENDOR:
        return "virtio"
    if attached.vendor == _INTEL and attached.class_code == _ETHERNET and attached.product in _E1000E:
        return "e1000e"
    return _BY_CLASS.get(attached.class_code, "")


def soft_stop(subject: Subject) -> Steps:
    """The step: decode memory if it does not, then the registers of its class."""
    kind = kind_of(subject)
    if subject.attached.platform:
        yield from _platform_stop(subject, kind)
        return
    if not kind:
        raise Skip(f"no soft stop for class {subject.attached.class_code:06x}")
    if not subject.present():
        subject.gone = True
        raise StepFailed("the device does not answer: its configuration space reads all ones")
    command = subject.read("command", pci.COMMAND, 2)
    if not command & pci.COMMAND_MEMORY:
        # The guest may have turned it off; nobody else's addresses are under these BARs.
        raise Skip("its registers are off")
    subject.step.detail = kind
    yield from STOPS[kind](subject)


def _platform_stop(subject: Subject, kind: str) -> Steps:
    """All that stops such a device is its script; what it waits for is the proof."""
    if not kind:
        raise Skip("a platform device without a script: nobody knows its registers")
    subject.step.detail = kind
    yield from STOPS[kind](subject)
    subject.stopped = script.proves(subject.policy)
