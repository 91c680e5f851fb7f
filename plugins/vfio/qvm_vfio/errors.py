"""What can go wrong with a physical device, in the words of whoever has to put it right."""

from __future__ import annotations

import errno

from qvm_quiesce.hardware import HardwareError


class VfioError(HardwareError):
    """An access or a request the host refused.

    ``hint`` says what to do, empty when nobody knows; ``number`` is the kernel's errno, or 0.
    """

    def __init__(self, text: str, hint: str = "", number: int = 0) -> None:
        super().__init__(f"{text}; {hint}" if hint else text)
        self.text = text
        self.hint = hint
        self.number = number


def failed(what: str, error: OSError) -> VfioError:
    """``what`` failed with ``error``; with a hint for the usual reasons."""
    hint = ""
    if error.errno == errno.ENOMEM:
        hint = "the limit of locked memory may be too low: ulimit -l, or LimitMEMLOCK= of a service"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "close some files, or raise the limit: ulimit -n"
    return VfioError(f"{what}: {error.strerror or error}", hint, error.errno or 0)


def not_here() -> VfioError:
    """There is no VFIO in this kernel, now."""
    return VfioError(
        "this host has no VFIO: there is no /dev/vfio/vfio", "load it: sudo modprobe -a vfio-pci; in a "
        "container, pass /dev/vfio in",
    )  # fmt: skip


def no_iommu(name: str) -> VfioError:
    """The device is in no IOMMU group: nothing would keep its DMA inside the guest's memory."""
    return VfioError(
        f"{name} is in no IOMMU group, so nothing would keep its writes inside the guest's memory",
        "turn on VT-d or AMD-Vi in the firmware and start the kernel with intel_iommu=on (Intel)",
    )


def not_bound(name: str, driver: str, python: str) -> VfioError:
    """The device belongs to a driver of the host, or to none."""
    owner = f"belongs to the host's driver {driver}" if driver else "has no driver"
    return VfioError(
        f"{name} {owner}, not to vfio-pci",
        f"if the host can do without it: sudo modprobe vfio-pci && sudo {python} -m qvm_vfio bind {name}",
    )


def not_all_ours(name: str, group: int, others: list[str], python: str) -> VfioError:
    """Functions of the group belong to somebody else. ``others``: their names with their drivers."""
    first = others[0].split()[0]
    return VfioError(
        f"{name} shares IOMMU group {group} with functions that are not all bound to vfio-pci: "
        f"{', '.join(others)}",
        f"bind each of them, for example: sudo {python} -m qvm_vfio bind {first}",
    )


def busy(name: str, group: int, holders: list[int]) -> VfioError:
    """The group can be opened once, and is."""
    who = f"process {', '.join(map(str, holders))}" if holders else "another process"
    return VfioError(
        f"{name}: its IOMMU group {group} is in use by {who}",
        "end that VM; or, if it is the keeper of a quarantined device: qvm quiesce status",
    )


def permission(name: str, path: str) -> VfioError:
    """The group's file may not be opened."""
    return VfioError(f"{name}: no permission to open {path}", f"sudo chown $USER {path}")
