"""Targets for whole virtio devices: a guest that does anything, in any order, over MMIO or PCI."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qvmcore.testing.driver import FeaturesRefused
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.ring import RingDriver
from qvmcore.testing.samples import Echo
from qvmcore.testing.strategies import REGISTERS
from qvmcore.types import MemorySpec
from qvmcore.vdev import Vdev
from qvmcore.virtio import spec
from tests.fuzz.bytesource import ByteSource

#: Small, so that what a chain can claim by naming the same bytes often is bounded.
RAM = (MemorySpec(0x8000_0000, 1 << 20),)

_VERSION_1, _PACKED = 1 << spec.VIRTIO_F_VERSION_1, 1 << spec.VIRTIO_F_RING_PACKED
_IN_ORDER = 1 << spec.VIRTIO_F_IN_ORDER


@cache
def _folder() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """A folder with a disk image; gone with the process."""
    keep = tempfile.TemporaryDirectory(prefix="qvm-fuzz-")
    folder = Path(keep.name)
    (folder / "disk.img").write_bytes(bytes(64 << 10))
    return keep, folder


def echo(data: bytes) -> None:
    """The state machine and the rings, behind the kit's sample device."""
    _device(data, Echo, {}, lambda source: [source.take(source.byte() % 32)])


def blk(data: bytes) -> None:
    """virtio-blk with two queues on an image."""
    from qvm_virtio_blk.device import VirtioBlk

    options = {"hostdev": str(_folder()[1] / "disk.img"), "queues": 2}
    _device(data, VirtioBlk, options, _blk_request)


def _blk_request(source: ByteSource) -> list[bytes]:
    kind = source.pick((0, 1, 4, 8, 11, 13, 99)).to_bytes(4, "little")
    head = kind + bytes(4) + source.value(8).to_bytes(8, "little")
    body = bytes(512) if source.byte() & 1 else source.take(source.byte() % 40)
    return [head, body] if body else [head]


def console(data: bytes) -> None:
    """virtio-console with further ports, if it has them, and its control queue."""
    from qvm_virtio_console.device import VirtioConsole

    options: dict[str, object] = {"hostdev": "null"}
    if "ports" in VirtioConsole.Options.__struct_fields__:
        options["ports"] = [{"name": "a", "hostdev": "null"}, {"name": "b", "hostdev": "null"}]
    _device(data, VirtioConsole, options, _control)


def _control(source: ByteSource) -> list[bytes]:
    """struct virtio_console_control with any port, event and value, or output; perhaps cut short."""
    port = source.byte() % 5 if source.byte() & 1 else source.value(4)
    message = (
        port.to_bytes(4, "little") + bytes([source.byte() % 10, 0]) + source.value(2).to_bytes(2, "little")
    )
    return [message[: None if source.byte() & 3 else source.byte() % 9] + source.take(source.byte() % 8)]


def entropy(data: bytes) -> None:
    """virtio-entropy on the host's own source."""
    from qvm_virtio_entropy import VirtioEntropy

    _device(data, VirtioEntropy, {}, lambda source: [])


def net(data: bytes) -> None:
    """virtio-net without a cable: transmit, receive and control queue."""
    from qvm_virtio_net.device import VirtioNet

    _device(data, VirtioNet, {"none": True}, _frame_or_command)


def _frame_or_command(source: ByteSource) -> list[bytes]:
    """A header and a frame, or a command with its data."""
    if source.byte() & 1:
        return [bytes([source.byte() % 7, source.byte() % 8]), source.take(source.byte() % 24)]
    head = bytes([source.byte() & 3, source.pick((0, 1, 4, 9))]) + source.take(8).ljust(10, b"\0")
    return [head, bytes(14) + source.take(source.byte() % 80)]


def _device(
    data: bytes,
    cls: type[Vdev],
    options: Mapping[str, object],
    request: Callable[[ByteSource], Sequence[bytes]],
) -> None:
    """One life of a device; ``request`` makes readable buffers that mean something to it."""
    source = ByteSource(data)
    transport = source.pick(("mmio", "pci"))
    with plug(cls, options, ram=RAM, base_dir=_folder()[1], transport=transport) as device:
        guest = _Guest(device, source, request)
        if source.byte() & 3:
            guest.bring_up()
        while source:
            guest.act()
        device.settle()
        assert device.ctx.faults == [], device.ctx.faults
        assert device.ctx.shutdowns == []
        guest.recover()
        assert [result for result in device.terminate() if result.verdict != "ok"] == []


class _Guest:
    """Does what ``source`` says."""

    def __init__(
        self, device: Plugged[Any], source: ByteSource, request: Callable[[ByteSource], Sequence[bytes]]
    ) -> None:
        self._device = device
        self._source = source
        self._request = request
        self._driver = device.driver()

    def act(self) -> None:
        """One thing, right or wrong."""
        source = self._source
        action = source.byte() % 12
        rings = self._driver.queues
        ring = source.pick(rings) if rings else None
        if action == 0:
            self.bring_up()
        elif action == 1:
            assert 0 <= self._device.read(source.uint(2) % 0x1FD, source.pick((1, 2, 4, 8))) < 1 << 64
        elif action <= 3 or ring is None:
            self._register()
        elif action == 4:
            size = source.pick((1, 2, 4))
            self._driver.write_config(source.byte() % 64, size, source.value(size))
        elif action == 5:
            self._driver.notify(source.value(2))
        elif action == 6:
            self._malformed(ring)
        elif action == 7:
            ring.publish(source.value(2))
            ring.notify()
        elif action == 8:
            self._device.settle()
        else:
            self._good(ring)

    def bring_up(self) -> None:
        """As a driver does, with any subset of what is offered. A device that refuses is reset."""
        choice = self._source.byte() & 3
        bits = self._source.uint(6) if choice == 3 else (-1, ~_PACKED, ~(_PACKED | _IN_ORDER))[choice]
        self._new_driver()
        try:
            self._driver.start((bits | _VERSION_1) & ((1 << 128) - 1), [16] * 64)
        except FeaturesRefused:
            self._driver.reset()

    def recover(self) -> None:
        """After all this a good driver finds a good device."""
        self._new_driver()
        self._driver.start()
        self._device.settle()
        assert not self._driver.needs_reset
        assert self._device.ctx.faults == [], self._device.ctx.faults

    def _new_driver(self) -> None:
        """As after a reboot: on PCI the firmware places the BARs again."""
        if self._device.device is not None:
            self._device.device.enumerate(anew=True)
        self._driver = self._device.driver()

    def _register(self) -> None:
        """Any store to registers; on PCI to the structures, or to configuration space."""
        source = self._source
        size = source.pick((4, 4, 4, 1, 2))
        if self._device.device is None:
            self._device.write(source.pick(REGISTERS), source.value(size), size)
        elif source.byte() & 1:
            # Registers first: of the common configuration, then of everything.
            offset = source.byte() % 64 if source.byte() & 3 else source.uint(2)
            self._device.write(offset, source.value(size), size)
        else:
            offset = source.byte()
            self._device.device.write(offset, source.value(size), size)
            assert 0 <= self._device.device.read(offset, size) < 1 << 8 * size

    def _good(self, ring: RingDriver) -> None:
        """A well-formed chain of what the device expects, or of anything."""
        source = self._source
        readable = self._request(source) if source.byte() & 3 else [source.take(source.byte() % 8)]
        writable = [(1, 8, 20, 512, 513)[source.byte() % 5] for _ in range(source.byte() % 3)]
        ring.indirect = not source.byte() & 3
        try:
            ring.add([each for each in readable if each], writable)
        except MemoryError:
            # The guest has no buffers left: what is in flight stays so.
            return
        if source.byte() & 3:
            ring.publish()
            ring.notify()

    def _malformed(self, ring: RingDriver) -> None:
        """A descriptor of any contents, offered or not."""
        source = self._source
        slot = source.byte() % ring.size
        where = source.byte()
        address = RAM[0].start + source.uint(2) if where & 3 else source.value(8)
        length = source.uint(2) if where & 12 else source.value(4)
        ring.write_desc(slot, address, length, source.byte() & 7, source.byte() % 32)
        if source.byte() & 1:
            ring.offer(slot if source.byte() & 7 else source.value(2))
            ring.publish()
            ring.notify()
