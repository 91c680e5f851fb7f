"""The in-flight regions: their layout, what a device finds in them, and what hostile clients put there."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qvm_vhost_user.inflight import QueueInflight, area_size, region_size

from qvmcore.api import BadDescriptorChain, Chain, ClientError, GuestError, GuestMemory, MemorySpec, Virtqueue
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam, RingDriver, SplitDriver
from qvmcore.virtio import spec
from qvmcore.virtio.queue_setup import QueueSetup

PACKED, INDIRECT = 1 << spec.VIRTIO_F_RING_PACKED, 1 << spec.VIRTIO_F_INDIRECT_DESC
SIZE = 8
SPLIT_HEADER, SPLIT_ENTRY = struct.Struct("=QHHHH"), struct.Struct("=B5xHQ")
PACKED_HEADER, PACKED_ENTRY = struct.Struct("=QHHHHHHBB10x"), struct.Struct("=BxHHHQHHIQ")


class Bench:
    """A driver, and devices that share an in-flight region."""

    def __init__(self, packed: bool, size: int = SIZE) -> None:
        self.packed = packed
        self.size = size
        self.features = INDIRECT | (PACKED if packed else 0)
        self.memory = GuestMemory.allocate([MemorySpec(0x8000_0000, 1 << 20)])
        self.driver: RingDriver = (PackedDriver if packed else SplitDriver)(
            GuestRam(self.memory), size, self.features
        )
        self.area = bytearray(region_size(size, packed=packed))
        self.errors: list[BaseException] = []

    def device(self, position: int | None = None, size: int | None = None) -> Virtqueue:
        setup = QueueSetup(self.size)
        setup.desc, setup.driver, setup.device = self.driver.desc, self.driver.avail, self.driver.used
        setup.enable(self.memory, self.features)
        account = QueueInflight(memoryview(self.area), packed=self.packed, size=size or self.size)
        calls: Any = (lambda: None, self.errors.append, lambda: None)
        return setup.make(0, self.memory, self.features, *calls, position=position, inflight=account)

    def take(self, queue: Virtqueue, count: int) -> list[Chain]:
        """Offer and pop so many chains of one, two, three, one ... buffers."""
        chains = []
        for number in range(count):
            self.driver.submit([b"x"] * (number % 3), [4])
            chain = queue.pop()
            assert chain is not None
            chains.append(chain)
        return chains

    @property
    def header(self) -> tuple[int, ...]:
        return (PACKED_HEADER if self.packed else SPLIT_HEADER).unpack_from(self.area)

    def entry(self, index: int) -> tuple[int, ...]:
        header, entry = (PACKED_HEADER, PACKED_ENTRY) if self.packed else (SPLIT_HEADER, SPLIT_ENTRY)
        return entry.unpack_from(self.area, header.size + entry.size * index)

    def set_header(self, **fields: int) -> None:
        names = ["features", "version", "number", "free", "old_free", "used", "old_used", "wrap", "old_wrap"]
        if not self.packed:
            names = ["features", "version", "number", "head", "used"]
        values = dict(zip(names, self.header, strict=True)) | fields
        (PACKED_HEADER if self.packed else SPLIT_HEADER).pack_into(self.area, 0, *values.values())


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def drain(bench: Bench, queue: Virtqueue) -> list[bytes]:
    """Pop everything and give it back; what was read."""
    data = []
    for chain in queue:
        data.append(chain.read())
        queue.push(chain)
    queue.notify()
    return data


# ---- layout ------------------------------------------------------------------------------------


def test_sizes() -> None:
    assert (SPLIT_HEADER.size, SPLIT_ENTRY.size, PACKED_HEADER.size, PACKED_ENTRY.size) == (16, 16, 32, 32)
    assert region_size(128, packed=False) == 16 + 128 * 16 + 48
    assert region_size(128, packed=True) == 32 + 128 * 32 + 32
    assert region_size(3, packed=True) == 128
    assert area_size(4, 128, packed=False) == 4 * region_size(128, packed=False)


def test_a_region_that_is_too_small_is_refused() -> None:
    for packed in (False, True):
        enough = 16 + 16 * SIZE if not packed else 32 + 32 * SIZE
        QueueInflight(memoryview(bytearray(enough)), packed=packed, size=SIZE)
        with pytest.raises(ClientError, match=f"{enough - 1} bytes for a queue of 8, expected {enough}"):
            QueueInflight(memoryview(bytearray(enough - 1)), packed=packed, size=SIZE)


def test_a_fresh_region_of_a_split_ring() -> None:
    bench = Bench(False)
    bench.device()
    assert bench.header == (0, 1, SIZE, 0, 0)
    assert all(bench.entry(index) == (0, 0, 0) for index in range(SIZE))


def test_a_fresh_region_of_a_packed_ring() -> None:
    bench = Bench(True)
    bench.device()
    assert bench.header == (0, 1, SIZE, 0, 0, 0, 0, 1, 1)
    assert [bench.entry(index)[1] for index in range(SIZE)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_fresh_region_of_a_ring_that_was_served_before() -> None:
    split = Bench(False)
    split.driver.avail_idx = split.driver.last_used = 0xFFFE  # type: ignore[attr-defined]
    split.driver.publish()
    split.driver.write16(split.driver.used + 2, 0xFFFE)
    queue = split.device(0xFFFE)
    assert split.header == (0, 1, SIZE, 0, 0xFFFE)
    for chain in split.take(queue, 3):
        queue.push(chain)
    assert split.header[4] == 1
    packed = Bench(True)
    packed.device(0x8003_8003)
    assert packed.header == (0, 1, SIZE, 0, 0, 3, 3, 1, 1)
    packed.area[:] = bytes(len(packed.area))
    packed.device(0x0003_0003)
    assert packed.header == (0, 1, SIZE, 0, 0, 3, 3, 0, 0)


def test_a_split_chain_from_pop_to_push() -> None:
    bench = Bench(False)
    queue = bench.device()
    one, two, three = bench.take(queue, 3)
    assert [bench.entry(chain.head) for chain in (one, two, three)] == [(1, 0, 0), (1, 0, 1), (1, 0, 2)]
    queue.push(two)
    assert bench.entry(two.head)[:2] == (0, 0)
    assert bench.header[3:] == (two.head, 1)
    queue.push(three)
    assert bench.entry(three.head)[:2] == (0, two.head)
    assert bench.header[3:] == (three.head, 2)
    assert bench.entry(one.head)[0] == 1


def test_a_packed_chain_from_pop_to_push() -> None:
    bench = Bench(True)
    queue = bench.device()
    one, two, three = bench.take(queue, 3)
    # One descriptor, two and three.
    assert bench.header[3:] == (6, 6, 0, 0, 1, 1)
    assert [bench.entry(first)[:5] for first in (0, 1, 3)] == [
        (1, 1, 0, 1, 0),
        (1, 2, 2, 2, 1),
        (1, 4, 5, 3, 2),
    ]
    for entry, slot in zip(range(6), range(6), strict=True):
        address, length, ident, flags = bench.driver.read_slot(slot)  # type: ignore[attr-defined]
        assert bench.entry(entry)[5:] == (ident, flags, length, address)
    queue.push(two)
    assert bench.entry(1)[0] == 0
    assert bench.entry(2)[1] == 6
    assert bench.header[3:] == (1, 1, 2, 2, 1, 1)
    queue.push(three)
    queue.push(one)
    assert bench.header[3:] == (0, 0, 6, 6, 1, 1)
    bench.driver.reap()
    for chain in bench.take(queue, 2):
        queue.push(chain)
    assert bench.header[5:] == (1, 1, 0, 0)


def test_an_unpopped_chain_is_not_in_flight(bench: Bench) -> None:
    queue = bench.device()
    _, two = bench.take(queue, 2)
    queue.unpop(two)
    assert sum(bench.entry(index)[0] for index in range(SIZE)) == 1
    assert len(drain(bench, bench.device())) == 2
    assert len(bench.driver.reap()) == 2


# ---- what a device finds ---------------------------------------------------------------------------


def test_the_position_is_that_of_the_region_not_of_the_client(bench: Bench) -> None:
    queue = bench.device()
    for chain in bench.take(queue, 3)[1:]:
        queue.push(chain)
    for position in (0, 0x8000_8000 if bench.packed else 2, None):
        again = bench.device(position)
        assert again.position == queue.position
        assert again.pending == 1
        assert again.in_hand == 0


@pytest.mark.parametrize("fields", [{"version": 7}, {"number": 4}, {"number": 9}])
def test_a_region_of_another_ring_without_chains_begins_anew(bench: Bench, fields: dict[str, int]) -> None:
    """A client that resets its driver may forget to clear it."""
    begin_anew(bench, fields)


def test_a_split_region_of_an_earlier_driver_without_chains_begins_anew() -> None:
    begin_anew(Bench(False), {"used": 0x4000})


def begin_anew(bench: Bench, fields: dict[str, int]) -> None:
    queue = bench.device()
    for chain in bench.take(queue, 2):
        queue.push(chain)
    bench.driver.reap()
    bench.set_header(**fields)
    queue = bench.device(queue.position)
    assert bench.header[1:3] == (1, SIZE)
    for chain in bench.take(queue, 3):
        queue.push(chain)
    assert len(bench.driver.reap()) == 3


@pytest.mark.parametrize("fields", [{"version": 7}, {"number": 4}, {"number": 9}, {"used": 0x4000}])
def test_a_region_of_another_ring_with_chains_is_refused(bench: Bench, fields: dict[str, int]) -> None:
    bench.take(bench.device(), 3)
    bench.set_header(**fields)
    with pytest.raises(GuestError, match="in-flight memory"):
        bench.device()


def test_a_packed_region_for_another_size_of_ring_is_refused() -> None:
    bench = Bench(True)
    bench.take(bench.device(), 1)
    bench.area += bytes(1024)
    with pytest.raises(GuestError, match="for 8 entries; the ring has 8"):
        bench.device(size=16)


# ---- hostile clients -------------------------------------------------------------------------------


def test_split_a_list_that_leaves_the_region_is_refused() -> None:
    bench = Bench(False)
    queue = bench.device()
    queue.push(bench.take(queue, 2)[0])
    bench.set_header(used=0, head=9)
    with pytest.raises(GuestError, match="names entry 9 of 8"):
        bench.device()


def test_split_a_list_in_a_circle_ends() -> None:
    bench = Bench(False)
    queue = bench.device()
    chains = bench.take(queue, 4)
    for chain in chains:
        queue.push(chain)
    SPLIT_ENTRY.pack_into(bench.area, 16 + 16 * 3, 1, 3, 0)
    bench.set_header(used=0, head=3)
    assert drain(bench, bench.device()) == []


@pytest.mark.parametrize("version", ["split", "packed"])
def test_a_counter_at_the_end_is_refused(version: str) -> None:
    bench = Bench(version == "packed")
    bench.take(bench.device(), 1)
    offset = 32 + 8 if bench.packed else 16 + 8
    head = next(index for index in range(SIZE) if bench.entry(index)[0])
    bench.area[offset + (32 if bench.packed else 16) * head + 7] = 0xFF
    with pytest.raises(GuestError, match="counts"):
        bench.device()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"free": 7, "old_free": 7}, "neither free nor in flight"),
        ({"free": 9, "old_free": 9}, "names entry 9"),
        ({"old_used": 8}, "used index 8"),
        ({"old_wrap": 2}, "wrap counter 2"),
    ],
)
def test_packed_a_header_that_makes_no_sense_is_refused(fields: dict[str, int], match: str) -> None:
    bench = Bench(True)
    bench.take(bench.device(), 3)
    bench.set_header(**fields)
    with pytest.raises(GuestError, match=match):
        bench.device()


@pytest.mark.parametrize(("field", "value"), [(1, 1), (1, 8), (2, 0), (2, 9), (3, 0), (3, 2), (3, 9)])
def test_packed_a_chain_that_makes_no_sense_is_refused(field: int, value: int) -> None:
    bench = Bench(True)
    bench.take(bench.device(), 3)
    row = list(bench.entry(3))
    row[field] = value
    PACKED_ENTRY.pack_into(bench.area, 32 + 32 * 3, *row)
    with pytest.raises(GuestError, match="in-flight memory"):
        bench.device()


def test_packed_descriptors_are_checked_when_they_are_served() -> None:
    bench = Bench(True)
    bench.take(bench.device(), 1)
    row = list(bench.entry(0))
    row[-1] = 1 << 60
    PACKED_ENTRY.pack_into(bench.area, 32, *row)
    queue = bench.device()
    with pytest.raises(BadDescriptorChain, match="is not guest memory"):
        queue.pop()
    assert len(bench.errors) == 1


def test_split_heads_are_checked_when_they_are_served() -> None:
    bench = Bench(False)
    bench.take(bench.device(), 1)
    bench.driver.write_desc(0, 1 << 60, 4)
    queue = bench.device()
    with pytest.raises(BadDescriptorChain, match="is not guest memory"):
        queue.pop()
    assert len(bench.errors) == 1


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pokes=st.lists(
        st.tuples(st.integers(0, 300), st.sampled_from((0, 1, 2, 3, 7, 8, 9, 128, 255))), max_size=12
    ),
    ring=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 255)), max_size=6),
    noise=st.binary(max_size=0) | st.binary(min_size=320, max_size=320),
    position=st.none() | st.integers(0, 0xFFFF_FFFF),
)
def test_any_region_is_refused_or_served(
    packed: bool,
    pokes: list[tuple[int, int]],
    ring: list[tuple[int, int]],
    noise: bytes,
    position: int | None,
) -> None:
    """Whatever is in it, and in the rings: a GuestError, or chains inside guest memory, and an end."""
    bench = Bench(packed)
    queue = bench.device()
    for chain in bench.take(queue, 4)[2:]:
        queue.push(chain)
    bench.driver.submit([b"more"])
    if noise:
        bench.area[16:] = noise[: len(bench.area) - 16]
    for offset, value in pokes:
        if offset < len(bench.area):
            bench.area[offset] = value
    for offset, value in ring:
        place = bench.driver.desc if packed else bench.driver.used
        bench.memory.write(place + offset % (16 * SIZE if packed else 6 + 8 * SIZE), bytes([value]))
    try:
        queue = bench.device(position)
        held = []
        for _ in range(4):
            taken = 0
            for chain in queue:
                taken += 1
                held.append(chain)
                if taken % 2:
                    queue.push(held.pop(0))
            assert taken <= 2 * SIZE
            queue.notify()
        queue.push_together([(chain, 0) for chain in held])
        assert queue.in_hand == 0
    except GuestError:
        pass
    bench.memory.close()
