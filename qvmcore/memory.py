"""Guest memory: the only way to touch guest RAM (floor 1).

Every region is one shared mapping, so an engine, a vhost-user client and a vdev all see the same
bytes and no access copies. Views are plain ``memoryview`` slices: pass them to ``os.preadv``.

All views of one buffer share a counter. In a Python without a GIL threads that take and drop views at the
same time corrupt it, and CPython then releases memory that is in use (its issue 155606): there each thread
has views of a buffer of its own.

Lookups need no lock, on any thread. The regions of a guest of our own are there before it starts; those
of a guest elsewhere (``qvm serve``) come and go, while nobody serves a queue.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Sequence

from qvmcore.errors import GuestMemoryError, HostError
from qvmcore.types import MemorySpec

#: Whether threads may run at the same time, so that each needs views of its own. A view is then for the
#: thread that took it: whoever slices for others takes it anew each time.
PER_THREAD = not getattr(sys, "_is_gil_enabled", lambda: True)()


class MemoryRegion:
    """One contiguous range of guest-physical memory backed by one shared mapping.

    ``start`` and ``size`` are bytes; ``view`` is a writable memoryview of the whole range;
    ``fd`` is the memfd behind it, so that another process can map the same pages.
    """

    view: memoryview

    def __init__(self, spec: MemorySpec) -> None:
        try:
            fd = os.memfd_create(f"qvm-ram-{spec.start:x}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, spec.size)
            # Whoever else gets it cannot take its pages away from under us.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except (OSError, OverflowError) as error:
            raise _unmappable(spec.size, error) from error
        self._map_file(spec, fd, 0, writable=True)

    @classmethod
    def adopt(cls, start: int, size: int, fd: int, offset: int = 0, *, writable: bool = True) -> MemoryRegion:
        """Memory of another process: ``size`` bytes at ``offset`` of the file behind ``fd``.

        Takes the descriptor over, on failure too. What is not ``writable`` is as a ROM: what is written
        there never reaches the file. Raises HostError for a file that is too short or cannot be mapped. A
        process that makes its file shorter later takes the pages away from under us: it has to be trusted
        that far.
        """
        region = cls.__new__(cls)
        try:
            length = os.fstat(fd).st_size
        except OSError as error:
            os.close(fd)
            raise _unmappable(size, error) from error
        if size <= 0 or offset < 0 or length < offset + size:
            os.close(fd)
            raise HostError(f"[{offset:#x}, +{size:#x}) is not inside a file of {length:#x} bytes")
        region._map_file(MemorySpec(start, size, rom=not writable), fd, offset, writable)
        return region

    def _map_file(self, spec: MemorySpec, fd: int, offset: int, writable: bool) -> None:
        self.start = spec.start
        self.size = spec.size
        self.end = spec.end
        self.rom = spec.rom
        self.fd = fd
        lead = offset % mmap.ALLOCATIONGRANULARITY
        # What the client only lets us read is a ROM to the device: as on a bus, a write ends nowhere, here in
        # a page of our own. A view that refuses it would make each device fail that a guest points there.
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
        try:
            self._map = mmap.mmap(fd, lead + spec.size, access=access, offset=offset - lead)
        except (OSError, OverflowError, ValueError) as error:
            os.close(fd)
            raise _unmappable(spec.size, error) from error
        # A core dump of gigabytes would hold up whoever waits for the end of this process.
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._lead = lead
        self._lock = threading.Lock()
        self._closed = False
        self._views: dict[int, memoryview] = {}
        if not PER_THREAD:
            self.view = self._own_view()

    def _own_view(self) -> memoryview:
        """The whole range, for the calling thread. Raises ValueError once closed, as a released view does."""
        thread = threading.get_ident()
        own = self._views.get(thread)
        if own is None:
            # A thread that has ended leaves its view to whoever gets its number.
            with self._lock:
                if self._closed:
                    raise ValueError("guest memory that was released")
                own = self._views[thread] = memoryview(self._map)[self._lead :]
        return own

    @property
    def host_address(self) -> int:
        """Address of the first byte in this process, for engines that map their own memory by pointer."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def close(self) -> bool:
        """Drop the mapping; idempotent. False while views held elsewhere keep the pages alive."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with self._lock:
            self._closed = True
        try:
            for view in self._views.values():
                view.release()
            self._map.close()
        except BufferError:
            # A worker that could not be stopped, or what it left in a cycle, still holds a view.
            return False
        return True


if PER_THREAD:
    MemoryRegion.view = property(MemoryRegion._own_view)  # type: ignore[assignment]


class GuestMemory:
    """The guest-physical memory map: bounds-checked reads, writes and zero-copy views.

    Addresses are guest-physical bytes. A range must lie inside one region, else
    :class:`~qvmcore.errors.GuestMemoryError` is raised; nothing is ever clipped.
    """

    def __init__(self, regions: Iterable[MemoryRegion] = ()) -> None:
        self._regions: tuple[MemoryRegion, ...] = tuple(sorted(regions, key=lambda r: r.start))
        self._first = self._regions[0] if self._regions else None

    @classmethod
    def allocate(cls, specs: Sequence[MemorySpec]) -> GuestMemory:
        """Map fresh zeroed memory for every spec. Raises HostError when the host has not enough."""
        return cls(MemoryRegion(spec) for spec in specs)

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """The regions in address order."""
        return self._regions

    def view(self, address: int, size: int) -> memoryview:
        """A writable view of ``size`` bytes at ``address`` without a copy."""
        region = self._first
        if region is None or address < region.start or address + size > region.end or size < 0:
            region = self._find(address, size)
        start = address - region.start
        return region.view[start : start + size]

    def read(self, address: int, size: int) -> bytes:
        """A copy of ``size`` bytes at ``address``."""
        return bytes(self.view(address, size))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` to ``address``."""
        self.view(address, len(data))[:] = data

    def contains(self, address: int, size: int) -> bool:
        """Whether the whole range is guest memory."""
        return size >= 0 and any(r.start <= address and address + size <= r.end for r in self._regions)

    def replace(self, regions: Iterable[MemoryRegion]) -> None:
        """Other regions from now on; the old ones are not closed.

        For memory that its owner adds and takes away. Who may be inside it has to be out of it before:
        running queues keep views of their own (``VirtioState.remap``).
        """
        self._regions = tuple(sorted(regions, key=lambda r: r.start))
        self._first = self._regions[0] if self._regions else None

    def close(self) -> bool:
        """Unmap everything; idempotent. False while views held elsewhere keep pages alive."""
        closed = [region.close() for region in self._regions]
        return all(closed)

    def _find(self, address: int, size: int) -> MemoryRegion:
        if size >= 0:
            for region in self._regions:
                if region.start <= address and address + size <= region.end:
                    return region
        raise GuestMemoryError(f"[{address:#x}, +{size:#x}) is not guest memory")


def _unmappable(size: int, error: Exception) -> HostError:
    reason = getattr(error, "strerror", None) or error
    return HostError(f"cannot map {size} bytes of guest memory: {reason}")
