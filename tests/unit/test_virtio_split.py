"""The split ring, device side, over a driver of our own: every way a driver can be wrong (2.7)."""

from __future__ import annotations

import pytest

from qvmcore.errors import BadDescriptorChain, GuestMemoryError
from qvmcore.memory import GuestMemory
from qvmcore.testing.ring import GuestRam, SplitDriver
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.split import SplitQueue, SplitRings

RAM, SIZE = 0x8000_0000, 8
EVENT_IDX, INDIRECT = 1 << spec.VIRTIO_F_EVENT_IDX, 1 << spec.VIRTIO_F_INDIRECT_DESC
NEXT, WRITE, IND = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT


class Bench:
    """A driver and a device at the two ends of one ring."""

    def __init__(self, features: int = 0, size: int = SIZE, rom: bool = False) -> None:
        specs = [MemorySpec(RAM, 1 << 20), MemorySpec(0x1000, 0x1000, rom=rom)]
        self.memory = GuestMemory.allocate(specs)
        region = next(r for r in self.memory.regions if r.start == RAM)
        self.ram = GuestRam(self.memory, region.start, region.size)
        self.driver = SplitDriver(self.ram, size, features)
        self.interrupts = 0
        self.again = 0
        self.errors: list[BaseException] = []
        rings = SplitRings(self.memory, size, self.driver.desc, self.driver.avail, self.driver.used)
        calls = (self.interrupt, self.errors.append, self.more)
        self.queue = SplitQueue(3, rings, self.memory, features, *calls)

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

    def chain(self, *rows: tuple[int, int, int, int]) -> None:
        """Descriptors from 0 on as (address, length, flags, next), head 0, published."""
        for index, row in enumerate(rows):
            self.driver.write_desc(index, *row)
        self.driver.offer(0)
        self.driver.publish()

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
    chain = bench.queue.pop()
    assert chain is not None
    assert (chain.readable, chain.writable, chain.head) == (8, 104, request.head)
    assert chain.read(2) == b"ab"
    assert chain.read() == b"cdefgh"
    assert chain.write(b"0123456789") == 10
    bench.queue.push(chain)
    assert bench.queue.pop() is None
    assert bench.driver.reap() == [request]
    assert (request.length, request.result()[:12]) == (10, b"0123456789\0\0")


def test_the_views_are_guest_memory() -> None:
    bench = Bench()
    request = bench.driver.submit([b"abc"], [4, 2])
    chain = bench.queue.pop()
    assert chain is not None
    chain.writers[0][1:3] = b"xy"
    assert request.result() == b"\0xy\0\0\0"
    assert bytes(chain.readers[0]) == b"abc"


# ---- the descriptor table, 2.7.5 ----------------------------------------------------------------


def test_2_7_4_2_readable_behind_writable_is_refused() -> None:
    bench = Bench()
    bench.chain((RAM, 16, WRITE | NEXT, 1), (RAM + 64, 16, 0, 0))
    bench.refused("device-readable descriptor behind a device-writable")


@pytest.mark.parametrize("length", [1, 2, 3, SIZE])
def test_2_7_5_2_a_loop_is_refused(length: int) -> None:
    bench = Bench()
    bench.chain(*[(RAM, 16, NEXT, (index + 1) % length) for index in range(length)])
    bench.refused("longer than 1024 descriptors")


def test_2_7_5_2_a_chain_as_long_as_the_queue_is_fine() -> None:
    bench = Bench()
    rows = [(RAM, 16, NEXT if i < SIZE - 1 else 0, i + 1) for i in range(SIZE)]
    bench.chain(*rows)
    chain = bench.queue.pop()
    assert chain is not None
    assert chain.readable == 16 * SIZE


@pytest.mark.parametrize("following", [SIZE, SIZE + 1, 0x7FFF, 0xFFFF])
def test_2_7_5_next_out_of_range_is_refused(following: int) -> None:
    bench = Bench()
    bench.chain((RAM, 16, NEXT, following))
    bench.refused(f"descriptor index {following} is beyond")


def test_2_7_5_next_without_the_flag_means_nothing() -> None:
    bench = Bench()
    bench.chain((RAM, 16, 0, 0xFFFF))
    assert bench.queue.pop() is not None


@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize(
    ("address", "length"),
    [
        (0, 1),  # below all memory
        (RAM - 1, 2),  # begins in the hole
        (RAM + (1 << 20) - 1, 2),  # ends past the end
        (RAM, (1 << 20) + 1),  # longer than memory
        (0xA000_0000, 4),  # in a hole, where device registers may be
        ((1 << 64) - 1, 2),  # wraps 64 bits
        ((1 << 64) - 16, 0xFFFFFFFF),
        (0x1FFF, 2),  # leaves the small region
    ],
)
def test_2_7_5_buffers_outside_guest_memory_are_refused(address: int, length: int, flags: int) -> None:
    bench = Bench()
    bench.chain((address, length, flags, 0))
    bench.refused("is not guest memory")


@pytest.mark.parametrize(
    ("address", "length"), [(RAM, 1), (RAM + (1 << 20) - 1, 1), (0x1000, 0x1000), (0x1FFF, 1)]
)
def test_2_7_5_buffers_at_the_edges_of_memory_are_fine(address: int, length: int) -> None:
    bench = Bench()
    bench.chain((address, length, 0, 0))
    chain = bench.queue.pop()
    assert chain is not None
    assert chain.readable == length == len(chain.readers[0])


def test_2_7_5_length_zero_is_skipped() -> None:
    bench = Bench()
    nowhere = (1 << 64) - 1
    bench.chain((0, 0, NEXT, 1), (RAM, 3, NEXT, 2), (nowhere, 0, WRITE | NEXT, 3), (RAM, 5, WRITE, 0))
    chain = bench.queue.pop()
    assert chain is not None
    assert (len(chain.readers), chain.readable, len(chain.writers), chain.writable) == (1, 3, 1, 5)


def test_2_7_5_a_chain_of_nothing_comes_back() -> None:
    bench = Bench()
    bench.chain((0, 0, 0, 0))
    assert bench.serve() == 1
    assert bench.driver.used_elements() == [(0, 0)]


def test_2_7_5_2_total_length_over_2_32_is_refused() -> None:
    size = 1 << 30
    memory = GuestMemory.allocate([MemorySpec(RAM, size)])
    driver = SplitDriver(GuestRam(memory), 8)
    errors: list[BaseException] = []
    rings = SplitRings(memory, 8, driver.desc, driver.avail, driver.used)
    queue = SplitQueue(0, rings, memory, 0, lambda: None, errors.append, lambda: None)
    for index in range(4):
        driver.write_desc(index, RAM, size, NEXT if index < 3 else 0, index + 1)
    driver.offer(0)
    driver.publish()
    chain = queue.pop()
    assert chain is not None
    assert chain.readable == 1 << 32
    driver.write_desc(3, RAM, size, NEXT, 4)
    driver.write_desc(4, RAM, 1, 0, 0)
    driver.offer(0)
    driver.publish()
    with pytest.raises(BadDescriptorChain, match=r"exceeds 2\^32"):
        queue.pop()
    assert len(errors) == 1


def test_rom_is_readable_but_not_writable_by_the_device() -> None:
    bench = Bench(rom=True)
    bench.chain((0x1000, 16, 0, 0))
    assert bench.queue.pop() is not None
    bench.chain((0x1F00, 16, WRITE, 0))
    bench.refused("read-only memory")


def test_a_buffer_on_the_ring_itself_is_the_drivers_own_harm() -> None:
    bench = Bench()
    bench.chain((bench.driver.used, 6 + 8 * SIZE, WRITE, 0))
    chain = bench.queue.pop()
    assert chain is not None
    chain.write(b"\xff" * chain.writable)
    bench.queue.push(chain)
    assert bench.driver.used_idx == 1
    assert not bench.errors


def test_a_descriptor_changed_while_in_flight_changes_nothing() -> None:
    bench = Bench()
    bench.chain((RAM, 16, WRITE, 0))
    chain = bench.queue.pop()
    assert chain is not None
    bench.driver.write_desc(0, 0xDEAD_0000, 0xFFFFFFFF, WRITE | NEXT, 0)
    assert chain.write(bytes(32)) == 16
    bench.queue.push(chain)
    assert bench.driver.used_elements() == [(0, 16)]


# ---- indirect descriptors, 2.7.5.3 ---------------------------------------------------------------


def test_2_7_5_3_an_indirect_chain() -> None:
    bench = Bench(INDIRECT)
    bench.driver.indirect = True
    request = bench.driver.submit([b"ab", b"cd"], [8])
    assert bench.serve() == 1
    assert bench.driver.reap() == [request]
    assert request.result() == b"abcd\0\0\0\0"


def test_2_7_5_3_2_the_write_flag_of_the_reference_is_ignored() -> None:
    bench = Bench(INDIRECT)
    bench.chain((*bench.driver.raw_table([(RAM, 5, 0, 0)]), IND | WRITE, 0))
    chain = bench.queue.pop()
    assert chain is not None
    assert (chain.readable, chain.writable) == (5, 0)


def test_2_7_5_3_2_normal_descriptors_may_precede_the_indirect_one() -> None:
    bench = Bench(INDIRECT)
    table = bench.driver.raw_table([(RAM, 5, NEXT, 1), (RAM, 7, WRITE, 0)])
    bench.chain((RAM, 3, NEXT, 1), (*table, IND, 0))
    chain = bench.queue.pop()
    assert chain is not None
    assert (chain.readable, chain.writable) == (8, 7)


def test_2_7_5_3_1_indirect_without_the_feature_is_refused() -> None:
    bench = Bench()
    bench.chain((*bench.driver.raw_table([(RAM, 5, 0, 0)]), IND, 0))
    bench.refused("VIRTIO_F_INDIRECT_DESC was not negotiated")


def test_2_7_5_3_1_nested_indirect_is_refused() -> None:
    bench = Bench(INDIRECT)
    inner = bench.driver.raw_table([(RAM, 5, 0, 0)])
    bench.chain((*bench.driver.raw_table([(*inner, IND, 0)]), IND, 0))
    bench.refused("inside an indirect table")


def test_2_7_5_3_1_indirect_with_next_is_refused_so_two_in_a_chain_are_too() -> None:
    bench = Bench(INDIRECT)
    table = bench.driver.raw_table([(RAM, 5, 0, 0)])
    bench.chain((*table, IND | NEXT, 1), (*table, IND, 0))
    bench.refused("NEXT set")


@pytest.mark.parametrize("length", [0, 1, 15, 17, 31])
def test_2_7_5_3_table_length_must_be_a_multiple_of_16(length: int) -> None:
    bench = Bench(INDIRECT)
    address, _ = bench.driver.raw_table([(RAM, 5, 0, 0)] * 3)
    bench.chain((address, length, IND, 0))
    bench.refused("not of 16-byte entries")


@pytest.mark.parametrize("address", [0, RAM + (1 << 20) - 16, (1 << 64) - 16])
def test_2_7_5_3_table_outside_guest_memory_is_refused(address: int) -> None:
    bench = Bench(INDIRECT)
    bench.chain((address, 32, IND, 0))
    bench.refused("is not guest memory")


def test_2_7_5_3_an_unaligned_table_is_fine() -> None:
    bench = Bench(INDIRECT)
    address, _ = bench.driver.raw_table([(RAM, 5, 0, 0)] * 3)
    table = bench.memory.read(address, 16)
    bench.memory.write(address + 3, table)
    bench.chain((address + 3, 16, IND, 0))
    chain = bench.queue.pop()
    assert chain is not None
    assert chain.readable == 5


def test_2_7_5_3_next_beyond_the_table_is_refused() -> None:
    bench = Bench(INDIRECT)
    bench.chain((*bench.driver.raw_table([(RAM, 5, NEXT, 2), (RAM, 5, 0, 0)]), IND, 0))
    bench.refused("beyond the 2 of its table")


@pytest.mark.parametrize("entries", [SIZE, SIZE + 1, 1024, 1025])
def test_2_7_5_3_1_a_table_may_be_longer_than_the_queue_but_not_than_1024(entries: int) -> None:
    """As Linux makes them: it looks at what the device takes, not at the size that a VMM gave the queue."""
    bench = Bench(INDIRECT)
    rows = [(RAM, 2, NEXT if i < entries - 1 else 0, i + 1) for i in range(entries)]
    bench.chain((*bench.driver.raw_table(rows), IND, 0))
    if entries <= 1024:
        chain = bench.queue.pop()
        assert chain is not None
        assert chain.readable == 2 * entries
    else:
        bench.refused("longer than 1024 descriptors")


def test_2_7_5_3_a_big_table_with_a_short_chain_is_fine() -> None:
    bench = Bench(INDIRECT)
    rows = [(RAM, 2, NEXT, 99), *[(0, 0, 0, 0)] * 98, (RAM, 2, 0, 0)]
    bench.chain((*bench.driver.raw_table(rows), IND, 0))
    assert bench.queue.pop() is not None


def test_2_7_5_3_a_loop_inside_the_table_is_refused() -> None:
    bench = Bench(INDIRECT)
    bench.chain((*bench.driver.raw_table([(RAM, 5, NEXT, 1), (RAM, 5, NEXT, 0)]), IND, 0))
    bench.refused("longer than 1024 descriptors")


def test_2_7_4_2_order_of_directions_holds_across_the_table() -> None:
    bench = Bench(INDIRECT)
    bench.chain((RAM, 3, NEXT | WRITE, 1), (*bench.driver.raw_table([(RAM, 5, 0, 0)]), IND, 0))
    bench.refused("device-readable descriptor behind")


# ---- the available ring, 2.7.6 -------------------------------------------------------------------


@pytest.mark.parametrize("head", [SIZE, 0xFFFF, 0x8000])
def test_2_7_6_a_head_out_of_range_is_refused(head: int) -> None:
    bench = Bench()
    bench.driver.offer(head)
    bench.driver.publish()
    bench.refused(f"descriptor index {head}")


@pytest.mark.parametrize("jump", [SIZE + 1, 0x8000, 0xFFFF])
def test_2_7_13_3_1_avail_idx_jump_is_refused(jump: int) -> None:
    bench = Bench()
    bench.driver.publish(jump)
    bench.refused(f"{jump} chains offered")


def test_2_7_6_1_avail_idx_going_back_is_refused() -> None:
    bench = Bench()
    bench.driver.submit([b"a"])
    bench.driver.submit([b"b"])
    assert bench.serve() == 2
    bench.driver.publish(1)
    bench.refused("65535 chains offered")


def test_2_7_6_a_full_ring_in_one_step_is_fine() -> None:
    bench = Bench()
    for _ in range(SIZE):
        bench.driver.add([b"x"])
    bench.driver.publish()
    assert bench.queue.pending == SIZE
    assert bench.serve() == SIZE
    assert len(bench.driver.reap()) == SIZE


def test_2_7_6_more_in_flight_than_descriptors_is_refused() -> None:
    bench = Bench()
    bench.driver.write_desc(0, RAM, 4, 0, 0)
    for _ in range(SIZE):
        bench.driver.offer(0)
        bench.driver.publish()
        assert bench.queue.pop() is not None
    bench.driver.offer(0)
    bench.driver.publish()
    bench.refused(f"1 chains offered with {SIZE} in flight")


def test_a_head_offered_twice_comes_back_twice() -> None:
    bench = Bench()
    bench.driver.write_desc(2, RAM, 4, WRITE, 0)
    bench.driver.offer(2)
    bench.driver.offer(2)
    bench.driver.publish()
    assert bench.serve() == 2
    assert [element.id for element in bench.driver.used_elements()] == [2, 2]


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_indices_wrap_at_65536(features: int) -> None:
    bench = Bench(features, size=4)
    mark = bench.ram.mark()
    for number in range(65536 + 10):
        data = number.to_bytes(4, "little")
        request = bench.driver.submit([data], [4])
        assert bench.serve() == 1
        assert bench.driver.reap() == [request]
        assert request.result() == data
        bench.ram.release(mark)
    assert bench.queue.counters()["popped"] == 65546
    assert bench.driver.used_idx == 10
    assert bench.interrupts == 65546
    assert bench.driver.notifications == 65546


# ---- the used ring, 2.7.8 ------------------------------------------------------------------------


def test_pushes_may_come_in_any_order() -> None:
    bench = Bench()
    first, second = bench.driver.submit([b"a"], [1]), bench.driver.submit([b"b"], [1])
    one, two = bench.queue.pop(), bench.queue.pop()
    assert one is not None
    assert two is not None
    bench.queue.push(two, 1)
    bench.queue.push(one)
    assert bench.driver.reap() == [second, first]
    assert (first.length, second.length) == (0, 1)


def test_2_7_8_2_more_written_than_writable_is_a_bug_of_the_device() -> None:
    bench = Bench()
    bench.driver.submit([b"a"], [4])
    chain = bench.queue.pop()
    assert chain is not None
    for written in (5, -1):
        with pytest.raises(ValueError, match="bytes written of 4 writable"):
            bench.queue.push(chain, written)


def test_a_chain_pushed_twice_is_a_bug_of_the_device() -> None:
    bench, other = Bench(), Bench()
    bench.driver.submit([b"a"])
    chain = bench.queue.pop()
    assert chain is not None
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
    chain = bench.queue.pop()
    assert chain is not None
    bench.queue.kill()
    bench.queue.push(chain, 4)
    bench.queue.notify()
    bench.queue.unpop(chain)
    next_life.queue.push(chain, 4)
    assert bench.queue.pop() is None
    assert bench.queue.pending == 0
    assert (bench.driver.used_idx, next_life.driver.used_idx, bench.interrupts) == (0, 0, 0)


def test_the_used_ring_written_by_the_guest_does_not_matter() -> None:
    bench = Bench()
    bench.driver.submit([b"a"])
    bench.memory.write(bench.driver.used, b"\xff" * (6 + 8 * SIZE))
    assert bench.serve() == 1
    assert bench.driver.used_idx == 1


def test_unpop_gives_the_same_chain_again() -> None:
    bench = Bench()
    bench.driver.submit([b"first"])
    bench.driver.submit([b"second"])
    chain = bench.queue.pop()
    assert chain is not None
    bench.queue.unpop(chain)
    with pytest.raises(ValueError, match="not the one popped last"):
        bench.queue.unpop(chain)
    with pytest.raises(ValueError, match="pushed twice, or elsewhere"):
        bench.queue.push(chain)
    assert [c.read() for c in bench.queue] == [b"first", b"second"]


def test_only_the_newest_chain_can_be_unpopped_whatever_the_guest_writes() -> None:
    bench = Bench()
    bench.driver.submit([b"first"])
    bench.driver.submit([b"second"])
    one, two = bench.queue.pop(), bench.queue.pop()
    assert one is not None
    assert two is not None
    bench.memory.write(bench.driver.avail + 4, bytes(2 * SIZE))
    with pytest.raises(ValueError, match="not the one popped last"):
        bench.queue.unpop(one)
    bench.queue.unpop(two)


def test_an_error_delivers_what_was_served_before() -> None:
    bench = Bench()
    good = bench.driver.submit([b"good"], [4])
    bench.driver.offer(SIZE)
    bench.driver.publish()
    with pytest.raises(BadDescriptorChain):
        bench.serve()
    assert bench.driver.reap() == [good]
    assert bench.interrupts == 1


# ---- the areas, 2.7 ------------------------------------------------------------------------------


@pytest.mark.parametrize(("desc", "driver", "device"), [(8, 0, 0), (0, 1, 0), (0, 0, 2), (1, 1, 1)])
def test_2_7_misaligned_areas_are_refused(desc: int, driver: int, device: int) -> None:
    memory = GuestMemory.allocate([MemorySpec(RAM, 1 << 16)])
    with pytest.raises(BadDescriptorChain, match="is not a multiple of"):
        SplitRings(memory, SIZE, RAM + desc, RAM + 0x1000 + driver, RAM + 0x2000 + device)


@pytest.mark.parametrize("area", [0, 1, 2])
def test_2_7_areas_outside_guest_memory_are_refused(area: int) -> None:
    memory = GuestMemory.allocate([MemorySpec(RAM, 1 << 16)])
    places = [RAM, RAM + 0x1000, RAM + 0x2000]
    for address in (0, RAM + (1 << 16) - 4, (1 << 64) - 16):
        places[area] = address & ~15
        with pytest.raises(GuestMemoryError):
            SplitRings(memory, SIZE, *places)


# ---- notification suppression, 2.7.7 and 2.7.10 -----------------------------------------------------


def test_2_7_7_2_one_interrupt_per_notify_without_event_idx() -> None:
    bench = Bench()
    for _ in range(3):
        bench.driver.submit([b"x"])
    bench.serve()
    assert bench.interrupts == 1
    bench.queue.notify()
    assert bench.interrupts == 1


def test_2_7_7_2_no_interrupt_flag_suppresses_and_used_event_is_ignored() -> None:
    bench = Bench()
    bench.driver.set_no_interrupt(True)
    bench.driver.set_used_event(0)
    bench.driver.submit([b"x"])
    bench.serve()
    assert bench.interrupts == 0
    bench.driver.set_no_interrupt(False)
    bench.driver.set_used_event(0x7777)
    bench.driver.submit([b"x"])
    bench.serve()
    assert bench.interrupts == 1


def test_2_7_7_2_with_event_idx_the_flag_is_ignored() -> None:
    bench = Bench(EVENT_IDX)
    bench.driver.set_no_interrupt(True)
    bench.driver.submit([b"x"])
    bench.serve()
    assert bench.interrupts == 1


@pytest.mark.parametrize(
    ("event", "batch", "interrupts"),
    [(0, 1, 1), (0, 4, 1), (3, 4, 1), (3, 3, 0), (4, 4, 0), (0xFFFF, 8, 0), (7, 8, 1), (0x8000, 8, 0)],
)
def test_2_7_7_2_used_event_inside_the_batch_interrupts_once(event: int, batch: int, interrupts: int) -> None:
    bench = Bench(EVENT_IDX)
    bench.driver.set_used_event(event)
    for _ in range(batch):
        bench.driver.add([b"x"])
    bench.driver.publish()
    bench.serve()
    assert bench.interrupts == interrupts


@pytest.mark.parametrize(
    ("event", "interrupts"), [(65533, 0), (65534, 1), (65535, 1), (0, 1), (1, 1), (2, 0)]
)
def test_2_7_7_2_used_event_across_the_wrap(event: int, interrupts: int) -> None:
    bench = Bench(EVENT_IDX, size=8)
    bench.driver.write_desc(0, RAM, 4, 0, 0)
    bench.driver.set_used_event(0)
    for _ in range(65534):
        bench.driver.offer(0)
        bench.driver.publish()
        chain = bench.queue.pop()
        assert chain is not None
        bench.queue.push(chain)
        bench.queue.notify()
    assert bench.interrupts == 1
    bench.driver.set_used_event(event)
    for _ in range(4):  # elements 65534, 65535, 0, 1
        bench.driver.offer(0)
    bench.driver.publish()
    assert bench.serve() == 4
    assert bench.interrupts == 1 + interrupts


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_a_driver_that_never_stops_offering_gets_a_queue_at_a_time(features: int) -> None:
    bench = Bench(features)
    bench.driver.write_desc(0, RAM, 4, 0, 0)
    bench.driver.offer(0)
    bench.driver.publish()
    served = 0
    for chain in bench.queue:
        served += 1
        bench.queue.push(chain)
        bench.driver.offer(0)
        bench.driver.publish()
    # Each was a batch of its own; with EVENT_IDX this driver asked for the first only.
    told = 1 if features else SIZE
    assert (served, bench.again, bench.interrupts) == (SIZE, 0, told)
    assert bench.queue.pop() is None
    bench.queue.notify()
    bench.queue.notify()
    assert (bench.again, bench.interrupts) == (1, told)
    assert bench.serve() == 1
    bench.queue.notify()
    assert bench.again == 1


@pytest.mark.parametrize(
    ("batch", "told"),
    [(1, [1]), (2, [2]), (7, [7]), (8, [2, 4, 6, 8]), (16, [4, 8, 12, 16]), (18, [5, 10, 15])],
)
def test_2_7_8_the_driver_is_told_of_a_batch_before_the_device_looks_for_more(
    batch: int, told: list[int]
) -> None:
    """Of a large one in four parts: it goes on with the first while the others are served."""
    bench = Bench(size=32)
    for _ in range(batch):
        bench.driver.submit([b"x"])
    when = []
    for number in range(1, batch + 1):
        chain = bench.queue.pop()
        assert chain is not None
        before = bench.interrupts
        bench.queue.push(chain)
        when += [number] * (bench.interrupts - before)
    assert when == told
    bench.queue.notify()
    assert bench.interrupts == len(told) + (batch not in told), (
        "what was left is told at the end, nothing twice"
    )


def test_2_7_7_2_the_driver_is_not_told_of_a_part_it_does_not_want() -> None:
    bench = Bench(EVENT_IDX, size=32)
    for _ in range(16):
        bench.driver.submit([b"x"])
    bench.driver.set_used_event(9)
    assert bench.serve() == 16
    assert bench.interrupts == 1


def test_the_device_comes_back_for_a_chain_given_back_at_the_limit() -> None:
    bench = Bench()
    for _ in range(SIZE):
        bench.driver.submit([b"x"])
    chains = [bench.queue.pop() for _ in range(SIZE)]
    last = chains[-1]
    assert last is not None
    bench.queue.unpop(last)
    assert bench.queue.pop() is not None
    assert bench.queue.pop() is None
    bench.queue.notify()
    assert bench.again == 0


def test_2_7_10_2_notifications_are_off_while_serving_and_on_when_idle() -> None:
    bench = Bench()
    bench.driver.submit([b"x"])
    assert bench.driver.used_flags == 0
    assert bench.queue.pop() is not None
    assert bench.driver.used_flags == spec.VIRTQ_USED_F_NO_NOTIFY
    bench.driver.add([b"y"])
    assert bench.driver.kick() is False
    assert bench.queue.pop() is not None
    assert bench.queue.pop() is None
    assert bench.driver.used_flags == 0
    bench.driver.add([b"z"])
    assert bench.driver.kick() is True


def test_2_7_10_2_avail_event_is_written_when_idle_and_flags_stay_zero() -> None:
    bench = Bench(EVENT_IDX)
    for _ in range(3):
        bench.driver.submit([b"x"])
    assert bench.driver.notifications == 1  # the device asked for entry 0 only
    assert bench.queue.pop() is not None
    assert bench.driver.used_flags == 0
    assert bench.driver.avail_event == 0
    bench.serve()
    assert bench.driver.avail_event == 3
    assert bench.driver.used_flags == 0
    bench.driver.submit([b"x"])
    bench.driver.submit([b"x"])
    assert bench.driver.notifications == 2


def test_2_7_10_a_chain_offered_while_arming_is_not_lost() -> None:
    """The driver publishes between the device's last look and its re-arm; it saw NO_NOTIFY."""
    for features in (0, EVENT_IDX):
        bench = Bench(features)
        bench.driver.submit([b"x"])
        assert bench.queue.pop() is not None

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
        chain = bench.queue.pop()
        assert chain is not None
        assert chain.read() == b"late"
        assert bench.driver.used_flags == (0 if features else spec.VIRTQ_USED_F_NO_NOTIFY)
