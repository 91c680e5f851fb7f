"""The accesses of a guest: what reaches memory, the bus, the ports and the doorbells of an engine."""

from __future__ import annotations

import os

import pytest

from qvmcore.bus import all_ones
from qvmcore.testing.access_server import AccessServer
from qvmcore.testing.engine_kit import DEVICE, NOWHERE, PATTERN, PORT, RAM, ROM, EngineKit, Recorder
from qvmcore.types import Doorbell, Window

_DOORBELL = Doorbell(0x50, 4)
_MATCHED = Doorbell(0x60, 4, datamatch=7)


class AccessContract(EngineKit):
    """What holds for every engine's accesses."""

    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    def test_an_access_reaches_the_bus_with_its_offset_size_and_value(
        self, server: AccessServer, device: Recorder, size: int
    ) -> None:
        """Loads and stores, once each."""
        for offset in (0, 0x18, 0x1000 - size):
            expected = all_ones(size)
            device.log.clear()
            value = PATTERN >> 8 * (offset % 8) & expected
            if size > self.widest:
                assert server.load(DEVICE + offset, size) == value
                continue
            assert server.load(DEVICE + offset, size) == value
            server.store(DEVICE + offset, size, ~value & expected)
            assert device.log == [(offset, size, None), (offset, size, ~value & expected)]

    def test_every_value_comes_through(self, server: AccessServer, device: Recorder) -> None:
        """Also those with the highest bit set, zero extended."""
        for value in (0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF):
            server.store(DEVICE, 4, value)
            assert device.log[-1] == (0, 4, value)
        assert server.load(DEVICE + 7, 1) == 0x88

    def test_where_nothing_is_reads_all_ones_and_stores_are_dropped(self, server: AccessServer) -> None:
        """The bus is asked, so that its policy applies."""
        for size in (1, 2, 4, 8):
            assert server.load(NOWHERE + 0x18, size) == all_ones(size)
            server.store(NOWHERE + 0x20, size, 0)
        if self.widest == 8:
            assert [(at - NOWHERE, size) for at, size, _ in server.unsupported] == [
                (at, size) for size in (1, 2, 4, 8) for at in (0x18, 0x20)
            ]
        assert {value for _, _, value in server.unsupported} == {None, 0}

    def test_memory_is_memory_and_rom_is_not_written(self, server: AccessServer) -> None:
        """What the guest stores the host sees and the other way round; no access of it is the bus's."""
        memory = server.memory
        server.store(RAM + 0x123, 4, 0xDEADBEEF)
        assert memory.read(RAM + 0x123, 4) == bytes.fromhex("efbeadde")
        memory.write(RAM + 0x1000, b"from the")
        assert server.load(RAM + 0x1000, 8).to_bytes(8, "little") == b"from the"
        assert server.unsupported == []
        memory.write(ROM, b"ROM says")
        server.store(ROM, 8, 0)
        assert server.load(ROM, 8).to_bytes(8, "little") == memory.read(ROM, 8) == b"ROM says"

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_ports_are_a_space_of_their_own(self, server: AccessServer, device: Recorder, size: int) -> None:
        """IN and OUT of each size; an unused port reads all ones."""
        self._needs_ports()
        server.port_out(PORT + 4, size, 0xA5A5_A5A5 & all_ones(size))
        assert server.port_in(PORT, size) == PATTERN & all_ones(size)
        assert device.log == [(4, size, 0xA5A5_A5A5 & all_ones(size)), (0, size, None)]
        assert server.port_in(PORT + 0x100, size) == all_ones(size)
        assert server.unsupported == []

    def _needs_ports(self) -> None:
        if not self.arch.has_ports:
            pytest.skip(f"{self.arch.name} has no I/O ports")

    def test_windows_come_and_go_while_the_guest_runs(self, server: AccessServer, device: Recorder) -> None:
        """As the BARs of a PCI function do."""
        for base in (NOWHERE, NOWHERE + 0x1_0000, NOWHERE):
            mapped = server.bus.place(base, Window(0x1000), device.handler, "moving")
            assert server.load(base + 8, 4) == PATTERN & all_ones(4)
            server.bus.remove(mapped)
            assert server.load(base + 8, 4) == all_ones(4)

    def test_a_doorbell_rings_once_for_each_store(self, server: AccessServer) -> None:
        """By its eventfd, not by ``write``, with ``fast_doorbells``; else by ``write`` alone. Also moved."""
        recorder = Recorder()
        fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        handler = recorder.handler._replace(doorbells=((_DOORBELL, fds[0]), (_MATCHED, fds[1])))
        try:
            for base in (NOWHERE, NOWHERE + 0x1_0000):
                mapped = server.bus.place(base, Window(0x1000), handler, "bell")
                self._ring(server, recorder, base, fds)
                server.bus.remove(mapped)
                server.store(base + _DOORBELL.offset, 4, 1)  # nobody is there any more
                assert (self._taken(fds[0]), recorder.log) == (0, [])
        finally:
            for fd in fds:
                os.close(fd)

    def _ring(self, server: AccessServer, recorder: Recorder, base: int, fds: list[int]) -> None:
        for value in range(10):
            server.store(base + _DOORBELL.offset, 4, value)
            server.store(base + _MATCHED.offset, 4, value)
        assert server.load(base + _DOORBELL.offset, 4) == PATTERN & all_ones(4)
        stores = [access for access in recorder.log if access[2] is not None]
        matched = [(_MATCHED.offset, 4, value) for value in range(10)]
        if server.guest.fast_doorbells:
            assert [self._taken(fd) for fd in fds] == [10, 1]
            assert stores == [access for access in matched if access[2] != _MATCHED.datamatch]
        else:
            assert [self._taken(fd) for fd in fds] == [0, 0]
            assert len(stores) == 20
        recorder.log.clear()

    @staticmethod
    def _taken(fd: int) -> int:
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0
