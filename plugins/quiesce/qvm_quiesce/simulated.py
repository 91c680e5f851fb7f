"""Physical PCI functions that are not there, with the faults of real ones: for tests of quiescing.

A :class:`SimulatedDevice` has the registers quiescing touches, a DMA engine that writes to its memory
while it may, interrupts, and resets that take their time. Everything it is lives in one buffer, so a
second process given that buffer (a memfd) sees and quiesces the same device.

With a :class:`FakeClock` its time passes when somebody sleeps; with a real one the owner calls
:meth:`SimulatedDevice.tick` as often as it likes, usually from a thread.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvm_quiesce import pci
from qvm_quiesce.clock import Clock, RealClock
from qvm_quiesce.hardware import Handover, HardwareError

#: Bytes of the buffer: configuration space, BAR 0, own state.
CONFIG, BAR, STATE = 4096, 4096, 64
BUFFER_SIZE = CONFIG + BAR + STATE
#: Bytes of memory its DMA can reach.
MEMORY = 64 * 1024
#: Offsets in the state: interrupts counted; requests pending until (seconds, f64); flags; silent until.
_INTERRUPTS, _BUSY_UNTIL, _FLAGS = CONFIG + BAR, CONFIG + BAR + 8, CONFIG + BAR + 16
_SILENT_UNTIL = CONFIG + BAR + 24
_RESET_DONE, _FROZEN, _REVOKED, _UNMAPPED, _DROPPED, _CLOSED = 1, 2, 4, 8, 16, 32
_SURRENDERED = 64

PM_AT, MSI_AT, MSIX_AT, EXPRESS_AT = 0x40, 0x50, 0x60, 0x70
ATS_AT = 0x100
#: NVMe's registers in BAR 0: controller configuration and status.
NVME_CC, NVME_CSTS = 0x14, 0x1C
_INTEL, _NVME_CLASS, _OTHER_CLASS = 0x8086, 0x010802, 0xFF0000


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong with a device; times in seconds, ``math.inf`` for never."""

    #: Bus Master Enable cannot be cleared: the write is lost.
    ignores_bus_master_off: bool = False
    #: The bit reads 0, and it writes on all the same.
    masters_in_secret: bool = False
    #: How long Transactions Pending stays set.
    pending: float = 0.0
    #: How long after a reset it answers with nothing.
    reset_takes: float = 0.02
    #: It answers with all ones, as a device that was pulled out.
    gone: bool = False
    #: Interrupts go on though they were turned off.
    storms: bool = False
    #: A reset starts its DMA engine anew, with bus mastering on.
    dma_after_reset: bool = False
    #: Bus mastering comes back with a reset, as the kernel restores what it saved.
    reset_restores_mastering: bool = False
    #: An NVMe drive that never comes back from a reset with its controller enabled.
    freezes_unless_disabled: bool = False
    #: It sleeps in D3hot when the end comes, and wakes up with bus mastering on.
    sleeps: bool = False
    #: An access to it never returns from the kernel: ``config``, ``reset`` or ``bar``.
    hangs_in: str = ""


class FakeClock:
    """Time that passes only when somebody sleeps; all its devices live through it in steps of 1 ms."""

    threads = False
    _STEP = 0.001

    def __init__(self) -> None:
        self._now = 1000.0
        self.devices: list[SimulatedDevice] = []

    def now(self) -> float:
        """Simulated seconds."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Pass them. Long waits are taken in larger steps: nothing new happens in them."""
        end = self._now + seconds
        step = max(self._STEP, seconds / 20)
        while self._now < end:
            self._now = min(end, self._now + step)
            for device in self.devices:
                device.tick()


class SimulatedDevice:
    """Implements :class:`qvm_quiesce.hardware.Hardware`. Any thread.

    ``fds`` are a buffer of BUFFER_SIZE bytes and the memory its DMA writes to, both mapped shared; a
    process that takes over a device that exists passes ``fresh=False``. See :func:`shared`.
    """

    platform = False

    def __init__(
        self,
        name: str = "0000:03:00.0",
        faults: Faults | None = None,
        clock: Clock | None = None,
        *,
        nvme: bool = False,
        resets: Sequence[str] = ("flr",),
        fds: tuple[int, ...] = (),
        fresh: bool = True,
    ) -> None:
        self.name = name
        self.faults = faults or Faults()
        self.clock = clock or FakeClock()
        self.resets = tuple(resets)
        self._nvme = nvme
        self._fds = fds
        buffers = [memoryview(mmap.mmap(fd, 0)) for fd in fds]
        self._buffer, self._memory = buffers or (
            memoryview(bytearray(BUFFER_SIZE)),
            memoryview(bytearray(MEMORY)),
        )
        self._lock = threading.RLock()
        if isinstance(self.clock, FakeClock):
            self.clock.devices.append(self)
        if fresh:
            self._power_on()

    # -- Hardware ----------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """All ones while it is gone, frozen or in its reset."""
        self._hang("config")
        with self._lock:
            if self._silent():
                return (1 << 8 * size) - 1
            if offset == EXPRESS_AT + pci.EXPRESS_DEVICE_STATUS and self.clock.now() < self._f64(_BUSY_UNTIL):
                return pci.EXPRESS_PENDING
            return self._get(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Registers with read-only bits keep them."""
        self._hang("config")
        with self._lock:
            if self._silent():
                return
            if offset == pci.COMMAND:
                self._write_command(value)
            elif offset == PM_AT + pci.PM_CONTROL:
                self._write_power(value)
            elif offset >= pci.BAR0:
                self._put(offset, size, value)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """Registers of BAR 0; all ones while memory is not decoded."""
        self._hang("bar")
        if bar or self._silent() or not self._get(pci.COMMAND, 2) & pci.COMMAND_MEMORY:
            return (1 << 8 * size) - 1
        return self._get(CONFIG + offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Registers of BAR 0; of NVMe's, CSTS.RDY follows CC.EN."""
        self._hang("bar")
        with self._lock:
            if bar or self._silent() or not self._get(pci.COMMAND, 2) & pci.COMMAND_MEMORY:
                return
            self._put(CONFIG + offset, size, value)
            if self._nvme and offset == NVME_CC:
                self._put(CONFIG + NVME_CSTS, 4, value & 1)

    def reset(self, method: str) -> None:
        """The host's part of a reset; afterwards the device is silent for as long as it takes."""
        self._hang("reset")
        if method not in self.resets:
            raise HardwareError(f"{self.name} has no {method} reset")
        with self._lock:
            frozen = self.faults.freezes_unless_disabled and self._get(CONFIG + NVME_CC, 4) & 1
            command = self._get(pci.COMMAND, 2)
            self._power_on()
            kept = self.faults.reset_restores_mastering or self.faults.dma_after_reset
            self._put(pci.COMMAND, 2, command if self.faults.reset_restores_mastering else 0)
            if kept and self.faults.dma_after_reset:
                self._put(pci.COMMAND, 2, pci.COMMAND_BUS_MASTER)
            self._flag(_RESET_DONE, True)
            self._flag(_FROZEN, bool(frozen))
            self._put_f64(_BUSY_UNTIL, 0.0)
            self._put_f64(_SILENT_UNTIL, self.clock.now() + self.faults.reset_takes)

    def revoke(self) -> None:
        """Remembered: see :meth:`done`."""
        self._flag(_REVOKED, True)

    def drop_interrupts(self) -> None:
        """Remembered: see :meth:`done`."""
        self._flag(_DROPPED, True)

    def interrupts(self) -> int:
        """The count in the buffer."""
        return int(struct.unpack_from("<Q", self._buffer, _INTERRUPTS)[0])

    def memory(self) -> Sequence[memoryview]:
        """One range."""
        return (self._memory,)

    def unmap_dma(self) -> None:
        """Remembered: see :meth:`done`."""
        self._flag(_UNMAPPED, True)

    def handover(self) -> Handover:
        """The descriptors of its buffer and its memory. Raises HardwareError without any."""
        if len(self._fds) != 2:
            raise HardwareError(f"{self.name} was not made by shared(): nobody else can reach it")
        values = {
            "name": self.name,
            "faults": {**asdict(self.faults)},
            "nvme": self._nvme,
            "resets": list(self.resets),
        }
        path = str(Path(__file__).parents[1])
        return Handover("qvm_quiesce.simulated:adopt", path, values, self._fds)

    def surrender(self) -> None:
        """Remembered: see :meth:`done`."""
        self._flag(_SURRENDERED, True)

    def close(self) -> None:
        """Remembered: see :meth:`done`."""
        self._flag(_CLOSED, True)

    # -- the device itself -------------------------------------------------------------------------

    def start(self) -> None:
        """What a guest's driver does: decode, bus mastering, MSI-X, and the DMA engine runs."""
        self._put(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
        self._put(MSIX_AT + pci.MSIX_CONTROL, 2, pci.MSIX_ENABLE)
        self._put(CONFIG + NVME_CC, 4, 1)
        self._put(CONFIG + NVME_CSTS, 4, 1)
        self._put_f64(_BUSY_UNTIL, self.clock.now() + self.faults.pending)
        if self.faults.sleeps:
            self._put(PM_AT + pci.PM_CONTROL, 2, pci.PM_D3HOT)

    def tick(self) -> None:
        """Let it do for a moment what it is allowed to do, or does without being allowed."""
        with self._lock:
            if not self.faults.masters_in_secret and (self._silent() or not self.running):
                if self.faults.storms:
                    self._interrupt()
                return
            count = struct.unpack_from("<Q", self._memory, 0)[0]
            struct.pack_into("<Q", self._memory, 0, count + 1 & (1 << 64) - 1)
            if self.faults.storms or self._get(MSIX_AT + pci.MSIX_CONTROL, 2) & pci.MSIX_ENABLE:
                self._interrupt()

    @property
    def running(self) -> bool:
        """Whether its DMA engine writes now."""
        if self._get(PM_AT + pci.PM_CONTROL, 2) & pci.PM_STATE:
            return False
        return bool(self._get(pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER)

    @property
    def written(self) -> int:
        """How often it has written to memory."""
        return int(struct.unpack_from("<Q", self._memory, 0)[0])

    @property
    def done(self) -> dict[str, bool]:
        """What the host has taken away from it."""
        flags = self._get(_FLAGS, 1)
        names = {
            "revoked": _REVOKED,
            "unmapped": _UNMAPPED,
            "dropped": _DROPPED,
            "reset": _RESET_DONE,
            "closed": _CLOSED,
            "surrendered": _SURRENDERED,
        }
        return {name: bool(flags & bit) for name, bit in names.items()}

    # -- inside ------------------------------------------------------------------------------------

    def _silent(self) -> bool:
        frozen = self._get(_FLAGS, 1) & _FROZEN
        return self.faults.gone or bool(frozen) or self.clock.now() < self._f64(_SILENT_UNTIL)

    def _hang(self, where: str) -> None:
        if self.faults.hangs_in == where:
            threading.Event().wait()

    def _interrupt(self) -> None:
        struct.pack_into("<Q", self._buffer, _INTERRUPTS, self.interrupts() + 1)

    def _write_command(self, value: int) -> None:
        if self.faults.ignores_bus_master_off:
            value |= self._get(pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER
        self._put(pci.COMMAND, 2, value)

    def _write_power(self, value: int) -> None:
        asleep = self._get(PM_AT + pci.PM_CONTROL, 2) & pci.PM_STATE
        self._put(PM_AT + pci.PM_CONTROL, 2, value)
        if asleep and not value & pci.PM_STATE:
            self._put(pci.COMMAND, 2, self._get(pci.COMMAND, 2) | pci.COMMAND_BUS_MASTER)

    def _power_on(self) -> None:
        flags = self._get(_FLAGS, 1)
        interrupts = self.interrupts()
        self._buffer[: CONFIG + BAR] = bytes(CONFIG + BAR)
        struct.pack_into("<Q", self._buffer, _INTERRUPTS, interrupts)
        self._put(_FLAGS, 1, flags)
        code = _NVME_CLASS if self._nvme else _OTHER_CLASS
        self._put(pci.VENDOR_ID, 4, _INTEL | 0x1234 << 16)
        self._put(pci.STATUS, 2, pci.STATUS_CAPABILITIES)
        self._put(pci.CLASS_REVISION, 4, code << 8)
        self._put(pci.BAR0, 4, 0xFEB0_0000)
        self._put(pci.INTERRUPT_PIN, 1, 1)
        self._put(pci.CAPABILITIES, 1, PM_AT)
        chain = ((PM_AT, pci.CAP_PM), (MSI_AT, pci.CAP_MSI), (MSIX_AT, pci.CAP_MSIX), (EXPRESS_AT, 0x10))
        for (at, number), following in zip(chain, [*(at for at, _ in chain[1:]), 0], strict=True):
            self._put(at, 2, number | following << 8)
        self._put(EXPRESS_AT + pci.EXPRESS_DEVICE_CAPABILITIES, 4, pci.EXPRESS_FLR)
        self._put(ATS_AT, 4, pci.EXT_ATS | 1 << 16)

    def _flag(self, bit: int, on: bool) -> None:
        flags = self._get(_FLAGS, 1)
        self._put(_FLAGS, 1, flags | bit if on else flags & ~bit)

    def _get(self, offset: int, size: int) -> int:
        return int.from_bytes(self._buffer[offset : offset + size], "little")

    def _put(self, offset: int, size: int, value: int) -> None:
        self._buffer[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def _f64(self, offset: int) -> float:
        return float(struct.unpack_from("<d", self._buffer, offset)[0])

    def _put_f64(self, offset: int, value: float) -> None:
        struct.pack_into("<d", self._buffer, offset, value)


def shared(name: str, faults: Faults | None = None, **more: Any) -> SimulatedDevice:
    """A device in real time that another process can take over; the descriptors stay open."""
    fds = []
    for size in (BUFFER_SIZE, MEMORY):
        fd = os.memfd_create(f"simulated-{name}", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        fds.append(fd)
    return SimulatedDevice(name, faults, RealClock(), fds=tuple(fds), **more)


def adopt(values: dict[str, Any], fds: Sequence[int]) -> SimulatedDevice:
    """The device of another process; see :meth:`SimulatedDevice.handover`."""
    faults = Faults(**values.pop("faults"))
    return SimulatedDevice(faults=faults, clock=RealClock(), fds=tuple(fds), fresh=False, **values)
