"""Drivers of a few lines for the machine's physical devices: each makes its device write to memory.

It does so for as long as it is stepped, and for a while when nobody steps it any more.
"""

from __future__ import annotations

import struct
import time
from typing import Any, Protocol

from qvm_vfio.hardware import VfioHardware

from tests.rig.inside import vfio_owner
from tests.rig.inside.vfio_owner import IOVA, Memory, enable, wait_for


class Driver(Protocol):
    """A device at work."""

    def step(self) -> None:
        """Give it more to do. Often."""

    def pend(self) -> None:
        """Have it write something soon, without any further step."""

    def writes(self) -> int:
        """How often it has written so far, as far as memory tells; may start anew with a step."""


class Edu:
    """Writes a page with another content every 200 ms. Memory: 0 is what it reads, PLACE what it writes."""

    PLACE, BUFFER, SIZE = 0x4000, 0x40000, 2048

    def __init__(self, hardware: VfioHardware, memory: Memory) -> None:
        self._hardware = hardware
        self._memory = memory.map
        self._out = False
        self._number = 0
        enable(hardware)
        wait_for(lambda: not self.busy(), "edu's earlier transfer")

    def busy(self) -> bool:
        """Whether a transfer is pending."""
        return bool(self._hardware.bar_read(0, 0x98, 4) & 1)

    def step(self) -> None:
        """Start the next transfer when there is none."""
        if not self.busy():
            if self._out:
                self.transfer(self.BUFFER, IOVA + self.PLACE, 1 | 2)
            else:
                self._number += 1
                self._memory[: self.SIZE] = self._number.to_bytes(4, "little") * (self.SIZE // 4)
                self.transfer(IOVA, self.BUFFER, 1)
            self._out = not self._out

    def pend(self) -> None:
        """The transfer to memory has just begun."""
        self._out = True
        wait_for(lambda: not self.busy(), "edu's transfer")
        self._memory[self.PLACE : self.PLACE + self.SIZE] = bytes(self.SIZE)
        self.step()

    def transfer(self, source: int, target: int, command: int) -> None:
        """One transfer, in 100 ms."""
        for at, value in ((0x80, source), (0x88, target), (0x90, self.SIZE), (0x98, command)):
            self._hardware.bar_write(0, at, 4, value)

    def writes(self) -> int:
        """The number of the page that was written last."""
        return int(struct.unpack_from("<I", self._memory, self.PLACE)[0])


class E1000e:
    """Receives frames: a ring of descriptors at 0, buffers from 1 MiB on (82574 datasheet, 7.1)."""

    COUNT, SIZE, BUFFERS = 8192, 256, 1 << 20

    def __init__(self, hardware: VfioHardware, memory: Memory) -> None:
        self._hardware = hardware
        self._memory = memory.map
        self._next = 0
        enable(hardware)
        # CTRL: reset; then, without interrupts (IMC), the link up.
        self._set(0x0, self._get(0x0) | 1 << 26)
        time.sleep(0.1)
        self._set(0xD8, 0xFFFF_FFFF)
        self._set(0x0, self._get(0x0) | 1 << 6)
        wait_for(lambda: bool(self._get(0x8) & 2), "the e1000e's link")
        for number in range(self.COUNT):
            address = IOVA + self.BUFFERS + self.SIZE * number
            struct.pack_into("<QQ", self._memory, 16 * number, address, 0)
        for at, value in ((0x2800, IOVA), (0x2804, 0), (0x2808, 16 * self.COUNT), (0x2810, 0)):
            self._set(at, value)
        self._set(0x2818, self.COUNT - 1)
        # RCTL: on, every address, broadcast, buffers of 256 bytes, no checksum.
        self._set(0x100, 1 << 1 | 1 << 3 | 1 << 4 | 1 << 15 | 3 << 16 | 1 << 26)

    def _get(self, at: int) -> int:
        return self._hardware.bar_read(0, at, 4)

    def _set(self, at: int, value: int) -> None:
        self._hardware.bar_write(0, at, 4, value)

    def step(self) -> None:
        """Give descriptors back that have a frame."""
        done = self._next
        while self._memory[16 * self._next + 12] & 1 and (self._next + 1) % self.COUNT != done:
            self._memory[16 * self._next + 12] = 0
            self._next = (self._next + 1) % self.COUNT
        if done != self._next:
            self._set(0x2818, (self._next - 1) % self.COUNT)

    def pend(self) -> None:
        """Frames come whatever is done here."""

    def writes(self) -> int:
        """How many descriptors have a frame."""
        return self.COUNT - self._memory[12 : 16 * self.COUNT : 16].count(0)


class Slow:
    """Reads 60 blocks at 20 a second, all asked for at once; then again."""

    def __init__(self, hardware: VfioHardware, memory: Memory) -> None:
        self._hardware = hardware
        self._shared = memory
        self._begin()

    def _begin(self) -> None:
        self._shared.map[:] = bytes(vfio_owner.SIZE)
        drive = vfio_owner.Nvme(self._hardware, self._shared)
        drive.start()
        drive.read()

    def step(self) -> None:
        """Begin again before it has nothing to do: always 1.5 s of work are left."""
        if vfio_owner.landed(self._shared.map) > vfio_owner.Nvme.READS // 2:
            self._begin()

    def pend(self) -> None:
        """See :meth:`step`: there is."""

    def writes(self) -> int:
        """Blocks that came."""
        return vfio_owner.landed(self._shared.map)


DRIVERS: dict[str, Any] = {"edu": Edu, "e1000e": E1000e, "slow": Slow}
