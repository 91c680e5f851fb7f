"""Clauses of virtio 1.4 over PCI, 4.1, that the other tests of the transport do not show."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from qvmcore.pci import spec as pci
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.pci_driver import PciDriver
from qvmcore.testing.samples import Echo
from qvmcore.virtio import pci_spec, spec
from qvmcore.virtio.pci import ISR

PLAIN = 1 << spec.VIRTIO_F_VERSION_1
RING_RESET = 1 << spec.VIRTIO_F_RING_RESET


@pytest.fixture
def echo() -> Iterator[Plugged[Echo]]:
    with plug(Echo, transport="pci") as device:
        yield device
        device.vdev.gate.set()
        device.settle()
        assert device.ctx.faults == []


@pytest.fixture
def driver(echo: Plugged[Echo]) -> PciDriver:
    driver = echo.driver()
    assert isinstance(driver, PciDriver)
    return driver


def change(echo: Plugged[Echo]) -> None:
    """A new configuration."""
    echo.vdev.value += 1
    echo.vdev.virtio.config_changed()


def work(echo: Plugged[Echo], driver: PciDriver) -> None:
    """A used buffer."""
    request = driver.queues[0].submit([b"ping"], [4])
    echo.settle()
    assert driver.queues[0].reap() == [request]


@pytest.fixture
def isr_when_told(echo: Plugged[Echo], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ISR status as it is in the moment of each interrupt: a rise of INTA# or a message."""
    seen: list[int] = []
    bus = echo.pci
    assert bus is not None
    raise_line, send = bus.set_intx, bus.message
    # From inside an interrupt the register itself must not be read: reading clears it.
    vectors = echo.transport._vectors  # type: ignore[union-attr]

    def set_intx(level: bool) -> None:
        if level:
            seen.append(vectors._isr)
        raise_line(level)

    def message(address: int, data: int) -> None:
        seen.append(vectors._isr)
        send(address, data)

    monkeypatch.setattr(bus, "set_intx", set_intx)
    monkeypatch.setattr(bus, "message", message)
    return seen


def test_4_1_4_5_1_the_isr_bit_is_set_before_intx(
    echo: Plugged[Echo], driver: PciDriver, isr_when_told: list[int]
) -> None:
    driver.start(PLAIN)
    for event, bit in ((work, pci_spec.ISR_QUEUE), (lambda *_: change(echo), pci_spec.ISR_CONFIG)):
        event(echo, driver)
        assert isr_when_told.pop() & bit
        assert driver.device.read(pci.STATUS, 2) & pci.STATUS_INTERRUPT
        assert echo.read(ISR, 1) & bit
        assert not driver.device.read(pci.STATUS, 2) & pci.STATUS_INTERRUPT


def test_4_1_4_5_1_the_configuration_bit_is_set_before_a_message(
    echo: Plugged[Echo], driver: PciDriver, isr_when_told: list[int]
) -> None:
    driver.start(PLAIN)
    driver.use_msix(0x0802_0040)
    driver.map_config(0)
    isr_when_told.clear()
    change(echo)
    assert isr_when_told == [pci_spec.ISR_CONFIG]


def test_4_1_4_3_1_queue_reset_shows_1_while_it_goes_on_and_0_after(
    echo: Plugged[Echo], driver: PciDriver
) -> None:
    driver.start(PLAIN | RING_RESET)
    echo.vdev.gate.clear()
    driver.queues[0].submit([b"slow"], [4])
    assert echo.vdev.entered.wait(5)
    driver.select_queue(0)
    vcpu = threading.Thread(target=lambda: driver.write(pci_spec.QUEUE_RESET, 1), daemon=True)
    vcpu.start()
    deadline = time.monotonic() + 5
    while driver.read(pci_spec.QUEUE_RESET) == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert driver.read(pci_spec.QUEUE_RESET) == 1
    echo.vdev.gate.set()
    vcpu.join(5)
    assert (driver.read(pci_spec.QUEUE_RESET), driver.queue_ready) == (0, 0)


def test_4_1_4_3_1_a_device_reset_clears_queue_reset(echo: Plugged[Echo], driver: PciDriver) -> None:
    driver.start(PLAIN | RING_RESET)
    setup = echo.vdev.virtio.setup(0)
    assert setup is not None
    setup.resetting = True  # as while the worker is waited for
    driver.select_queue(0)
    assert driver.read(pci_spec.QUEUE_RESET) == 1
    driver.status = 0
    driver.select_queue(0)
    assert (driver.read(pci_spec.QUEUE_RESET), driver.queue_ready) == (0, 0)
