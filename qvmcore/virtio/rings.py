"""The three areas of one virtqueue: checked once, and read and written through casts afterwards.

Each index, each used element and each event structure is one load or store that way.
"""

from __future__ import annotations

from qvmcore.errors import BadDescriptorChain
from qvmcore.memory import GuestMemory
from qvmcore.virtio import spec


class SplitRings:
    """The areas of a split queue, checked: size, alignment (2.7) and place in guest memory.

    Raises BadDescriptorChain or GuestMemoryError. Addresses are guest-physical bytes.
    """

    __slots__ = ("avail", "size", "table", "used", "used_elements")

    def __init__(self, memory: GuestMemory, size: int, desc: int, driver: int, device: int) -> None:
        _check_alignment("descriptor table", desc, spec.VIRTQ_DESC_ALIGN)
        _check_alignment("available ring", driver, spec.VIRTQ_AVAIL_ALIGN)
        _check_alignment("used ring", device, spec.VIRTQ_USED_ALIGN)
        self._cut(
            size,
            memory.view(desc, spec.VIRTQ_DESC_SIZE * size),
            memory.view(driver, 6 + 2 * size),
            memory.view(device, 6 + 8 * size),
        )

    @classmethod
    def private(cls, size: int, table: memoryview) -> SplitRings:
        """Rings of our own, nothing offered, for the chains of a driver's descriptor table."""
        rings = cls.__new__(cls)
        rings._cut(size, table, memoryview(bytearray(6 + 2 * size)), memoryview(bytearray(6 + 8 * size)))
        return rings

    def _cut(self, size: int, table: memoryview, avail: memoryview, used: memoryview) -> None:
        self.size = size
        self.table = table
        self.avail = avail.cast("H")
        self.used = used.cast("H")
        self.used_elements = used[4 : 4 + 8 * size].cast("Q")


class PackedRings:
    """The areas of a packed queue, checked: alignment (2.8.10.1) and place in guest memory.

    Raises BadDescriptorChain or GuestMemoryError. Addresses are guest-physical bytes; ``size`` is
    any number of descriptors, not only a power of two.
    """

    __slots__ = ("device_event", "driver_event", "flags", "size", "table", "used")

    def __init__(self, memory: GuestMemory, size: int, desc: int, driver: int, device: int) -> None:
        _check_alignment("descriptor ring", desc, spec.VIRTQ_DESC_ALIGN)
        _check_alignment("driver event suppression", driver, spec.PVIRTQ_EVENT_ALIGN)
        _check_alignment("device event suppression", device, spec.PVIRTQ_EVENT_ALIGN)
        self._cut(
            size,
            memory.view(desc, spec.VIRTQ_DESC_SIZE * size),
            memory.view(driver, spec.PVIRTQ_EVENT_SIZE),
            memory.view(device, spec.PVIRTQ_EVENT_SIZE),
        )

    @classmethod
    def private(cls, table: bytes) -> PackedRings:
        """A ring of our own that holds these descriptors."""
        rings = cls.__new__(cls)
        events = (memoryview(bytearray(spec.PVIRTQ_EVENT_SIZE)) for _ in range(2))
        rings._cut(len(table) // spec.VIRTQ_DESC_SIZE, memoryview(bytearray(table)), *events)
        return rings

    def _cut(self, size: int, table: memoryview, driver: memoryview, device: memoryview) -> None:
        self.size = size
        self.table = table
        # Of each descriptor, the flags; and its length and what is behind that, in turn.
        self.flags = table.cast("H")[7::8]
        self.used = table.cast("I")
        self.driver_event = driver.cast("I")
        self.device_event = device.cast("I")


def _check_alignment(name: str, address: int, align: int) -> None:
    if address % align:
        raise BadDescriptorChain(f"{name} at {address:#x} is not a multiple of {align}")
