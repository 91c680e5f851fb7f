"""The contracts of a vdev as pytest classes. A plugin certifies itself by subclassing them::

    class TestHello(VdevConformance, MmioConformance, TerminationConformance):
        vdev_class = Hello

    class TestEcho(VirtioConformance, TerminationConformance):
        vdev_class = Echo

        def check_works(self, device, driver):
            request = driver.queues[0].submit([b"ping"], [8])
            device.settle()
            assert driver.queues[0].reap() == [request]

Give the options of the VM file as ``options``, or define ``make_options(tmp_path)`` when they need
host files. ``volatile`` names registers that may differ between two fresh devices (a clock).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from qvmcore.bus import all_ones
from qvmcore.memory import GuestMemory
from qvmcore.options import describe_options
from qvmcore.testing.driver import FeaturesRefused, VirtioDriver
from qvmcore.testing.fakes import RAM, TRANSPORTS, FakeContext, Plugged, default_transport, plug
from qvmcore.types import GuestEnd, Reason, Window
from qvmcore.vdev import Vdev
from qvmcore.virtio import spec
from qvmcore.virtio.device import VirtioVdev

_END = GuestEnd(Reason.GUEST_SHUTDOWN, "conformance")
_WRITE, _NEXT, _INDIRECT = spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_INDIRECT


class Kit:
    """What every conformance class shares."""

    vdev_class: ClassVar[type[Vdev]]
    options: ClassVar[Mapping[str, object]] = {}
    volatile: ClassVar[frozenset[int]] = frozenset()

    def make_options(self, tmp_path: Path) -> Mapping[str, object]:
        """The options for one device; ``options`` unless overridden."""
        return self.options

    @pytest.fixture
    def device(self, tmp_path: Path) -> Iterator[Plugged[Any]]:
        """A configured and started device, ended after the test; a fault fails the test."""
        with self.plugged(tmp_path) as device:
            yield device
            device.settle()
            assert device.ctx.faults == []

    def plugged(self, tmp_path: Path) -> Plugged[Any]:
        """One more device."""
        return plug(self.vdev_class, self.make_options(tmp_path), base_dir=tmp_path)

    def _fixed(self, registers: dict[int, int]) -> dict[int, int]:
        """Without those that may differ."""
        return {offset: value for offset, value in registers.items() if offset not in self.volatile}


class VdevConformance(Kit):
    """What holds for every vdev."""

    def test_it_declares_itself(self) -> None:
        """Type, summary, options and windows are there before anything is made."""
        cls = self.vdev_class
        assert cls.vdev_type
        assert cls.vdev_type == cls.vdev_type.strip().lower()
        assert "\n" not in cls.summary, "the summary is one line"
        assert issubclass(cls.Options, msgspec.Struct)
        assert cls.Options.__struct_config__.frozen, "Options must be frozen"
        assert all(isinstance(window, Window) for window in cls.windows)
        assert cls.irqs >= 0
        assert len(cls.api) == 2
        describe_options(cls.Options)

    def test_making_it_opens_nothing(self, tmp_path: Path) -> None:
        """``__init__`` neither starts threads nor asks for the worker."""
        before = set(threading.enumerate())
        with self.plugged(tmp_path) as device:
            memory = GuestMemory.allocate(RAM)
            ctx = FakeContext("fresh", memory, self.vdev_class.irqs, tmp_path)
            vdev = self.vdev_class(ctx, device.vdev.options)
            assert not ctx.worker_alive
            vdev.on_terminate(_END)
            memory.close()
        assert set(threading.enumerate()) <= before

    def test_instances_are_independent(self, tmp_path: Path) -> None:
        """Two of a kind share nothing a guest could see."""
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        with self.plugged(tmp_path / "one") as one:
            fresh = _registers(one)
            _scribble(one)
            with self.plugged(tmp_path / "two") as two:
                assert self._fixed(_registers(two)) == self._fixed(fresh)

    def test_status_is_json(self, device: Plugged[Any]) -> None:
        """``status()`` is JSON-able at any time."""
        json.dumps(dict(device.vdev.status()))
        _scribble(device)
        device.settle()
        json.dumps(dict(device.vdev.status()))

    def test_reset_is_idempotent(self, device: Plugged[Any]) -> None:
        """After ``on_reset``, once or twice, the device is as fresh as on the first day."""
        if type(device.vdev).on_reset is Vdev.on_reset:
            pytest.skip(f"{self.vdev_class.__name__} has no on_reset(): it cannot be reset")
        fresh = _registers(device)
        for _ in range(2):
            _scribble(device)
            device.vdev.on_reset()
            device.vdev.on_reset()
            assert self._fixed(_registers(device)) == self._fixed(fresh)
            assert not any(line.level for line in device.ctx.irqs)


class MmioConformance(Kit):
    """What holds for every vdev with registers."""

    def test_any_offset_and_size_is_harmless(self, device: Plugged[Any]) -> None:
        """Loads give a value that fits, stores are taken or dropped; nothing raises."""
        for value in (0, 1, 0x5A5A5A5A5A5A5A5A, (1 << 64) - 1):
            for offset, size in _places(device):
                device.write(offset, value & all_ones(size), size)
                assert 0 <= device.read(offset, size) <= all_ones(size)
        device.settle()

    def test_undeclared_sizes_never_reach_the_vdev(self, device: Plugged[Any]) -> None:
        """They read all ones, at every offset."""
        base = 0
        for window in device.windows:
            for size in {1, 2, 4, 8} - window.access:
                assert device.read(base, size) == all_ones(size)
            largest = max(window.access)
            assert device.read(base + window.size - largest + 1, largest) == all_ones(largest) or largest == 1
            base += window.size


class TerminationConformance(Kit):
    """What holds when the VM ends, however it ends."""

    def test_the_end_succeeds_and_leaves_no_thread(self, tmp_path: Path) -> None:
        """Every step of the plan is ok, and nothing of the vdev runs afterwards."""
        before = set(threading.enumerate())
        with self.plugged(tmp_path) as device:
            self.load(device)
            results = device.terminate()
            assert [result for result in results if result.verdict != "ok"] == []
            assert not device.ctx.worker_alive
        assert {thread for thread in threading.enumerate() if thread.is_alive()} <= before

    def test_on_terminate_is_idempotent(self, tmp_path: Path) -> None:
        """Also after the plan has run."""
        with self.plugged(tmp_path) as device:
            device.terminate()
            device.vdev.on_terminate(_END)
            device.vdev.on_terminate(_END)

    def test_on_terminate_after_a_start_that_never_came(self, tmp_path: Path) -> None:
        """``on_configured`` may not have run, or not to its end."""
        with self.plugged(tmp_path) as device:
            memory = GuestMemory.allocate(RAM)
            ctx = FakeContext("half", memory, self.vdev_class.irqs, tmp_path)
            vdev = self.vdev_class(ctx, device.vdev.options)
            vdev.on_terminate(_END)
            vdev.on_terminate(_END)
            memory.close()

    def test_nothing_happens_after_the_end(self, tmp_path: Path) -> None:
        """No interrupt and no write to guest memory, though work was queued and doorbells still ring."""
        with self.plugged(tmp_path) as device:
            self.load(device)
            device.terminate()
            region = device.memory.regions[0]
            counts = [line.count for line in device.ctx.irqs]
            before = bytes(region.view)
            # The vCPUs have stopped, but an ioeventfd or another process may ring late.
            if isinstance(device.vdev, VirtioVdev):
                for doorbell in device.vdev.virtio.doorbells:
                    doorbell.signal()
            self.late(device)
            time.sleep(0.05)
            assert [line.count for line in device.ctx.irqs] == counts
            assert region.view == before

    def late(self, device: Plugged[Any]) -> None:
        """Let the host side act after the end (input that arrives, say); may be overridden."""

    def load(self, device: Plugged[Any]) -> None:
        """Give the device something to do, so that the end meets it at work; may be overridden."""
        if isinstance(device.vdev, VirtioVdev):
            driver = device.driver()
            driver.start()
            for ring in driver.queues:
                ring.submit([bytes(16)], [64])
                ring.notify()


class VirtioConformance(VdevConformance):
    """What holds for every virtio device (virtio 1.4), over MMIO and over PCI, on split and packed rings.

    Every test of the class, of the other contracts it keeps too, runs once on each transport, and
    those with a driver once on each format of the ring.
    """

    vdev_class: ClassVar[type[VirtioVdev]]
    #: ConfigGeneration goes on counting through a reset.
    volatile: ClassVar[frozenset[int]] = frozenset({spec.MMIO_CONFIG_GENERATION})

    def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        """The driver is up: do one request of the device's kind and assert its result."""

    @pytest.fixture(autouse=True, params=TRANSPORTS)
    def transport(self, request: pytest.FixtureRequest) -> Iterator[str]:
        """What :func:`~qvmcore.testing.fakes.plug` hangs the device on during a test."""
        with default_transport(request.param):
            yield request.param

    @pytest.fixture(params=["split", "packed"])
    def driver(self, device: Plugged[Any], request: pytest.FixtureRequest) -> VirtioDriver:
        """A driver that has not begun."""
        driver = device.driver()
        driver.packed = request.param == "packed"
        return driver

    def test_3_1_1_bring_up_and_work(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        """With everything offered, after a reset too."""
        for _ in range(3):
            driver.start()
            assert driver.status == 15
            assert device.vdev.virtio.active
            self.check_works(device, driver)

    def test_2_6_1_every_queue_works_again_after_a_reset_of_it(
        self, device: Plugged[Any], driver: VirtioDriver
    ) -> None:
        """One after the other, while the device goes on."""
        driver.start()
        self.check_works(device, driver)
        for index, ring in enumerate(driver.queues):
            driver.reset_queue(index)
            assert device.vdev.virtio.queue(index) is None
            driver.queues[index] = driver.setup_queue(index, ring.size)
            device.settle()
        self.check_works(device, driver)
        assert not driver.needs_reset

    @pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
    @pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
    def test_2_7_every_kind_of_ring_gives_the_same(
        self, device: Plugged[Any], driver: VirtioDriver, event_idx: bool, indirect: bool
    ) -> None:
        """EVENT_IDX and indirect descriptors change nothing but the speed."""
        bits = 1 << spec.VIRTIO_F_EVENT_IDX | 1 << spec.VIRTIO_F_INDIRECT_DESC
        own = driver.acceptable() & ~bits
        driver.start(own | event_idx << spec.VIRTIO_F_EVENT_IDX | indirect << spec.VIRTIO_F_INDIRECT_DESC)
        for ring in driver.queues:
            ring.indirect = indirect
        self.check_works(device, driver)

    def test_2_2_no_device_feature_is_required_but_version_1(
        self, device: Plugged[Any], driver: VirtioDriver
    ) -> None:
        """A driver that knows nothing but the base still gets FEATURES_OK, unless the device says why not."""
        base = 1 << spec.VIRTIO_F_VERSION_1
        if not device.vdev.refuse_features(base):
            driver.start(base)
            assert device.vdev.virtio.features == base

    def test_2_2_1_unoffered_features_are_refused(self, driver: VirtioDriver) -> None:
        """Any single bit that was not offered."""
        offered = driver.offered()
        for bit in range(128):
            if not offered >> bit & 1:
                driver.reset()
                driver.status = spec.ACKNOWLEDGE | spec.DRIVER
                driver.accept(1 << spec.VIRTIO_F_VERSION_1 | 1 << bit)
                driver.status = spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK
                assert not driver.status & spec.FEATURES_OK, f"bit {bit}"

    def test_6_2_version_1_is_required(self, driver: VirtioDriver) -> None:
        """No legacy driver."""
        with pytest.raises(FeaturesRefused):
            driver.start(driver.acceptable() & ~(1 << spec.VIRTIO_F_VERSION_1))

    def test_2_2_the_device_offers_only_bits_of_its_own(self, device: Plugged[Any]) -> None:
        """24 to 43 but 41 and 42 belong to the transport and the ring; the offer never changes."""
        bits = device.vdev.device_features()
        reserved = sum(1 << bit for bit in (*range(24, 41), *range(43, 50)))
        assert bits & reserved == 0
        assert bits == device.vdev.device_features()

    def test_2_5_the_configuration_has_one_length(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        """Readable at every moment, of the same length, zero behind its end."""
        length = len(device.vdev.config_space())
        for begin in (lambda: None, driver.negotiate, driver.driver_ok, driver.reset):
            begin()
            assert len(device.vdev.config_space()) == length
            for offset in range(0, 0x100, 4):
                driver.config(offset, 4)
        assert driver.config(0x100 - 4, 4) == 0 or length > 0x100 - 4

    def test_2_5_reading_does_not_change_the_generation(self, driver: VirtioDriver) -> None:
        """Two reads of an unchanged configuration see one generation."""
        before = driver.generation()
        for offset in range(0x100):
            driver.config(offset, 1)
        assert driver.generation() == before

    def test_2_1_2_nothing_is_consumed_before_driver_ok(
        self, device: Plugged[Any], driver: VirtioDriver
    ) -> None:
        """Neither by a notification nor by a ring made ready."""
        driver.reset()
        driver.negotiate()
        driver.setup_queues()
        for ring in driver.queues:
            ring.submit([bytes(16)], [64])
            ring.notify()
        device.settle()
        assert [ring.used_idx for ring in driver.queues] == [0] * len(driver.queues)
        assert device.irq.count == 0

    def test_notifications_of_nothing_are_harmless(self, device: Plugged[Any], driver: VirtioDriver) -> None:
        """Before set-up, of an empty ring, of no ring."""
        for value in (0, 1, 0xFFFF, 0xFFFFFFFF):
            driver.notify(value)
        driver.start()
        for _ in range(3):
            for value in (*range(len(driver.queues)), 0xFFFF):
                driver.notify(value)
        device.settle()
        assert not driver.needs_reset
        self.check_works(device, driver)

    @pytest.mark.parametrize(
        "rows",
        [
            [(0, 16, _NEXT, 0)],
            [(RAM[0].start, 16, _WRITE | _NEXT, 1), (RAM[0].start, 16, 0, 0)],
            [(RAM[0].start, 16, _NEXT, 0xFFFF)],
            [(RAM[0].end - 1, 2, 0, 0)],
            [((1 << 64) - 1, 2, _WRITE, 0)],
            [(RAM[0].start, 17, _INDIRECT, 0)],
            [(RAM[0].start, 16, _INDIRECT | _NEXT, 0)],
        ],
        ids=["loop", "order", "next", "outside", "wrap", "table-length", "table-next"],
    )
    def test_2_7_5_a_malformed_chain_needs_a_reset_and_a_reset_helps(
        self, device: Plugged[Any], driver: VirtioDriver, rows: list[tuple[int, int, int, int]]
    ) -> None:
        """On each queue; a device that leaves its queue alone until it has data need not notice."""
        for index in range(len(device.vdev.queue_sizes)):
            driver.start()
            ring = driver.queues[index]
            for slot, row in enumerate(rows):
                ring.write_desc(slot, *row)
            ring.offer(0)
            ring.publish()
            ring.notify()
            device.settle()
            taken = device.vdev.virtio.counters()["queues"][index]["popped"]
            assert taken == 0
            if driver.needs_reset:
                assert driver.interrupt_status() & spec.MMIO_INT_CONFIG  # bit 1 of the ISR status, too
        driver.start()
        assert not driver.needs_reset
        self.check_works(device, driver)

    @pytest.mark.parametrize(
        "pieces",
        [
            ([b""], []),
            ([b"x"], []),
            ([], [1]),
            ([bytes(16)], []),
            ([bytes(15)], [1]),
            ([bytes(7), bytes(9)], [1]),
        ],
        ids=["nothing", "tiny", "room", "no-room", "short", "cut"],
    )
    def test_a_well_formed_chain_of_the_wrong_kind_is_survived(
        self, device: Plugged[Any], driver: VirtioDriver, pieces: tuple[list[bytes], list[int]]
    ) -> None:
        """Whatever is in it, the worker lives and a reset gives a working device."""
        for index in range(len(device.vdev.queue_sizes)):
            driver.start()
            driver.queues[index].submit(*pieces)
            device.settle()
            driver.queues[index].used_elements()
        driver.start()
        self.check_works(device, driver)


def _places(device: Plugged[Any]) -> Iterator[tuple[int, int]]:
    """Offsets and sizes over all windows: everything small, and the edges of what is big."""
    base = 0
    for window in device.windows:
        for size in (1, 2, 4, 8):
            offsets = range(0, min(window.size, 0x1000), size)
            for offset in (*offsets, window.size - size, window.size - 1, 1, 3):
                yield base + max(0, offset), size
        base += window.size


def _registers(device: Plugged[Any]) -> dict[int, int]:
    """Every aligned register of the largest width each window takes."""
    values, base = {}, 0
    for window in device.windows:
        width = min(4, max(window.access))
        for offset in range(0, min(window.size, 0x1000) - width + 1, width):
            values[base + offset] = device.read(base + offset, width)
        base += window.size
    return values


def _scribble(device: Plugged[Any]) -> None:
    """Store into every register."""
    base = 0
    for window in device.windows:
        width = min(4, max(window.access))
        for offset in range(0, min(window.size, 0x1000) - width + 1, width):
            device.write(base + offset, 0xA5A5A5A5 & all_ones(width), width)
        base += window.size
