"""MSI-X with mask and pending bits (PCI 3.0, 6.8.2), INTx and its sharing (2.2.6)."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qvmcore.pci import spec
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.pci.intx import SharedLine
from qvmcore.testing.fakes import FakeIrq

VECTORS = 70  # more than one 64-bit word of pending bits
ADDRESS = 0x0802_0040


class Port:
    """Records messages and the INTx level."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, int]] = []
        self.levels: list[bool] = []
        self.pulses = 0

    def message(self, address: int, data: int) -> None:
        self.messages.append((address, data))

    def set_intx(self, level: bool) -> None:
        self.levels.append(level)

    def pulse_intx(self) -> None:
        self.pulses += 1

    def listen(self, fd: int, address: int, data: int) -> None: ...

    def listen_intx(self, fd: int, resample: int) -> None: ...


def connected(vectors: int = VECTORS, *, on: bool = True) -> tuple[PciInterrupts, Port]:
    """With all vectors programmed to ``(ADDRESS + 4 * n, n)`` and unmasked, and MSI-X enabled."""
    interrupts, port = PciInterrupts(vectors), Port()
    interrupts.connect(port)
    if on:
        for vector in range(vectors):
            base = 16 * vector
            for word, value in enumerate((ADDRESS + 4 * vector, 0, vector, 0)):
                interrupts.table_write(base + 4 * word, 4, value)
        interrupts.set_command(spec.COMMAND_BUS_MASTER)
        interrupts.set_control(spec.MSIX_ENABLE)
    return interrupts, port


def mask(interrupts: PciInterrupts, vector: int, masked: bool) -> None:
    interrupts.table_write(16 * vector + 12, 4, int(masked))


def pending(interrupts: PciInterrupts) -> int:
    words = range(0, (interrupts.vectors + 63) // 64 * 8, 4)
    return sum(interrupts.table_read(interrupts.pba_offset + at, 4) << 8 * at for at in words)


def test_6_8_2_an_unmasked_vector_sends_its_message() -> None:
    interrupts, port = connected()
    interrupts.table_write(16 * 5, 8, 0x12_3456_789F)  # 8 bytes: both halves; bits 1:0 are zero
    interrupts.signal(5)
    interrupts.signal(69)
    assert port.messages == [(0x12_3456_789C, 5), (ADDRESS + 4 * 69, 69)]
    assert pending(interrupts) == 0


def test_6_8_2_9_vectors_are_masked_at_first() -> None:
    interrupts, port = connected(on=False)
    interrupts.set_command(spec.COMMAND_BUS_MASTER)
    interrupts.set_control(spec.MSIX_ENABLE)
    interrupts.signal(0)
    assert (port.messages, pending(interrupts)) == ([], 1)


def test_6_8_3_4_a_masked_vector_is_pending_and_sent_once_when_unmasked() -> None:
    interrupts, port = connected()
    mask(interrupts, 65, True)
    interrupts.signal(65)
    interrupts.signal(65)
    assert (port.messages, pending(interrupts)) == ([], 1 << 65)
    interrupts.table_write(interrupts.pba_offset, 8, 0)
    mask(interrupts, 64, True)
    mask(interrupts, 64, False)
    assert pending(interrupts) == 1 << 65
    mask(interrupts, 65, False)
    assert (port.messages, pending(interrupts)) == ([(ADDRESS + 4 * 65, 65)], 0)


def test_6_8_2_3_the_function_mask_holds_all_vectors() -> None:
    interrupts, port = connected()
    interrupts.set_control(spec.MSIX_ENABLE | spec.MSIX_FUNCTION_MASK)
    mask(interrupts, 2, True)
    for vector in (1, 2, 3):
        interrupts.signal(vector)
    mask(interrupts, 3, False)
    assert (port.messages, pending(interrupts)) == ([], 0b1110)
    interrupts.set_control(spec.MSIX_ENABLE)
    assert ([data for _, data in port.messages], pending(interrupts)) == ([1, 3], 0b100)


def test_without_bus_master_messages_wait() -> None:
    interrupts, port = connected()
    interrupts.set_command(0)
    interrupts.signal(7)
    assert (port.messages, pending(interrupts)) == ([], 1 << 7)
    interrupts.set_command(spec.COMMAND_BUS_MASTER)
    assert [data for _, data in port.messages] == [7]


def test_a_disabled_msix_forgets_and_sends_nothing() -> None:
    interrupts, port = connected()
    mask(interrupts, 0, True)
    interrupts.signal(0)
    interrupts.set_control(0)
    interrupts.signal(1)
    mask(interrupts, 0, False)
    interrupts.set_control(spec.MSIX_ENABLE)
    assert (port.messages, pending(interrupts)) == ([], 0)


def test_a_vector_that_does_not_exist_is_none() -> None:
    interrupts, port = connected()
    for vector in (-1, VECTORS, 2047, 0xFFFF):
        interrupts.signal(vector)
    assert port.messages == []
    interrupts, port = connected(0)
    interrupts.signal(0)
    assert port.messages == []


def test_6_8_2_accesses_the_standard_does_not_define_do_nothing() -> None:
    interrupts, _ = connected()
    before = [interrupts.table_read(at, 4) for at in range(0, interrupts.bar_size, 4)]
    for at in range(interrupts.bar_size):
        for size in (1, 2, 4, 8):
            if size < 4 or at % size:
                interrupts.table_write(at, size, (1 << 64) - 1)
                assert interrupts.table_read(at, size) == 0
    interrupts.table_write(interrupts.pba_offset, 8, (1 << 64) - 1)
    interrupts.table_write(interrupts.bar_size - 8, 8, (1 << 64) - 1)
    assert [interrupts.table_read(at, 4) for at in range(0, interrupts.bar_size, 4)] == before


def test_the_bar_holds_table_and_pending_bits() -> None:
    sizes = {vectors: PciInterrupts(vectors).bar_size for vectors in (1, 255, 256, 2048)}
    assert sizes == {1: 0x1000, 255: 0x2000, 256: 0x2000, 2048: 0x10000}
    for vectors in (1, 63, 64, 65, 254, 255, 256, 2048):
        interrupts = PciInterrupts(vectors)
        assert interrupts.pba_offset + (vectors + 63) // 64 * 8 <= interrupts.bar_size
        assert interrupts.bar_size & (interrupts.bar_size - 1) == 0


def test_2_2_6_intx_is_the_or_of_its_sources() -> None:
    interrupts, port = connected(0, on=False)
    first, second = interrupts.line(0), interrupts.line(1)
    first.set(True)
    second.set(True)
    first.set(False)
    assert port.levels == [True]
    second.set(False)
    assert port.levels == [True, False]


def test_6_2_2_intx_disable_and_msix_silence_the_pin() -> None:
    interrupts, port = connected(1, on=False)
    interrupts.set_intx(True)
    interrupts.set_command(spec.COMMAND_INTX_DISABLE)
    interrupts.set_command(0)
    interrupts.set_control(spec.MSIX_ENABLE)
    interrupts.set_control(0)
    assert port.levels == [True, False, True, False, True]
    assert interrupts.level


def test_a_level_from_before_the_bus_is_not_lost() -> None:
    interrupts, port = PciInterrupts(0), Port()
    interrupts.set_intx(True)
    interrupts.connect(port)
    assert port.levels == [True]


def test_a_function_without_a_pin_has_no_intx() -> None:
    interrupts, port = PciInterrupts(0, intx=False), Port()
    interrupts.connect(port)
    interrupts.set_intx(True)
    interrupts.line(0).pulse()
    assert (port.levels, port.pulses) == ([], 0)


def test_a_line_is_a_message_or_intx_as_the_guest_wants() -> None:
    interrupts, port = connected(2)
    line = interrupts.line(1)
    line.pulse()
    line.set(True)
    line.set(True)
    line.set(False)
    line.set(True)
    assert ([data for _, data in port.messages], port.levels) == ([1, 1, 1], [])
    line.set(False)
    interrupts.set_control(0)
    line.pulse()
    line.set(True)
    line.pulse()  # the line is high: it signals anyway
    assert (port.pulses, port.levels, len(port.messages)) == (1, [True], 3)


def test_a_shared_line_is_high_while_anyone_drives_it() -> None:
    irq = FakeIrq()
    line, one, other = SharedLine(irq), object(), object()
    line.drive(one, True)
    line.drive(other, True)
    line.drive(one, True)
    line.drive(one, False)
    assert (irq.level, irq.rises) == (True, 1)
    line.pulse()
    assert irq.pulses == 0
    line.drive(other, False)
    line.drive(other, False)
    assert not irq.level
    line.pulse()
    assert irq.pulses == 1


class MsixModel(RuleBasedStateMachine):
    """Any sequence of signals and register writes against a plain model of 6.8.2."""

    few = st.integers(0, 4)

    @initialize()
    def start(self) -> None:
        self.real, self.port = connected(5)
        self.masked, self.held = [False] * 5, set[int]()
        self.enabled, self.function_mask, self.master = True, False, True
        self.sent: list[int] = []

    def deliver(self) -> None:
        if self.enabled and self.master and not self.function_mask:
            ready = sorted(vector for vector in self.held if not self.masked[vector])
            self.sent += ready
            self.held -= set(ready)

    @rule(vector=few)
    def signal(self, vector: int) -> None:
        self.real.signal(vector)
        if self.enabled:
            self.held.add(vector)
        self.deliver()

    @rule(vector=few, masked=st.booleans())
    def mask(self, vector: int, masked: bool) -> None:
        mask(self.real, vector, masked)
        self.masked[vector] = masked
        self.deliver()

    @rule(enable=st.booleans(), function_mask=st.booleans())
    def control(self, enable: bool, function_mask: bool) -> None:
        self.real.set_control(enable * spec.MSIX_ENABLE | function_mask * spec.MSIX_FUNCTION_MASK)
        self.enabled, self.function_mask = enable, function_mask
        if not enable:
            self.held.clear()
        self.deliver()

    @rule(master=st.booleans())
    def command(self, master: bool) -> None:
        self.real.set_command(master * spec.COMMAND_BUS_MASTER)
        self.master = master
        self.deliver()

    @invariant()
    def same(self) -> None:
        assert [data for _, data in self.port.messages] == self.sent
        assert pending(self.real) == sum(1 << vector for vector in self.held)


TestMsixModel = MsixModel.TestCase
