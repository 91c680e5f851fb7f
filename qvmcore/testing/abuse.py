"""A hostile guest for any virtio device, as a Hypothesis state machine over MMIO or PCI.

::

    class HostileGuest(VirtioAbuse):
        def device(self):
            return plug(MyVdev, size="1M")

    TestHostileGuest = HostileGuest.TestCase

It mixes legal bring-up and legal requests with arbitrary registers, descriptors, ring entries,
kicks and resets, and holds the device to what a guest may never break:

* no exception leaves the device, and the worker always comes back;
* memory no ring and no buffer ever named stays as it was;
* the device gives back at most what it took, and takes at most what was offered;
* the used index in memory is the device's own, unless the guest let it be overwritten;
* after a reset everything works again.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qvmcore.testing.driver import MmioDriver, VirtioDriver
from qvmcore.testing.fakes import Plugged, default_transport
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.pci_driver import PciDriver
from qvmcore.testing.ring import GuestRam, RingDriver
from qvmcore.testing.strategies import (
    Access,
    Descriptor,
    accesses,
    config_accesses,
    descriptors,
    good_chains,
    pci_accesses,
)
from qvmcore.virtio import pci_spec, spec
from qvmcore.virtio.device import VirtioVdev

#: Bytes at the end of the first memory region that the guest never names.
GUARD = 0x1_0000
_PATTERN = bytes(range(256)) * (GUARD // 256)
_RING_PART = 0x4_0000


class VirtioAbuse(RuleBasedStateMachine):
    """Subclass, define :meth:`device`, and give ``TestCase`` to pytest.

    Each run is on MMIO or on PCI, as ``plug`` puts the device on what the machine draws, and on
    split or on packed rings.
    ``steps`` and ``examples`` bound a run; the first memory region of the device must be at least
    1 MiB. Rings live in its first quarter MiB, buffers behind that, the guard at its end.
    """

    examples: ClassVar[int] = 25
    steps: ClassVar[int] = 40

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.TestCase.settings = settings(
            max_examples=cls.examples,
            stateful_step_count=cls.steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )

    def device(self) -> Plugged[Any]:
        """A fresh device; called for each run, closed by the machine."""
        raise NotImplementedError("define device() to return plug(YourVdev, ...)")

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        """The device was just brought up by a good driver: do a request and assert its result."""

    # ---- the guest ---------------------------------------------------------------------------

    @initialize(up=st.booleans(), transport=st.sampled_from(("mmio", "pci")), packed=st.booleans())
    def power_on(self, up: bool, transport: str, packed: bool) -> None:
        """A device nobody has touched, or one a good driver has just brought up."""
        self.packed = packed
        with default_transport(transport):
            self.plugged = self.device()
        self.on_pci = self.plugged.pci is not None
        vdev = self.plugged.vdev
        assert isinstance(vdev, VirtioVdev), f"{vdev!r} is no VirtioVdev"
        self.virtio = vdev.virtio
        region = self.plugged.memory.regions[0]
        assert region.size >= 1 << 20, "the first memory region must be at least 1 MiB"
        self.start = region.start
        self.guard = region.end - GUARD
        self.plugged.memory.write(self.guard, _PATTERN)
        self.rings: list[RingDriver] = []
        self.smashed = False
        self.driver = self._new_driver()
        if up:
            self._bring_up(None)

    @precondition(lambda self: not self.on_pci)
    @rule(access=accesses())
    def touch_a_register(self, access: Access) -> None:
        """Any load or store in the window. A reset through it is a reset like any other."""
        if access.value is None:
            value = self.plugged.read(access.offset, access.size)
            assert 0 <= value < 1 << 8 * access.size
            return
        if access.offset in _RING_PLACES:
            # Rings wherever the guest likes, but out of the guard.
            return
        self.plugged.write(access.offset, access.value, access.size)
        self._forget_rings_if_reset()

    @precondition(lambda self: self.on_pci)
    @rule(access=pci_accesses())
    def touch_a_structure(self, access: Access) -> None:
        """Likewise in the BAR of the structures."""
        if access.value is None:
            value = self.plugged.read(access.offset, access.size)
            assert 0 <= value < 1 << 8 * access.size
        elif access.offset not in _PCI_RING_PLACES:
            self.plugged.write(access.offset, access.value, access.size)
            self._forget_rings_if_reset()

    @precondition(lambda self: self.on_pci)
    @rule(access=config_accesses())
    def touch_configuration_space(self, access: Access) -> None:
        """BARs, Command, MSI-X, and the window into the BAR."""
        device = self.plugged.device
        assert device is not None
        if access.value is None:
            assert 0 <= device.read(access.offset, access.size) < 1 << 8 * access.size
        else:
            device.write(access.offset, access.value, access.size)

    @precondition(lambda self: self.on_pci)
    @rule(access=pci_accesses(), bar=st.one_of(st.just(0), st.integers(0, 255)))
    def look_through_the_window(self, access: Access, bar: int) -> None:
        """Any access through the PCI configuration access capability (4.1.4.9)."""
        device = self.plugged.device
        assert device is not None
        if access.offset in _PCI_RING_PLACES:
            return
        at = next(each.at for each in device.structures() if each.cfg_type == pci_spec.CAP_PCI_CFG)
        device.write(at + 4, bar, 1)
        device.write(at + 8, access.offset)
        device.write(at + 12, access.size)
        if access.value is None:
            device.read(at + pci_spec.CAP_SIZE)
        else:
            device.write(at + pci_spec.CAP_SIZE, access.value & 0xFFFFFFFF)
            self._forget_rings_if_reset()
        # Shut it again: what other rules do to configuration space must not place a ring.
        device.write(at + 12, 0)

    @precondition(lambda self: self.on_pci)
    @rule(vector=st.one_of(st.integers(0, 4), st.sampled_from((0x7FF, 0x800, 0xFFFE, 0xFFFF))))
    def map_a_vector(self, vector: int) -> None:
        """MSI-X on, and every event mapped to a vector that may not exist."""
        driver = self.driver
        if not isinstance(driver, PciDriver) or not self._reachable():
            return
        driver.use_msix(0x0802_0040)
        for index in range(len(self.plugged.vdev.queue_sizes)):
            assert driver.map_queue(index, vector) in (vector, pci_spec.MSI_NO_VECTOR)
        assert driver.map_config(vector) in (vector, pci_spec.MSI_NO_VECTOR)

    @rule(ready=st.booleans())
    def place_a_ring_anywhere(self, ready: bool) -> None:
        """Ring areas at an address that cannot work, for whatever queue is selected."""
        if self._reachable():
            self.driver.place(16, self.start + 8, self.start + 1, (1 << 64) - 2)
            if ready:
                self.driver.enable_queue()

    @rule(features=st.one_of(st.none(), st.just(1 << 32), st.just(1 << 32 | 1 << 29)))
    def bring_up(self, features: int | None) -> None:
        """What a good driver does."""
        if features is not None:
            features |= self.packed << spec.VIRTIO_F_RING_PACKED
        self._bring_up(features)

    @precondition(lambda self: self.rings)
    @rule(data=st.data(), again=st.booleans())
    def reset_one_queue(self, data: st.DataObject, again: bool) -> None:
        """2.6.1, in whatever state the queue is, and perhaps set it up again."""
        driver = self.driver
        index = data.draw(st.integers(0, len(self.rings) - 1))
        if not driver.features >> spec.VIRTIO_F_RING_RESET & 1 or not self._reachable():
            return
        if self.virtio.features != driver.features:
            return
        driver.reset_queue(index)
        assert self.virtio.queue(index) is None
        if again and driver.ram.mark() < self.guard - _RING_PART:
            self.rings[index] = driver.setup_queue(index, self.rings[index].size)

    @precondition(lambda self: self.rings)
    @rule(data=st.data())
    def write_descriptors(self, data: st.DataObject) -> None:
        """Some rows of a descriptor table."""
        ring = self._pick(data)
        rows = data.draw(st.lists(descriptors(self.start, self.guard, ring.size), min_size=1, max_size=5))
        first = data.draw(st.integers(0, ring.size - 1))
        for number, row in enumerate(rows):
            ring.write_desc((first + number) % ring.size, *self._tame(row))
        ring.offer(first)
        self._go(ring, data)

    @precondition(lambda self: self.rings)
    @rule(data=st.data())
    def write_an_indirect_table(self, data: st.DataObject) -> None:
        """A table of rows, and a reference to it that may have the wrong length."""
        ring = self._pick(data)
        rows = data.draw(st.lists(descriptors(self.start, self.guard, 4), min_size=1, max_size=5))
        address, length = ring.raw_table([self._tame(row) for row in rows])
        length += data.draw(st.sampled_from((0, 0, 0, -1, 1, 16, -16)))
        slot = data.draw(st.integers(0, ring.size - 1))
        flags = spec.VIRTQ_DESC_F_INDIRECT | data.draw(st.sampled_from((0, 0, 1, 2)))
        ring.write_desc(slot, address, max(0, length), flags, 0)
        ring.offer(slot)
        self._go(ring, data)

    @precondition(lambda self: self.rings and self.packed)
    @rule(data=st.data())
    def write_slots(self, data: st.DataObject) -> None:
        """Descriptors in a packed ring as they are: any flags, any ID, wherever the device looks next."""
        ring = self._pick(data)
        if not isinstance(ring, PackedDriver):
            return
        for _ in range(data.draw(st.integers(1, 5))):
            row = self._tame(data.draw(descriptors(self.start, self.guard, ring.size)))
            mark = data.draw(st.sampled_from((0, spec.VIRTQ_DESC_F_AVAIL, spec.VIRTQ_DESC_F_USED)))
            slot = (ring.filled + data.draw(st.integers(0, 2))) % ring.size
            ring.write_slot(slot, row.address, row.length, row.following & 0xFFFF, row.flags ^ mark)
            ring.filled += 1
        self._go(ring, data)

    @precondition(lambda self: self.rings)
    @rule(data=st.data(), head=st.one_of(st.integers(0, 63), st.integers(0, 0xFFFF)))
    def offer_a_head(self, data: st.DataObject, head: int) -> None:
        """A ring entry that may name anything."""
        ring = self._pick(data)
        ring.offer(head)
        self._go(ring, data)

    @precondition(lambda self: self.rings)
    @rule(data=st.data(), chain=good_chains())
    def offer_a_good_chain(self, data: st.DataObject, chain: tuple[list[bytes], list[int]]) -> None:
        """A well-formed chain with contents that mean nothing to the device."""
        ring = self._pick(data)
        try:
            ring.add(*chain)
        except MemoryError:
            return
        self._go(ring, data)

    @precondition(lambda self: self.rings)
    @rule(data=st.data(), jump=st.sampled_from((None, None, None, None, 1, -1, 64, 0x8000)))
    def publish(self, data: st.DataObject, jump: int | None) -> None:
        """Show the device what was offered, or an index out of the blue."""
        ring = self._pick(data)
        ring.publish(None if jump is None else ring.published + jump)
        self._settled()

    @precondition(lambda self: self.rings)
    @rule(data=st.data(), event=st.integers(0, 0xFFFF), off=st.booleans())
    def suppress(self, data: st.DataObject, event: int, off: bool) -> None:
        """Either way of suppressing interrupts, whatever was negotiated."""
        ring = self._pick(data)
        ring.set_used_event(event)
        ring.set_no_interrupt(off)

    @rule(queue=st.one_of(st.integers(0, 3), st.integers(0, 0xFFFFFFFF)))
    def kick(self, queue: int) -> None:
        """A notification, with a reason or without."""
        self.driver.notify(queue)
        self._settled()

    @rule()
    def reset(self) -> None:
        """A reset, in whatever state the device is."""
        self._new_driver().reset()
        self._forget_rings()

    @rule()
    def recover(self) -> None:
        """After a reset a good driver finds a good device."""
        self.driver = self._new_driver()
        self._bring_up(None)
        self._settled()
        assert not self.driver.needs_reset, "a fresh device needs a reset"
        self.check_works(self.plugged, self.driver)
        self._settled()
        assert not self.driver.needs_reset

    # ---- what must hold ------------------------------------------------------------------------

    @invariant()
    def nothing_escapes(self) -> None:
        """No exception left the device, nobody asked for the end of the VM."""
        if hasattr(self, "plugged"):
            self._settled()
            assert self.plugged.ctx.faults == []
            assert self.plugged.ctx.shutdowns == []

    @invariant()
    def memory_outside_is_untouched(self) -> None:
        """What the guest never named was never written."""
        if hasattr(self, "plugged"):
            intact = self.plugged.memory.view(self.guard, GUARD) == _PATTERN
            assert intact, "the device wrote out of its buffers"

    @invariant()
    def no_more_back_than_taken(self) -> None:
        """Given back <= taken, and the used index in memory says the same."""
        if not hasattr(self, "plugged"):
            return
        for index, ring in enumerate(self.rings):
            queue = self.virtio.queue(index)
            if queue is None:
                continue
            counters = queue.counters()
            assert counters["pushed"] <= counters["popped"]
            assert counters["interrupts"] <= counters["pushed"]
            if not self.smashed and not self.packed:
                # Nobody reaps, so a packed ring runs over its own used descriptors.
                assert ring.used_idx == counters["pushed"] & 0xFFFF

    def teardown(self) -> None:
        """The VM ends, in whatever state the device is; every step of the end must succeed."""
        if hasattr(self, "plugged"):
            results = self.plugged.terminate()
            self.plugged.close()
            assert [result for result in results if result.verdict != "ok"] == []

    # ---- inside ------------------------------------------------------------------------------------

    def _new_driver(self) -> VirtioDriver:
        ram = GuestRam(self.plugged.memory, self.start, self.guard - self.start)
        device = self.plugged.device
        driver: VirtioDriver
        if device is None:
            driver = MmioDriver(self.plugged.bus, self.plugged.base, ram)
        else:
            device.enumerate(anew=True)
            driver = PciDriver(self.plugged.bus, device, ram)
        driver.packed = self.packed
        return driver

    def _reachable(self) -> bool:
        """Whether the registers are still where the driver expects them."""
        device = self.plugged.device
        if device is None or self.plugged.pci is None:
            return True
        function = self.plugged.pci.function
        return all(function.bar_address(number) == at for number, (at, _) in device.bars.items())

    def _bring_up(self, features: int | None) -> None:
        self.driver = self._new_driver()
        self.driver.start(features)
        self.rings = self.driver.queues
        self.smashed = False
        assert self.driver.ram.mark() <= self.start + _RING_PART, "the rings outgrew their part of the memory"

    def _forget_rings_if_reset(self) -> None:
        """The status is 0 after a reset, and before anything was negotiated."""
        if self.virtio.status == 0:
            self._forget_rings()

    def _forget_rings(self) -> None:
        self.rings = []
        self.smashed = False

    def _go(self, ring: RingDriver, data: st.DataObject) -> None:
        """Mostly at once, so that runs get far; sometimes later, together with more."""
        if data.draw(st.sampled_from((True, True, True, False))):
            ring.publish()
            ring.notify()
            self._settled()

    def _pick(self, data: st.DataObject) -> RingDriver:
        return data.draw(st.sampled_from(self.rings))

    def _tame(self, row: Descriptor) -> Descriptor:
        """Keep buffers out of the guard; note when they may overwrite a ring."""
        if self.start <= row.address < self.guard + GUARD:
            row = row._replace(length=min(row.length, max(0, self.guard - row.address)))
        if row.address < self.start + _RING_PART:
            self.smashed = True
        return row

    def _settled(self) -> None:
        self.plugged.settle()


#: Registers that say where rings are: the machine sets them itself, or a ring would cover the guard.
_RING_PLACES = frozenset(range(spec.MMIO_QUEUE_DESC_LOW, spec.MMIO_QUEUE_DEVICE_HIGH + 4))
_PCI_RING_PLACES = frozenset(range(pci_spec.QUEUE_DESC - 3, pci_spec.QUEUE_DEVICE + 8))
