"""The contract of an engine as a pytest class. An engine's author certifies it by subclassing::

    class TestMine(EngineConformance):
        engine = MyEngine()
        arch = Aarch64()        # from qvmcore.testing.guest_archs; or a GuestArch of one's own

Everything is done by a real guest, the program of :mod:`qvmcore.testing.access_server`. When the
engine says that it cannot run such a guest here, the tests are skipped with that reason. ``widest``
is the size of the largest access that reaches the bus in one piece; an engine that cuts larger ones
says so. The same suites that certify vdevs run through the vCPU of an engine with
:mod:`qvmcore.testing.engine_driven`.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest

from qvmcore.bus import AddressSpace, all_ones
from qvmcore.engine import Engine, GuestConfig
from qvmcore.errors import EngineError
from qvmcore.memory import MemoryRegion
from qvmcore.testing.access_server import INTERRUPTS, WORDS, AccessServer, Order
from qvmcore.testing.guest_archs import GuestArch
from qvmcore.types import Doorbell, MemorySpec, MmioHandler, Reason, Window

#: Where the tests put a device, guest-physical, and where nothing is.
DEVICE, NOWHERE = 0x1C0D_0000, 0x2000_0000
#: I/O port of a device on architectures that have ports.
PORT = 0x2F8
#: Guest memory beside the program's.
RAM, ROM = 0x8000_0000, 0x8800_0000
_PATTERN = 0x8877_6655_4433_2211
_DOORBELL = Doorbell(0x50, 4)
_MATCHED = Doorbell(0x60, 4, datamatch=7)
#: A bound for what should take no time; only a broken engine reaches it.
_LONG = 20.0


class Recorder:
    """A device that remembers its accesses, (offset, size, value or None), and reads as a pattern."""

    def __init__(self) -> None:
        self.log: list[tuple[int, int, int | None]] = []

    def read(self, offset: int, size: int) -> int:
        """Remember it."""
        self.log.append((offset, size, None))
        return _PATTERN >> 8 * (offset % 8) & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Remember it."""
        self.log.append((offset, size, value))

    @property
    def handler(self) -> MmioHandler:
        """What a window is bound to."""
        return MmioHandler(self.read, self.write)


class EngineConformance:
    """What holds for every engine."""

    engine: ClassVar[Engine]
    arch: ClassVar[GuestArch]
    widest: ClassVar[int] = 8

    @pytest.fixture(autouse=True)
    def _usable(self) -> None:
        reason = self.engine.unusable(self.arch.name)
        if reason:
            pytest.skip(f"engine {self.engine.name}: {reason}")

    @pytest.fixture
    def device(self) -> Recorder:
        """What answers at DEVICE, and at PORT where there are ports."""
        return Recorder()

    @pytest.fixture
    def made(self, device: Recorder) -> Iterator[AccessServer]:
        """A guest that was not started."""
        regions = [MemoryRegion(MemorySpec(RAM, 0x1_0000)), MemoryRegion(MemorySpec(ROM, 0x1_0000, rom=True))]
        server = AccessServer(self.engine, self.arch, regions=regions)
        server.bus.insert(DEVICE, Window(0x1000), device.handler, "recorder")
        if server.ports is not None:
            server.ports.insert(PORT, Window(8), device.handler, "recorder")
        yield server
        server.close()
        for region in regions:
            region.close()

    @pytest.fixture
    def server(self, made: AccessServer) -> AccessServer:
        """A guest that waits for orders."""
        return made.start()

    # ---- the engine ------------------------------------------------------------------------------

    def test_it_says_what_it_cannot_run(self) -> None:
        """``unusable`` gives a reason, and ``create_guest`` raises it."""
        reason = self.engine.unusable("no-such-architecture")
        assert reason and "\n" not in reason
        assert self.engine.name == self.engine.name.strip().lower()
        with AccessServer(self.engine, self.arch) as server:
            config = GuestConfig("no-such-architecture", 1, server.memory, AddressSpace(), (), server._on_end)
            with pytest.raises(EngineError):
                self.engine.create_guest(config)

    def test_many_lives_leave_neither_descriptor_nor_thread(self) -> None:
        """``close`` gives back what ``create_guest`` and ``start`` took."""
        self._one_life()  # what is loaded once stays
        gc.collect()
        before, threads = os.listdir("/proc/self/fd"), set(threading.enumerate())
        for _ in range(5):
            self._one_life()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= len(before)
        assert {thread for thread in threading.enumerate() if thread.is_alive()} <= threads

    def _one_life(self) -> None:
        with AccessServer(self.engine, self.arch) as server:
            server.guest.irq_line(self.arch.edge).pulse()
            assert server.load(NOWHERE, 4) == all_ones(4)

    def test_two_guests_at_once_share_nothing(self, server: AccessServer, device: Recorder) -> None:
        """Neither bus nor memory nor registers."""
        other_device = Recorder()
        with AccessServer(self.engine, self.arch) as other:
            other.bus.insert(DEVICE, Window(0x1000), other_device.handler, "other")
            server.begin(Order.SPIN)
            other.store(DEVICE, 4, 1)
            server.finish()
            server.store(DEVICE, 4, 2)
            assert other.counter == 0 < server.counter
        assert (device.log, other_device.log) == ([(0, 4, 2)], [(0, 4, 1)])
        assert server.load(DEVICE, 4) == _PATTERN & all_ones(4)

    # ---- accesses --------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    def test_an_access_reaches_the_bus_with_its_offset_size_and_value(
        self, server: AccessServer, device: Recorder, size: int
    ) -> None:
        """Loads and stores, once each."""
        for offset in (0, 0x18, 0x1000 - size):
            expected = all_ones(size)
            device.log.clear()
            value = _PATTERN >> 8 * (offset % 8) & expected
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
        assert server.port_in(PORT, size) == _PATTERN & all_ones(size)
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
            assert server.load(base + 8, 4) == _PATTERN & all_ones(4)
            server.bus.remove(mapped)
            assert server.load(base + 8, 4) == all_ones(4)

    # ---- doorbells ---------------------------------------------------------------------------------

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
        assert server.load(base + _DOORBELL.offset, 4) == _PATTERN & all_ones(4)
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

    # ---- interrupts --------------------------------------------------------------------------------

    @pytest.mark.parametrize("order", [Order.SPIN, Order.SLEEP])
    def test_each_pulse_of_an_edge_line_is_one_interrupt(self, server: AccessServer, order: Order) -> None:
        """Of a guest that computes and of one that sleeps."""
        line = server.guest.irq_line(self.arch.edge)
        number = self.arch.enable(server, self.arch.edge, level=False)
        server.begin(order)
        for count in range(1, 51):
            line.pulse()
            assert server.wait_count(number, count), f"interrupt {count} was lost"
        assert server.count(number) == 50
        server.finish(line.pulse)

    def test_pulses_before_the_guest_takes_them_are_one_interrupt(self, server: AccessServer) -> None:
        """An edge is pending or not; nothing is lost of it."""
        line = server.guest.irq_line(self.arch.edge)
        number = self.arch.enable(server, self.arch.edge, level=False)
        for _ in range(5):
            line.pulse()
        server.begin(Order.SPIN)
        assert server.wait_count(number, 1)
        server.finish()
        server.spin_a_while()
        assert server.count(number) == 1

    def test_a_level_line_interrupts_until_it_is_lowered(self, server: AccessServer) -> None:
        """And is silent afterwards."""
        line = server.guest.irq_line(self.arch.level)
        number = self.arch.enable(server, self.arch.level, level=True)
        server.begin(Order.SPIN)
        for _ in range(2):
            before = server.count(number)
            line.set(True)
            line.set(True)
            assert server.wait_count(number, before + 5)
            line.set(False)
            server.finish()
            server.spin_a_while()  # one that was pending may still come
            after = server.count(number)
            server.spin_a_while()
            assert server.count(number) == after
            server.begin(Order.SPIN)
        server.finish()

    def test_a_line_no_controller_has_is_refused(self, made: AccessServer) -> None:
        """By an error that says so."""
        with pytest.raises(EngineError, match=str(self.arch.unknown)):
            made.guest.irq_line(self.arch.unknown)

    def test_each_message_is_one_interrupt(self, server: AccessServer) -> None:
        """Of a sleeping guest."""
        numbers = [self.arch.enable_message(server, index) for index in range(len(self.arch.messages))]
        server.begin(Order.SLEEP)
        for count in range(1, 21):
            for message, number in zip(self.arch.messages, numbers, strict=True):
                server.guest.signal_msi(*message)
                assert server.wait_count(number, count), f"message {message} was lost"
        assert [server.count(number) for number in numbers] == [20] * len(numbers)
        server.finish(lambda: server.guest.signal_msi(*self.arch.messages[0]))

    def test_a_message_to_elsewhere_is_dropped(self, server: AccessServer) -> None:
        """Whatever the guest told a device to write where: nothing happens, nothing raises."""
        for index in range(len(self.arch.messages)):
            self.arch.enable_message(server, index)
        self.arch.enable(server, self.arch.edge, level=False)
        before = [server.count(number) for number in range(INTERRUPTS)]
        for address, data in (*self.arch.foreign, (0, 0), ((1 << 64) - 4, (1 << 32) - 1)):
            server.guest.signal_msi(address, data)
        server.spin_a_while()
        assert [server.count(number) for number in range(INTERRUPTS)] == before
        assert server.ends == []

    # ---- pause, registers, status --------------------------------------------------------------------

    def test_a_paused_guest_stands_still_and_goes_on(self, server: AccessServer) -> None:
        """Between two instructions: the counter and its register differ by one at the most."""
        server.begin(Order.SPIN)
        assert server.wait_counter(1)
        for _ in range(20):
            assert server.guest.pause(_LONG)
            count = server.counter
            (registers,) = server.guest.registers()
            assert registers[self.arch.counting] - count in (0, 1)
            assert server.counter == count
            assert server.guest.pause(_LONG)
            server.guest.resume()
            server.guest.resume()
            assert server.wait_counter(count + 1)
        server.finish()
        assert server.load(DEVICE, 1) == 0x11

    def test_a_sleeping_guest_is_paused_and_sleeps_on(self, server: AccessServer) -> None:
        """And an interrupt during the pause is not lost."""
        line = server.guest.irq_line(self.arch.edge)
        number = self.arch.enable(server, self.arch.edge, level=False)
        server.begin(Order.SLEEP)
        for count in range(1, 6):
            assert server.guest.pause(_LONG)
            line.pulse()
            server.guest.resume()
            assert server.wait_count(number, count)
        server.finish(line.pulse)

    def test_registers_have_their_names(self, server: AccessServer) -> None:
        """All of the architecture's; the program counter is inside the program."""
        server.begin(Order.SPIN)
        assert server.guest.pause(_LONG)
        (registers,) = server.guest.registers()
        assert self.arch.registers <= set(registers)
        assert all(isinstance(value, int) and value >= 0 for value in registers.values())
        program = server.arch.entry().pc
        assert program <= registers[self.arch.pc] < program + len(self.arch.code())
        server.guest.resume()
        server.finish()

    def test_status_is_json_at_any_time(self, made: AccessServer) -> None:
        """Before the start, during the run, after the end."""
        json.dumps(dict(made.guest.status()))
        made.start()
        made.begin(Order.SPIN)
        json.dumps(dict(made.guest.status()))
        made.finish()
        made.let_go()
        assert made.guest.stop(_LONG)
        json.dumps(dict(made.guest.status()))
        made.guest.close()
        json.dumps(dict(made.guest.status()))

    # ---- start, stop, end ----------------------------------------------------------------------------

    def test_it_starts_once(self, server: AccessServer) -> None:
        """A second start is refused."""
        with pytest.raises(EngineError):
            server.guest.start(self.arch.entry())

    def test_an_entry_with_an_unknown_register_is_refused(self, made: AccessServer) -> None:
        """Before any vCPU runs."""
        entry = self.arch.entry()
        with pytest.raises(EngineError):
            made.guest.start(type(entry)(entry.pc, {**entry.registers, "no-such-register": 1}, entry.mode))

    @pytest.mark.parametrize("order", [Order.SPIN, Order.SLEEP])
    def test_stop_is_idempotent_and_no_end(self, server: AccessServer, order: Order) -> None:
        """It stops a guest that computes or sleeps; ``on_end`` is for a guest that ends by itself."""
        server.begin(order)
        assert server.guest.stop(_LONG)
        counter = server.counter
        assert server.guest.stop(0.0)
        assert server.guest.stop(_LONG)
        assert server.counter == counter
        assert len(server.guest.registers()) == 1
        server.guest.close()
        server.guest.close()
        assert server.guest.stop(0.0)
        assert server.ends == []

    def test_what_was_never_started_stops_and_closes(self, made: AccessServer) -> None:
        """As when a vdev refuses to start."""
        assert made.guest.stop(_LONG)
        made.guest.close()
        made.guest.close()

    def test_interrupts_after_the_end_are_harmless(self, server: AccessServer) -> None:
        """A worker or a timer may be late."""
        edge, level = (server.guest.irq_line(intr) for intr in (self.arch.edge, self.arch.level))
        server.let_go()
        for end in (lambda: server.guest.stop(_LONG), server.guest.close):
            end()
            edge.pulse()
            level.set(True)
            level.set(False)
            server.guest.signal_msi(*self.arch.messages[0])

    def test_a_guest_that_ends_by_itself_says_so_once(self, server: AccessServer) -> None:
        """With the reason; stopping it afterwards succeeds."""
        server.begin(Order.END)
        assert server.ended.wait(_LONG)
        assert server.guest.stop(_LONG)
        assert [end.reason for end in server.ends] == [self.arch.end_reason]
        assert server.ends[0].message

    def test_a_hung_handler_does_not_hang_stop(self, server: AccessServer) -> None:
        """``stop`` and ``pause`` say False in time, and succeed once the handler is back."""
        entered, release = threading.Event(), threading.Event()

        def hang(_offset: int, _size: int) -> int:
            entered.set()
            release.wait(_LONG)
            return 0

        server.bus.place(NOWHERE, Window(4), MmioHandler(hang, lambda *_: None), "hung")
        server.begin(Order.LOAD, NOWHERE)
        try:
            assert entered.wait(_LONG)
            started = time.monotonic()
            assert not server.guest.pause(0.05)
            assert not server.guest.stop(0.05)
            assert time.monotonic() - started < _LONG / 2
        finally:
            server.let_go()
            release.set()
        assert server.guest.stop(_LONG)
        assert server.ends == []

    def test_an_exception_out_of_a_handler_ends_the_guest(
        self, server: AccessServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """With HOST_ERROR and what was raised; a vdev's own faults never get that far."""

        def broken(_offset: int, _size: int) -> int:
            raise RuntimeError("broken device")

        server.bus.place(NOWHERE, Window(4), MmioHandler(broken, lambda *_: None), "broken")
        server.begin(Order.LOAD, NOWHERE)
        assert server.ended.wait(_LONG)
        assert server.guest.stop(_LONG)
        assert [end.reason for end in server.ends] == [Reason.HOST_ERROR]
        assert "broken device" in server.ends[0].message
        assert "broken device" in caplog.text

    def test_a_handler_may_stop_the_guest(self, server: AccessServer) -> None:
        """From the vCPU thread, where ``stop`` cannot wait."""
        asked: list[bool] = []

        def stop(_offset: int, _size: int) -> int:
            asked.append(server.guest.stop(_LONG))
            return 0

        server.bus.place(NOWHERE, Window(4), MmioHandler(stop, lambda *_: None), "stopper")
        server._closing = True
        server.begin(Order.LOAD, NOWHERE)
        assert server.wait_for(lambda: bool(asked))
        assert server.guest.stop(_LONG)
        assert server.ends == []

    def test_the_words_of_the_block_are_at_their_place(self, server: AccessServer) -> None:
        """The kit itself: a load of the program's own memory."""
        assert server.load(WORDS, 8) == WORDS
