"""Options of ``pass``: which device. Opens nothing."""

from __future__ import annotations

from typing import Annotated

import msgspec
from qvm_vfio.errors import VfioError
from qvm_vfio.sysfs import address

#: One descriptor and one interrupt of the host for each.
MOST_VECTORS = 256


class PassOptions(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """Which physical device the guest gets."""

    device: Annotated[
        str,
        msgspec.Meta(description='the function on the host, e.g. "pci:0000:03:00.0" (lspci -D)'),
    ] = ""
    hostdev: Annotated[str, msgspec.Meta(description="the same, by the name other vdevs have for it")] = ""
    vectors: Annotated[
        int,
        msgspec.Meta(
            ge=1, le=MOST_VECTORS, description="at most so many vectors of MSI-X, or messages of MSI"
        ),
    ] = 32

    direct: Annotated[
        bool,
        msgspec.Meta(description="map registers into the guest, where the engine can"),
    ] = True

    def __post_init__(self) -> None:
        if bool(self.device) == bool(self.hostdev):
            raise ValueError('write one of device and hostdev, e.g. device = "pci:0000:03:00.0"')
        try:
            address(self.device or self.hostdev)
        except VfioError as error:
            raise ValueError(str(error)) from None

    @property
    def name(self) -> str:
        """Its place on the host: ``0000:03:00.0``."""
        return address(self.device or self.hostdev)
