"""The packed ring, device side, over a driver of our own: every way a driver can be wrong (2.8)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qvmcore.errors import BadDescriptorChain, GuestMemoryError
from qvmcore.memory import GuestMemory
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.packed import PackedQueue, PackedRings

RAM, SIZE = 0x8000_0000, 8
EVENT_IDX, INDIRECT = 1 << spec.VIRTIO_F_EVENT_IDX, 1 << spec.VIRTIO_F_INDIRECT_DESC
NEXT, WRITE, IND = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT
AVAIL, USED = spec.VIRTQ_DESC_F_AVAIL, spec.VIRTQ_DESC_F_USED
ENABLE, DISABLE, DESC = 0, 1, 2


class Bench:
    """A driver and a device at the two ends of one ring."""

    def __init__(self, features: int = 0, size: int = SIZE, rom: bool = False) -> None:
        specs = [MemorySpec(RAM, 1 << 20), MemorySpec(0x1000, 0x1000, rom=rom)]
        self.memory = GuestMemory.allocate(specs)
        region = next(r for r in self.memory.regions if r.start == RAM)
        self.ram = GuestRam(self.memory, region.start, region.size)
        self.driver = PackedDriver(self.ram, size, features)
        self.interrupts = 0
        self.again = 0
        self.errors: list[BaseException] = []
        rings = PackedRings(self.memory, size, self.driver.desc, self.driver.avail, self.driver.used)
        calls = (self.interrupt, self.errors.append, self.more)
        self.queue = PackedQueue(3, rings, self.memory, features, *calls)

    def more(self) -> None:
        self.again += 1

    def interrupt(self) -> None:
        self.interrupts += 1

    def refused(self, match: str) -> None:
        """The next pop refuses with this message, reports it once, and the queue is dead."""
        with pytest.raises(BadDescriptorChain, match=match):
            self.queue.pop()
        assert len(self.errors) == 1
        assert self.queue.dead
        assert self.queue.pop() is None

    def chain(self, *rows: tuple[int, int, int]) -> None:
        """Descriptors from the next slot on as (address, length, flags), available, with ID 5."""
        for number, (address, length, flags) in enumerate(rows):
            self.driver.write_slot(number, address, length, 5, flags | AVAIL)

    def popped(self) -> Chain:
        chain = self.queue.pop()
        assert chain is not None
        return chain

    def serve(self) -> int:
        """Echo everything offered, then one notify, as the framework does."""
        served = 0
        for chain in self.queue:
            chain.write(chain.read())
            self.queue.push(chain)
            served += 1
        self.queue.notify()
        return served


def test_a_request_goes_there_and_back() -> None:
    bench = Bench()
    request = bench.driver.submit([b"abc", b"defgh"], [4, 100])
    chain = bench.popped()
    assert (chain.readable, chain.writable, chain.head) == (8, 104, request.head)
    assert chain.read() == b"abcdefgh"
    assert chain.write(b"0123456789") == 10
    bench.queue.push(chain)
    assert bench.queue.pop() is None
    assert bench.driver.reap() == [request]
    assert (request.length, request.result()[:12]) == (10, b"0123456789\0\0")


def test_2_8_4_a_used_descriptor_says_whether_anything_was_written() -> None:
    bench = Bench()
    bench.driver.submit([b"a"], [4])
    bench.driver.submit([b"b"], [4])
    bench.queue.push(bench.popped(), 3)
    bench.queue.push(bench.popped(), 0)
    _, length, ident, flags = bench.driver.read_slot(0)
    assert (length, ident, flags) == (3, 0, AVAIL | USED | WRITE)
    _, length, ident, flags = bench.driver.read_slot(2)
    assert (length, ident, flags) == (0, 1, AVAIL | USED)


# ---- wrap counters, 2.8.1 -------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, EVENT_IDX])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_2_8_1_the_wrap_counters_flip_together(size: int, features: int) -> None:
    bench = Bench(features, size=size)
    mark = bench.ram.mark()
    for number in range(7 * size + 3):
        pieces = [bytes([number + piece]) for piece in range(number % size)]
        request = bench.driver.submit(pieces, [size])
        assert bench.serve() == 1
        assert bench.driver.reap() == [request]
        assert request.result()[: len(pieces)] == b"".join(pieces)
        bench.ram.release(mark)
    assert bench.interrupts == bench.driver.notifications == 7 * size + 3


@pytest.mark.parametrize("flags", [0, AVAIL | USED, USED])
def test_2_8_15_a_descriptor_that_is_not_available_is_not_used(flags: int) -> None:
    bench = Bench()
    bench.driver.write_slot(0, RAM, 16, 0, flags)
    assert bench.queue.pop() is None
    assert bench.queue.pending == 0
    assert bench.driver.read_slot(0) == (RAM, 16, 0, flags)


@pytest.mark.parametrize("flags", [0, AVAIL, AVAIL | USED])
def test_2_8_15_in_the_second_round_the_bits_are_inverted(flags: int) -> None:
    bench = Bench(size=2)
    for _ in range(2):
        bench.driver.submit([b"x"])
    assert bench.serve() == 2
    bench.driver.write_slot(0, RAM, 16, 0, flags)
    assert bench.queue.pop() is None
    bench.driver.write_slot(0, RAM, 16, 0, USED)
    assert bench.popped().readable == 16


def test_2_8_15_the_rest_of_a_chain_must_be_available_too() -> None:
    bench = Bench()
    bench.chain((RAM, 16, NEXT))
    bench.refused("descriptor 1, inside a chain, is not available")


def test_2_8_15_used_descriptors_in_a_chain_are_refused() -> None:
    bench = Bench()
    bench.chain((RAM, 16, NEXT), (RAM, 16, USED))
    bench.refused("descriptor 1, inside a chain, is not available")


# ---- chains, 2.8.5 and 2.8.6 ------------------------------------------------------------------------


def test_2_8_6_the_id_is_that_of_the_last_descriptor() -> None:
    bench = Bench()
    bench.driver.write_slot(1, RAM, 4, 7, WRITE | AVAIL)
    bench.driver.write_slot(0, RAM, 4, 3, NEXT | AVAIL)
    chain = bench.popped()
    assert chain.head == 7
    bench.queue.push(chain, 4)
    assert bench.driver.read_slot(0)[1:] == (4, 7, AVAIL | USED | WRITE)
    assert bench.driver.read_slot(1)[3] == WRITE | AVAIL, "one used descriptor for the whole chain"


def test_2_8_17_readable_behind_writable_is_refused() -> None:
    bench = Bench()
    bench.chain((RAM, 16, WRITE | NEXT), (RAM + 64, 16, 0))
    bench.refused("device-readable descriptor behind a device-writable")


def test_2_8_17_a_ring_of_next_flags_ends() -> None:
    """CVE-2026-16457 is of this kind: a list without an end must not keep the device."""
    bench = Bench()
    bench.chain(*[(RAM, 16, NEXT)] * SIZE)
    bench.refused(f"chain longer than the {SIZE} free descriptors")


@pytest.mark.parametrize("done", [0, 3])
def test_2_8_17_next_flags_all_around_from_anywhere_end(done: int) -> None:
    bench = Bench()
    for _ in range(done):
        bench.driver.submit([b"x"])
        bench.serve()
    for number in range(SIZE):
        position = done + number
        mark = AVAIL if position < SIZE else USED
        bench.driver.write_slot(position % SIZE, RAM, 16, 0, NEXT | mark)
    bench.refused("chain longer than")


def test_2_8_17_a_chain_over_descriptors_in_flight_is_refused() -> None:
    bench = Bench()
    for _ in range(3):
        bench.driver.submit([b"x"])
        bench.popped()
    for number in range(SIZE):
        position = 3 + number
        bench.driver.write_slot(position % SIZE, RAM, 16, 0, NEXT | (AVAIL if position < SIZE else USED))
    bench.refused(f"chain longer than the {SIZE - 3} free descriptors")


def test_2_8_17_a_chain_into_descriptors_in_flight_is_refused_in_the_second_round_too() -> None:
    bench = Bench()
    for number in range(SIZE + 1):
        bench.driver.submit([b"x"])
        chain = bench.popped()
        if number < 3:
            bench.queue.push(chain)
            bench.driver.reap()
        bench.queue.notify()
    for slot in range(1, SIZE):
        bench.driver.write_slot(slot, RAM, 16, 0, NEXT | USED)
    bench.refused("descriptor 1: chain longer than the 2 free descriptors")


def test_2_8_17_offering_what_is_in_flight_is_refused() -> None:
    bench = Bench()
    for _ in range(SIZE):
        bench.driver.submit([b"x"])
        bench.popped()
    assert bench.queue.pop() is None
    bench.driver.write_slot(0, RAM, 16, 0, USED)
    assert bench.queue.pending == 0
    bench.queue.notify()
    bench.refused(f"offered while all {SIZE} descriptors are in flight")


def test_2_8_17_a_chain_as_long_as_the_queue_is_fine_also_across_the_end() -> None:
    bench = Bench()
    for begin in range(3):
        request = bench.driver.submit([b"ab"] * SIZE)
        chain = bench.popped()
        assert chain.readable == 2 * SIZE
        bench.queue.push(chain)
        assert bench.driver.reap() == [request]
        bench.driver.submit([b"x"])
        bench.queue.push(bench.popped())
        assert len(bench.driver.reap()) == 1
        assert bench.driver.filled == (begin + 1) * (SIZE + 1)


@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize(
    ("address", "length"),
    [
        (0, 1),
        (RAM - 1, 2),
        (RAM + (1 << 20) - 1, 2),
        (RAM, (1 << 20) + 1),
        (0xA000_0000, 4),
        ((1 << 64) - 1, 2),
        ((1 << 64) - 16, 0xFFFFFFFF),
        (0x1FFF, 2),
    ],
)
def test_2_8_buffers_outside_guest_memory_are_refused(address: int, length: int, flags: int) -> None:
    bench = Bench()
    bench.chain((address, length, flags))
    bench.refused("is not guest memory")


@pytest.mark.parametrize(
    ("address", "length"), [(RAM, 1), (RAM + (1 << 20) - 1, 1), (0x1000, 0x1000), (0x1FFF, 1)]
)
@pytest.mark.parametrize("flags", [0, WRITE])
def test_2_8_buffers_at_the_edges_of_memory_are_fine(address: int, length: int, flags: int) -> None:
    bench = Bench()
    bench.chain((address, length, flags))
    chain = bench.popped()
    assert chain.readable + chain.writable == length


def test_2_8_length_zero_is_skipped() -> None:
    bench = Bench()
    nowhere = (1 << 64) - 1
    bench.chain((0, 0, NEXT), (RAM, 3, NEXT), (nowhere, 0, WRITE | NEXT), (RAM, 5, WRITE))
    chain = bench.popped()
    assert (len(chain.readers), chain.readable, len(chain.writers), chain.writable) == (1, 3, 1, 5)


def test_2_8_5_total_length_over_2_32_is_refused() -> None:
    size = 1 << 30
    memory = GuestMemory.allocate([MemorySpec(RAM, size)])
    driver = PackedDriver(GuestRam(memory), 16)
    rings = PackedRings(memory, 16, driver.desc, driver.avail, driver.used)
    queue = PackedQueue(0, rings, memory, 0, lambda: None, lambda error: None, lambda: None)
    for index in range(4):
        driver.write_slot(index, RAM, size, 0, AVAIL | (NEXT if index < 3 else 0))
    chain = queue.pop()
    assert chain is not None
    assert chain.readable == 1 << 32
    for index in range(4, 9):
        driver.write_slot(index, RAM, size, 0, AVAIL | (NEXT if index < 8 else 0))
    with pytest.raises(BadDescriptorChain, match=r"exceeds 2\^32"):
        queue.pop()


def test_rom_is_readable_but_not_writable_by_the_device() -> None:
    bench = Bench(rom=True)
    bench.driver.write_slot(0, 0x1000, 16, 0, AVAIL)
    bench.driver.write_slot(1, 0x1F00, 16, 0, AVAIL | WRITE)
    assert bench.queue.pop() is not None
    bench.refused("read-only memory")


# ---- buffer IDs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ident", [SIZE, 0x7FFF, 0x8000, 0xFFFF])
def test_2_8_13_any_buffer_id_comes_back_as_it_was(ident: int) -> None:
    """It is the driver's own number: the device indexes nothing with it."""
    bench = Bench()
    bench.driver.write_slot(0, RAM, 4, ident, AVAIL | WRITE)
    assert bench.serve() == 1
    assert bench.driver.read_slot(0)[2] == ident


def test_2_8_13_an_id_offered_twice_comes_back_twice() -> None:
    bench = Bench()
    for slot in range(2):
        bench.driver.write_slot(slot, RAM, 4, 6, AVAIL | WRITE)
    assert bench.serve() == 2
    assert [element.id for element in bench.driver.used_elements()] == [6, 6]


def test_2_8_15_a_descriptor_changed_while_in_flight_changes_nothing() -> None:
    bench = Bench()
    bench.chain((RAM, 16, WRITE))
    chain = bench.popped()
    bench.driver.write_slot(0, 0xDEAD_0000, 0xFFFFFFFF, 1, WRITE | NEXT | AVAIL)
    assert chain.write(bytes(32)) == 16
    bench.queue.push(chain)
    assert bench.driver.read_slot(0)[1:] == (16, 5, AVAIL | USED | WRITE)


def test_a_buffer_on_the_ring_itself_is_the_drivers_own_harm() -> None:
    bench = Bench()
    bench.chain((bench.driver.desc, 16 * SIZE, WRITE))
    chain = bench.popped()
    chain.write(b"\xff" * chain.writable)
    bench.queue.push(chain)
    assert bench.queue.pop() is None
    assert not bench.errors


# ---- indirect descriptors, 2.8.7 --------------------------------------------------------------------


def test_2_8_7_an_indirect_chain() -> None:
    bench = Bench(INDIRECT)
    bench.driver.indirect = True
    for _ in range(2 * SIZE + 1):
        request = bench.driver.submit([b"ab", b"cd"], [8])
        assert bench.serve() == 1
        assert bench.driver.reap() == [request]
        assert request.result() == b"abcd\0\0\0\0"
    assert bench.driver.filled == 2 * SIZE + 1


def test_2_8_7_of_the_flags_in_a_table_only_write_counts_and_ids_do_not() -> None:
    bench = Bench(INDIRECT)
    noise = NEXT | IND | AVAIL | USED | 0x7000
    table = bench.driver.raw_table([(RAM, 5, noise & ~NEXT, 9), (RAM, 7, noise | WRITE, 9)])
    bench.chain((*table, IND | WRITE))
    chain = bench.popped()
    assert (chain.readable, chain.writable, chain.head) == (5, 7, 5)


def test_2_8_19_indirect_without_the_feature_is_refused() -> None:
    bench = Bench()
    bench.chain((*bench.driver.raw_table([(RAM, 5, 0, 0)]), IND))
    bench.refused("VIRTIO_F_INDIRECT_DESC was not negotiated")


def test_2_8_19_indirect_with_next_is_refused() -> None:
    bench = Bench(INDIRECT)
    table = bench.driver.raw_table([(RAM, 5, 0, 0)])
    bench.chain((*table, IND | NEXT), (*table, IND))
    bench.refused("NEXT set")


def test_2_8_5_indirect_behind_a_direct_one_is_refused() -> None:
    bench = Bench(INDIRECT)
    bench.chain((RAM, 3, NEXT), (*bench.driver.raw_table([(RAM, 5, 0, 0)]), IND))
    bench.refused("descriptor 1, inside a chain, is indirect")


@pytest.mark.parametrize("length", [0, 1, 15, 17, 31, 0xFFFFFFFF])
def test_2_8_7_table_length_must_be_a_multiple_of_16(length: int) -> None:
    bench = Bench(INDIRECT)
    address, _ = bench.driver.raw_table([(RAM, 5, 0, 0)] * 3)
    bench.chain((address, length, IND))
    bench.refused("not of 16-byte entries")


@pytest.mark.parametrize("address", [0, RAM + (1 << 20) - 16, (1 << 64) - 16])
def test_2_8_7_table_outside_guest_memory_is_refused(address: int) -> None:
    bench = Bench(INDIRECT)
    bench.chain((address, 32, IND))
    bench.refused("is not guest memory")


def test_2_8_7_an_unaligned_table_is_fine() -> None:
    bench = Bench(INDIRECT)
    address, _ = bench.driver.raw_table([(RAM, 5, 0, 0)] * 3)
    bench.memory.write(address + 3, bench.memory.read(address, 16))
    bench.chain((address + 3, 16, IND))
    assert bench.popped().readable == 5


@pytest.mark.parametrize("entries", [SIZE, SIZE + 1, 1024, 1025, 0x0FFFFFFF])
def test_2_8_17_a_table_may_be_longer_than_the_queue_but_not_than_1024(entries: int) -> None:
    """As Linux makes them: it looks at what the device takes, not at the size that a VMM gave the queue."""
    bench = Bench(INDIRECT)
    address, _ = bench.driver.raw_table([(RAM, 2, 0, 0)] * 1025)
    bench.chain((address, 16 * entries, IND))
    if entries <= 1024:
        assert bench.popped().readable == 2 * entries
    else:
        bench.refused(f"table of {entries} entries, more than 1024")


# ---- giving back ------------------------------------------------------------------------------------


def test_2_8_12_used_descriptors_are_written_in_the_order_of_completion() -> None:
    bench = Bench()
    first, second = bench.driver.submit([b"a"], [1]), bench.driver.submit([b"b", b"c"], [1])
    one, two = bench.popped(), bench.popped()
    bench.queue.push(two, 1)
    assert bench.driver.read_slot(0)[2] == two.head
    bench.queue.push(one)
    assert bench.driver.read_slot(3)[2] == one.head
    assert bench.driver.reap() == [second, first]
    assert (first.length, second.length) == (0, 1)


def test_more_written_than_writable_is_a_bug_of_the_device() -> None:
    bench = Bench()
    bench.driver.submit([b"a"], [4])
    chain = bench.popped()
    for written in (5, -1):
        with pytest.raises(ValueError, match="bytes written of 4 writable"):
            bench.queue.push(chain, written)


def test_a_chain_pushed_twice_is_a_bug_of_the_device() -> None:
    bench, other = Bench(), Bench()
    bench.driver.submit([b"a"])
    chain = bench.popped()
    with pytest.raises(ValueError, match="pushed twice, or elsewhere"):
        other.queue.push(chain)
    bench.queue.push(chain)
    with pytest.raises(ValueError, match="pushed twice"):
        bench.queue.push(chain)
    assert bench.driver.used_idx == 1


def test_a_dead_queue_is_silent() -> None:
    bench, next_life = Bench(), Bench()
    bench.driver.submit([b"a"], [4])
    bench.driver.submit([b"a"], [4])
    chain = bench.popped()
    bench.queue.kill()
    bench.queue.push(chain, 4)
    bench.queue.notify()
    bench.queue.unpop(chain)
    next_life.queue.push(chain, 4)
    assert bench.queue.pop() is None
    assert bench.queue.pending == 0
    assert not bench.queue.reached(bench.driver.position)
    assert (bench.driver.used_idx, next_life.driver.used_idx, bench.interrupts) == (0, 0, 0)


@pytest.mark.parametrize("before", [0, SIZE - 1])
def test_unpop_gives_the_same_chain_again_also_across_the_end(before: int) -> None:
    bench = Bench()
    for _ in range(before):
        bench.driver.submit([b"x"])
        bench.serve()
        bench.driver.reap()
    bench.driver.submit([b"fir", b"st"])
    bench.driver.submit([b"second"])
    chain = bench.popped()
    bench.queue.unpop(chain)
    with pytest.raises(ValueError, match="not the one popped last"):
        bench.queue.unpop(chain)
    with pytest.raises(ValueError, match="pushed twice, or elsewhere"):
        bench.queue.push(chain)
    assert bench.queue.pending == 2
    assert [c.read() for c in bench.queue] == [b"first", b"second"]
    assert bench.queue.pending == 0


def test_an_error_delivers_what_was_served_before() -> None:
    bench = Bench()
    good = bench.driver.submit([b"good"], [4])
    bench.driver.write_slot(2, 0, 1, 0, AVAIL)
    with pytest.raises(BadDescriptorChain):
        bench.serve()
    assert bench.driver.reap() == [good]
    assert bench.interrupts == 1


def test_a_driver_that_never_stops_offering_gets_a_queue_at_a_time() -> None:
    bench = Bench()
    bench.driver.submit([b"x"])
    served = 0
    for chain in bench.queue:
        served += 1
        bench.queue.push(chain)
        bench.driver.reap()
        bench.driver.add([b"x"])
        bench.driver.publish()
    # Each was all there was.
    assert (served, bench.again, bench.interrupts) == (SIZE, 0, SIZE)
    assert bench.queue.pop() is None
    bench.queue.notify()
    bench.queue.notify()
    assert (bench.again, bench.interrupts) == (1, SIZE)
    assert bench.serve() == 1
    assert bench.again == 1


@pytest.mark.parametrize(("batch", "told"), [(1, [1]), (2, [2]), (8, [8]), (20, [8, 16, 20])])
def test_2_8_the_driver_is_told_when_everything_is_back_and_of_parts_before(
    batch: int, told: list[int]
) -> None:
    bench = Bench(size=32)
    for _ in range(batch):
        bench.driver.submit([b"x"])
    when = []
    for number in range(1, batch + 1):
        chain, before = bench.popped(), bench.interrupts
        bench.queue.push(chain)
        when += [number] * (bench.interrupts - before)
    assert when == told
    bench.queue.notify()
    assert bench.interrupts == len(told)


def test_2_8_what_comes_back_late_is_told_together() -> None:
    """Of a device that serves elsewhere: it says itself, by notify(), when a batch of answers is complete."""
    bench = Bench()
    for _ in range(4):
        bench.driver.submit([b"x"])
    chains = [bench.popped() for _ in range(4)]
    for chain in chains[:3]:
        bench.queue.push(chain)
    assert bench.interrupts == 0
    bench.queue.notify()
    assert bench.interrupts == 1


# ---- the areas, 2.8.10.1 ------------------------------------------------------------------------------


@pytest.mark.parametrize(("desc", "driver", "device"), [(8, 0, 0), (0, 2, 0), (0, 0, 1), (1, 1, 1)])
def test_2_8_10_1_misaligned_areas_are_refused(desc: int, driver: int, device: int) -> None:
    memory = GuestMemory.allocate([MemorySpec(RAM, 1 << 16)])
    with pytest.raises(BadDescriptorChain, match="is not a multiple of"):
        PackedRings(memory, SIZE, RAM + desc, RAM + 0x1000 + driver, RAM + 0x2000 + device)


@pytest.mark.parametrize("area", [0, 1, 2])
def test_2_8_10_1_areas_outside_guest_memory_are_refused(area: int) -> None:
    memory = GuestMemory.allocate([MemorySpec(RAM, 1 << 16)])
    places = [RAM, RAM + 0x1000, RAM + 0x2000]
    for address in (0, RAM + (1 << 16), (1 << 64) - 16):
        places[area] = address
        with pytest.raises(GuestMemoryError):
            PackedRings(memory, SIZE, *places)


# ---- event suppression, 2.8.10 --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "flags", "interrupts"),
    [
        (0, ENABLE, 1), (0, DISABLE, 0), (0, DESC, 1), (0, 3, 1),
        (EVENT_IDX, ENABLE, 1), (EVENT_IDX, DISABLE, 0), (EVENT_IDX, 3, 1),
        (0, 0xFFFC | DISABLE, 0),
    ],
)  # fmt: skip
def test_2_8_10_the_flags(features: int, flags: int, interrupts: int) -> None:
    """One notification for all of notify(); the reserved value and bits suppress nothing."""
    bench = Bench(features)
    bench.driver.write_event(0x7777, flags)
    for _ in range(3):
        bench.driver.submit([b"x"])
    bench.serve()
    bench.queue.notify()
    assert bench.interrupts == interrupts


def inside(size: int, old: int, new: int, place: int) -> bool:
    """2.8.10 by the letter: is any of these descriptors the one asked for?"""
    names = [position % size | (0x8000 if position // size % 2 == 0 else 0) for position in range(old, new)]
    return place in names


@pytest.mark.parametrize("size", [1, 3, 4])
def test_2_8_10_a_descriptor_event_interrupts_exactly_when_it_is_among_the_new(size: int) -> None:
    """Every place in both rounds, every batch, from every position."""
    for start in range(2 * size):
        for batch in range(1, size + 1):
            for place in (wrap << 15 | offset for wrap in (0, 1) for offset in range(size)):
                bench = Bench(EVENT_IDX, size=size)
                bench.driver.set_no_interrupt(True)
                for _ in range(start):
                    bench.driver.submit([b"x"])
                    bench.serve()
                    bench.driver.used_elements()
                    bench.driver._free, bench.driver._ids = size, list(range(size))
                bench.driver.set_used_event(place)
                for _ in range(batch):
                    bench.driver.add([b"x"])
                bench.driver.publish()
                assert bench.serve() == batch
                assert bench.interrupts == inside(size, start, start + batch, place), (start, batch, place)


def test_2_8_10_a_place_inside_a_chain_counts_when_the_chain_is_used() -> None:
    bench = Bench(EVENT_IDX)
    bench.driver.set_used_event(0x8000 | 2)
    bench.driver.submit([b"a", b"b", b"c", b"d"])
    bench.serve()
    assert bench.interrupts == 1


@pytest.mark.parametrize("place", [SIZE, 0x7FFF, 0x8000 | SIZE, 0xFFFF])
def test_2_8_10_a_place_beyond_the_ring_is_the_drivers_own_harm(place: int) -> None:
    bench = Bench(EVENT_IDX)
    bench.driver.set_used_event(place)
    for _ in range(4 * SIZE):
        bench.driver.submit([b"x"])
        bench.serve()
        bench.driver.used_elements()
        bench.driver._free, bench.driver._ids = SIZE, list(range(SIZE))
    assert bench.interrupts <= 4 * SIZE
    assert not bench.errors


def test_2_8_10_notifications_are_off_while_serving_and_on_when_idle() -> None:
    bench = Bench()
    bench.driver.submit([b"x"])
    assert bench.driver.device_event == (0, ENABLE)
    bench.popped()
    assert bench.driver.device_event == (0, DISABLE)
    bench.driver.add([b"y"])
    assert bench.driver.kick() is False
    bench.popped()
    assert bench.queue.pop() is None
    assert bench.driver.device_event == (0, ENABLE)
    bench.driver.add([b"z"])
    assert bench.driver.kick() is True


def test_2_8_10_with_event_idx_the_next_descriptor_is_asked_for() -> None:
    bench = Bench(EVENT_IDX)
    assert bench.queue.pop() is None
    assert bench.driver.device_event == (0x8000, DESC)
    for _ in range(3):
        bench.driver.submit([b"x"])
    assert bench.driver.notifications == 1
    bench.serve()
    bench.driver.reap()
    assert bench.driver.device_event == (0x8003, DESC)
    for _ in range(SIZE):
        bench.driver.submit([b"x"])
    bench.serve()
    assert bench.driver.device_event == (3, DESC)
    assert bench.driver.notifications == 2


def test_2_8_10_a_chain_offered_while_arming_is_not_lost() -> None:
    """The driver publishes between the device's last look and its re-arm; it saw events off."""
    for features in (0, EVENT_IDX):
        bench = Bench(features)
        bench.driver.submit([b"x"])
        bench.popped()

        class Race:
            """Stands in for the fence: the moment after arming, before the second look."""

            def __init__(self, bench: Bench) -> None:
                self.bench, self.done = bench, False

            def __enter__(self) -> None:
                if not self.done:
                    self.done = True
                    self.bench.driver.add([b"late"])
                    self.bench.driver.publish()

            def __exit__(self, *error: object) -> None:
                pass

        bench.queue._fence = Race(bench)  # type: ignore[assignment]
        assert bench.popped().read() == b"late"
        assert bench.driver.device_event == ((0x8001, DESC) if features else (0, DISABLE))


def test_2_9_reached_is_offset_and_wrap_counter() -> None:
    bench = Bench(size=3)
    for _ in range(8):
        assert bench.queue.reached(bench.driver.position)
        bench.driver.submit([b"x"])
        assert not bench.queue.reached(bench.driver.position)
        bench.serve()
        bench.driver.reap()


@pytest.mark.parametrize("size", [1000, 1024])
def test_queues_of_the_largest_size_fill_and_empty(size: int) -> None:
    bench = Bench(EVENT_IDX, size=size)
    for _ in range(3):
        requests = [bench.driver.add([bytes([n & 255])]) for n in range(size - 7)]
        bench.driver.publish()
        assert bench.queue.pending == size - 7
        assert bench.serve() == size - 7
        assert bench.driver.reap() == requests
    request = bench.driver.submit([b"x"] * size)
    assert bench.popped().readable == size
    assert request.readable


# ---- a guest that changes its mind, between two loads ------------------------------------------------


class Racing:
    """Ring state that the guest changes as soon as it has been loaded once; counts the loads."""

    def __init__(self, cells: memoryview, change: Callable[[], None]) -> None:
        self.cells = cells
        self.change = change
        self.loads: list[int] = []

    def __getitem__(self, index: int) -> int:
        value: int = self.cells[index]
        self.loads.append(index)
        self.change()
        return value


@pytest.mark.parametrize("changed", [0, NEXT | AVAIL, IND | AVAIL, AVAIL, USED])
def test_the_flags_that_were_checked_are_the_flags_that_are_used(changed: int) -> None:
    bench = Bench()
    bench.chain((RAM, 16, WRITE))
    racing = Racing(bench.queue._flags, lambda: bench.driver.write_slot(0, RAM, 16, 5, changed))
    bench.queue._flags = racing  # type: ignore[assignment]
    chain = bench.popped()
    assert (chain.readable, chain.writable) == (0, 16)
    assert racing.loads == [0]


def test_a_descriptor_is_not_loaded_before_it_is_seen_to_be_available() -> None:
    """Its flags become right while the device looks: what was in it before must not count."""
    bench = Bench()
    bench.driver.write_slot(0, 0xDEAD_0000, 99, 0, AVAIL)
    racing = Racing(bench.queue._flags, lambda: bench.driver.write_slot(0, RAM, 16, 5, AVAIL))
    bench.queue._flags = racing  # type: ignore[assignment]
    chain = bench.popped()
    assert (chain.readable, chain.head) == (16, 5)


@pytest.mark.parametrize("flags", [ENABLE, DISABLE, DESC])
def test_the_driver_event_is_loaded_once(flags: int) -> None:
    bench = Bench(EVENT_IDX)
    bench.driver.write_event(0x8000, flags)
    racing = Racing(bench.queue._driver_event, lambda: bench.driver.write_event(7, (flags + 1) % 3))
    bench.queue._driver_event = racing  # type: ignore[assignment]
    bench.driver.submit([b"x"])
    bench.serve()
    assert racing.loads == [0]
    assert bench.interrupts == (flags != DISABLE)
