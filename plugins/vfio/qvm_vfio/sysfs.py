"""What sysfs tells about a PCI function: its driver, its IOMMU group, its resets. And binding, on request."""

from __future__ import annotations

import re
import sys

from qvm_vfio import errors
from qvm_vfio.errors import VfioError
from qvm_vfio.kernel import Kernel

DRIVER = "vfio-pci"
_NAME = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_BRIDGE = 0x06
#: The kernel's names of reset methods -> those of Hardware. A reset made for the device, or by the
#: firmware, counts as one of the function: that is what it resets.
_RESETS = {
    "flr": "flr",
    "device_specific": "flr",
    "acpi": "flr",
    "af_flr": "af-flr",
    "pm": "pm",
    "bus": "bus",
    "cxl_bus": "bus",
}


def address(text: str) -> str:
    """``0000:03:00.0`` of ``pci:0000:03:00.0`` or ``03:00.0``. Raises VfioError."""
    name = text.removeprefix("pci:").lower()
    name = name if name.count(":") == 2 else f"0000:{name}"
    if not _NAME.fullmatch(name):
        raise VfioError(
            f"{text!r} is no PCI address", "write domain:bus:device.function, e.g. pci:0000:03:00.0"
        )
    return name


class PciFunction:
    """One function in sysfs; every property is read anew. Raises VfioError when there is none."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.name = name
        self._kernel = kernel
        self.path = kernel.sys / "bus/pci/devices" / name
        if not self.path.exists():
            raise VfioError(f"there is no PCI function {name} in this host", "list them with: lspci -D")

    @property
    def driver(self) -> str:
        """The name of its driver, empty for none."""
        try:
            return (self.path / "driver").readlink().name
        except OSError:
            return ""

    @property
    def group(self) -> int | None:
        """The number of its IOMMU group; None without one that protects."""
        link = self.path / "iommu_group"
        try:
            number = int(link.readlink().name)
        except (OSError, ValueError):
            return None
        try:
            protects = (link / "name").read_text().strip() != "vfio-noiommu"
        except OSError:
            protects = True  # only groups without an IOMMU have this name
        return number if protects else None

    @property
    def members(self) -> list[str]:
        """All functions of its group, itself included."""
        try:
            return sorted(each.name for each in (self.path / "iommu_group/devices").iterdir())
        except OSError:
            return [self.name]

    @property
    def base_class(self) -> int:
        """The upper byte of its class code."""
        try:
            return int((self.path / "class").read_text(), 16) >> 16
        except (OSError, ValueError):
            return 0

    @property
    def resets(self) -> tuple[str, ...]:
        """The resets the kernel can do, in the order it tries them, as Hardware names them."""
        try:
            words = (self.path / "reset_method").read_text().split()
        except OSError:
            return ()
        return tuple(dict.fromkeys(_RESETS[word] for word in words if word in _RESETS))

    def check(self) -> int:
        """The number of its group, which is bound to vfio-pci as a whole. Raises VfioError."""
        group = self.group
        if group is None:
            raise errors.no_iommu(self.name)
        if self.driver != DRIVER:
            raise errors.not_bound(self.name, self.driver, sys.executable)
        others = []
        for name in self.members:
            other = PciFunction(self._kernel, name)
            # A bridge cannot be passed; the kernel lets its driver be in the group.
            if name != self.name and other.driver != DRIVER and other.base_class != _BRIDGE:
                others.append(f"{name} ({other.driver or 'no driver'})")
        if others:
            raise errors.not_all_ours(self.name, group, others, sys.executable)
        return group

    def bind(self, driver: str = DRIVER) -> None:
        """Take it from its driver and give it to ``driver``; ``""``: to whichever the kernel chooses.

        Needs root. Never called by a VM: only by who asks for it. Raises VfioError.
        """
        try:
            self._kernel.write_sysfs(self.path / "driver_override", f"{driver}\n")
            if self.driver and self.driver != driver:
                self._kernel.write_sysfs(self.path / "driver/unbind", self.name)
            if not self.driver:
                self._kernel.write_sysfs(self._kernel.sys / "bus/pci/drivers_probe", self.name)
        except OSError as error:
            raise errors.failed(f"cannot bind {self.name}: {error.filename or 'sysfs'}", error) from error
        if driver and self.driver != driver:
            raise VfioError(
                f"{self.name} is bound to {self.driver or 'no driver'}, not to {driver}",
                f"load the driver: sudo modprobe {driver}",
            )
