"""Owners of physical devices in the rig: drivers of a few lines over VFIO, in this process or another.

Run as a program: ``vfio_owner.py KIND NAME RAM_FD SOCKET_FD GUARD`` takes a device of the kind ``nvme``,
``e1000e`` or ``edu``, puts it to work, and waits to be killed; with edu it kills itself, a transfer pending.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qvm_quiesce import pci
from qvm_quiesce.attach import attach
from qvm_quiesce.guard import Guard
from qvm_quiesce.state import folder
from qvm_quiesce.subject import Policy
from qvm_vfio import structs
from qvm_vfio.hardware import Ram, VfioHardware, open_device

#: Where the device sees the memory; the edu device reaches no more than 256 MiB.
IOVA, SIZE = 1 << 20, 4 << 20
POLICY = Policy(reset_deadline=20, watch=0.2)


class Memory:
    """Memory for DMA, shared by whoever has the descriptor."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("ram")
            os.ftruncate(fd, SIZE)
        self.fd = fd
        self.map = mmap.mmap(fd, SIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.ram = Ram(IOVA, SIZE, fd, address, lambda: memoryview(self.map))


def wait_for(holds: Callable[[], bool], what: str, limit: float = 60.0) -> None:
    """Wait, bounded. AssertionError."""
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {limit:g} s"
        time.sleep(0.005)


def take(name: str, memory: Memory) -> VfioHardware:
    """The device, with the memory mapped for it, decoding its registers and mastering the bus."""
    hardware = open_device(name)
    hardware.give_memory([memory.ram])
    hardware.map_dma()
    return hardware


def enable(hardware: VfioHardware) -> None:
    """What a driver does first."""
    hardware.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)


class Nvme:
    """As much of a driver as it takes to read blocks: memory at 0 are the queues, data is from DATA on."""

    DATA, READS, BLOCK = 1 << 20, 60, 4096

    def __init__(self, hardware: VfioHardware, memory: Memory) -> None:
        self.hardware = hardware
        self.memory = memory.map
        self._commands = 0

    def start(self) -> None:
        """Enable the controller with one pair of queues for blocks, and MSI-X."""
        hardware = self.hardware
        enable(hardware)
        self.events = hardware.connect(structs.MSIX, 2)
        hardware.bar_write(0, 0x14, 4, 0)
        wait_for(lambda: not hardware.bar_read(0, 0x1C, 4) & 1, "CSTS.RDY = 0")
        hardware.bar_write(0, 0x24, 4, 15 << 16 | 15)
        for at, value in ((0x28, IOVA), (0x30, IOVA + 0x1000)):
            hardware.bar_write(0, at, 4, value)
            hardware.bar_write(0, at + 4, 4, 0)
        hardware.bar_write(0, 0x14, 4, 6 << 16 | 4 << 20 | 1)
        wait_for(lambda: bool(hardware.bar_read(0, 0x1C, 4) & 1), "CSTS.RDY")
        self._admin(5, IOVA + 0x3000, 63 << 16 | 1, 1 << 16 | 2 | 1)
        self._admin(1, IOVA + 0x2000, 63 << 16 | 1, 1 << 16 | 1)

    def read(self) -> None:
        """Ask for READS blocks at once."""
        for number in range(self.READS):
            target = IOVA + self.DATA + number * self.BLOCK
            self._put(0x2000 + 64 * number, 2 | number << 16, 1, target, number * 8, 0, 7)
        self.hardware.bar_write(0, 0x1008, 4, self.READS)

    def work(self) -> None:
        """From nothing to blocks that come."""
        self.start()
        self.read()
        wait_for(lambda: landed(self.memory) > 2, "the first blocks")

    def _admin(self, opcode: int, address: int, word10: int, word11: int) -> None:
        number = self._commands
        self._put(64 * number, opcode | number << 16, 0, address, word10, word11, 0)
        self._commands += 1
        self.hardware.bar_write(0, 0x1000, 4, self._commands)
        done = 0x1000 + 16 * number + 14
        wait_for(lambda: bool(self.memory[done] & 1), f"NVMe command {opcode}")
        assert struct.unpack_from("<H", self.memory, done)[0] >> 1 == 0

    def _put(self, at: int, first: int, nsid: int, address: int, *words: int) -> None:
        self.memory[at : at + 64] = struct.pack(
            "<IIQQQQIIIIII", first, nsid, 0, 0, address, 0, *words, 0, 0, 0
        )


def landed(memory: mmap.mmap) -> int:
    """How many blocks of the slow drive are in the memory."""
    places = range(Nvme.DATA, Nvme.DATA + Nvme.READS * Nvme.BLOCK, Nvme.BLOCK)
    return sum(memory[at : at + 8] == b"canary!!" for at in places)


class E1000e:
    """A receiver: a ring of RING descriptors from the start of the memory, all with the same buffer."""

    RING, BUFFER = 4096, 1 << 20

    def __init__(self, hardware: VfioHardware, memory: Memory) -> None:
        self.hardware = hardware
        self.memory = memory.map

    def work(self) -> None:
        """Receive whatever comes."""
        enable(self.hardware)
        self.memory[: self.RING * 16] = struct.pack("<QQ", IOVA + self.BUFFER, 0) * self.RING
        link = self.hardware.bar_read(0, 0, 4) | 1 << 6  # CTRL: set link up
        ring = ((0x2800, IOVA), (0x2804, 0), (0x2808, self.RING * 16), (0x2810, 0), (0x2818, self.RING - 1))
        # RCTL: on, all frames, broadcast too.
        for at, value in ((0, link), *ring, (0x100, 1 << 1 | 1 << 3 | 1 << 4 | 1 << 15 | 1 << 26)):
            self.hardware.bar_write(0, at, 4, value)
        wait_for(lambda: received(self.memory) > 2, "the first frames")


class Edu:
    """QEMU's device for courses: one transfer at a time, 100 ms after the command."""

    BUFFER, TARGET = 0x40000, 0x4000

    def __init__(self, hardware: VfioHardware, memory: Memory) -> None:
        self.hardware = hardware
        self.memory = memory.map

    def load(self) -> None:
        """A pattern into its buffer."""
        enable(self.hardware)
        self.memory[:2048] = b"pattern!" * 256
        self._transfer(IOVA, self.BUFFER, 1)
        wait_for(lambda: not self.hardware.bar_read(0, 0x98, 4) & 1, "edu's transfer")

    def arm(self) -> None:
        """In 100 ms it writes the pattern to TARGET."""
        self._transfer(self.BUFFER, IOVA + self.TARGET, 1 | 2)

    def work(self) -> None:
        """Ready to arm."""
        self.load()

    def _transfer(self, source: int, target: int, command: int) -> None:
        for at, value in ((0x80, source), (0x88, target), (0x90, 2048), (0x98, command)):
            self.hardware.bar_write(0, at, 4, value)


def received(memory: mmap.mmap) -> int:
    """How many frames the e1000e has put into the memory."""
    return sum(1 for at in range(12, E1000e.RING * 16, 16) if memory[at] & 1)


def arrived(memory: mmap.mmap) -> bool:
    """Whether edu's transfer has taken place."""
    return memory[Edu.TARGET : Edu.TARGET + 8] == b"pattern!"


def main(kind: str, name: str, ram: int, channel: int, guard: bool) -> None:
    """Own a device and keep it busy."""
    memory = Memory(ram)
    hardware = take(name, memory)
    record = attach(hardware)
    # Kept: a guard acts when its VM lets go of it.
    watcher = Guard.start("rig", [(hardware, record, POLICY)], folder()) if guard else None
    handover = hardware.handover()
    driver = {"nvme": Nvme, "e1000e": E1000e, "edu": Edu}[kind](hardware, memory)
    driver.work()
    told = {"guard": watcher.pid if watcher else 0, "values": handover.values, "attached": record.to_json()}
    with socket.socket(fileno=channel) as sock:
        socket.send_fds(sock, [json.dumps(told).encode()], [] if guard else list(handover.fds))
    if isinstance(driver, Edu):
        time.sleep(0.2)
        driver.arm()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def find(vendor: int, device: int, serial: str = "") -> str:
    """A function behind a root port of the rig, by what it is; NVMe drives by their serial number."""
    if serial:
        for path in Path("/sys/class/nvme").glob("*"):
            if (path / "serial").read_text().strip() == serial:
                return (path / "device").resolve().name
    for path in sorted(Path("/sys/bus/pci/devices").glob("*")):
        ids = [int((path / name).read_text(), 16) for name in ("vendor", "device")]
        if ids == [vendor, device] and not path.name.startswith("0000:00:") and not serial:
            return path.name
    raise AssertionError(f"no function {vendor:04x}:{device:04x} {serial}")


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "guard")
