"""A guest that makes the accesses its host asks for, so that tests drive a real vCPU of any engine.

The program (``guest_programs/*.s``; its machine code is here, too, so no assembler is needed) loads
an order from a *mailbox* window on the bus. That load waits on the vCPU thread until the host has an
order, so neither side polls and an access costs two exits: the access itself and the load behind it::

    server = AccessServer(engine, Aarch64())      # from qvmcore.testing.guest_archs
    server.start()
    server.store(0x1C0D_0004, 4, 1)               # a real store of the guest
    server.close()

:class:`EngineBus` gives a server the shape of a bus, which is all that the drivers of
:mod:`qvmcore.testing.driver` and :mod:`qvmcore.testing.pci_driver` need. Interrupts are counted by
the guest's own handlers: :meth:`AccessServer.count`.
"""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from qvmcore.bus import AddressSpace, Mapped
from qvmcore.engine import Engine, GuestConfig
from qvmcore.memory import GuestMemory, MemoryRegion
from qvmcore.types import GuestEnd, MemorySpec, MmioHandler, Window

if TYPE_CHECKING:
    from qvmcore.testing.guest_archs import GuestArch

#: Where the program's memory is, guest-physical: code, the block of words, what the architecture adds.
PROGRAM = MemorySpec(0x9000_0000, 0x1_0000)
WORDS = PROGRAM.start + 0x1000
STACK = PROGRAM.start + 0x8000
#: Where the guest loads its orders from.
MAILBOX = 0x0A00_0000
_OWNER = "access-server"

#: Words of the block, by index; from COUNTS on, 32 bits for each interrupt number.
ADDRESS, VALUE, FAULT, STOP, COUNTER, TOP = range(6)
COUNTS = 0x400
INTERRUPTS = 1024


class Order(enum.IntEnum):
    """What the host may ask for: the offsets of the program's routines."""

    LOAD = 0x100  # of 1, 2, 4, 8 bytes
    STORE = 0x180
    SPIN = 0x200  # count in COUNTER until STOP is set
    SLEEP = 0x220  # wait for interrupts until STOP is set
    END = 0x240  # power off, or what comes next to it
    IN = 0x260  # of 1, 2, 4 bytes
    OUT = 0x2C0


#: Distance of the routines for two sizes.
_SPACING = 0x20
_LOG2 = {1: 0, 2: 1, 4: 2, 8: 3}


class AccessServer:
    """The program in a guest of ``engine``, with one vCPU. Use it from one thread at a time.

    ``bus`` may hold windows already; the mailbox is placed on it. ``regions`` is further guest memory.
    ``ends`` are the ends the engine reported, ``unsupported`` the accesses nobody answered when the
    server made the bus itself. ``patience`` is the bound, in seconds, of everything that is waited for:
    only a broken engine reaches it.
    """

    patience: ClassVar[float] = 20.0

    def __init__(
        self,
        engine: Engine,
        arch: GuestArch,
        bus: AddressSpace | None = None,
        regions: Sequence[MemoryRegion] = (),
        ports: AddressSpace | None = None,
    ) -> None:
        self.arch = arch
        self.unsupported: list[tuple[int, int, int | None]] = []
        self.bus = AddressSpace(lambda *access: self.unsupported.append(access)) if bus is None else bus
        self.ports = AddressSpace() if ports is None and arch.has_ports else ports
        self.ends: list[GuestEnd] = []
        self.ended = threading.Event()
        self._orders: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closing = False
        self._program = MemoryRegion(PROGRAM)
        self.memory = GuestMemory([*regions, self._program])
        arch.prepare_memory(self.memory)
        self._words = self.memory.view(WORDS, 64).cast("Q")
        self._counts = self.memory.view(WORDS + COUNTS, 4 * INTERRUPTS).cast("I")
        self._words[TOP] = STACK
        self._mailbox = self.bus.place(
            MAILBOX, Window(4, frozenset({4})), MmioHandler(self._next_order, lambda *_: None), _OWNER
        )
        try:
            self.guest = engine.create_guest(
                GuestConfig(
                    arch.name, 1, self.memory, self.bus, arch.controllers, self._on_end, arch.msi, self.ports
                )
            )
        except BaseException:
            self._release()
            raise

    def start(self) -> AccessServer:
        """Start the vCPU and wait until it asks for its first order."""
        self.guest.start(self.arch.entry())
        self._wait("start")
        self.arch.prepare(self)
        return self

    # ---- one access ----------------------------------------------------------------------------

    def load(self, address: int, size: int) -> int:
        """A load of 1, 2, 4 or 8 bytes."""
        return self._call(Order.LOAD + _SPACING * _LOG2[size], address, 0)

    def store(self, address: int, size: int, value: int) -> None:
        """A store of 1, 2, 4 or 8 bytes."""
        self._call(Order.STORE + _SPACING * _LOG2[size], address, value)

    def port_in(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes."""
        return self._call(Order.IN + _SPACING * _LOG2[size], port, 0)

    def port_out(self, port: int, size: int, value: int) -> None:
        """OUT of 1, 2 or 4 bytes."""
        self._call(Order.OUT + _SPACING * _LOG2[size], port, value)

    # ---- a guest that goes on by itself ----------------------------------------------------------

    def begin(self, order: Order, address: int = 0) -> None:
        """Start SPIN, SLEEP, END, or an access that may never come back, and return at once."""
        self._words[STOP] = 0
        self._words[ADDRESS] = address
        self._orders.put(order)

    def finish(self, wake: Callable[[], None] = lambda: None) -> None:
        """End SPIN or SLEEP; ``wake`` raises the interrupt that a sleeping guest needs."""
        self._words[STOP] = 1
        wake()
        self._wait("what was begun")

    def spin_a_while(self) -> None:
        """Let the guest compute long enough to take every interrupt that is pending."""
        before = self.counter
        self.begin(Order.SPIN)
        assert self.wait_counter(before + 20_000), "the guest does not compute"
        self.finish()

    @property
    def counter(self) -> int:
        """How far SPIN has counted."""
        return int(self._words[COUNTER])

    def count(self, number: int) -> int:
        """How often the guest has taken interrupt ``number``."""
        return int(self._counts[number])

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Whether ``condition`` came true."""
        deadline = time.monotonic() + self.patience
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0002)
        return True

    def wait_count(self, number: int, count: int) -> bool:
        """Wait until the guest has taken interrupt ``number`` that often."""
        return self.wait_for(lambda: self.count(number) >= count)

    def wait_counter(self, value: int) -> bool:
        """Wait until SPIN has counted that far."""
        return self.wait_for(lambda: self.counter >= value)

    # ---- the end ---------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Let a vCPU that waits for an order leave; from now on it gets no other."""
        self._closing = True
        self._words[ADDRESS] = WORDS  # what it may still load harms nobody
        self._words[STOP] = 1
        self._orders.put(Order.LOAD)

    def close(self) -> None:
        """Stop the guest and release everything. AssertionError when it does not stop. Idempotent."""
        if self._program.fd < 0:
            return
        self.let_go()
        assert self.guest.stop(self.patience), "the vCPU did not stop"
        self.guest.close()
        self._release()

    def __enter__(self) -> AccessServer:
        return self.start()

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _release(self) -> None:
        self.bus.remove(self._mailbox)
        self._words.release()
        self._counts.release()
        self._program.close()

    def _call(self, order: int, address: int, value: int) -> int:
        words = self._words
        words[ADDRESS] = address
        words[VALUE] = value
        self._orders.put(order)
        self._wait(f"order {order:#x} at {address:#x}")
        return int(words[VALUE])

    def _wait(self, what: str) -> None:
        limit = self.patience
        try:
            self._done.get(timeout=limit)
        except queue.Empty:
            raise AssertionError(f"the guest did not come back from {what} within {limit:g} s") from None
        assert not self.ends, f"the guest ended during {what}: {self.ends[0]}"
        fault, self._words[FAULT] = int(self._words[FAULT]), 0
        assert not fault, f"the guest took exception {fault:#x} at {what}"

    def _next_order(self, _offset: int, _size: int) -> int:
        """The mailbox, on the vCPU thread."""
        self._done.put(None)
        if self._closing:
            return Order.LOAD
        return self._orders.get()

    def _on_end(self, end: GuestEnd) -> None:
        self.ends.append(end)
        self.ended.set()
        self._done.put(None)


class EngineBus:
    """A bus whose accesses a real vCPU makes; iterating gives the windows of the bus under it."""

    def __init__(self, server: AccessServer) -> None:
        self.server = server

    def read(self, address: int, size: int) -> int:
        """A load of ``size`` bytes."""
        return self.server.load(address, size)

    def write(self, address: int, size: int, value: int) -> None:
        """A store of ``size`` bytes."""
        self.server.store(address, size, value)

    def __iter__(self) -> Iterator[Mapped]:
        return (mapped for mapped in self.server.bus if not mapped.owner.startswith(_OWNER))
