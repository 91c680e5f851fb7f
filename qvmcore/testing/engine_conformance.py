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

import pytest

from qvmcore.bus import AddressSpace, all_ones
from qvmcore.engine import GuestConfig
from qvmcore.errors import EngineError
from qvmcore.testing.access_server import WORDS, AccessServer, Order
from qvmcore.testing.engine_accesses import AccessContract
from qvmcore.testing.engine_interrupts import InterruptContract
from qvmcore.testing.engine_kit import DEVICE, NOWHERE, PATTERN, Recorder
from qvmcore.types import MmioHandler, Reason, Window


class EngineConformance(AccessContract, InterruptContract):
    """What holds for every engine: the two contracts, and the life of a guest."""

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
        assert server.load(DEVICE, 4) == PATTERN & all_ones(4)

    # ---- pause, registers, status --------------------------------------------------------------------

    def test_a_paused_guest_stands_still_and_goes_on(self, server: AccessServer) -> None:
        """Between two instructions: the counter and its register differ by one at the most."""
        server.begin(Order.SPIN)
        assert server.wait_counter(1)
        for _ in range(20):
            assert server.guest.pause(AccessServer.patience)
            count = server.counter
            (registers,) = server.guest.registers()
            assert registers[self.arch.counting] - count in (0, 1)
            # Long enough for a guest that runs on to get its turn on a busy host.
            time.sleep(0.003)
            assert server.counter == count
            assert server.guest.pause(AccessServer.patience)
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
            assert server.guest.pause(AccessServer.patience)
            line.pulse()
            server.guest.resume()
            assert server.wait_count(number, count)
        server.finish(line.pulse)

    def test_registers_have_their_names(self, server: AccessServer) -> None:
        """All of the architecture's; the program counter is inside the program."""
        server.begin(Order.SPIN)
        assert server.guest.pause(AccessServer.patience)
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
        assert made.guest.stop(AccessServer.patience)
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
        assert server.guest.stop(AccessServer.patience)
        counter = server.counter
        assert server.guest.stop(0.0)
        assert server.guest.stop(AccessServer.patience)
        assert server.counter == counter
        assert len(server.guest.registers()) == 1
        server.guest.close()
        server.guest.close()
        assert server.guest.stop(0.0)
        assert server.ends == []

    def test_what_was_never_started_stops_and_closes(self, made: AccessServer) -> None:
        """As when a vdev refuses to start."""
        assert made.guest.stop(AccessServer.patience)
        made.guest.close()
        made.guest.close()

    def test_interrupts_after_the_end_are_harmless(self, server: AccessServer) -> None:
        """A worker or a timer may be late."""
        edge, level = (server.guest.irq_line(intr) for intr in (self.arch.edge, self.arch.level))
        server.let_go()
        for end in (lambda: server.guest.stop(AccessServer.patience), server.guest.close):
            end()
            edge.pulse()
            level.set(True)
            level.set(False)
            server.guest.signal_msi(*self.arch.messages[0])

    def test_a_guest_that_ends_by_itself_says_so_once(self, server: AccessServer) -> None:
        """With the reason; stopping it afterwards succeeds."""
        server.begin(Order.END)
        assert server.ended.wait(AccessServer.patience)
        assert server.guest.stop(AccessServer.patience)
        assert [end.reason for end in server.ends] == [self.arch.end_reason]
        assert server.ends[0].message

    def test_a_hung_handler_does_not_hang_stop(self, server: AccessServer) -> None:
        """``stop`` and ``pause`` say False in time, and succeed once the handler is back."""
        entered, release = threading.Event(), threading.Event()

        def hang(_offset: int, _size: int) -> int:
            entered.set()
            release.wait(AccessServer.patience)
            return 0

        server.bus.place(NOWHERE, Window(4), MmioHandler(hang, lambda *_: None), "hung")
        server.begin(Order.LOAD, NOWHERE)
        try:
            assert entered.wait(AccessServer.patience)
            started = time.monotonic()
            assert not server.guest.pause(0.05)
            assert not server.guest.stop(0.05)
            assert time.monotonic() - started < AccessServer.patience / 2
        finally:
            server.let_go()
            release.set()
        assert server.guest.stop(AccessServer.patience)
        assert server.ends == []

    def test_an_exception_out_of_a_handler_ends_the_guest(
        self, server: AccessServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """With HOST_ERROR and what was raised; a vdev's own faults never get that far."""

        def broken(_offset: int, _size: int) -> int:
            raise RuntimeError("broken device")

        server.bus.place(NOWHERE, Window(4), MmioHandler(broken, lambda *_: None), "broken")
        server.begin(Order.LOAD, NOWHERE)
        assert server.ended.wait(AccessServer.patience)
        assert server.guest.stop(AccessServer.patience)
        assert [end.reason for end in server.ends] == [Reason.HOST_ERROR]
        assert "broken device" in server.ends[0].message
        assert "broken device" in caplog.text

    def test_a_handler_may_stop_the_guest(self, server: AccessServer) -> None:
        """From the vCPU thread, where ``stop`` cannot wait."""
        asked: list[bool] = []

        def stop(_offset: int, _size: int) -> int:
            asked.append(server.guest.stop(AccessServer.patience))
            return 0

        server.bus.place(NOWHERE, Window(4), MmioHandler(stop, lambda *_: None), "stopper")
        server._closing = True
        server.begin(Order.LOAD, NOWHERE)
        assert server.wait_for(lambda: bool(asked))
        assert server.guest.stop(AccessServer.patience)
        assert server.ends == []

    def test_the_words_of_the_block_are_at_their_place(self, server: AccessServer) -> None:
        """The kit itself: a load of the program's own memory."""
        assert server.load(WORDS, 8) == WORDS
