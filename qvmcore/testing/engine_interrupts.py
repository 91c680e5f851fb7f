"""The interrupts of a guest: an engine delivers each one that was raised, once, and no other."""

from __future__ import annotations

import os

import pytest

from qvmcore.errors import EngineError
from qvmcore.testing.access_server import INTERRUPTS, AccessServer, Order
from qvmcore.testing.engine_kit import EngineKit


class InterruptContract(EngineKit):
    """What holds for every engine's interrupts."""

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

    def test_pulses_before_the_guest_takes_them_may_become_one_interrupt(self, server: AccessServer) -> None:
        """An edge is pending or not, and an engine may deliver late; but one comes, and none is invented."""
        line = server.guest.irq_line(self.arch.edge)
        number = self.arch.enable(server, self.arch.edge, level=False)
        for _ in range(5):
            line.pulse()
        server.begin(Order.SPIN)
        assert server.wait_count(number, 1)
        server.finish()
        server.spin_a_while()
        assert 1 <= server.count(number) <= 5

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

    def test_an_eventfd_it_listens_to_is_one_interrupt_for_each_signal(self, server: AccessServer) -> None:
        """And none once it does not; an engine that cannot listen leaves the counts alone."""
        number = self.arch.enable_message(server, 0)
        server.begin(Order.SLEEP)
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            sent = 0
            for _ in range(5):
                stop = server.guest.listen(fd, *self.arch.messages[0])
                if stop is None:
                    break
                for _ in range(4):
                    os.eventfd_write(fd, 1)
                    sent += 1
                    assert server.wait_count(number, sent), f"signal {sent} was lost"
                stop()
                stop()
            os.eventfd_write(fd, 1)
            server.guest.signal_msi(*self.arch.messages[0])
            assert server.wait_count(number, sent + 1)
            assert os.eventfd_read(fd) == 1, "somebody took a count that is not his"
            assert server.count(number) == sent + 1
            for address, data in self.arch.foreign:
                assert server.guest.listen(fd, address, data) is None
        finally:
            os.close(fd)
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
