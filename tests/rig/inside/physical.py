"""The machine's physical devices at work: who owns them, and what tells whether they still write.

Run as a program it is an owner: ``physical.py JSON``; see :class:`Owner`.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvm_quiesce.attach import AttachRecord, attach
from qvm_quiesce.guard import Guard
from qvm_vfio.hardware import open_device

from tests.rig.inside.devices import bound
from tests.rig.inside.drivers import DRIVERS, Driver
from tests.rig.inside.vfio_owner import POLICY, Memory, wait_for

#: What is special with each: a transfer 100 ms after the command that no reset cancels; frames as they
#: come; requests that the drive has taken and answers late.
KINDS = ("edu", "e1000e", "slow")
#: Seconds within which each of them has written something, if it may.
WHILE = 1.0


def digest(memory: Memory) -> int:
    """Of all the memory a device can reach."""
    return zlib.crc32(memory.map)


def assert_unchanged(*memories: Memory) -> None:
    """Nothing is written for a while."""
    before = [digest(each) for each in memories]
    time.sleep(WHILE)
    assert [digest(each) for each in memories] == before


def changes(memory: Memory) -> bool:
    """Whether something is written within a while."""
    before = digest(memory)
    time.sleep(WHILE)
    return digest(memory) != before


class Faults:
    """What the kernel says of DMA that the IOMMU refused, from now on."""

    def __init__(self) -> None:
        self._log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._log, 0, os.SEEK_END)

    def lines(self) -> list[str]:
        """The lines since they were asked for last."""
        found: list[str] = []
        while True:
            try:
                line = os.read(self._log, 8192).decode(errors="replace")
            except BlockingIOError:
                return found
            except BrokenPipeError:
                continue  # lines were lost; the next read goes on with the oldest there is
            if "DMAR" in line and "fault addr" in line:
                found.append(line.split(";", 1)[1].strip())

    def close(self) -> None:
        """Stop listening."""
        os.close(self._log)


class Frames:
    """Frames for the e1000e, about 500 a second, from the virtio card at the other end of its wire."""

    def __init__(self) -> None:
        drivers = {path.parent.name: (path / "driver") for path in Path("/sys/class/net").glob("*/device")}
        (card,) = [name for name, link in drivers.items() if link.resolve().name == "virtio_net"]
        subprocess.run(["busybox", "ip", "link", "set", card, "up"], check=True)
        self._process = subprocess.Popen([sys.executable, "-c", _SENDER, card])

    def close(self) -> None:
        """No more of them."""
        self._process.kill()
        self._process.wait()


_SENDER = """
import itertools, socket, sys, time
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind((sys.argv[1], 0x88B5))
for number in itertools.count():
    try:
        wire.send(b"\\xff" * 6 + b"\\x02qvm00" + b"\\x88\\xb5" + number.to_bytes(8, "little") * 8)
    except OSError:
        pass
    time.sleep(0.002)
"""


class Taken:
    """A device this process owns, with its record, its memory and a driver at work."""

    def __init__(self, kind: str, name: str, memory: Memory, *, work: bool = True) -> None:
        self.kind = kind
        self.memory = memory
        self.hardware = open_device(name)
        self.hardware.give_memory([memory.ram])
        self.hardware.map_dma()
        self.record: AttachRecord = attach(self.hardware)
        if work:
            self.start()

    def start(self) -> None:
        """Put it to work."""
        self.driver: Driver = DRIVERS[self.kind](self.hardware, self.memory)


def until_all_write(taken: Sequence[Taken]) -> None:
    """Keep the drivers busy until each device has written to its memory, and leave it about to write."""
    before = {each.kind: each.driver.writes() for each in taken}

    def wrote() -> bool:
        for each in taken:
            if before.get(each.kind) not in (None, each.driver.writes()):
                del before[each.kind]
            each.driver.step()
        return not before

    wait_for(wrote, f"writes of {', '.join(before)}")
    for each in taken:
        each.driver.pend()


class Owner:
    """A process that owns devices and keeps them at work; started, and heard to be at work, when made.

    ``guard``: where its guard keeps its state, or None for no guard. ``share``: the descriptors of the
    devices, and nothing else, come to us as ``fds``, so that somebody else holds them. ``ballast``: MiB of
    other memory that the kernel has to free before the process is gone, as a guest's is.
    """

    def __init__(
        self, kinds: Sequence[str], *, guard: Path | None = None, share: bool = False, ballast: int = 0
    ) -> None:
        self.names = {kind: bound(kind) for kind in kinds}
        self.memory = {kind: Memory() for kind in kinds}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        rams = {kind: each.fd for kind, each in self.memory.items()}
        brief: dict[str, Any] = {
            "names": self.names,
            "rams": rams,
            "channel": theirs.fileno(),
            "share": share,
        }
        brief |= {"guard": str(guard) if guard else "", "ballast": ballast}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(brief)], pass_fds=[*rams.values(), theirs.fileno()]
        )
        theirs.close()
        self._channel = ours
        text, fds, _, _ = socket.recv_fds(ours, 1 << 16, 16)
        assert text, f"the owner ended with {self.process.wait()}"
        self.fds = dict(zip(kinds, fds, strict=False))
        self.guard = int(text)

    def tell(self, word: str) -> None:
        """``exit`` or ``segv``: end in that way."""
        self._channel.send(word.encode())

    def close(self) -> None:
        """Whatever is left of it."""
        self.process.kill()
        self.process.wait()
        self._channel.close()
        while self.fds:
            os.close(self.fds.popitem()[1])


def own(brief: dict[str, Any]) -> None:
    """Own devices until something ends this process."""
    taken = [
        Taken(kind, name, Memory(brief["rams"][kind]), work=False) for kind, name in brief["names"].items()
    ]
    guard = None
    if brief["guard"]:
        watched = [(each.hardware, each.record, POLICY) for each in taken]
        # Kept: for the guard, the end of its socket is the end of this process.
        guard = Guard.start("rig", watched, Path(brief["guard"]))
    ballast = bytearray(brief["ballast"] << 20)
    ballast[::4096] = b"b" * len(ballast[::4096])
    for each in taken:
        each.start()
    until_all_write(taken)
    channel = socket.socket(fileno=brief["channel"])
    shared = [each.hardware.device.fd for each in taken] if brief["share"] else []
    socket.send_fds(channel, [str(guard.pid if guard else 0).encode()], shared)
    while True:
        for each in taken:
            each.driver.step()
        if select.select([channel], [], [], 0.005)[0]:
            word = channel.recv(16)
            if word == b"segv":
                ctypes.string_at(0)
            os._exit(7)


if __name__ == "__main__":
    own(json.loads(sys.argv[1]))
