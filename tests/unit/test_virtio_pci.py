"""The modern PCI transport of virtio, as a driver sees it (virtio 1.4, 4.1)."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from qvmcore.errors import PluginError
from qvmcore.pci import spec as pci
from qvmcore.testing.driver import GuestRam, SplitDriver
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.pci_driver import PciDevice, PciDriver
from qvmcore.testing.samples import Echo
from qvmcore.virtio import pci_spec, spec
from qvmcore.virtio.pci import DEVICE, ISR, NOTIFY, PciTransport

RING_RESET = 1 << spec.VIRTIO_F_RING_RESET
NOTIFICATION_DATA = 1 << spec.VIRTIO_F_NOTIFICATION_DATA
NO_VECTOR = pci_spec.MSI_NO_VECTOR
#: What a driver of the split ring accepts, without extras.
PLAIN = 1 << spec.VIRTIO_F_VERSION_1
#: Where the tests have messages sent.
DOORBELL = 0x0802_0040


@pytest.fixture
def echo() -> Iterator[Plugged[Echo]]:
    with plug(Echo, transport="pci") as device:
        yield device
        device.settle()
        assert device.ctx.faults == []


@pytest.fixture
def function(echo: Plugged[Echo]) -> PciDevice:
    """Its configuration space."""
    assert echo.device is not None
    return echo.device


@pytest.fixture
def driver(echo: Plugged[Echo]) -> PciDriver:
    """A driver that has not begun."""
    driver = echo.driver()
    assert isinstance(driver, PciDriver)
    return driver


def roundtrip(device: Plugged[Any], driver: PciDriver, queue: int = 0) -> None:
    """One request there and back."""
    ring = driver.queues[queue]
    request = ring.submit([b"ping"], [8])
    device.settle()
    assert ring.reap() == [request]
    assert request.result() == b"ping\0\0\0\0"


def messages(device: Plugged[Any]) -> list[tuple[int, int]]:
    """The messages sent since the last call."""
    assert device.pci is not None
    sent = list(device.pci.messages)
    device.pci.messages.clear()
    return sent


def config_cap(function: PciDevice) -> int:
    """Where the PCI configuration access capability is."""
    return next(each.at for each in function.structures() if each.cfg_type == pci_spec.CAP_PCI_CFG)


class Window:
    """The keyhole of 4.1.4.9."""

    def __init__(self, function: PciDevice) -> None:
        self._function = function
        self._at = config_cap(function)

    def select(self, bar: int, offset: int, length: int) -> None:
        self._function.write(self._at + 4, bar, 1)
        self._function.write(self._at + 8, offset)
        self._function.write(self._at + 12, length)

    def read(self, offset: int, length: int, bar: int = 0) -> int:
        self.select(bar, offset, length)
        return self._function.read(self._at + 16, length)

    def write(self, offset: int, length: int, value: int, bar: int = 0) -> None:
        self.select(bar, offset, length)
        self._function.write(self._at + 16, value, length)

    @property
    def data(self) -> int:
        return self._function.read(self._at + 16)


@pytest.fixture
def window(function: PciDevice) -> Window:
    return Window(function)


# ---- discovery: 4.1.2, 4.1.4 ------------------------------------------------------------------------


def test_4_1_2_1_identity(function: PciDevice) -> None:
    """Echo is device type 42 of the subsystem vendor 1c05."""
    assert function.read(pci.VENDOR_ID, 2) == 0x1AF4
    assert function.read(pci.DEVICE_ID, 2) == 0x1040 + 42
    assert function.read(pci.SUBSYSTEM_VENDOR_ID, 2) == 0x1C05
    assert function.read(pci.SUBSYSTEM_ID, 2) == 0x40 + 42
    assert function.read(pci.REVISION_ID, 1) == 1
    assert function.read(pci.REVISION_ID) >> 8 == 0x00FF00


@pytest.mark.parametrize(
    ("device_id", "subsystem", "class_code"),
    [(1, 0x41, 0x028000), (2, 0x42, 0x018000), (3, 0x43, 0x078000), (4, 0x44, 0x00FF00)],
    ids=["net", "blk", "console", "entropy"],
)
def test_4_1_2_1_types_and_classes(device_id: int, subsystem: int, class_code: int) -> None:
    kind = type("Kind", (Echo,), {"device_id": device_id})
    with plug(kind, transport="pci") as device:
        assert device.device is not None
        read = device.device.read
        assert read(pci.DEVICE_ID, 2) == 0x1040 + device_id
        assert read(pci.SUBSYSTEM_ID, 2) == subsystem
        assert read(pci.REVISION_ID) >> 8 == class_code


def test_4_1_4_every_structure_is_there_and_fits_its_bar(function: PciDevice) -> None:
    """Also: nothing overlaps, offsets are aligned, extra data is counted in cap_len."""
    found = {each.cfg_type: each for each in function.structures()}
    assert set(found) == {1, 2, 3, 4, 5}
    taken: set[int] = set()
    for each in (found[1], found[2], found[3], found[4]):
        _, size = function.bars[each.bar]
        assert each.offset + each.length <= size
        assert taken.isdisjoint(range(each.offset, each.offset + each.length))
        taken.update(range(each.offset, each.offset + each.length))
    assert [found[n].offset % 4 for n in (1, 2, 4)] == [0, 0, 0]
    assert found[1].length >= pci_spec.COMMON_CFG_SIZE
    assert found[3].length >= 1
    assert found[4].length == 12, "the length of Echo's configuration"
    assert function.read(found[2].at + 2, 1) == 20
    assert function.read(found[5].at + 2, 1) == 20


def test_4_1_4_4_1_the_multiplier_suits_notifications_with_data(driver: PciDriver) -> None:
    """A power of two, a multiple of 4; every queue's address lies inside the structure."""
    multiplier = driver.multiplier
    assert multiplier % 4 == 0
    assert multiplier & (multiplier - 1) == 0
    for index in range(2):
        driver.select_queue(index)
        offset = driver.read(pci_spec.QUEUE_NOTIFY_OFF) * multiplier
        assert offset + 4 <= driver.found[pci_spec.CAP_NOTIFY_CFG].length


def test_4_1_4_6_a_device_without_configuration_has_no_capability_for_it() -> None:
    class Bare(Echo):
        def config_space(self) -> bytes:
            return b""

    with plug(Bare, transport="pci") as device:
        assert device.device is not None
        assert pci_spec.CAP_DEVICE_CFG not in {each.cfg_type for each in device.device.structures()}
        driver = device.driver()
        driver.start()
        assert driver.config(0, 4) == 0


def test_4_1_4_capabilities_are_read_only(function: PciDevice) -> None:
    """But for the fields of 4.1.4.9."""
    cfg = config_cap(function)
    writable = {cfg + 4, *range(cfg + 8, cfg + 20)}
    for at, kind in function.capabilities():
        if kind != pci.CAP_VENDOR:
            continue
        for offset in range(at, at + function.read(at + 2, 1)):
            if offset in writable:
                continue
            before = function.read(offset, 1)
            function.write(offset, 0xFF ^ before, 1)
            assert function.read(offset, 1) == before, f"byte {offset - at} of the capability at {at:#x}"


def test_4_1_5_1_2_a_vector_for_each_queue_and_one_for_the_configuration(driver: PciDriver) -> None:
    assert driver.vectors == 3


@pytest.mark.parametrize("length", [0x1000, 0x1001])
def test_4_1_4_6_a_configuration_that_is_too_long_is_refused(length: int) -> None:
    class Long(Echo):
        def config_space(self) -> bytes:
            return bytes(length)

    if length > 0x1000:
        with pytest.raises(PluginError, match="exceeds"):
            plug(Long, transport="pci")
    else:
        plug(Long, transport="pci").close()


def test_too_many_queues_are_refused() -> None:
    class Many(Echo):
        queue_sizes = (2,) * 1025

    with pytest.raises(PluginError, match="1025 queues"):
        plug(Many, transport="pci")


# ---- common configuration: 4.1.4.3 ----------------------------------------------------------------


@pytest.mark.parametrize("features", [PLAIN, None], ids=["plain", "everything"])
def test_3_1_1_a_good_driver_gets_through(
    echo: Plugged[Echo], driver: PciDriver, features: int | None
) -> None:
    driver.start(features)
    assert driver.status == 15
    assert driver.read(pci_spec.NUM_QUEUES) == 2
    for queue in (0, 1):
        roundtrip(echo, driver, queue)


def test_4_1_3_fields_take_their_own_width_only(echo: Plugged[Echo], driver: PciDriver) -> None:
    """Anything else reads 0 and writes nothing."""
    driver.start()
    before = {field: driver.read(field) for field in pci_spec.COMMON_CFG_FIELDS}
    for field, width in pci_spec.COMMON_CFG_FIELDS.items():
        for size in {1, 2, 4} - {width}:
            assert echo.read(field, size) == 0, f"{size} bytes at {field:#x}"
            echo.write(field, 0, size)
        for offset in range(field + 1, field + width):
            for size in (1, 2, 4):
                if offset not in pci_spec.COMMON_CFG_FIELDS:
                    assert echo.read(offset, size) == 0, f"{size} bytes at {offset:#x}"
                    echo.write(offset, 0, size)
    assert {field: driver.read(field) for field in pci_spec.COMMON_CFG_FIELDS} == before
    roundtrip(echo, driver)


def test_4_1_3_8_byte_accesses_are_never_right(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.negotiate()
    echo.write(pci_spec.QUEUE_DESC, 0x1122334455667788, 8)
    assert driver.read(pci_spec.QUEUE_DESC) == 0
    assert echo.read(pci_spec.QUEUE_DESC, 8) == (1 << 64) - 1


def test_4_1_3_1_halves_of_64_bit_fields_are_independent(driver: PciDriver) -> None:
    driver.negotiate()
    for field in (pci_spec.QUEUE_DESC, pci_spec.QUEUE_DRIVER, pci_spec.QUEUE_DEVICE):
        driver.write(field + 4, 0x11223344)
        assert (driver.read(field), driver.read(field + 4)) == (0, 0x11223344)
        driver.write(field, 0x55667788)
        assert (driver.read(field), driver.read(field + 4)) == (0x55667788, 0x11223344)


@pytest.mark.parametrize("word", [4, 31, 32, 0x7FFFFFFF, 0xFFFFFFFF])
def test_4_1_4_3_1_selectors_out_of_range_show_no_features(driver: PciDriver, word: int) -> None:
    """The selectors themselves read back."""
    driver.negotiate()
    driver.write(pci_spec.DEVICE_FEATURE_SELECT, word)
    driver.write(pci_spec.DRIVER_FEATURE_SELECT, word)
    assert driver.read(pci_spec.DEVICE_FEATURE_SELECT) == word
    assert driver.read(pci_spec.DRIVER_FEATURE_SELECT) == word
    assert driver.read(pci_spec.DEVICE_FEATURE) == 0
    assert driver.read(pci_spec.DRIVER_FEATURE) == 0


def test_4_1_4_3_1_driver_features_read_back(driver: PciDriver) -> None:
    """Each word on its own; bit 100 is Echo's."""
    driver.status = spec.ACKNOWLEDGE | spec.DRIVER
    driver.accept(PLAIN | 1 | 1 << 100)
    for word, bits in enumerate((1, 1, 0, 1 << 4)):
        driver.write(pci_spec.DRIVER_FEATURE_SELECT, word)
        assert driver.read(pci_spec.DRIVER_FEATURE) == bits


def test_2_2_features_beyond_64_bits_are_negotiated(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN | 1 << 100)
    assert echo.vdev.virtio.features == PLAIN | 1 << 100


@pytest.mark.parametrize("queue", [2, 64, 0x7FFF, 0xFFFF])
def test_4_1_4_3_1_a_queue_that_is_not_there(echo: Plugged[Echo], driver: PciDriver, queue: int) -> None:
    """queue_size reads 0; nothing that is written to it arrives anywhere."""
    driver.negotiate()
    driver.select_queue(queue)
    for field in range(pci_spec.QUEUE_SIZE, pci_spec.QUEUE_DEVICE + 8, 2):
        if field in pci_spec.COMMON_CFG_FIELDS:
            driver.write(field, 1)
            wanted = NO_VECTOR if field == pci_spec.QUEUE_MSIX_VECTOR else 0
            assert driver.read(field) == wanted, f"field {field:#x}"
    driver.write(pci_spec.QUEUE_RESET, 1)
    assert driver.read(pci_spec.QUEUE_RESET) == 0
    assert driver.read(pci_spec.QUEUE_SELECT) == queue
    driver.setup_queues()
    driver.driver_ok()
    roundtrip(echo, driver)


@pytest.mark.parametrize("size", [0, 3, 48, 65, 128, 0x8000, 0xFFFF])
def test_4_1_4_3_1_queue_size_reads_back_only_what_is_possible(driver: PciDriver, size: int) -> None:
    driver.negotiate(PLAIN)
    driver.select_queue(0)
    driver.write(pci_spec.QUEUE_SIZE, size)
    assert driver.read(pci_spec.QUEUE_SIZE) == 64


def test_4_1_4_3_a_smaller_queue(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN, [4, 1])
    driver.select_queue(0)
    assert driver.read(pci_spec.QUEUE_SIZE) == 4
    for _ in range(9):
        roundtrip(echo, driver)
    driver.reset()
    assert driver.queue_size_max(0) == 64


def test_4_1_4_3_2_zero_does_not_disable_a_queue(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start()
    driver.select_queue(0)
    driver.write(pci_spec.QUEUE_ENABLE, 0)
    assert driver.queue_ready == 1
    roundtrip(echo, driver)


@pytest.mark.parametrize("value", [0, 2, 3, 0x8000, 0xFFFF])
def test_4_1_4_3_only_one_enables(echo: Plugged[Echo], driver: PciDriver, value: int) -> None:
    driver.negotiate(PLAIN)
    ring = SplitDriver(driver.ram, 16, driver.features, lambda: driver.notify(0))
    driver.select_queue(0)
    driver.place(16, ring.desc, ring.avail, ring.used)
    driver.write(pci_spec.QUEUE_ENABLE, value)
    assert driver.queue_ready == 0
    driver.enable_queue()
    assert driver.queue_ready == 1
    driver.queues = [ring]
    driver.driver_ok()
    roundtrip(echo, driver)


def test_4_1_4_3_2_parameters_are_locked_while_enabled(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start()
    driver.select_queue(0)
    fields = (pci_spec.QUEUE_SIZE, *range(pci_spec.QUEUE_DESC, pci_spec.QUEUE_DEVICE + 8, 4))
    before = [driver.read(field) for field in fields]
    for field in fields:
        driver.write(field, 2)
    assert [driver.read(field) for field in fields] == before
    roundtrip(echo, driver)


def test_4_1_4_3_1_reset(echo: Plugged[Echo], driver: PciDriver) -> None:
    """Status, queue_enable, vectors, selectors and interrupts are gone."""
    driver.start()
    driver.map_config(1)
    driver.map_queue(1, 2)
    driver.write(pci_spec.DEVICE_FEATURE_SELECT, 3)
    echo.vdev.value += 1
    echo.vdev.virtio.config_changed()
    assert echo.irq.level
    driver.status = 0
    assert driver.status == 0
    assert not echo.irq.level
    assert driver.interrupt_status() == 0
    assert driver.read(pci_spec.CONFIG_MSIX_VECTOR) == NO_VECTOR
    assert driver.read(pci_spec.QUEUE_SELECT) == driver.read(pci_spec.DEVICE_FEATURE_SELECT) == 0
    for queue in (0, 1):
        driver.select_queue(queue)
        assert driver.queue_ready == 0
        assert driver.read(pci_spec.QUEUE_MSIX_VECTOR) == NO_VECTOR
        assert driver.read(pci_spec.QUEUE_DESC) == 0


def test_read_only_fields_ignore_writes(driver: PciDriver) -> None:
    driver.negotiate()
    fields = (
        pci_spec.DEVICE_FEATURE,
        pci_spec.NUM_QUEUES,
        pci_spec.CONFIG_GENERATION,
        pci_spec.QUEUE_NOTIFY_OFF,
        pci_spec.QUEUE_NOTIF_CONFIG_DATA,
        pci_spec.ADMIN_QUEUE_INDEX,
        pci_spec.ADMIN_QUEUE_NUM,
    )
    driver.write(pci_spec.DEVICE_FEATURE_SELECT, 0)
    driver.select_queue(1)
    before = [driver.read(field) for field in fields]
    for field in fields:
        driver.write(field, 0xFFFFFFFF)
    assert [driver.read(field) for field in fields] == before
    assert before[3:] == [1, 0, 0, 0], "NOTIF_CONFIG_DATA and ADMIN_VQ are not offered"


# ---- reset of one queue: 2.6.1, 4.1.4.3 ------------------------------------------------------------


def test_4_1_4_3_1_reset_of_one_queue(echo: Plugged[Echo], driver: PciDriver) -> None:
    """The other goes on; it works again in another size after its set-up; its vector stays."""
    driver.start(PLAIN | RING_RESET)
    driver.map_queue(0, 2)
    roundtrip(echo, driver)
    driver.reset_queue(0)
    assert driver.queue_size_max(0) == 64
    roundtrip(echo, driver, 1)
    driver.queues[0] = driver.setup_queue(0, 8)
    assert driver.queue_ready == 1
    assert driver.read(pci_spec.QUEUE_RESET) == 0
    roundtrip(echo, driver)


def test_4_1_4_3_queue_reset_does_not_exist_unless_negotiated(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN)
    driver.select_queue(0)
    driver.write(pci_spec.QUEUE_RESET, 1)
    assert driver.read(pci_spec.QUEUE_RESET) == 0
    assert driver.queue_ready == 1
    roundtrip(echo, driver)


@pytest.mark.parametrize("value", [0, 2, 0xFFFF])
def test_4_1_4_3_only_one_resets_a_queue(echo: Plugged[Echo], driver: PciDriver, value: int) -> None:
    driver.start(PLAIN | RING_RESET)
    driver.select_queue(0)
    driver.write(pci_spec.QUEUE_RESET, value)
    assert driver.queue_ready == 1
    roundtrip(echo, driver)


# ---- notification: 4.1.4.4, 4.1.5.2 -----------------------------------------------------------------


def quietly(driver: PciDriver, queue: int = 0) -> Any:
    """A request in the ring the device was not told of."""
    ring = driver.queues[queue]
    request = ring.add([b"ping"], [8])
    ring.publish()
    return request


@pytest.mark.parametrize("queue", [0, 1])
def test_4_1_5_2_each_queue_has_an_address(echo: Plugged[Echo], driver: PciDriver, queue: int) -> None:
    driver.start(PLAIN)
    echo.settle()
    request = quietly(driver, queue)
    echo.write(NOTIFY + 4 * (1 - queue), 1 - queue, 2)
    echo.settle()
    assert driver.queues[queue].reap() == []
    echo.write(NOTIFY + 4 * queue, queue, 2)
    echo.settle()
    assert driver.queues[queue].reap() == [request]


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (1, 1), (1, 2), (2, 2), (3, 1), (8, 2), (0xFFC, 4), (0xFFE, 2)]
)
def test_4_1_5_2_odd_notifications_are_ignored(
    echo: Plugged[Echo], driver: PciDriver, offset: int, size: int
) -> None:
    """Of a byte, between the addresses, behind the last queue."""
    driver.start(PLAIN)
    echo.settle()
    quietly(driver)
    echo.write(NOTIFY + offset, 0, size)
    echo.settle()
    assert driver.queues[0].reap() == []
    assert echo.read(NOTIFY + offset, size) == 0, "write-only"


class Counting(Echo):
    """Knows how often its worker was woken."""

    served = 0

    def handle_queue(self, index: int, queue: Any) -> None:
        self.served += 1
        super().handle_queue(index, queue)


def test_2_9_a_position_the_device_has_reached_wakes_nobody() -> None:
    """The upper 16 bits of a notification arrive; another position does wake it."""
    with plug(Counting, transport="pci") as device:
        driver = device.driver()
        assert isinstance(driver, PciDriver)
        driver.start(PLAIN | NOTIFICATION_DATA)
        roundtrip(device, driver)
        before = device.vdev.served
        device.write(NOTIFY, driver.queues[0].position << 16)
        device.settle()
        assert device.vdev.served == before
        device.write(NOTIFY, driver.queues[0].position + 1 << 16)
        device.settle()
        assert device.vdev.served == before + 1


def test_4_1_5_2_the_address_names_the_queue(echo: Plugged[Echo], driver: PciDriver) -> None:
    """Whatever number is written there: an ioeventfd would not look at it either."""
    driver.start(PLAIN | NOTIFICATION_DATA)
    echo.settle()
    request = quietly(driver, 1)
    echo.write(NOTIFY + 4, driver.queues[1].position << 16 | 0x7777)
    echo.settle()
    assert driver.queues[1].reap() == [request]


def test_4_1_5_2_notification_data(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN | NOTIFICATION_DATA)
    assert driver.features & NOTIFICATION_DATA
    for queue in (0, 1, 0, 0, 1):
        roundtrip(echo, driver, queue)


def test_2_1_2_a_disabled_queue_is_not_served(echo: Plugged[Echo], driver: PciDriver) -> None:
    """Neither before DRIVER_OK nor when the driver never enabled it."""
    driver.negotiate(PLAIN)
    driver.queues = [driver.setup_queue(0, 16)]
    request = quietly(driver)
    driver.notify(0)
    echo.write(NOTIFY + 4, 1, 2)
    echo.settle()
    assert driver.queues[0].reap() == []
    driver.driver_ok()
    echo.write(NOTIFY + 4, 1, 2)
    echo.settle()
    assert driver.queues[0].reap() == [request]
    assert not driver.needs_reset


def test_doorbells_are_what_a_notification_signals(echo: Plugged[Echo], driver: PciDriver) -> None:
    """An engine with ioeventfds takes the store away from the transport."""
    assert isinstance(echo.transport, PciTransport)
    doorbells = echo.transport.function.bars[0].handler.doorbells
    places = [(bell.offset, bell.size, bell.datamatch) for bell, _ in doorbells]
    assert places == [(NOTIFY, 2, None), (NOTIFY, 4, None), (NOTIFY + 4, 2, None), (NOTIFY + 4, 4, None)]
    driver.start(PLAIN)
    echo.settle()
    for queue, bell in ((0, 0), (1, 3)):
        request = quietly(driver, queue)
        os.eventfd_write(doorbells[bell][1], 1)
        echo.settle()
        assert driver.queues[queue].reap() == [request]


# ---- INTx and the ISR status: 4.1.4.5 ------------------------------------------------------------------


def test_4_1_4_5_1_a_used_buffer_raises_intx_until_the_isr_is_read(
    echo: Plugged[Echo], driver: PciDriver, function: PciDevice
) -> None:
    driver.start(PLAIN)
    roundtrip(echo, driver)
    assert echo.irq.level
    assert function.read(pci.STATUS, 2) & pci.STATUS_INTERRUPT
    assert driver.interrupt_status() == pci_spec.ISR_QUEUE
    assert not echo.irq.level
    assert not function.read(pci.STATUS, 2) & pci.STATUS_INTERRUPT
    assert driver.interrupt_status() == 0, "reading clears"


def test_4_1_4_5_1_a_configuration_change_raises_intx(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN)
    echo.vdev.value += 1
    echo.vdev.virtio.config_changed()
    assert echo.irq.level
    assert driver.interrupt_status() == pci_spec.ISR_CONFIG
    assert not echo.irq.level


def test_4_1_5_4_both_bits_by_one_interrupt(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN)
    roundtrip(echo, driver)
    echo.vdev.value += 1
    echo.vdev.virtio.config_changed()
    assert driver.interrupt_status() == pci_spec.ISR_QUEUE | pci_spec.ISR_CONFIG


@pytest.mark.parametrize(("offset", "size"), [(0, 2), (0, 4), (1, 1), (2, 2), (0xFFF, 1)])
def test_4_1_4_5_only_its_byte_is_the_isr(
    echo: Plugged[Echo], driver: PciDriver, offset: int, size: int
) -> None:
    """Another access neither shows nor clears it, and a store does nothing."""
    driver.start(PLAIN)
    roundtrip(echo, driver)
    assert echo.read(ISR + offset, size) == 0
    echo.write(ISR, 0xFF, 1)
    assert echo.irq.level
    assert driver.interrupt_status() == 1


# ---- MSI-X: 4.1.5.1.2, 4.1.5.3, 4.1.5.4 -----------------------------------------------------------------


def test_4_1_5_1_2_1_every_event_to_every_vector(echo: Plugged[Echo], driver: PciDriver) -> None:
    """And back to none; what was mapped reads back."""
    driver.start(PLAIN)
    for vector in (*range(driver.vectors), NO_VECTOR):
        assert driver.map_config(vector) == vector
        for queue in (0, 1):
            assert driver.map_queue(queue, vector) == vector


def test_4_1_5_1_2_1_nothing_is_mapped_at_first(driver: PciDriver) -> None:
    assert driver.read(pci_spec.CONFIG_MSIX_VECTOR) == NO_VECTOR
    for queue in (0, 1):
        driver.select_queue(queue)
        assert driver.read(pci_spec.QUEUE_MSIX_VECTOR) == NO_VECTOR


@pytest.mark.parametrize("vector", [3, 0x7FF, 0x800, 0x8000, 0xFFFE])
def test_4_1_5_1_2_1_a_vector_out_of_range_is_refused(
    echo: Plugged[Echo], driver: PciDriver, vector: int
) -> None:
    """NO_VECTOR reads back, also where a good one was, and nothing is sent."""
    driver.start(PLAIN)
    driver.use_msix(DOORBELL)
    assert driver.map_config(1) == 1
    assert driver.map_queue(0, 2) == 2
    assert driver.map_config(vector) == NO_VECTOR
    assert driver.map_queue(0, vector) == NO_VECTOR
    echo.vdev.value += 1
    echo.vdev.virtio.config_changed()
    roundtrip(echo, driver)
    assert messages(echo) == []


def test_4_1_5_3_messages_of_queues(echo: Plugged[Echo], driver: PciDriver) -> None:
    """Each its own vector; INTx stays down and the ISR status unused."""
    driver.start(PLAIN)
    driver.use_msix(DOORBELL, first=100)
    driver.map_queue(0, 1)
    driver.map_queue(1, 2)
    for queue in (0, 1, 1):
        roundtrip(echo, driver, queue)
    assert messages(echo) == [(DOORBELL, 101), (DOORBELL, 102), (DOORBELL, 102)]
    assert not echo.irq.level
    assert driver.interrupt_status() == 0


def test_4_1_5_3_1_an_unmapped_queue_does_not_interrupt(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN)
    driver.use_msix(DOORBELL)
    driver.map_queue(1, 1)
    roundtrip(echo, driver)
    assert messages(echo) == []
    assert not echo.irq.level


def test_4_1_5_4_message_of_a_configuration_change(echo: Plugged[Echo], driver: PciDriver) -> None:
    """The ISR bit is set before, in this mode too (4.1.4.5.1)."""
    driver.start(PLAIN)
    driver.use_msix(DOORBELL)
    driver.map_config(2)
    echo.vdev.value += 1
    echo.vdev.virtio.config_changed()
    assert messages(echo) == [(DOORBELL, 2)]
    assert not echo.irq.level
    assert driver.interrupt_status() == pci_spec.ISR_CONFIG


def test_4_1_5_4_one_vector_for_everything(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN)
    driver.use_msix(DOORBELL)
    driver.map_config(0)
    driver.map_queue(0, 0)
    driver.map_queue(1, 0)
    roundtrip(echo, driver)
    roundtrip(echo, driver, 1)
    echo.vdev.virtio.config_changed(always=True)
    assert messages(echo) == [(DOORBELL, 0)] * 3


def test_6_8_2_a_masked_vector_is_sent_when_unmasked(
    echo: Plugged[Echo], driver: PciDriver, function: PciDevice
) -> None:
    driver.start(PLAIN)
    driver.use_msix(DOORBELL)
    driver.map_queue(0, 1)
    entry = function.bars[2][0] + pci.MSIX_ENTRY_SIZE + 12
    echo.bus.write(entry, 4, 1)
    roundtrip(echo, driver)
    assert messages(echo) == []
    echo.bus.write(entry, 4, 0)
    assert messages(echo) == [(DOORBELL, 1)]


def test_back_from_msix_to_intx(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN)
    driver.use_msix(DOORBELL)
    driver.map_queue(0, 1)
    driver.disable_msix()
    roundtrip(echo, driver)
    assert messages(echo) == []
    assert echo.irq.level
    assert driver.interrupt_status() == 1


# ---- device configuration: 2.5, 4.1.4.6 --------------------------------------------------------------


def test_2_5_configuration_in_every_width(driver: PciDriver) -> None:
    assert driver.config(0, 8) == Echo.value
    raw = struct.pack("<Q", Echo.value) + bytes(4)
    for size in (1, 2, 4):
        for offset in range(12 - size + 1):
            assert driver.config(offset, size) == int.from_bytes(raw[offset : offset + size], "little")
    assert driver.config(11, 4) == 0, "behind the end"


def test_2_5_configuration_writes(echo: Plugged[Echo], driver: PciDriver) -> None:
    """Wholly inside, or not at all."""
    driver.start()
    driver.write_config(8, 4, 0x44332211)
    assert driver.config(8, 4) == 0x44332211
    driver.write_config(10, 4, 0xFFFFFFFF)
    assert driver.config(8, 4) == 0x44332211
    echo.write(DEVICE + 0xFFC, 0xFFFFFFFF)
    assert driver.config(8, 4) == 0x44332211


def test_4_1_4_3_1_the_generation_tells_of_every_change_a_driver_could_mix(
    echo: Plugged[Echo], driver: PciDriver
) -> None:
    """However often it changes between two looks: the number has 8 bits only."""
    driver.start()
    for changes in (1, 2, 255, 256, 257):
        before = driver.generation()
        driver.config(0, 4)
        for _ in range(changes):
            echo.vdev.value += 1
            echo.vdev.virtio.config_changed()
        assert driver.generation() != before, f"{changes} changes"
    before = driver.generation()
    driver.config(0, 8)
    assert driver.generation() == before


def test_4_1_4_3_the_generation_has_8_bits(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start()
    seen = set()
    for _ in range(300):
        seen.add(driver.generation())
        echo.vdev.value += 1
        echo.vdev.virtio.config_changed()
    assert seen == set(range(256))


# ---- PCI configuration access: 4.1.4.9 ------------------------------------------------------------------


def test_4_1_4_9_1_the_whole_device_through_the_keyhole(
    echo: Plugged[Echo], function: PciDevice, window: Window
) -> None:
    """Even with memory decoding off: what firmware does before it places BARs."""
    function.write(pci.COMMAND, pci.COMMAND_BUS_MASTER, 2)

    class Keyhole:
        """A bus that goes through configuration space."""

        base = function.bars[0][0]

        def read(self, address: int, size: int) -> int:
            return window.read(address - self.base, size)

        def write(self, address: int, size: int, value: int) -> None:
            window.write(address - self.base, size, value)

    driver = PciDriver(Keyhole(), function, GuestRam(echo.memory))
    driver.start()
    roundtrip(echo, driver)
    assert driver.config(0, 8) == Echo.value
    assert driver.interrupt_status() == 1


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [
        (1, 0x14, 1), (2, 0, 4), (5, 0x14, 1), (6, 0x14, 1), (0xFF, 0x14, 1),
        (0, 0x14, 0), (0, 0x14, 3), (0, 0x10, 8), (0, 0x14, 0xFFFFFFFF),
        (0, 0x15, 2), (0, 0x02, 4), (0, 0x4000, 1), (0, 0xFFFFFFFC, 4), (0, 0xFFFFFFFF, 1),
    ],
)  # fmt: skip
def test_4_1_4_9_2_what_a_driver_must_not_select_is_not_accessed(
    echo: Plugged[Echo], driver: PciDriver, window: Window, bar: int, offset: int, length: int
) -> None:
    """Another BAR, no width, unaligned, outside: the data stays, the device too."""
    driver.start()
    window.select(bar, offset, length)
    at = config_cap(driver.device)
    driver.device.write(at + 16, 0x5A5A5A5A)
    assert window.data == 0x5A5A5A5A
    assert driver.status == 15
    roundtrip(echo, driver)


def test_4_1_4_9_1_reading_the_isr_through_it_clears_it(
    echo: Plugged[Echo], driver: PciDriver, window: Window
) -> None:
    driver.start(PLAIN)
    roundtrip(echo, driver)
    assert window.read(ISR, 1) == 1
    assert not echo.irq.level
    assert window.read(ISR, 1) == 0


def test_4_1_4_9_1_only_the_first_bytes_are_replaced(driver: PciDriver, window: Window) -> None:
    driver.negotiate()
    window.select(0, 0, 0)
    driver.device.write(config_cap(driver.device) + 16, 0xAABBCCDD)
    window.select(0, pci_spec.DEVICE_STATUS, 1)
    assert window.data == 0xAABBCC00 | driver.status


# ---- BARs ------------------------------------------------------------------------------------------------


def test_bars_move_and_the_device_goes_with_them(echo: Plugged[Echo], function: PciDevice) -> None:
    driver = echo.driver()
    driver.start(PLAIN)
    old = function.bars[0][0]
    function.write(pci.BAR0, 0x4000_0000)
    function.write(pci.BAR0 + 4, 0x80)
    assert echo.bus.read(old + pci_spec.DEVICE_STATUS, 1) == 0xFF
    assert echo.bus.read(0x80_4000_0000 + pci_spec.DEVICE_STATUS, 1) == 15
    function.enumerate()
    moved = PciDriver(echo.bus, function, GuestRam(echo.memory))
    assert moved.status == 15


def test_memory_decoding_off_hides_the_device(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start()
    driver.device.write(pci.COMMAND, 0, 2)
    assert driver.status == 0xFF
    driver.notify(0)
    driver.device.write(pci.COMMAND, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER, 2)
    assert driver.status == 15
    roundtrip(echo, driver)


# ---- bus mastering: PCI 3.0, 6.2.2 ------------------------------------------------------------------


ON, OFF = pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER, pci.COMMAND_MEMORY


def used(driver: PciDriver, queue: int = 0) -> bytes:
    """The device's area of a split queue as it is in memory."""
    ring = driver.queues[queue]
    assert isinstance(ring, SplitDriver)
    return ring.memory.read(ring.used, 6 + 8 * ring.size)


@pytest.mark.parametrize("doorbell", ["register", "eventfd", "device"])
def test_6_2_2_without_bus_mastering_no_queue_is_served_and_nothing_is_lost(
    echo: Plugged[Echo], driver: PciDriver, doorbell: str
) -> None:
    """However the device is woken: by a register, by the engine's eventfd, by itself."""
    driver.start(PLAIN)
    roundtrip(echo, driver)
    driver.device.write(pci.COMMAND, OFF, 2)
    before = used(driver)
    ring = driver.queues[0]
    request = ring.submit([b"ping"], [8])
    if doorbell == "eventfd":
        echo.vdev.virtio.doorbells[0].signal()
    elif doorbell == "device":
        echo.vdev.virtio.kick(0)
    echo.settle()
    assert used(driver) == before
    assert ring.reap() == []
    assert echo.vdev.virtio.queue(0) is None
    driver.device.write(pci.COMMAND, ON, 2)
    echo.settle()
    assert ring.reap() == [request]
    assert echo.vdev.virtio.queue(0) is not None


def test_6_2_2_a_driver_that_masters_the_bus_after_driver_ok_is_served_then(
    echo: Plugged[Echo], driver: PciDriver
) -> None:
    driver.device.write(pci.COMMAND, OFF, 2)
    driver.start(PLAIN)
    request = driver.queues[1].submit([b"ping"], [8])
    echo.settle()
    assert driver.queues[1].reap() == []
    driver.device.write(pci.COMMAND, ON, 2)
    echo.settle()
    assert driver.queues[1].reap() == [request]
    roundtrip(echo, driver)


def test_6_2_2_a_function_does_not_master_the_bus_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has ever written the bit."""
    write = PciDevice.write

    def without_master(device: PciDevice, offset: int, value: int, size: int = 4) -> None:
        write(device, offset, value & ~pci.COMMAND_BUS_MASTER if offset == pci.COMMAND else value, size)

    monkeypatch.setattr(PciDevice, "write", without_master)
    with plug(Echo, transport="pci") as echo:
        driver = echo.driver()
        assert isinstance(driver, PciDriver)
        driver.start(PLAIN)
        request = driver.queues[0].submit([b"ping"], [8])
        echo.settle()
        assert driver.queues[0].reap() == []
        write(driver.device, pci.COMMAND, ON, 2)
        echo.settle()
        assert driver.queues[0].reap() == [request]


def test_6_2_2_a_reset_does_not_give_the_bus_back(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN)
    driver.device.write(pci.COMMAND, OFF, 2)
    driver.status = 0
    driver.start(PLAIN)
    request = driver.queues[0].submit([b"ping"], [8])
    echo.settle()
    assert driver.queues[0].reap() == []
    driver.device.write(pci.COMMAND, ON, 2)
    echo.settle()
    assert driver.queues[0].reap() == [request]


def test_6_2_2_when_bus_mastering_is_off_the_worker_has_left_guest_memory(
    echo: Plugged[Echo], driver: PciDriver
) -> None:
    driver.start(PLAIN)
    echo.vdev.gate.clear()
    request = driver.queues[0].submit([b"ping"], [8])
    assert echo.vdev.entered.wait(10)
    writer = threading.Thread(target=driver.device.write, args=(pci.COMMAND, OFF, 2))
    writer.start()
    writer.join(0.05)
    assert writer.is_alive()
    echo.vdev.gate.set()
    writer.join()
    assert driver.queues[0].reap() == [request]


def test_6_2_2_other_bits_of_the_command_register_disturb_nobody(
    echo: Plugged[Echo], driver: PciDriver
) -> None:
    driver.start(PLAIN)
    calls: list[bool] = []
    assert echo.pci is not None
    echo.pci.function.on_bus_master = calls.append
    for command in (ON | pci.COMMAND_INTX_DISABLE, pci.COMMAND_BUS_MASTER, ON, OFF, OFF, 0, ON):
        driver.device.write(pci.COMMAND, command, 2)
    driver.device.write(pci.COMMAND + 1, 0, 1)
    assert calls == [False, True]


# ---- the end -----------------------------------------------------------------------------------------------


def test_nothing_is_sent_after_the_end(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN)
    driver.use_msix(DOORBELL)
    driver.map_config(0)
    driver.map_queue(0, 1)
    assert [step for step in echo.terminate() if step.verdict != "ok"] == []
    quietly(driver)
    driver.notify(0)
    echo.vdev.virtio.config_changed(always=True)
    assert messages(echo) == []
    assert not echo.irq.level
