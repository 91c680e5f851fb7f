"""DMA_MAP and DMA_UNMAP: what the device reaches, what is refused, and who closes what."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from qvm_vfio_user.testing import CONFIG_REGION, INFO, MAP, UNMAP, UNMAP_ALL, Command
from qvm_vfio_user.version import MAPS_MAX

from plugins.vfio_user.tests.vfio_bench import (
    COMMAND,
    MASTER_OFF,
    MEMORY_AND_MASTER,
    MIB,
    Bench,
    Probe,
    open_fds,
    serving,
)
from qvmcore.api import GuestMemoryError

TOP = 1 << 64
OPTION = "-object memory-backend-memfd,id=mem,size=...,share=on -machine memory-backend=mem"


def ask_map(
    bench: Bench, start: int, size: int, *, fd: int | None = None, flags: int = 3, argsz: int = 32
) -> int:
    """The errno of a DMA_MAP, 0 when it is taken."""
    payload = MAP.pack(argsz, flags, 0, start, size)
    return bench.client.ask(Command.DMA_MAP, payload, fds=() if fd is None else (fd,)).errno


def ask_unmap(bench: Bench, start: int, size: int, *, flags: int = 0, argsz: int = 24) -> int:
    """The errno of a DMA_UNMAP, 0 when it is done."""
    return bench.client.ask(Command.DMA_UNMAP, UNMAP.pack(argsz, flags, start, size)).errno


def test_DMA_MAP_gives_the_device_the_file_at_its_offset() -> None:
    with serving() as bench:
        bench.ready()
        bench.share(0x4000_0000, 0x2000, b"here", offset=0x3000)
        assert bench.fetch(0x4000_0000) == b"here"
        assert [(each.start, each.size) for each in bench.served.memory.regions] == [
            (0, MIB),
            (0x4000_0000, 0x2000),
        ]
        assert isinstance(bench.fetch(0x4000_2000), GuestMemoryError)


def test_DMA_MAP_makes_the_life_used_only_when_the_device_can_reach_it() -> None:
    with serving() as bench:
        bench.client.version()
        bench.client.info()
        bench.client.dma_map(0, 0x1000, None)
        assert not bench.served.used
        bench.share(0x1000, 0x1000)
        assert bench.served.used


def test_DMA_MAP_without_a_descriptor_takes_the_addresses_and_gives_nothing() -> None:
    with serving() as bench:
        bench.ready()
        bench.client.dma_map(0x10_0000, 0x1000, None, flags=1)
        assert isinstance(bench.fetch(0x10_0000), GuestMemoryError)
        assert ask_map(bench, 0x10_0000, 0x1000) == errno.EEXIST
        assert ask_unmap(bench, 0x10_0000, 0x1000) == 0
        assert ask_map(bench, 0x10_0000, 0x1000) == 0


def test_DMA_MAP_that_is_not_writable_is_as_a_rom(tmp_path: Path) -> None:
    path = tmp_path / "rom"
    path.write_bytes(b"rom!" + bytes(0xFFC))
    with serving() as bench, path.open("rb") as file:
        bench.ready()
        bench.client.dma_map(0x20_0000, 0x1000, file.fileno(), flags=1)
        assert bench.fetch(0x20_0000) == b"rom!"
        bench.served.memory.write(0x20_0000, b"lost")
        assert path.read_bytes()[:4] == b"rom!"
        # Not writable, whatever the client says of it.
        assert ask_map(bench, 0x30_0000, 0x1000, fd=file.fileno()) == errno.EINVAL


@pytest.mark.parametrize(
    "start, size",
    [
        (0x1000, 1),
        (0, 0x1001),
        (0, TOP - 1),
        (0x1800, 0x800),
        (0x1FFF, 1),
        (0x1FFF, 0x1000),
        (0x1000, 0x1000),
    ],
)
def test_DMA_MAP_over_another_map_is_refused(start: int, size: int) -> None:
    with serving() as bench:
        bench.client.version()
        bench.client.dma_map(0x1000, 0x1000, None)
        assert ask_map(bench, start, size) == errno.EEXIST
        assert ask_map(bench, 0x2000, TOP - 0x2000) == 0
        assert ask_map(bench, 0, 0x1000) == 0


@pytest.mark.parametrize(
    "start, size, flags, argsz",
    [
        (0, 0, 3, 32),
        (TOP - 0x1000, 0x1001, 3, 32),
        (1, TOP - 1, 4, 32),
        (0, 0x1000, 0x80, 32),
        (0, 0x1000, 3, 31),
        (0, 0x1000, 3, 0),
    ],
)
def test_DMA_MAP_of_what_cannot_be_is_refused(start: int, size: int, flags: int, argsz: int) -> None:
    before = open_fds()
    with serving() as bench, open("/dev/null") as file:
        bench.client.version()
        for fd in (None, file.fileno()):
            assert ask_map(bench, start, size, fd=fd, flags=flags, argsz=argsz) == errno.EINVAL
        assert bench.served.memory.regions == () and not bench.served.used
    assert open_fds() == before


def test_DMA_MAP_of_a_file_that_is_too_short_or_no_file_is_refused(tmp_path: Path) -> None:
    before = open_fds()
    path = tmp_path / "short"
    path.write_bytes(bytes(0xFFF))
    with serving() as bench, path.open("r+b") as short:
        bench.client.version()
        read, write = os.pipe()
        try:
            for fd in (short.fileno(), read):
                assert ask_map(bench, 0, 0x1000, fd=fd) == errno.EINVAL
        finally:
            os.close(read)
            os.close(write)
        assert ask_map(bench, 0, 0x1000) == 0
    assert open_fds() == before


def test_DMA_MAP_is_bounded_in_number() -> None:
    with serving() as bench:
        bench.client.version()
        for index in range(MAPS_MAX):
            assert ask_map(bench, index << 12, 0x1000) == 0
        assert ask_map(bench, MAPS_MAX << 12, 0x1000) == errno.ENOSPC
        assert ask_unmap(bench, 0, 0, flags=UNMAP_ALL) == 0
        assert ask_map(bench, 0, 0x1000) == 0


def test_DMA_UNMAP_takes_the_memory_away_and_unmaps_it() -> None:
    before = open_fds()
    with serving() as bench:
        bench.ready()
        bench.share(0x20_0000, 0x1000, b"gone")
        assert bench.fetch(0x20_0000) == b"gone"
        region = bench.served.memory.regions[1]
        bench.client.dma_unmap(0x20_0000, 0x1000)
        assert isinstance(bench.fetch(0x20_0000), GuestMemoryError)
        assert region.fd == -1
        with pytest.raises(ValueError, match="released"):
            region.view[0]
    assert open_fds() == before


def test_DMA_UNMAP_of_a_range_takes_the_whole_maps_in_it() -> None:
    with serving() as bench:
        bench.client.version()
        for start in (0x1000, 0x2000, 0x8000):
            bench.share(start, 0x1000)
        assert ask_unmap(bench, 0, 0x1000) == errno.ENOENT
        assert ask_unmap(bench, 0, 0x2800) == errno.EINVAL
        assert ask_unmap(bench, 0x1800, 0x1800) == errno.EINVAL
        assert ask_unmap(bench, 0, 0x4000) == 0
        assert ask_unmap(bench, 0x1000, 0x1000) == errno.ENOENT
        assert ask_unmap(bench, 0x8000, 0x1000) == 0


def test_DMA_UNMAP_all_takes_everything() -> None:
    with serving() as bench:
        bench.ready()
        bench.share(TOP - 0x1000, 0x1000)
        bench.client.dma_map(0x800000, 0x1000, None)
        bench.client.dma_unmap(0, 0, UNMAP_ALL)
        assert bench.served.memory.regions == ()
        bench.client.dma_unmap(0, 0, UNMAP_ALL)  # nothing is all there is
        assert ask_unmap(bench, 0x1000, 0x1000, flags=UNMAP_ALL) == errno.EINVAL


@pytest.mark.parametrize(
    "flags, expected",
    [(1, errno.ENOTSUP), (3, errno.EINVAL), (4, errno.ENOTSUP), (0x80000000, errno.ENOTSUP)],
)
def test_DMA_UNMAP_with_a_dirty_bitmap_or_unknown_flags_is_refused(flags: int, expected: int) -> None:
    with serving() as bench:
        bench.ready()
        assert ask_unmap(bench, 0, MIB, flags=flags) == expected
        payload = UNMAP.pack(40, flags, 0, MIB) + bytes(16)
        assert bench.client.ask(Command.DMA_UNMAP, payload).errno == expected
        assert ask_unmap(bench, 0, MIB, argsz=23) == errno.EINVAL
        assert len(bench.served.memory.regions) == 1


def test_reply_sizes_of_DMA_are_those_strict_clients_read() -> None:
    """Cloud Hypervisor reads exactly 16 bytes after a map and 40 after an unmap."""
    with serving() as bench:
        bench.client.version()
        assert bench.client.request(Command.DMA_MAP, MAP.pack(32, 3, 0, 0, 0x1000)) == b""
        asked = UNMAP.pack(24, 0, 0, 0x1000)
        assert bench.client.request(Command.DMA_UNMAP, asked) == asked


def test_a_device_without_bus_master_does_not_reach_memory() -> None:
    with serving() as bench:
        bench.client.version()
        bench.share(0, MIB, b"ram!")
        assert isinstance(bench.fetch(0), GuestMemoryError)
        bench.client.write(CONFIG_REGION, COMMAND, 2, MEMORY_AND_MASTER)
        assert bench.fetch(0) == b"ram!"
        bench.client.write(CONFIG_REGION, COMMAND, 2, MASTER_OFF)
        assert isinstance(bench.fetch(0), GuestMemoryError)
        bench.share(0x20_0000, 0x1000, b"more")
        assert isinstance(bench.fetch(0x20_0000), GuestMemoryError)
        bench.client.write(CONFIG_REGION, COMMAND, 2, MEMORY_AND_MASTER)
        assert bench.fetch(0x20_0000) == b"more"
        bench.client.reset()
        assert isinstance(bench.fetch(0), GuestMemoryError)


def test_the_vdev_is_told_of_bus_master_while_it_still_reaches_memory() -> None:
    told: list[tuple[bool, bytes]] = []

    class Follower(Probe):
        def on_function(self, function: Any) -> None:
            function.on_bus_master = self.told

        def told(self, master: bool) -> None:
            if self.ctx.memory.regions:
                told.append((master, self.ctx.memory.read(0, 4)))

    with serving(Follower) as bench:
        bench.client.version()
        bench.share(0, MIB, b"ram!")
        bench.client.write(CONFIG_REGION, COMMAND, 2, MEMORY_AND_MASTER)
        bench.client.write(CONFIG_REGION, COMMAND, 2, MASTER_OFF)
        bench.client.info()
        assert told == [(True, b"ram!"), (False, b"ram!")]


@pytest.mark.parametrize("master", [True, False])
def test_when_the_client_goes_memory_in_reach_stays_for_the_core_and_other_is_unmapped(master: bool) -> None:
    before = open_fds()
    with serving() as bench:
        bench.ready()
        if not master:
            bench.client.write(CONFIG_REGION, COMMAND, 2, MASTER_OFF)
        bench.client.close()
        assert bench.ended() is None
        assert len(bench.served.memory.regions) == master
        assert ("/memfd:client (deleted)" in open_fds()) == master
    assert open_fds() == before


def test_DMA_UNMAP_waits_for_what_the_worker_does() -> None:
    """A plain vdev's worker may be in memory when the map goes."""
    entered, leave = threading.Event(), threading.Event()
    seen: list[bytes] = []

    class Slow(Probe):
        def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
            self.ctx.worker.call(self.work)

        def work(self) -> None:
            view = self.ctx.memory.view(0, 4)
            entered.set()
            leave.wait(5)
            seen.append(bytes(view))

    with serving(Slow) as bench:
        bench.ready()
        bench.client.write(0, 0, 4, 1)
        assert entered.wait(5)
        bench.client.post(Command.DMA_UNMAP, UNMAP.pack(24, 0, 0, MIB))
        bench.client.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            bench.client.receive()
        leave.set()
        bench.client.socket.settimeout(5)
        assert not bench.client.receive().refused
        assert seen == [bytes(4)] and bench.served.memory.regions == ()


def test_DEVICE_RESET_is_not_done_before_the_worker_has_left_memory() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(Probe):
        def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
            self.ctx.worker.call(self.work)

        def on_reset(self) -> None:
            # Its worker begins something that nobody asked for any more.
            self.ctx.worker.call(self.work)
            self.ctx.worker.call(lambda: None)

        def work(self) -> None:
            entered.set()
            leave.wait(5)

    with serving(Slow) as bench:
        bench.ready()
        bench.client.write(0, 0, 4, 1)
        assert entered.wait(5)
        bench.client.post(Command.RESET)
        bench.client.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            bench.client.receive()
        leave.set()
        bench.client.socket.settimeout(5)
        assert not bench.client.receive().refused


def test_DMA_UNMAP_is_refused_when_the_worker_does_not_come_and_the_memory_stays() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Stuck(Probe):
        def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
            self.ctx.worker.call(self.work)

        def work(self) -> None:
            entered.set()
            leave.wait(10)

    with serving(Stuck) as bench:
        bench.ready()
        bench.client.write(0, 0, 4, 1)
        assert entered.wait(5)
        assert ask_unmap(bench, 0, MIB) == errno.EBUSY
        assert len(bench.served.memory.regions) == 1 and bench.served.memory.regions[0].fd >= 0
        assert [str(each) for each in bench.served.faults] == [
            "the worker did not leave guest memory within 1 s"
        ]
        bench.served.faults.clear()
        leave.set()


@pytest.mark.parametrize("command", ["info", "read", "write"])
def test_a_client_that_shares_no_ram_is_told_which_option_it_lacks(
    command: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving() as bench:
        bench.client.version()
        bench.client.dma_map(0xC0000, 0x20000, None, flags=1)
        if command != "info":
            bench.client.info()
            bench.client.region(7)
        bench.client.dma_map(0, 0xA0000, None)
        if command == "info":
            # The connection stays, for QEMU to leave in order; the option is said here, too.
            assert bench.client.ask(Command.GET_INFO, INFO.pack(16, 0, 0, 0)).errno == errno.EINVAL
            assert OPTION in caplog.text
        if command != "write":
            bench.client.post(Command.REGION_READ, bytes(8) + b"\x07\0\0\0\x04\0\0\0")
        else:
            bench.client.post(Command.REGION_WRITE, bytes(12) + b"\x04\0\0\0" + bytes(4))
        assert OPTION in bench.broken()


def test_roms_and_bars_of_others_do_not_count_as_ram_that_is_not_shared() -> None:
    with serving() as bench:
        bench.client.version()
        bench.client.dma_map(0xFFFC_0000, 0x40000, None, flags=1)
        bench.client.dma_map(0x8000_0000, 16 * MIB, None, flags=1)
        bench.client.dma_map(0xA0000, 0x20000, None)
        assert bench.client.read(CONFIG_REGION, 0, 2) == 0x1C05
        bench.share(0, 0xA0000)
        bench.client.dma_map(0xF000_0000, 16 * MIB, None)
        assert bench.client.read(CONFIG_REGION, 0, 2) == 0x1C05
