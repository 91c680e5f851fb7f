"""Requests on their way to a server: what each consists of, and what it became. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

from qvm_virtio_blk import spec
from qvm_virtio_blk.request import Request
from qvm_virtio_blk.session import answer, fill
from qvmcore.api import Chain, Virtqueue


@dataclass(eq=False, slots=True)
class Operation:
    """One command for the server. ``buffer`` is filled by T_IN and stored by T_OUT."""

    kind: int
    offset: int = 0
    length: int = 0
    unmap: bool = False
    buffer: bytearray = field(default_factory=bytearray)
    done: bool = False


@dataclass(eq=False, slots=True)
class Flight:
    """A request of the guest until it is answered; ``deadline`` is in monotonic seconds.

    The data has a buffer of its own: a server that answers late must not write into the memory of
    a guest that has reset its driver meanwhile.
    """

    queue: Virtqueue
    chain: Chain
    request: Request
    deadline: float
    flush_after: bool
    operations: list[Operation]
    error: str = ""
    #: For a flush: how many writes had been done when it was sent.
    covers: int = 0

    @property
    def waiting(self) -> list[Operation]:
        """What the server has not done yet."""
        return [operation for operation in self.operations if not operation.done]

    def land(self) -> None:
        """Answer the guest; nothing when its driver is gone."""
        if self.queue.dead:
            return
        if self.error:
            answer(self.queue, self.chain, spec.S_IOERR)
            return
        written = 1
        if self.request.kind == spec.T_IN:
            fill(self.request.views, self.operations[0].buffer)
            written += self.request.length
        answer(self.queue, self.chain, spec.S_OK, written)


def take_off(queue: Virtqueue, chain: Chain, request: Request, deadline: float, durable: bool) -> Flight:
    """The flight of a checked request, with a copy of what it writes."""
    kind, offset, length, views, segments = request
    if kind == spec.T_IN:
        operations = [Operation(kind, offset, length, buffer=bytearray(length))]
    elif kind == spec.T_OUT:
        operations = [Operation(kind, offset, length, buffer=bytearray(b"".join(views)))]
    elif kind == spec.T_FLUSH:
        operations = [Operation(kind)]
    else:
        operations = [Operation(kind, at, size, unmap) for at, size, unmap in segments]
    writes = kind in (spec.T_OUT, spec.T_DISCARD, spec.T_WRITE_ZEROES)
    return Flight(queue, chain, request, deadline, durable and writes, operations)


def cost(request: Request) -> int:
    """Bytes of the host's memory the flight of a request may take."""
    return 0 if request.kind == spec.T_DISCARD else request.length
