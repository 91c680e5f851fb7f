"""The guest shared memory factory: a page to ask for regions, and the aperture they appear in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from qvm_shmem import spec
from qvm_shmem.options import APERTURE, ShmemOptions, is_legal
from qvm_shmem.region import Region, Store
from qvm_shmem.spec import PAGE, Refused, Status
from qvmcore.api import GuestEnd, HostError, PciId, PciVdev, Trigger, VdevContext, Window

#: Regions one guest can be attached to at a time; each costs the host two descriptors.
MAX_ATTACHED = 32


class _Attachment:
    """A region in the aperture: its control page at page ``start``, its memory behind it."""

    def __init__(self, name: str, region: Region, start: int) -> None:
        self.name = name
        self.region = region
        self.start = start
        self.pending = 0
        self.fd = -1

    @property
    def pages(self) -> int:
        return 1 + self.region.pages


class Shmem(PciVdev):
    """Window 0 is the factory page, window 1 the aperture.

    Runs under the slot's lock, so a register access and a notification never meet.
    """

    vdev_type = "shmem"
    summary = "named memory shared with other VMs, and notifications between them"
    Options = ShmemOptions
    windows = (Window(PAGE), Window(APERTURE))
    irqs = 1
    trigger = Trigger.LEVEL
    pci_id = PciId(0x1C05, 0x0001)
    pci_class = 0x058000
    fdt_compatible = ("qvm,shmem",)

    def __init__(self, ctx: VdevContext, options: ShmemOptions) -> None:
        super().__init__(ctx, options)
        self._store: Store | None = None
        self._precreated: list[Region] = []
        self._pages: list[_Attachment | None] = [None] * (APERTURE // PAGE)
        self._attached: list[_Attachment] = []
        self._latest: _Attachment | None = None
        self._status = Status.OK
        self._size = 0
        self._name = bytearray(spec.MAX_NAME)
        self._notified = self._received = self._refused = 0

    def on_configured(self) -> None:
        """Make the directory and the regions that exist from the start."""
        directory = self.options.directory or Path(f"/dev/shm/qvm-shmem-{os.geteuid()}")
        store = self._store = Store(directory)
        for wanted in self.options.create:
            host_name = self.options.host_name(wanted.name)
            assert host_name is not None, "the options were checked"
            try:
                self._precreated.append(store.attach(host_name, wanted.pages))
            except Refused as refused:
                text = (
                    f"cannot create the shared memory {wanted.name!r} of {wanted.size} bytes in {directory}"
                )
                raise HostError(f"{text}: {refused.__cause__ or refused}") from refused

    # ---- registers -----------------------------------------------------------------------------

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        """The factory page, a control page, or shared memory; all ones where nothing is."""
        if window == 0:
            return int.from_bytes(self._factory()[offset : offset + size], "little")
        each = self._pages[offset // PAGE]
        if each is None:
            return (1 << 8 * size) - 1
        offset -= each.start * PAGE
        if offset < PAGE:
            return self._control_read(each, offset, size)
        try:
            return each.region.read(offset - PAGE, size)
        except IndexError:
            return (1 << 8 * size) - 1

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        """As :meth:`mmio_read`; what is not a writable register is dropped."""
        if window == 0:
            self._factory_write(offset, size, value)
            return
        each = self._pages[offset // PAGE]
        if each is None:
            return
        offset -= each.start * PAGE
        if offset < PAGE:
            self._control_write(each, offset, size, value)
            return
        try:
            each.region.write(offset - PAGE, size, value)
        except IndexError:
            pass  # half of it lies behind the region

    def _factory(self) -> bytes:
        address, latest = self.ctx.address(1), self._latest
        shmem = address + latest.start * PAGE if latest is not None and address is not None else 0
        vector = self.ctx.intr.number if self.ctx.intr is not None else 0
        return spec.FACTORY.pack(
            spec.SIGNATURE, shmem, vector, self._status, self._size, bytes(self._name), 0
        )

    def _factory_write(self, offset: int, size: int, value: int) -> None:
        start, end = spec.FACTORY_NAME, spec.FACTORY_NAME + spec.MAX_NAME
        if start <= offset and offset + size <= end:
            self._name[offset - start : offset - start + size] = value.to_bytes(size, "little")
        elif offset == spec.FACTORY_SIZE and size == 4:
            self._attempt(value)
        elif offset == spec.FACTORY_FIND and size == 4:
            self._attempt(None)

    def _control_read(self, each: _Attachment, offset: int, size: int) -> int:
        if size != 4:
            return 0
        if offset == spec.CONTROL_STATUS:
            pending, each.pending = each.pending, 0
            self._update_irq()
            return each.region.active << 16 | pending
        return each.region.index if offset == spec.CONTROL_IDX else 0

    def _control_write(self, each: _Attachment, offset: int, size: int, value: int) -> None:
        if size != 4:
            return
        if offset == spec.CONTROL_NOTIFY:
            self._notified += each.region.notify(value)
        elif offset == spec.CONTROL_DETACH:
            self._detach(each)

    # ---- regions -------------------------------------------------------------------------------

    def _attempt(self, pages: int | None) -> None:
        """The guest asks for a region by the name it has written; None: only an existing one."""
        self._latest = None
        self._size = pages or 0
        try:
            self._latest = self._attach(pages)
            self._size = self._latest.region.pages
            self._status = Status.OK
        except Refused as refused:
            self._refused += 1
            self._status = refused.status
            self.ctx.log.debug("%s: %r is refused: %s", self.ctx.name, bytes(self._name), refused)

    def _attach(self, pages: int | None) -> _Attachment:
        name = bytes(self._name).partition(b"\0")[0].decode("latin-1")
        host_name = self.options.host_name(name) if is_legal(name) else None
        if host_name is None:
            raise Refused(Status.ILLEGAL_NAME)
        if not self.options.may_use(name):
            raise Refused(Status.NO_PERMISSION)
        if self._store is None or pages == 0 or self.ctx.address(1) is None:
            raise Refused(Status.UNKNOWN_FAILURE)
        if len(self._attached) >= MAX_ATTACHED or (pages or 1) + 1 > len(self._pages):
            raise Refused(Status.NO_MEMORY)
        region = self._store.attach(host_name, pages)
        try:
            each = _Attachment(name, region, self._free_place(1 + region.pages))
            each.fd = region.join()
        except BaseException:
            region.close()
            raise
        self._pages[each.start : each.start + each.pages] = [each] * each.pages
        self._attached.append(each)
        self.ctx.worker.watch(each.fd, lambda: self._notification(each))
        return each

    def _free_place(self, pages: int) -> int:
        """The first run of free pages. Raises Refused."""
        start = 0
        for each in sorted(self._attached, key=lambda each: each.start):
            if each.start - start >= pages:
                break
            start = each.start + each.pages
        if start + pages > len(self._pages):
            raise Refused(Status.NO_MEMORY)
        return start

    def _detach(self, each: _Attachment) -> None:
        self.ctx.worker.unwatch(each.fd)
        self._attached.remove(each)
        self._pages[each.start : each.start + each.pages] = [None] * each.pages
        if self._latest is each:
            self._latest = None
        each.region.close()
        self._update_irq()

    def _notification(self, each: _Attachment) -> None:
        """Another client of a region has something to say (worker thread)."""
        if each not in self._attached:
            return
        news = each.region.collect()
        if news:
            each.pending |= news
            self._received += 1
            # Down and up again: a message-signalled interrupt is sent on the rise.
            self.ctx.irq().set(False)
            self._update_irq()

    def _update_irq(self) -> None:
        self.ctx.irq().set(any(each.pending for each in self._attached))

    # ---- life ----------------------------------------------------------------------------------

    def on_reset(self) -> None:
        """Detached from everything, and the factory page as at the start."""
        for each in list(self._attached):
            self._detach(each)
        self._latest = None
        self._status, self._size = Status.OK, 0
        self._name[:] = bytes(spec.MAX_NAME)

    def on_terminate(self, end: GuestEnd) -> None:
        """Leave every region; the last VM removes it."""
        for each in self._attached:
            each.region.close()
        self._attached.clear()
        self._pages[:] = [None] * len(self._pages)
        while self._precreated:
            self._precreated.pop().close()

    def status(self) -> Mapping[str, object]:
        """The regions, and counters."""
        regions = {
            f"{each.name}#{each.region.index}": {"pages": each.region.pages} for each in list(self._attached)
        }
        return {
            "regions": regions,
            "notified": self._notified,
            "received": self._received,
            "refused": self._refused,
        }
