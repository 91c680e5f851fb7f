"""What a hostile client may send, as data: wrong messages of every kind, and strategies for more."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from hypothesis import strategies as st
from qvm_vfio_user.testing import (
    ACCESS,
    CONFIG_REGION,
    HEADER,
    INFO,
    INTX,
    MAP,
    MSI,
    MSIX,
    MULTI,
    NO_REPLY,
    REGION_INFO,
    SET_IRQS,
    UNMAP,
    Command,
    Irq,
)

MAX32, MAX64 = (1 << 32) - 1, (1 << 64) - 1
FILE_SIZE = 0x10_000

#: Kinds of descriptor a client may pass where another kind is expected.
KINDS = ("memfd", "eventfd", "full", "pipe", "socket", "directory", "null", "readonly", "path")


class Bad(NamedTuple):
    """A message; ``fds`` are kinds of descriptor, ``size`` the header's, if it lies."""

    command: int
    payload: bytes = b""
    fds: tuple[str, ...] = ()
    flags: int = 0
    size: int | None = None
    errno: int = 0

    def bytes(self, number: int = 7) -> bytes:
        """As it goes over the wire."""
        size = HEADER.size + len(self.payload) if self.size is None else self.size
        return HEADER.pack(number, self.command, size, self.flags, self.errno) + self.payload


@contextmanager
def opened(kinds: Sequence[str]) -> Iterator[list[int]]:
    """Descriptors of these kinds, closed afterwards; many of one kind are one file."""
    with ExitStack() as stack:
        made: dict[str, int] = {}
        for kind in kinds:
            if kind not in made:
                made[kind] = _open(kind, stack)
        yield [made[kind] for kind in kinds]


def _open(kind: str, stack: ExitStack) -> int:
    def kept(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    if kind in ("memfd", "readonly"):
        fd = kept(os.memfd_create("hostile", os.MFD_CLOEXEC))
        os.ftruncate(fd, FILE_SIZE)
        return fd if kind == "memfd" else kept(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
    if kind in ("eventfd", "full"):
        # One that blocks, and whose counter takes nothing more.
        fd = kept(os.eventfd(0, os.EFD_CLOEXEC))
        if kind == "full":
            os.eventfd_write(fd, MAX64 - 1)
        return fd
    if kind == "pipe":
        return [kept(fd) for fd in os.pipe()][1]
    if kind == "socket":
        return stack.enter_context(socket.socket(socket.AF_UNIX)).fileno()
    return kept(
        os.open({"directory": "/", "null": "/dev/null", "path": "/etc"}[kind], _MODES.get(kind, os.O_RDONLY))
    )


_MODES = {"null": os.O_RDWR, "path": os.O_PATH}


def access(offset: int, region: int, count: int, data: bytes = b"") -> bytes:
    """The payload of REGION_READ and REGION_WRITE."""
    return ACCESS.pack(offset, region, count) + data


def irqs(
    flags: int, index: int, start: int = 0, count: int = 1, data: bytes = b"", argsz: int | None = None
) -> bytes:
    """The payload of SET_IRQS."""
    return (
        SET_IRQS.pack(SET_IRQS.size + len(data) if argsz is None else argsz, flags, index, start, count)
        + data
    )


def dma(address: int, size: int, offset: int = 0, flags: int = 3, argsz: int = MAP.size) -> bytes:
    """The payload of DMA_MAP."""
    return MAP.pack(argsz, flags, offset, address, size)


def undma(address: int, size: int, flags: int = 0, argsz: int = UNMAP.size) -> bytes:
    """The payload of DMA_UNMAP."""
    return UNMAP.pack(argsz, flags, address, size)


def multi(*writes: tuple[int, int, int], count: int | None = None) -> bytes:
    """The payload of WRITE_MULTI: (offset, region, count)."""
    rows = b"".join(MULTI.pack(*write, bytes(8)) for write in writes)
    return struct.pack("<Q", len(writes) if count is None else count) + rows


_TRIGGER = Irq.EVENTFD | Irq.TRIGGER
_READ, _WRITE = Command.REGION_READ, Command.REGION_WRITE

#: Well-framed, but not to be done: name to message. The server refuses them or drops the client.
WRONG: dict[str, Bad] = {
    "command 0": Bad(0),
    "command 14": Bad(Command.DIRTY_PAGES, bytes(16)),
    "feature": Bad(Command.FEATURE, struct.pack("<II", 8, 1 << 16 | 1)),
    "migration data": Bad(Command.MIG_DATA_READ, bytes(16)),
    "command 65535": Bad(0xFFFF, bytes(100)),
    "dma read from the client": Bad(Command.DMA_READ, struct.pack("<QQ", 0, 4)),
    "dma write from the client": Bad(Command.DMA_WRITE, struct.pack("<QQ", 0, 4) + bytes(4)),
    "io fds": Bad(Command.GET_REGION_IO_FDS, INFO.pack(16, 0, 0, 0)),
    "version twice": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b"{}\0"),
    "a reply": Bad(Command.DMA_READ, struct.pack("<QQ", 0, 0), flags=1),
    "an error": Bad(_READ, access(0, 0, 4), flags=0x21, errno=5),
    "flags of no meaning": Bad(_READ, access(0, 0, 4), flags=0xFFFFFF00),
    "type 2": Bad(_READ, access(0, 0, 4), flags=2),
    "info too short": Bad(Command.GET_INFO, bytes(12)),
    "info too long": Bad(Command.GET_INFO, bytes(100)),
    "info argsz 0": Bad(Command.GET_INFO, bytes(16)),
    "region 9": Bad(Command.GET_REGION_INFO, REGION_INFO.pack(32, 0, 9, 0, 0, 0)),
    "region max": Bad(Command.GET_REGION_INFO, REGION_INFO.pack(32, 0, MAX32, 0, 0, 0)),
    "region argsz 0": Bad(Command.GET_REGION_INFO, REGION_INFO.pack(0, 0, 0, 0, 0, 0)),
    "irq 5": Bad(Command.GET_IRQ_INFO, INFO.pack(16, 0, 5, 0)),
    "irq max": Bad(Command.GET_IRQ_INFO, INFO.pack(16, 0, MAX32, 0)),
    "irq argsz 0": Bad(Command.GET_IRQ_INFO, INFO.pack(0, 0, 0, 0)),
    "read of nothing there": Bad(_READ, access(0, 8, 4)),
    "read of region 9": Bad(_READ, access(0, 9, 4)),
    "read of region max": Bad(_READ, access(0, MAX32, 4)),
    "read max": Bad(_READ, access(0, 0, MAX32)),
    "read wraps": Bad(_READ, access(MAX64 - 3, 0, 8)),
    "read at the end": Bad(_READ, access(MAX64, CONFIG_REGION, 1)),
    "read behind config": Bad(_READ, access(0x1000, CONFIG_REGION, 4)),
    "read over config's end": Bad(_READ, access(0xFFF, CONFIG_REGION, 2)),
    "read with data": Bad(_READ, access(0, 0, 4, bytes(4))),
    "read too short": Bad(_READ, bytes(15)),
    "write without data": Bad(_WRITE, access(0, 0, 4)),
    "write with too much": Bad(_WRITE, access(0, 0, 4, bytes(5))),
    "write says max": Bad(_WRITE, access(0, 0, MAX32, bytes(4))),
    "write wraps": Bad(_WRITE, access(MAX64 - 3, 0, 8, bytes(8))),
    "write to nothing there": Bad(_WRITE, access(0, 6, 4, bytes(4))),
    "write behind config": Bad(_WRITE, access(MAX32, CONFIG_REGION, 4, bytes(4))),
    "multi says more": Bad(Command.WRITE_MULTI, multi((4, 0, 4), count=2)),
    "multi says none": Bad(Command.WRITE_MULTI, multi((4, 0, 4), count=0)),
    "multi says max": Bad(Command.WRITE_MULTI, multi((4, 0, 4), count=MAX64)),
    "multi overflows": Bad(Command.WRITE_MULTI, multi(count=(1 << 64) // MULTI.size + 1)),
    "multi of 9 bytes": Bad(Command.WRITE_MULTI, multi((0, 0, 9))),
    "multi of max bytes": Bad(Command.WRITE_MULTI, multi((0, 0, 4), (0, 0, MAX32))),
    "multi elsewhere": Bad(Command.WRITE_MULTI, multi((4, 0, 4), (0, MAX32, 4))),
    "multi wraps": Bad(Command.WRITE_MULTI, multi((MAX64, 0, 4))),
    "map of nothing": Bad(Command.DMA_MAP, dma(0, 0), ("memfd",)),
    "map wraps": Bad(Command.DMA_MAP, dma(MAX64 - 0xFFF, 0x2000), ("memfd",)),
    "map of everything": Bad(Command.DMA_MAP, dma(0, MAX64), ("memfd",)),
    "map behind the file": Bad(Command.DMA_MAP, dma(0x1000, FILE_SIZE + 1), ("memfd",)),
    "map far behind the file": Bad(Command.DMA_MAP, dma(0x1000, 0x1000, MAX64 - 0xFFF), ("memfd",)),
    "map with two files": Bad(Command.DMA_MAP, dma(0x1000, 0x1000), ("memfd", "memfd")),
    "map with unknown flags": Bad(Command.DMA_MAP, dma(0x1000, 0x1000, flags=MAX32), ("memfd",)),
    "map argsz 0": Bad(Command.DMA_MAP, dma(0x1000, 0x1000, argsz=0), ("memfd",)),
    "map writable of a file that is not": Bad(Command.DMA_MAP, dma(0x1000, 0x1000), ("readonly",)),
    **{
        f"map of {kind}": Bad(Command.DMA_MAP, dma(0x1000, 0x1000), (kind,))
        for kind in ("eventfd", "pipe", "socket", "directory", "null", "path")
    },
    "unmap of nothing": Bad(Command.DMA_UNMAP, undma(0x5000_0000, 0x1000)),
    "unmap of zero bytes": Bad(Command.DMA_UNMAP, undma(0x5000_0000, 0)),
    "unmap wraps": Bad(Command.DMA_UNMAP, undma(MAX64, MAX64)),
    "unmap with dirty pages": Bad(Command.DMA_UNMAP, undma(0, 0x1000, flags=1)),
    "unmap all of something": Bad(Command.DMA_UNMAP, undma(0x1000, 0x1000, flags=2)),
    "unmap argsz 0": Bad(Command.DMA_UNMAP, undma(0, 0x1000, argsz=0)),
    "irqs without data and action": Bad(Command.SET_IRQS, irqs(0, INTX)),
    "irqs with all flags": Bad(Command.SET_IRQS, irqs(0x3F, INTX)),
    "irqs with unknown flags": Bad(Command.SET_IRQS, irqs(MAX32, INTX)),
    "irqs of two actions": Bad(Command.SET_IRQS, irqs(Irq.NONE | Irq.MASK | Irq.UNMASK, INTX)),
    "irqs of type 5": Bad(Command.SET_IRQS, irqs(_TRIGGER, 5), ("eventfd",)),
    "irqs of type max": Bad(Command.SET_IRQS, irqs(_TRIGGER, MAX32), ("eventfd",)),
    "irqs of MSI": Bad(Command.SET_IRQS, irqs(_TRIGGER, MSI), ("eventfd",)),
    "irqs from max": Bad(Command.SET_IRQS, irqs(_TRIGGER, MSIX, MAX32), ("eventfd",)),
    "irqs max": Bad(Command.SET_IRQS, irqs(_TRIGGER, MSIX, 0, MAX32), ("eventfd",)),
    "irqs wrap": Bad(Command.SET_IRQS, irqs(_TRIGGER, MSIX, MAX32, MAX32), ("eventfd",)),
    "irqs one too many": Bad(Command.SET_IRQS, irqs(_TRIGGER, INTX, 1), ("eventfd",)),
    "irqs with too few files": Bad(Command.SET_IRQS, irqs(_TRIGGER, MSIX, 0, 2), ("eventfd",)),
    "irqs with too many files": Bad(Command.SET_IRQS, irqs(_TRIGGER, INTX), ("eventfd", "eventfd")),
    "irqs none of some": Bad(Command.SET_IRQS, irqs(_TRIGGER, INTX, 0, 0), ("eventfd",)),
    "irqs bool too short": Bad(Command.SET_IRQS, irqs(Irq.BOOL | Irq.TRIGGER, INTX)),
    "irqs bool too long": Bad(Command.SET_IRQS, irqs(Irq.BOOL | Irq.TRIGGER, INTX, data=b"\1\1")),
    "irqs none with data": Bad(Command.SET_IRQS, irqs(Irq.NONE | Irq.TRIGGER, INTX, data=b"\1")),
    "irqs mask by eventfd": Bad(Command.SET_IRQS, irqs(Irq.EVENTFD | Irq.MASK, INTX), ("eventfd",)),
    "irqs mask MSI-X": Bad(Command.SET_IRQS, irqs(Irq.NONE | Irq.MASK, MSIX)),
    "irqs argsz 0": Bad(Command.SET_IRQS, irqs(_TRIGGER, INTX, argsz=0), ("eventfd",)),
    **{
        f"irqs by {kind}": Bad(Command.SET_IRQS, irqs(_TRIGGER, INTX), (kind,))
        for kind in ("memfd", "pipe", "socket", "directory", "null", "path")
    },
    "reset with a payload": Bad(Command.RESET, bytes(8)),
    "files nobody wants": Bad(Command.GET_INFO, INFO.pack(16, 0, 0, 0), ("memfd", "eventfd", "socket")),
    "a flood of files": Bad(Command.SET_IRQS, irqs(_TRIGGER, INTX), ("eventfd",) * 250),
}

#: What is no message at all: name to bytes. The server cannot know where the next one begins.
BROKEN: dict[str, bytes] = {
    "size 0": Bad(_READ, access(0, 0, 4), size=0).bytes(),
    "size 15": Bad(_READ, access(0, 0, 4), size=15).bytes(),
    "size max": Bad(_WRITE, access(0, 0, 4, bytes(4)), size=MAX32).bytes(),
    "size of the sign bit": Bad(_WRITE, access(0, 0, 4, bytes(4)), size=1 << 31).bytes(),
    "size of a megabyte": Bad(_WRITE, access(0, 0, 4, bytes(4)), size=1 << 20 | 64).bytes(),
    "size of an unknown command": Bad(99, size=1 << 24).bytes(),
    "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "ones": b"\xff" * 64,
    "zeros": bytes(64),
}

#: First messages that are no proposal.
NO_VERSION: dict[str, Bad] = {
    "another command": Bad(Command.GET_INFO, INFO.pack(16, 0, 0, 0)),
    "a write": Bad(_WRITE, access(4, 0, 4, bytes(4))),
    "a map": Bad(Command.DMA_MAP, dma(0x1000, 0x1000), ("memfd",)),
    "major 1": Bad(Command.VERSION, struct.pack("<HH", 1, 0)),
    "too short": Bad(Command.VERSION, b"\0\0"),
    "empty": Bad(Command.VERSION),
    "no zero at the end": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b"{}"),
    "no JSON": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b"{\0"),
    "no text": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b"\xff\xfe\0"),
    "a list": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b"[]\0"),
    "null": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b"null\0"),
    "capabilities of another kind": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b'{"capabilities":3}\0'),
    "fds of another kind": Bad(
        Command.VERSION, struct.pack("<HH", 0, 1) + b'{"capabilities":{"max_msg_fds":"many"}}\0'
    ),
    "infinity": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b'{"capabilities":{"max_msg_fds":1e999}}\0'),
    "negative": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b'{"capabilities":{"max_msg_fds":-1}}\0'),
    "deep": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b"[" * 2000 + b"]" * 2000 + b"\0"),
    "long": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b'{"x":"' + b"y" * 65000 + b'"}\0'),
    "with files": Bad(Command.VERSION, struct.pack("<HH", 0, 1) + b"{}\0", ("memfd", "socket")),
}

_EDGES = (0, 1, 3, 4, 7, 8, 15, 16, 0xFFF, 0x1000, 0x1001, 0xFFFF, 1 << 20, MAX32, 1 << 63, MAX64 - 7, MAX64)


def numbers(bits: int) -> st.SearchStrategy[int]:
    """Edges, small numbers and anything."""
    top = (1 << bits) - 1
    return st.one_of(
        st.sampled_from([edge for edge in _EDGES if edge <= top]), st.integers(0, 16), st.integers(0, top)
    )


def _some(kinds: Sequence[str] = KINDS) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(kinds), max_size=4).map(tuple)


def _regions() -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from((0, 1, 2, CONFIG_REGION, CONFIG_REGION)), numbers(32))


def messages() -> st.SearchStrategy[Bad]:
    """Any message: structures of each command with any numbers, with and without lies in the header."""
    reads = st.builds(access, numbers(64), _regions(), numbers(32)).map(lambda p: Bad(_READ, p))
    writes = st.builds(
        lambda offset, region, data, lie: Bad(
            _WRITE, access(offset, region, len(data) if lie is None else lie, data)
        ),
        numbers(64), _regions(), st.binary(max_size=20), st.one_of(st.none(), numbers(32)),
    )  # fmt: skip
    sets = st.builds(
        lambda flags, index, start, count, data, fds: Bad(
            Command.SET_IRQS, irqs(flags, index, start, count, data), fds
        ),
        st.one_of(st.sampled_from((0x21, 0x24, 0x22, 9, 0x11, 0x0A)), st.integers(0, 63), numbers(32)),
        st.one_of(st.sampled_from((INTX, MSIX)), numbers(32)),
        st.one_of(st.integers(0, 3), numbers(32)), st.one_of(st.integers(0, 3), numbers(32)),
        st.binary(max_size=4), st.one_of(st.just(("eventfd",)), _some(("eventfd", "full")), _some()),
    )  # fmt: skip
    addresses = st.one_of(st.integers(0, 40).map(lambda page: page << 12), numbers(64))
    sizes = st.one_of(st.integers(0, 17).map(lambda page: page << 12), numbers(64))
    maps = st.builds(
        lambda address, size, offset, flags, fds: Bad(
            Command.DMA_MAP, dma(address, size, offset, flags), fds
        ),
        addresses, sizes, st.one_of(st.just(0), numbers(64)),
        st.one_of(st.just(3), st.integers(0, 3), numbers(32)), st.one_of(st.just(("memfd",)), _some()),
    )  # fmt: skip
    unmaps = st.builds(
        lambda address, size, flags: Bad(Command.DMA_UNMAP, undma(address, size, flags)),
        addresses, sizes, st.one_of(st.just(0), st.integers(0, 3)),
    )  # fmt: skip
    rows = st.lists(st.tuples(numbers(64), _regions(), st.one_of(st.integers(0, 9), numbers(32))), max_size=5)
    multis = st.builds(
        lambda writes, count: Bad(Command.WRITE_MULTI, multi(*writes, count=count)),
        rows, st.one_of(st.none(), numbers(64)),
    )  # fmt: skip
    infos = st.builds(
        lambda *head: Bad(Command.GET_REGION_INFO, REGION_INFO.pack(*head, 0, 0, 0)),
        numbers(32), numbers(32), numbers(32),
    )  # fmt: skip
    any_bytes = st.builds(
        lambda command, data, fds, flags: Bad(command, data, fds, flags),
        numbers(16), st.binary(max_size=80), _some(), st.sampled_from((0, NO_REPLY, 1)),
    )  # fmt: skip
    good = st.one_of(reads, writes, sets, maps, unmaps, multis, infos, st.just(Bad(Command.RESET)), any_bytes)
    return st.builds(
        lambda bad, posted: bad._replace(flags=bad.flags | posted * NO_REPLY), good, st.booleans()
    )
