"""virtio-mmio: registers, status machine, features, configuration, interrupts (2.1 to 2.5, 4.2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import Mock, call

import pytest

from qvmcore.bus import all_ones
from qvmcore.errors import PluginError
from qvmcore.testing.driver import FeaturesRefused, GuestRam, MmioDriver
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.samples import Echo
from qvmcore.types import Doorbell, MemorySpec, Trigger
from qvmcore.vdev import FdtNode
from qvmcore.virtio import spec
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.mmio import MmioTransport

ACK, DRIVER, OK, FEATURES, RESET, FAILED = 1, 2, 4, 8, 64, 128
VERSION_1 = 1 << 32
WRITE_ONLY = (0x14, 0x20, 0x24, 0x30, 0x38, 0x50, 0x64, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4, 0xAC)
READ_ONLY = (0x00, 0x04, 0x08, 0x0C, 0x10, 0x34, 0x60, 0xB0, 0xB4, 0xB8, 0xBC, 0xFC)
UNDEFINED = (0x18, 0x1C, 0x28, 0x2C, 0x3C, 0x40, 0x48, 0x4C, 0x54, 0x58, 0x68, 0x74, 0x88, 0xA8, 0xC4, 0xF8)


@pytest.fixture
def echo() -> Iterator[Plugged[Echo]]:
    with plug(Echo) as device:
        yield device
        device.settle()
        assert device.ctx.faults == []


@pytest.fixture
def driver(echo: Plugged[Echo]) -> MmioDriver:
    return MmioDriver.of(echo)


def roundtrip(device: Plugged[Echo], driver: MmioDriver, queue: int = 0) -> None:
    """One request there and back."""
    request = driver.queues[queue].submit([b"ping"], [8])
    device.settle()
    assert driver.queues[queue].reap() == [request]
    assert (request.length, request.result()) == (4, b"ping\0\0\0\0")


# ---- identity and widths, 4.2.2 ----------------------------------------------------------------


def test_4_2_2_1_identity(driver: MmioDriver) -> None:
    assert driver.read(0x000) == 0x74726976
    assert driver.read(0x004) == 2
    assert driver.read(0x008) == 42
    assert driver.read(0x00C) == 0x1C05
    driver.status = 0
    assert (driver.read(0), driver.read(4), driver.read(8)) == (0x74726976, 2, 42)


def test_4_2_1_what_the_device_tree_says() -> None:
    assert Echo.fdt_compatible == ("virtio,mmio",)
    assert Echo.windows[0].size == 0x200
    assert Echo.trigger is Trigger.LEVEL
    assert Echo.irqs == 1


def test_the_device_tree_says_that_dma_is_coherent(echo: Plugged[Echo]) -> None:
    node = Mock(spec=FdtNode)
    echo.vdev.describe_fdt(node)
    assert node.mock_calls == [call.set_flag("dma-coherent")]


@pytest.mark.parametrize("size", [1, 2])
def test_4_2_2_2_control_registers_of_another_width_do_nothing(
    echo: Plugged[Echo], driver: MmioDriver, size: int
) -> None:
    driver.negotiate()
    for register in range(0, 0x100, size):
        if register not in (spec.MMIO_QUEUE_NOTIFY,):
            assert echo.read(register, size) == 0
            echo.write(register, all_ones(size), size)
    assert driver.status == ACK | DRIVER | FEATURES
    driver.setup_queues()
    driver.driver_ok()
    roundtrip(echo, driver)


def test_4_2_2_2_unaligned_and_8_byte_accesses_do_nothing(echo: Plugged[Echo], driver: MmioDriver) -> None:
    assert echo.read(0x001, 4) == 0
    assert echo.read(0x000, 8) == all_ones(8)
    echo.write(0x072, 4, ACK)
    assert driver.status == 0


def test_undefined_registers_read_zero_and_ignore_writes(driver: MmioDriver) -> None:
    for register in UNDEFINED:
        driver.write(register, 0xFFFFFFFF)
        assert driver.read(register) == 0


def test_write_only_registers_read_zero(driver: MmioDriver) -> None:
    for register in WRITE_ONLY:
        assert driver.read(register) == 0


def test_read_only_registers_ignore_writes(driver: MmioDriver) -> None:
    before = [driver.read(register) for register in READ_ONLY]
    for register in READ_ONLY:
        driver.write(register, 0xA5A5A5A5)
    assert [driver.read(register) for register in READ_ONLY] == before


@pytest.mark.parametrize("region", [0, 1, 255, 0xFFFFFFFF])
def test_4_2_2_no_shared_memory_region(driver: MmioDriver, region: int) -> None:
    driver.write(spec.MMIO_SHM_SEL, region)
    assert [driver.read(register) for register in (0xB0, 0xB4, 0xB8, 0xBC)] == [0xFFFFFFFF] * 4


def test_4_2_2_queue_reset_does_nothing_unless_negotiated(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.start(driver.offered() & ~(1 << spec.VIRTIO_F_RING_RESET))
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    driver.write(spec.MMIO_QUEUE_RESET, 1)
    assert driver.read(spec.MMIO_QUEUE_RESET) == 0
    assert driver.read(spec.MMIO_QUEUE_READY) == 1
    roundtrip(echo, driver)


# ---- status, 2.1 and 3.1.1 ----------------------------------------------------------------------


def test_3_1_1_a_good_driver_gets_through(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.start()
    assert driver.status == ACK | DRIVER | FEATURES | OK
    assert echo.vdev.virtio.features == driver.features
    roundtrip(echo, driver)
    roundtrip(echo, driver, 1)


def test_2_1_1_bits_are_not_cleared_but_by_reset(driver: MmioDriver) -> None:
    driver.negotiate()
    driver.status = ACK
    assert driver.status == ACK | DRIVER | FEATURES
    driver.status = 0
    assert driver.status == 0


def test_2_1_the_driver_cannot_set_needs_reset_or_unknown_bits(driver: MmioDriver) -> None:
    driver.status = 0xFFFFFF00 | RESET | 16 | 32 | ACK
    assert driver.status == ACK


def test_2_1_everything_at_once_works_when_features_are_right(
    echo: Plugged[Echo], driver: MmioDriver
) -> None:
    driver.accept(VERSION_1)
    driver.status = ACK | DRIVER | FEATURES | OK
    assert driver.status == ACK | DRIVER | FEATURES | OK
    assert echo.vdev.lives == ["active"]


@pytest.mark.parametrize("status", [FEATURES, ACK | FEATURES, DRIVER | FEATURES])
def test_3_1_1_features_ok_needs_acknowledge_and_driver(driver: MmioDriver, status: int) -> None:
    driver.accept(VERSION_1)
    driver.status = status
    assert not driver.status & FEATURES


def test_3_1_1_driver_ok_without_features_ok_is_refused(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.status = ACK | DRIVER | OK
    assert driver.status == ACK | DRIVER
    assert echo.vdev.lives == []


def test_2_1_failed_stops_the_device(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.start()
    driver.status = FAILED
    assert driver.status & FAILED
    driver.queues[0].submit([b"x"], [1])
    driver.notify(0)
    echo.settle()
    assert driver.queues[0].used_idx == 0
    assert not echo.vdev.virtio.active
    driver.start()
    roundtrip(echo, driver)


def test_2_1_failed_before_driver_ok_keeps_it_off(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.negotiate()
    driver.status = FAILED
    driver.driver_ok()
    assert not driver.status & OK
    assert echo.vdev.lives == []


# ---- features, 2.2 -------------------------------------------------------------------------------


def test_2_2_features_of_any_width(echo: Plugged[Echo], driver: MmioDriver) -> None:
    ring = sum(1 << bit for bit in (28, 29, 32, 34, 35, 38, 40))
    assert driver.offered() == 1 | 1 << 100 | ring
    driver.packed = True
    driver.start()
    assert echo.vdev.virtio.features == driver.offered()


@pytest.mark.parametrize("word", [4, 5, 31, 32, 0x7FFFFFFF, 0xFFFFFFFF])
def test_2_2_words_without_features_read_zero(driver: MmioDriver, word: int) -> None:
    driver.write(spec.MMIO_DEVICE_FEATURES_SEL, word)
    assert driver.read(spec.MMIO_DEVICE_FEATURES) == 0


@pytest.mark.parametrize("word", [4, 31, 32, 0x7FFFFFFF, 0xFFFFFFFF])
def test_2_2_1_features_in_words_that_were_not_offered_are_refused(driver: MmioDriver, word: int) -> None:
    driver.status = ACK | DRIVER
    driver.accept(VERSION_1)
    driver.write(spec.MMIO_DRIVER_FEATURES_SEL, word)
    driver.write(spec.MMIO_DRIVER_FEATURES, 1)
    driver.status = ACK | DRIVER | FEATURES
    assert not driver.status & FEATURES
    driver.start()
    assert driver.status == ACK | DRIVER | FEATURES | OK


@pytest.mark.parametrize("bit", [1, 24, 31, 33, 63, 101, 127])
def test_2_2_1_unoffered_features_are_refused(driver: MmioDriver, bit: int) -> None:
    driver.status = ACK | DRIVER
    driver.accept(VERSION_1 | 1 << bit)
    driver.status = ACK | DRIVER | FEATURES
    assert driver.status == ACK | DRIVER


def test_6_2_version_1_is_required(driver: MmioDriver) -> None:
    with pytest.raises(FeaturesRefused):
        driver.negotiate(wanted=1)
    assert driver.negotiate(wanted=VERSION_1) == VERSION_1


def test_2_2_a_driver_may_try_again_after_a_refusal(driver: MmioDriver) -> None:
    driver.status = ACK | DRIVER
    driver.accept(0)
    driver.status = ACK | DRIVER | FEATURES
    driver.accept(VERSION_1)
    driver.status = ACK | DRIVER | FEATURES
    assert driver.status & FEATURES


def test_2_2_features_cannot_change_after_features_ok(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.negotiate(VERSION_1)
    driver.accept(VERSION_1 | 1)
    driver.driver_ok()
    assert echo.vdev.virtio.features == VERSION_1


def test_2_2_2_a_device_may_refuse_a_combination() -> None:
    class Picky(Echo):
        def refuse_features(self, features: int) -> str:
            return "" if features & 1 else "cannot do without bit 0"

    with plug(Picky) as device:
        driver = MmioDriver.of(device)
        with pytest.raises(FeaturesRefused):
            driver.negotiate(VERSION_1)
        assert driver.negotiate(VERSION_1 | 1)


# ---- queues, 4.2.3.2 -------------------------------------------------------------------------------


def test_4_2_2_queue_size_max(driver: MmioDriver) -> None:
    assert [driver.queue_size_max(index) for index in (0, 1, 2, 0xFFFF, 0xFFFFFFFF)] == [64, 16, 0, 0, 0]


@pytest.mark.parametrize("distance", [0, 16, 64])
def test_overlapping_ring_areas_harm_only_the_driver(
    echo: Plugged[Echo], driver: MmioDriver, distance: int
) -> None:
    driver.negotiate(VERSION_1)
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    base = driver.ram.alloc(4096)
    driver.place(64, base, base + distance, base + 2 * distance)
    driver.write(spec.MMIO_QUEUE_READY, 1)
    driver.driver_ok()
    echo.memory.write(base, bytes(range(256)) * 4)
    for _ in range(4):
        driver.notify(0)
        echo.settle()
    assert driver.needs_reset
    driver.start()
    roundtrip(echo, driver)


@pytest.mark.parametrize("size", [0, 3, 63, 65, 128, 0xFFFF, 0x10000, 0xFFFFFFFF])
def test_4_2_2_2_an_illegal_queue_size_leaves_the_queue_off(driver: MmioDriver, size: int) -> None:
    driver.negotiate()
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    driver.place(size, 0x8000_0000, 0x8000_1000, 0x8000_2000)
    driver.write(spec.MMIO_QUEUE_READY, 1)
    assert driver.read(spec.MMIO_QUEUE_READY) == 0
    assert driver.needs_reset


@pytest.mark.parametrize("size", [1, 2, 4, 32, 64])
def test_4_2_3_2_any_power_of_two_up_to_the_maximum_works(
    echo: Plugged[Echo], driver: MmioDriver, size: int
) -> None:
    driver.start(VERSION_1 | 1 << spec.VIRTIO_F_INDIRECT_DESC, [size, size if size <= 16 else 16])
    driver.queues[0].indirect = size > 1
    if size > 1:
        roundtrip(echo, driver)
    else:
        request = driver.queues[0].submit([], [4])
        echo.settle()
        assert driver.queues[0].reap() == [request]


@pytest.mark.parametrize("size", [1, 2, 3, 33, 63, 64])
def test_2_8_10_1_a_packed_queue_has_any_size_up_to_the_maximum(
    echo: Plugged[Echo], driver: MmioDriver, size: int
) -> None:
    driver.packed = True
    driver.start(sizes=[size, 16])
    for number in range(70):
        mark = driver.ram.mark()
        request = driver.queues[0].submit([bytes([number])]) if size == 1 else None
        if size > 1:
            roundtrip(echo, driver)
        echo.settle()
        assert driver.queues[0].reap() == ([request] if request else [])
        driver.ram.release(mark)
    assert not driver.needs_reset


@pytest.mark.parametrize("size", [0, 65, 0x8000, 0xFFFFFFFF])
def test_2_8_an_illegal_packed_queue_size_leaves_the_queue_off(driver: MmioDriver, size: int) -> None:
    driver.packed = True
    driver.negotiate()
    driver.select_queue(0)
    driver.place(size, 0x8000_0000, 0x8000_1000, 0x8000_2000)
    driver.enable_queue()
    assert not driver.queue_ready
    assert driver.needs_reset


@pytest.mark.parametrize(
    ("desc", "avail", "used"),
    [
        (0, 0, 0),
        (0x8000_0008, 0x8000_1000, 0x8000_2000),
        (0x8000_0000, 0x8000_1001, 0x8000_2000),
        (0x8000_0000, 0x8000_1000, 0x8000_2002),
        (0x8000_0000, 0x8000_1000, 0x9000_0000),
        (1 << 63, 0x8000_1000, 0x8000_2000),
        ((1 << 64) - 16, 0x8000_1000, 0x8000_2000),
        (0x1C0D_0000, 0x8000_1000, 0x8000_2000),
    ],
)
def test_2_7_1_bad_ring_addresses_leave_the_queue_off(
    driver: MmioDriver, desc: int, avail: int, used: int
) -> None:
    driver.negotiate()
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    driver.place(16, desc, avail, used)
    driver.write(spec.MMIO_QUEUE_READY, 1)
    assert driver.read(spec.MMIO_QUEUE_READY) == 0
    assert driver.needs_reset
    driver.driver_ok()
    assert not driver.status & OK
    driver.start()
    assert driver.status == ACK | DRIVER | FEATURES | OK


def test_4_2_2_2_queue_registers_are_locked_while_ready(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.negotiate()
    driver.setup_queues()
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    driver.place(2, 0, 0, 0)
    for ready in (1, 0, 1):
        driver.write(spec.MMIO_QUEUE_READY, ready)
        assert driver.read(spec.MMIO_QUEUE_READY) == ready
    driver.driver_ok()
    roundtrip(echo, driver)


def test_4_2_2_queue_ready_reads_back_and_takes_bit_0(driver: MmioDriver) -> None:
    driver.negotiate()
    driver.setup_queues()
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    assert driver.read(spec.MMIO_QUEUE_READY) == 1
    driver.write(spec.MMIO_QUEUE_READY, 2)
    assert driver.read(spec.MMIO_QUEUE_READY) == 0
    driver.write(spec.MMIO_QUEUE_READY, 0xFFFFFFFF)
    assert driver.read(spec.MMIO_QUEUE_READY) == 1
    driver.write(spec.MMIO_QUEUE_SEL, 77)
    driver.write(spec.MMIO_QUEUE_READY, 1)
    assert driver.read(spec.MMIO_QUEUE_READY) == 0


def test_3_1_1_queues_before_features_ok_are_ignored(driver: MmioDriver) -> None:
    driver.status = ACK | DRIVER
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    driver.place(16, 0x8000_0000, 0x8000_1000, 0x8000_2000)
    driver.write(spec.MMIO_QUEUE_READY, 1)
    assert driver.read(spec.MMIO_QUEUE_READY) == 0
    assert not driver.needs_reset


def test_4_2_2_1_queue_ready_0_stops_the_queue_for_good(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.start()
    driver.write(spec.MMIO_QUEUE_SEL, 0)
    driver.write(spec.MMIO_QUEUE_READY, 0)
    assert driver.read(spec.MMIO_QUEUE_READY) == 0
    driver.queues[0].submit([b"x"], [1])
    driver.notify(0)
    echo.settle()
    assert driver.queues[0].used_idx == 0
    driver.write(spec.MMIO_QUEUE_READY, 1)
    assert driver.read(spec.MMIO_QUEUE_READY) == 0
    roundtrip(echo, driver, 1)


def test_a_queue_the_driver_left_off_does_not_exist(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.reset()
    driver.negotiate()
    driver.queues.append(driver.setup_queue(0, 64))
    driver.driver_ok()
    assert echo.vdev.virtio.queue(1) is None
    driver.notify(1)
    roundtrip(echo, driver)


# ---- notifications, 2.3 and 4.2.3.3 ----------------------------------------------------------------


def test_2_1_2_kick_before_driver_ok_consumes_nothing(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.notify(0)
    driver.negotiate()
    driver.setup_queues()
    request = driver.queues[0].submit([b"early"], [8])
    driver.notify(0)
    echo.settle()
    assert driver.queues[0].used_idx == 0
    assert driver.interrupt_status() == 0
    driver.driver_ok()
    echo.settle()
    assert driver.queues[0].reap() == [request]


@pytest.mark.parametrize("value", [2, 0xFFFF, 0x10000, 0xFFFFFFFF])
def test_a_notification_for_no_queue_is_ignored(echo: Plugged[Echo], driver: MmioDriver, value: int) -> None:
    driver.start()
    driver.notify(value)
    echo.settle()
    roundtrip(echo, driver)


def test_2_7_10_2_spurious_and_doubled_kicks_do_nothing(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.start(VERSION_1)
    for _ in range(20):
        driver.notify(0)
        driver.notify(1)
    echo.settle()
    assert echo.irq.rises == 0
    first, second = driver.queues[0].add([b"a"], [1]), driver.queues[1].add([b"b"], [1])
    driver.queues[0].publish()
    driver.queues[1].publish()
    for index in (0, 1, 1, 0):
        driver.notify(index)
    echo.settle()
    assert driver.queues[0].reap() == [first]
    assert driver.queues[1].reap() == [second]
    assert echo.irq.rises == 1


def test_kick_after_reset_consumes_nothing(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.start()
    ring = driver.queues[0]
    driver.reset()
    ring.submit([b"x"], [1])
    driver.notify(0)
    echo.settle()
    assert ring.used_idx == 0
    assert echo.irq.rises == 0


def test_doorbells_are_declared_and_work_without_a_register_write(
    echo: Plugged[Echo], driver: MmioDriver
) -> None:
    assert echo.transport is not None
    assert isinstance(echo.transport, MmioTransport)
    bells = echo.transport.handler().doorbells
    assert [bell for bell, _ in bells] == [Doorbell(0x50, 4, 0), Doorbell(0x50, 4, 1)]
    driver.start()
    request = driver.queues[1].add([b"x"], [1])
    driver.queues[1].publish()
    os.eventfd_write(bells[1][1], 1)
    echo.settle()
    assert driver.queues[1].reap() == [request]


# ---- interrupts, 4.2.3.4 -------------------------------------------------------------------------------


def test_4_2_3_4_the_line_is_up_until_everything_is_acknowledged(
    echo: Plugged[Echo], driver: MmioDriver
) -> None:
    driver.start()
    roundtrip(echo, driver)
    echo.vdev.value += 1
    echo.vdev.virtio.config_changed()
    assert driver.interrupt_status() == 3
    assert (echo.irq.level, echo.irq.rises, echo.irq.pulses) == (True, 1, 0)
    driver.ack(1)
    assert (driver.interrupt_status(), echo.irq.level) == (2, True)
    driver.ack(0)
    driver.ack(0xFFFFFFFC)
    assert (driver.interrupt_status(), echo.irq.level) == (2, True)
    driver.ack(2)
    assert (driver.interrupt_status(), echo.irq.level) == (0, False)


def test_reading_interrupt_status_clears_nothing(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.start()
    roundtrip(echo, driver)
    assert [driver.interrupt_status() for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | 1 << 29])
def test_2_7_7_2_exactly_one_interrupt_per_request_that_wants_one(
    echo: Plugged[Echo], driver: MmioDriver, features: int
) -> None:
    driver.start(features)
    for count in range(1, 30):
        roundtrip(echo, driver)
        assert echo.irq.rises == count
        driver.ack()


def test_4_2_2_1_reset_clears_the_interrupt(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.start()
    roundtrip(echo, driver)
    assert echo.irq.level
    driver.reset()
    assert not echo.irq.level
    assert driver.interrupt_status() == 0


# ---- DEVICE_NEEDS_RESET, 2.1.2 ------------------------------------------------------------------------


def test_2_7_13_3_1_avail_idx_jump_sets_needs_reset(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.start()
    driver.queues[0].publish(65)
    driver.notify(0)
    echo.settle()
    assert driver.needs_reset
    assert driver.interrupt_status() == 2
    assert echo.irq.rises == 1
    assert not echo.vdev.virtio.active
    assert echo.vdev.virtio.queue(1) is None
    driver.start()
    assert not driver.needs_reset
    roundtrip(echo, driver)
    assert echo.vdev.lives == ["active", "inactive", "active"]


def test_2_1_2_before_driver_ok_needs_reset_sends_no_interrupt(
    echo: Plugged[Echo], driver: MmioDriver
) -> None:
    driver.negotiate()
    echo.vdev.virtio.needs_reset(RuntimeError("broken"))
    assert driver.needs_reset
    assert driver.interrupt_status() == 0


def test_needs_reset_is_reported_once(
    echo: Plugged[Echo], driver: MmioDriver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.start()
    for _ in range(5):
        echo.vdev.virtio.needs_reset(RuntimeError("disk on fire"))
    assert caplog.text.count("disk on fire") == 1
    assert echo.irq.rises == 1


def test_an_error_of_the_request_is_the_guests_and_any_other_the_devices() -> None:
    class Buggy(Echo):
        def handle_queue(self, index: int, queue: object) -> None:
            raise ZeroDivisionError("a bug")

    with plug(Buggy) as device:
        driver = MmioDriver.of(device)
        driver.start()
        device.settle()
        assert [type(fault) for fault in device.ctx.faults] == [ZeroDivisionError] * len(device.ctx.faults)
        assert device.ctx.faults
        assert driver.status == 0xFFFFFFFF


def test_a_failing_activation_needs_a_reset() -> None:
    class Broken(Echo):
        def on_activate(self, features: int) -> None:
            raise OSError("no such host device")

    with plug(Broken) as device:
        driver = MmioDriver.of(device)
        driver.start()
        assert [type(fault) for fault in device.ctx.faults] == [OSError]
        assert device.vdev.virtio.status & RESET
        assert not device.vdev.virtio.active


# ---- configuration space, 2.5 ---------------------------------------------------------------------------


def test_2_5_reads_of_every_size_and_alignment(echo: Plugged[Echo], driver: MmioDriver) -> None:
    whole = echo.vdev.config_space()
    for size in (1, 2, 4):
        for offset in range(0x100 - size + 1):
            wanted = int.from_bytes(whole[offset : offset + size], "little")
            assert driver.config(offset, size) == wanted
    assert driver.config(0, 8) == 0x1122334455667788


def test_2_5_2_readable_before_features_ok_and_after_driver_ok(driver: MmioDriver) -> None:
    assert driver.config(0, 4) == 0x55667788
    driver.start()
    assert driver.config(4, 4) == 0x11223344


def test_config_writes_reach_the_device_when_inside(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.start()
    driver.write_config(8, 4, 0x04030201)
    assert echo.vdev.scratch == b"\1\2\3\4"
    driver.write_config(9, 2, 0xBBAA)
    assert driver.config(8, 4) == 0x04BBAA01
    for offset, size in ((11, 2), (12, 1), (0xFC, 4), (10, 4)):
        driver.write_config(offset, size, all_ones(size))
    assert echo.vdev.scratch == b"\1\xaa\xbb\4"
    assert driver.interrupt_status() == 0


def test_2_5_the_generation_changes_exactly_when_a_reader_could_notice(
    echo: Plugged[Echo], driver: MmioDriver
) -> None:
    driver.start()
    first = driver.generation()
    assert driver.generation() == first
    echo.vdev.virtio.config_changed()
    assert driver.generation() == first
    assert driver.interrupt_status() == 0
    echo.vdev.value = 7
    echo.vdev.virtio.config_changed()
    assert driver.interrupt_status() == 2
    second = driver.generation()
    assert second != first
    for value in (8, 9, 10):
        echo.vdev.value = value
        echo.vdev.virtio.config_changed()
    assert driver.generation() == second + 1


def test_2_5_bytes_and_generation_change_together(echo: Plugged[Echo], driver: MmioDriver) -> None:
    """The device's value is new already, but config_changed() was not called: all is old."""
    driver.start()
    before = driver.generation()
    low = driver.config(0, 4)
    echo.vdev.value = 0xAAAAAAAA_BBBBBBBB
    high = driver.config(4, 4)
    assert driver.generation() == before
    assert low | high << 32 == 0x1122334455667788
    echo.vdev.virtio.config_changed()
    assert driver.config(0, 8) == 0xAAAAAAAA_BBBBBBBB


def test_config_changed_before_driver_ok_is_silent_but_visible(
    echo: Plugged[Echo], driver: MmioDriver
) -> None:
    assert driver.config(0, 4) != 5
    echo.vdev.value = 5
    echo.vdev.virtio.config_changed()
    assert driver.interrupt_status() == 0
    assert driver.config(0, 4) == 5


# ---- the class ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 2048, -2])
def test_wrong_queue_sizes_are_the_authors_error(size: int) -> None:
    class Wrong(Echo):
        queue_sizes = (16, size)

    with pytest.raises(PluginError, match=f"powers of two up to 1024, not {size}"):
        plug(Wrong)


def test_a_configuration_longer_than_the_window_is_the_authors_error() -> None:
    class Long(Echo):
        def config_space(self) -> bytes:
            return bytes(0x101)

    with pytest.raises(PluginError, match="exceeds the 256 bytes"):
        plug(Long)


def test_a_device_without_a_handler_says_so() -> None:
    class Lazy(VirtioVdev):
        vdev_type = "lazy"
        device_id = 1
        queue_sizes = (4,)

    with plug(Lazy) as device:
        MmioDriver.of(device).start()
        device.settle()
        assert "Lazy serves no queue" in str(device.ctx.faults[0])


def test_kick_by_the_device_itself_runs_its_handler(echo: Plugged[Echo], driver: MmioDriver) -> None:
    echo.vdev.virtio.kick(0)
    driver.start()
    echo.settle()
    request = driver.queues[0].add([b"x"], [1])
    driver.queues[0].publish()
    echo.vdev.virtio.kick(0)
    echo.vdev.virtio.kick(9)
    echo.settle()
    assert driver.queues[0].reap() == [request]


def test_status_counts(echo: Plugged[Echo], driver: MmioDriver) -> None:
    driver.start()
    roundtrip(echo, driver)
    assert echo.vdev.status() == {
        "status": 15,
        "features": f"{driver.features:#x}",
        "queues": [
            {"popped": 1, "pushed": 1, "interrupts": 1},
            {"popped": 0, "pushed": 0, "interrupts": 0},
        ],
    }


def test_memory_in_several_regions() -> None:
    ram = (MemorySpec(0x8000_0000, 0x10000), MemorySpec(0x9000_0000, 1 << 20))
    with plug(Echo, ram=ram) as device:
        memory = device.memory
        driver = MmioDriver(device.bus, device.base, GuestRam(memory, 0x8000_0000, 0x10000))
        driver.start()
        driver.queues[0].ram = GuestRam(memory, 0x9000_0000, 1 << 20)
        roundtrip(device, driver)


def test_the_transport_is_one_object_with_a_handler(echo: Plugged[Echo]) -> None:
    assert isinstance(echo.transport, MmioTransport)
    handler = echo.transport.handler()
    assert handler.read(0, 4) == 0x74726976
