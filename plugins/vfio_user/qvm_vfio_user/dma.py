"""DMA_MAP and DMA_UNMAP: which of the client's memory the device reaches, and when.

A map with a descriptor is mapped here. One without (a ROM, another device's BAR, RAM that is not shared)
is only remembered: its addresses are taken, and the device does not reach it. One thread, the socket's.
"""

from __future__ import annotations

import bisect
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qvm_vfio_user import hints, spec
from qvm_vfio_user.version import MAPS_MAX
from qvm_vfio_user.wire import Message, Refused
from qvmcore.api import ClientError, HostError, MemoryRegion, PciFunction, Served, VirtioVdev

_TOP = 1 << 64
#: Bytes of one client that are mapped here: files without pages cost nothing but addresses, and of those
#: the process has 128 TiB for everybody.
_BYTES_MAX = 1 << 42
#: A writable map of this many bytes that is no RAM does not exist before the guest runs: the RAM of a PC
#: below its video memory is larger.
_RAM_SIZE = 512 << 10
#: Seconds a vdev gets to leave memory that is taken away.
PATIENCE = 1.0


@dataclass(frozen=True, slots=True)
class Map:
    """One map of the client, ``[start, end)``; ``region`` is None when the device does not reach it."""

    start: int
    end: int
    writable: bool
    region: MemoryRegion | None


class DmaMaps:
    """The maps of one client, and what of them is in ``served.memory``.

    A device whose guest took Bus Master away must not reach memory (PCI 3.0, 6.2.2), and a mapping does
    not know. A virtio device is held by its transport; from any other one the memory is taken.
    """

    def __init__(self, served: Served, function: PciFunction) -> None:
        self._served = served
        self._maps: list[Map] = []
        #: The client has shared memory that the device can reach, and so it uses the device.
        self.shared = False
        self._virtio = served.vdev if isinstance(served.vdev, VirtioVdev) else None
        self._reached = True
        if self._virtio is None:
            self._reached = function.bus_master
            function.on_bus_master = self._chain(function.on_bus_master)

    def map(self, message: Message) -> None:
        """DMA_MAP. Raises Refused."""
        argsz, flags, offset, start, size = spec.DMA_MAP.unpack(message.payload)
        end = start + size
        if argsz < spec.DMA_MAP.size or flags & ~(spec.MAP_READ | spec.MAP_WRITE) or not size or end > _TOP:
            raise Refused(errno.EINVAL, f"argsz {argsz}, flags {flags:#x}, [{start:#x}, +{size:#x})")
        at = bisect.bisect_right(self._maps, start, key=lambda each: each.start)
        if (at and self._maps[at - 1].end > start) or (at < len(self._maps) and self._maps[at].start < end):
            raise Refused(errno.EEXIST, f"[{start:#x}, +{size:#x}) overlaps another map")
        if len(self._maps) >= MAPS_MAX:
            raise Refused(errno.ENOSPC, f"more than {MAPS_MAX} maps")
        mapped = sum(each.end - each.start for each in self._maps if each.region is not None)
        if message.fds and mapped + size > _BYTES_MAX:
            raise Refused(errno.ENOSPC, f"more than {_BYTES_MAX >> 40} TiB of shared memory")
        writable = bool(flags & spec.MAP_WRITE)
        region = None
        if message.fds and flags:
            try:
                region = MemoryRegion.adopt(start, size, message.fds.take(), offset, writable=writable)
            except HostError as error:
                raise Refused(errno.EINVAL, str(error)) from error
        maps = [*self._maps]
        maps.insert(at, Map(start, end, writable, region))
        if region is not None:
            self._served.used = True
            try:
                self._change(maps)
            except Refused:
                region.close()
                raise
            self.shared = True
        self._maps = maps

    def unmap(self, message: Message) -> bytes:
        """DMA_UNMAP; the reply says what was asked. Raises Refused.

        The range has whole maps in it, at least one. When this returns the device is out of them.
        """
        argsz, flags, start, size = spec.DMA_UNMAP.unpack_from(message.payload)
        if flags & ~spec.UNMAP_ALL == spec.UNMAP_DIRTY_BITMAP:
            raise Refused(
                errno.EINVAL if flags & spec.UNMAP_ALL else errno.ENOTSUP, "there is no dirty bitmap"
            )
        if flags & ~spec.UNMAP_ALL:
            raise Refused(errno.ENOTSUP, f"flags {flags:#x}")
        if argsz < spec.DMA_UNMAP.size or len(message.payload) != spec.DMA_UNMAP.size:
            raise Refused(errno.EINVAL, f"argsz {argsz}, {len(message.payload)} bytes")
        if flags:
            if start or size:
                raise Refused(errno.EINVAL, f"all, and [{start:#x}, +{size:#x})")
            size = _TOP
        gone = [each for each in self._maps if each.start < start + size and start < each.end]
        if any(each.start < start or start + size < each.end for each in gone):
            raise Refused(errno.EINVAL, f"[{start:#x}, +{size:#x}) is a part of a map")
        if not gone and not flags:
            raise Refused(errno.ENOENT, f"[{start:#x}, +{size:#x}) is not mapped")
        kept = [each for each in self._maps if each.start >= start + size or start >= each.end]
        regions = [each.region for each in gone if each.region is not None]
        if regions:
            self._change(kept)
        self._maps = kept
        for region in regions:
            region.close()
        return message.payload

    def check_shared(self) -> None:
        """The client uses the device: raises ClientError when none of its RAM is shared with it."""
        if self.shared:
            return
        if any(each.writable and each.end - each.start >= _RAM_SIZE for each in self._maps):
            raise ClientError(
                "the client does not share its memory, so the device cannot reach it",
                hint=f"QEMU does with {hints.QEMU_MEMORY}, Cloud Hypervisor with --memory shared=on",
            )

    def after_reset(self) -> None:
        """The device and its function were reset: wait until its worker has left memory, which is gone."""
        if self._virtio is None:
            try:
                self._wait_for_worker()
            except HostError as error:
                self._served.fault(error)

    def end(self) -> None:
        """The client is gone. Memory the vdev reaches stays, until the core has ended the vdev."""
        maps, self._maps, self.shared = self._maps, [], False
        if not self._reached:
            for each in maps:
                if each.region is not None:
                    each.region.close()

    # ---- inside ------------------------------------------------------------------------------------

    def _change(self, maps: Sequence[Map]) -> None:
        """Have the device reach the memory of ``maps``, and be out of all other. Raises Refused."""
        memory, regions = self._served.memory, _regions(maps)
        try:
            if self._virtio is not None:
                # QEMU takes all RAM away and gives it back in other pieces, with the queues running.
                self._virtio.virtio.remap(lambda: memory.replace(regions), in_parts=True)
            elif self._reached:
                memory.replace(regions)
                try:
                    self._wait_for_worker()
                except HostError:
                    memory.replace(_regions(self._maps))
                    raise
        except HostError as error:
            self._served.fault(error)
            raise Refused(errno.EBUSY, str(error)) from error

    def _wait_for_worker(self) -> None:
        """What the worker of a plain vdev does now may have begun with the memory of before."""
        if not self._served.vdev.ctx.worker.without_visitor(PATIENCE):
            raise HostError(f"the worker did not leave guest memory within {PATIENCE:g} s")

    def _chain(self, inner: Callable[[bool], None]) -> Callable[[bool], None]:
        """What to do when Bus Master changes, around what the vdev does then.

        The slot's lock is held, which the vdev's worker needs for anything it does; or it is a reset, and
        the worker is waited for behind it.
        """

        def changed(master: bool) -> None:
            if not master:
                inner(False)
            self._reached = master
            self._served.memory.replace(_regions(self._maps) if master else ())
            if master:
                inner(True)

        return changed


def _regions(maps: Sequence[Map]) -> list[MemoryRegion]:
    return [each.region for each in maps if each.region is not None]
