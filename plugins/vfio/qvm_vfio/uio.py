"""UIO: a memory range of a platform device and its interrupt, for the vdev ``pass-uio`` and its quiesce.

The kernel's driver maps the range and counts the interrupts. When one comes it masks it, and a write of 1
to the device file unmasks it. Standard library only: a guard process imports this with ``python -I -S``.

Nothing keeps such a device's DMA, if it has any, inside the guest's memory: there is no IOMMU in this.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qvm_quiesce.hardware import Handover

from qvm_vfio.errors import VfioError, failed
from qvm_vfio.kernel import Kernel

PREFIX = "uio:"
_NUMBERED = re.compile(r"(?:/dev/)?(uio\d+)")
#: The kernel has five maps at most (MAX_UIO_MAPS).
_MOST_MAPS = 5
_SIZES = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


class UioKernel(Kernel):
    """The way to a host's UIO devices. Methods raise OSError; any thread."""

    dev = Path("/dev")
    adopt = "qvm_vfio.uio:adopt"

    def open(self, path: Path) -> int:
        """A device file. Reading it does not wait."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)

    def waitable(self, fd: int) -> int:
        """What is readable when an interrupt has come."""
        return fd

    def take(self, fd: int) -> None:
        """Take note of the interrupts so far; BlockingIOError when there is none."""
        os.read(fd, 4)

    def control(self, fd: int, on: bool) -> None:
        """Unmask or mask the interrupt; ENOSYS when the driver cannot."""
        os.write(fd, int(on).to_bytes(4, "little"))

    def more(self) -> dict[str, Any]:
        """What else another process has to know to take a device over; JSON-able."""
        return {}

    def map(self, fd: int, number: int, size: int) -> mmap.mmap:
        """Map ``number`` of the device, whole pages."""
        return self.mmap(fd, size, number * mmap.PAGESIZE)


class UioMap(NamedTuple):
    """A range: ``size`` bytes, ``offset`` bytes into its first page."""

    size: int
    offset: int


class UioHardware:
    """Implements ``qvm_quiesce.hardware.Hardware`` for a device without PCI. Takes ``fd`` over.

    BARs are the device's maps. There is no configuration space, no reset and no memory of ours that it
    could write to.
    """

    platform = True
    resets: Sequence[str] = ()

    def __init__(self, kernel: UioKernel, entry: str, fd: int, *, interrupt: bool = True) -> None:
        self.name = PREFIX + entry
        #: Set by :meth:`revoke`: nothing of a guest may reach the device any more.
        self.revoked = False
        #: Whether its interrupt is used, and so has to be masked at the end.
        self.interrupt = interrupt
        self._kernel = kernel
        self._entry = entry
        self._fd = fd
        self._path = kernel.sys / "class/uio" / entry
        self.maps = {
            number: UioMap(*(self._value(f"maps/map{number}/{what}") for what in ("size", "offset")))
            for number in range(_MOST_MAPS)
            if (self._path / f"maps/map{number}").exists()
        }
        self._own: dict[int, mmap.mmap] = {}
        #: Mappings of the guest's, with their addresses and sizes.
        self._direct: list[tuple[mmap.mmap, int, int]] = []

    @property
    def label(self) -> str:
        """What the driver calls it."""
        return _text(self._path / "name")

    # -- Hardware --------------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """There is none. Raises VfioError."""
        raise VfioError(f"{self.name} is no PCI function: it has no configuration space")

    def config_write(self, offset: int, size: int, value: int) -> None:
        """There is none. Raises VfioError."""
        self.config_read(offset, size)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """A register of a map, by one access of ``size`` (1, 2, 4, 8) bytes."""
        return int(self._register(bar, offset, size).value)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a register of a map."""
        self._register(bar, offset, size).value = value

    def reset(self, method: str) -> None:
        """There is none. Raises VfioError."""
        raise VfioError(f"{self.name} has no reset")

    def revoke(self) -> None:
        """Whoever passes accesses of a guest on looks at :attr:`revoked`; what is mapped is covered."""
        self.revoked = True
        for _, address, size in self._direct:
            try:
                self._kernel.cover(address, size)
            except OSError as error:
                raise failed(f"{self.name}: its registers stay mapped", error) from error

    def drop_interrupts(self) -> None:
        """Mask the interrupt in its driver, when it is used."""
        if self.interrupt:
            self.enable_interrupt(False)

    def interrupts(self) -> int:
        """How often the driver saw it since it was loaded."""
        return self._value("event")

    def memory(self) -> Sequence[memoryview]:
        """None: nobody has mapped any for it."""
        return ()

    def unmap_dma(self) -> None:
        """Nothing is mapped."""

    def handover(self) -> Handover:
        """The device file."""
        values: dict[str, Any] = {"entry": self._entry, "interrupt": self.interrupt} | self._kernel.more()
        return Handover(self._kernel.adopt, str(Path(__file__).parents[1]), values, (self._open_fd(),))

    def surrender(self) -> None:
        """There is no memory to keep."""
        self.close()

    def close(self) -> None:
        """Close the device file. Mappings that somebody still looks at go with the process. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._kernel.close(fd)
        maps = [*self._own.values(), *(each for each, _, _ in self._direct)]
        self._own.clear()
        self._direct.clear()
        for each in maps:
            try:
                each.close()
            except BufferError:
                pass

    # -- for the owner ---------------------------------------------------------------------------------

    def size(self, number: int) -> int:
        """Bytes of a map. Raises VfioError."""
        return self._map_of(number).size

    def direct(self, number: int, size: int) -> int:
        """Map whole pages for a guest; the address. 0 where the range does not fill them."""
        found = self._map_of(number)
        if found.offset or size > found.size or size % mmap.PAGESIZE:
            return 0
        memory = self._mapped(number, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._direct.append((memory, address, size))
        return address

    @property
    def waitable(self) -> int:
        """A descriptor that is readable when an interrupt has come."""
        return self._kernel.waitable(self._open_fd())

    def take(self) -> bool:
        """Whether an interrupt came since it was asked last. The driver has masked it then."""
        try:
            self._kernel.take(self._open_fd())
        except BlockingIOError:
            return False
        except OSError as error:
            raise failed(f"{self.name}: its interrupt cannot be waited for", error) from error
        return True

    def enable_interrupt(self, on: bool) -> None:
        """Unmask or mask the interrupt. Raises VfioError."""
        try:
            self._kernel.control(self._open_fd(), on)
        except OSError as error:
            hint = "its driver has no control of the interrupt" if error.errno == errno.ENOSYS else ""
            what = f"{self.name}: its interrupt cannot be {'un' * on}masked"
            raise VfioError(f"{what}: {error.strerror or error}", hint, error.errno or 0) from error

    # -- inside ----------------------------------------------------------------------------------------

    def _register(self, number: int, offset: int, size: int) -> Any:
        found = self._map_of(number)
        if size not in _SIZES or offset % size or not 0 <= offset <= found.size - size:
            raise VfioError(f"{self.name}: no {size} bytes at {offset:#x} of map {number}")
        if number not in self._own:
            self._own[number] = self._mapped(number, found.offset + found.size)
        return _SIZES[size].from_buffer(self._own[number], found.offset + offset)

    def _map_of(self, number: int) -> UioMap:
        if number not in self.maps:
            known = ", ".join(map(str, self.maps)) or "none"
            raise VfioError(f"{self.name} has no map {number}", f"its maps: {known}")
        return self.maps[number]

    def _mapped(self, number: int, size: int) -> mmap.mmap:
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            return self._kernel.map(self._open_fd(), number, pages)
        except OSError as error:
            hint = "the kernel maps whole pages only" if error.errno == errno.EINVAL else ""
            raise VfioError(
                f"{self.name}: map {number} cannot be mapped: {error.strerror}", hint, error.errno or 0
            ) from error

    def _value(self, what: str) -> int:
        text = _text(self._path / what)
        try:
            return int(text, 0)
        except ValueError as error:
            raise VfioError(f"{self.name}: {self._path / what} says {text!r}") from error

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise VfioError(f"{self.name} was given back")
        return self._fd


def find(text: str, kernel: UioKernel) -> str:
    """``uio3`` of ``/dev/uio3``, ``uio3`` or the name its driver gave it. Raises VfioError."""
    entries = sorted(path.name for path in (kernel.sys / "class/uio").glob("uio*"))
    labels = {entry: _text(kernel.sys / "class/uio" / entry / "name") for entry in entries}
    numbered = _NUMBERED.fullmatch(text)
    found = [numbered[1]] if numbered else [entry for entry in entries if labels[entry] == text]
    if len(found) > 1:
        raise VfioError(f"{text!r} is the name of {', '.join(found)}", f"write one of them: {found[0]}")
    if not found or found[0] not in entries:
        listed = ", ".join(f"{entry} ({label})" for entry, label in labels.items()) or "none"
        raise VfioError(f"there is no UIO device {text!r} in this host", f"there are: {listed}")
    return found[0]


def open_uio(text: str, kernel: UioKernel | None = None, *, interrupt: bool = True) -> UioHardware:
    """Take a device, which nobody else who uses this function has then. Raises VfioError."""
    kernel = kernel or UioKernel()
    entry = find(text, kernel)
    path = kernel.dev / entry
    try:
        fd = kernel.open(path)
    except PermissionError:
        raise VfioError(f"no permission to open {path}", f"sudo chown $USER {path}") from None
    except OSError as error:
        raise failed(f"cannot open {path}", error) from error
    try:
        # The lock belongs to the open file: it lasts while the guard has it, too.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return UioHardware(kernel, entry, fd, interrupt=interrupt)
    except BlockingIOError:
        kernel.close(fd)
        raise VfioError(f"{path} is in use by another VM, or by the guard of one") from None
    except BaseException:
        kernel.close(fd)
        raise


def adopt(values: dict[str, Any], fds: Sequence[int], kernel: UioKernel | None = None) -> UioHardware:
    """The device of another process; see :meth:`UioHardware.handover`."""
    return UioHardware(kernel or UioKernel(), values["entry"], fds[0], interrupt=values["interrupt"])


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
