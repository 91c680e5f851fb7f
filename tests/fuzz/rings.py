"""Targets for the two ends of a request: the rings, and the parser of a disk's requests."""

from __future__ import annotations

import struct
from functools import cache

from qvmcore.errors import BadDescriptorChain
from qvmcore.memory import GuestMemory
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.queue_setup import QueueSetup
from tests.fuzz.bytesource import ByteSource

START, SIZE = 0x8000_0000, 8
RAM = MemorySpec(START, 0x1_0000)
ROM = MemorySpec(0x1000, 0x1000, rom=True)
#: Ring areas; buffers may lie anywhere, on them too.
DESC, DRIVER, DEVICE = START, START + 0x400, START + 0x800
INDIRECT = START + 0x2000
_IN_ORDER = 1 << spec.VIRTIO_F_IN_ORDER
RING_FEATURES = (
    0, 1 << spec.VIRTIO_F_EVENT_IDX, 1 << spec.VIRTIO_F_INDIRECT_DESC, 3 << 28,
    _IN_ORDER, _IN_ORDER | 3 << 28,
)  # fmt: skip
_ROM_CONTENT = b"\xc3" * ROM.size


@cache
def _memory() -> GuestMemory:
    return GuestMemory.allocate([RAM, ROM])


def _fresh() -> GuestMemory:
    """The memory as on the first day; made once, because mapping it costs more than a run."""
    memory = _memory()
    memory.view(RAM.start, RAM.size)[:] = bytes(RAM.size)
    memory.view(ROM.start, ROM.size)[:] = _ROM_CONTENT
    return memory


def _queue(memory: GuestMemory, size: int, features: int, errors: list[BaseException]) -> Virtqueue:
    """The queue a device gets for these features."""
    setup = QueueSetup(SIZE)
    setup.size, setup.desc, setup.driver, setup.device = size, DESC, DRIVER, DEVICE
    setup.enable(memory, features)
    return setup.make(0, memory, features, lambda: None, errors.append, lambda: None)


def split(data: bytes) -> None:
    """Any contents of a split ring, changed at any time: a chain inside memory, or one refusal."""
    source = ByteSource(data)
    memory = _fresh()
    errors: list[BaseException] = []
    queue = _queue(memory, SIZE, source.pick(RING_FEATURES), errors)
    published = 0
    held: list[Chain] = []
    while source:
        action = source.byte() % 8
        if action < 3:
            base = INDIRECT if source.byte() & 1 else DESC
            row = _descriptor(source) + struct.pack("<HH", source.byte(), source.byte() % (2 * SIZE))
            memory.write(base + 16 * (source.byte() % SIZE), row)
        elif action == 3:
            entry = source.byte() % SIZE if source.byte() & 3 else source.value(2)
            memory.write(DRIVER + 4 + 2 * (published % SIZE), entry.to_bytes(2, "little"))
            published = published + 1 & 0xFFFF
            memory.write(DRIVER + 2, published.to_bytes(2, "little"))
        elif action == 4:
            published = source.value(2)
            memory.write(DRIVER + 2, published.to_bytes(2, "little"))
        elif action == 5:
            memory.write(DRIVER + source.byte() % 24, source.take(4))
        else:
            _serve(queue, held, source, errors)
    _serve(queue, held, source, errors)
    assert memory.view(ROM.start, ROM.size) == _ROM_CONTENT, "read-only memory was written"


def packed(data: bytes) -> None:
    """The same for a packed ring, of any size: descriptors appear anywhere, with any flags."""
    source = ByteSource(data)
    memory = _fresh()
    size = source.pick((SIZE, SIZE, 5, 1))
    errors: list[BaseException] = []
    queue = _queue(memory, size, source.pick(RING_FEATURES) | 1 << spec.VIRTIO_F_RING_PACKED, errors)
    filled = 0
    held: list[Chain] = []
    while source:
        action = source.byte() % 8
        if action < 4:
            # What a driver in step would mark as available; rarely, anything.
            marks = (0x80, 0x8000)[filled // size & 1] if source.byte() & 15 else source.uint(2)
            flags = source.byte() & 7 | marks
            row = _descriptor(source) + struct.pack("<HH", source.byte() % SIZE, flags)
            memory.write(DESC + 16 * (filled % size), row)
            filled += 1
        elif action == 4:
            row = _descriptor(source) + struct.pack("<HH", source.byte(), source.value(2))
            memory.write((INDIRECT if source.byte() & 1 else DESC) + 16 * (source.byte() % SIZE), row)
        elif action == 5:
            memory.write(DRIVER, source.take(4))
        else:
            _serve(queue, held, source, errors)
    _serve(queue, held, source, errors)
    assert memory.view(ROM.start, ROM.size) == _ROM_CONTENT, "read-only memory was written"


def _descriptor(source: ByteSource) -> bytes:
    """Address and length: in memory, an indirect table, read-only memory, or anywhere."""
    where = source.byte()
    match where & 3:
        case 0:
            address = START + source.uint(2)
        case 1:
            address = INDIRECT
        case 2:
            address = ROM.start + 8
        case _:
            address = source.value(8)
    match where >> 2 & 3:
        case 0:
            length = source.byte()
        case 1:
            length = 16 * (1 + source.byte() % 10)
        case 2:
            length = 0xFFFF
        case _:
            length = source.value(4)
    return struct.pack("<QI", address, length)


def _serve(queue: Virtqueue, held: list[Chain], source: ByteSource, errors: list[BaseException]) -> None:
    """What a device does: take, read, write, give some back now and some later."""
    dead, taken = queue.dead, 0
    try:
        for chain in queue:
            taken += 1
            _check(chain)
            held.append(chain)
            if source.byte() & 1:
                chain.write(chain.read())
                for view in chain.room():
                    view[:1] = b"\xaa"
            if source.byte() & 3:
                queue.push(held.pop(source.byte() % len(held)))
        while held and source.byte() & 1:
            queue.push(held.pop(source.byte() % len(held)))
    except BadDescriptorChain:
        assert not dead, "a dead queue gave another error"
        assert queue.dead and len(errors) == 1
    assert taken <= queue.size, "more chains than entries before the device notified"
    queue.notify()
    counters = queue.counters()
    # In order, what is pushed early waits for what is held.
    in_flight = counters["popped"] - counters["pushed"]
    assert queue.dead or (len(held) <= in_flight <= SIZE and (held or not in_flight))
    assert counters["interrupts"] <= counters["pushed"]


def _check(chain: Chain) -> None:
    assert 0 <= chain.head <= 0xFFFF
    assert chain.readable == sum(map(len, chain.readers))
    assert chain.writable == sum(map(len, chain.writers))
    assert len(chain.readers) + len(chain.writers) <= SIZE + 1
    assert chain.readable + chain.writable <= spec.CHAIN_BYTES_MAX


def blk_request(data: bytes) -> None:
    """Any chain is a request that lies on the disk, or an error with a status; nothing is half checked."""
    from qvm_virtio_blk.request import RequestError, parse
    from qvm_virtio_blk.spec import S_IOERR, S_UNSUPP, T_IN, T_OUT

    source = ByteSource(data)
    capacity = 512 * (source.value(4) & 0xFFFF)
    features = source.pick((0, (1 << 64) - 1, 1 << 13, 1 << 14))
    kind, sector = source.value(4), source.value(8)
    body = struct.pack("<IIQ", kind, 0, sector)[: None if source.byte() & 3 else source.byte() % 17]
    for _ in range(source.byte() % 4):
        body += struct.pack("<QII", source.value(8), source.value(4), source.value(4))
    body += bytes(512 * (source.byte() % 4)) + source.take(source.byte() % 24)
    writable = bytearray(512 * (source.byte() % 4) + source.byte() % 24)
    readers, writers = _cut(body, source), _cut(writable, source)
    chain = Chain(None, 0, readers, len(body), writers, len(writable))
    try:
        request = parse(chain, capacity, 4, features)
    except BadDescriptorChain:
        assert not writable
        return
    except RequestError as error:
        assert error.status in (S_IOERR, S_UNSUPP)
        assert error.why
        return
    assert request.length >= 0
    if request.kind in (T_IN, T_OUT):
        assert request.offset % 512 == 0 == request.length % 512
        assert request.offset + request.length <= capacity
        assert sum(map(len, request.views)) == request.length
    for segment in request.segments:
        assert segment.offset % 512 == 0 == segment.length % 512
        assert 0 <= segment.offset <= segment.offset + segment.length <= capacity


def _cut(data: bytes | bytearray, source: ByteSource) -> list[memoryview]:
    """``data`` in pieces: a guest may cut a request anywhere."""
    view, pieces = memoryview(data), []
    while len(view):
        choice = source.byte() & 3
        size = source.byte() if choice == 3 else (16, len(view), len(view) - 1)[choice]
        size = min(max(1, size), len(view))
        pieces.append(view[:size])
        view = view[size:]
    return pieces
