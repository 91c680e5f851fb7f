"""A disk on an NBD server: many requests under way, and a server that may die and come back.

All of it runs on the disk's worker, except :meth:`NbdDisk.last_flush` and :meth:`NbdDisk.close`, after
the worker has ended. What had no answer when the connection was lost is sent again on the next one. A
request older than the time-out is an I/O error for the guest, and a server that let one get so old
while it was connected is disconnected.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import takewhile

from qvm_virtio_blk import spec
from qvm_virtio_blk.flight import Flight, Operation, cost, take_off
from qvm_virtio_blk.libnbd import Connection
from qvm_virtio_blk.link import Link
from qvm_virtio_blk.request import MAX_REQUEST, RequestError, parse
from qvm_virtio_blk.session import Session, answer, fill, reason
from qvmcore.api import HostError, Virtqueue, Worker

#: Seconds between two looks at the time-outs.
TICK = 0.1
#: Smallest discard worth sending, bytes; servers have files behind them, mostly.
GRANULARITY = 4096
#: Bytes under way at most: they have copies in the host's memory, and the guest may ask for a lot.
BUDGET = MAX_REQUEST


class NbdDisk:
    """The disk behind ``uri``. ``changed()`` is called when its size became known or new.

    ``kick(index)`` has :meth:`serve` called for a queue. ``size`` is 0 before the first connection.
    """

    def __init__(
        self,
        uri: str,
        session: Session,
        *,
        block_size: int,
        timeout: float,
        worker: Worker,
        changed: Callable[[], None],
        kick: Callable[[int], None],
        log: logging.LoggerAdapter[logging.Logger],
    ) -> None:
        self.size = 0
        #: As in Backend; until the server is known, that it can.
        self.can_discard = True
        self.granularity = GRANULARITY
        self.link = Link(uri, self, worker, log)
        self._session = session
        self._block_size = block_size
        self._timeout = timeout
        self._worker = worker
        self._changed = changed
        self._kick = kick
        self._ticking = False
        #: In the order of their deadlines.
        self._flights: dict[Flight, None] = {}
        self._commands: dict[int, tuple[Flight, Operation]] = {}
        #: Of a driver that is gone: what the server may still be doing.
        self._stale: set[Flight] = set()
        self._held: set[int] = set()
        self._pushed: set[Virtqueue] = set()
        self._bytes = 0
        #: Writes the server did, and how many of them a flush covers.
        self._writes = self._flushed = 0

    # ---- the link's events -----------------------------------------------------------------------

    def check_export(self, connection: Connection) -> None:
        """See Owner."""
        uri, block = self.link.uri, connection.minimum_block
        if connection.readonly and not self._session.readonly:
            raise HostError(f"{uri} is read only", hint="set readonly = true if the guest need not write")
        if block > self._block_size:
            raise HostError(f"{uri} has blocks of {block} bytes", hint=f"set block_size = {block}")
        if connection.size < self._block_size:
            raise HostError(f"{uri} is empty", hint="give the export a size")

    def link_up(self, connection: Connection) -> None:
        """See Owner: a new size is the guest's business, and what had no answer is sent again."""
        if not self.size:
            self.can_discard = connection.can_trim
            self.granularity = max(GRANULARITY, connection.minimum_block)
        size = connection.size - connection.size % self._block_size
        if size != self.size:
            self.size = size
            self._changed()
        for flight in tuple(self._flights):
            self._issue(flight)

    def link_moved(self, connection: Connection) -> None:
        """See Owner."""
        if not self._commands:
            return
        for command, error in connection.retire():
            flight, operation = self._commands.pop(command)
            if error is not None and connection.dead:
                continue  # not done; to be sent again
            operation.done = True
            if error is not None:
                flight.error = flight.error or reason(error)
            if not flight.waiting:
                self._done(flight)

    def link_down(self) -> None:
        """See Owner: what the server was asked for is waiting again."""
        self._commands.clear()
        # Nobody waits for these, and a server that is gone does them no more.
        for flight in tuple(self._stale):
            self._remove(flight)

    def link_settled(self) -> None:
        """See Owner: tell the driver of what was answered, and look at what was left in the rings."""
        pushed, self._pushed = self._pushed, set()
        for queue in pushed:
            queue.notify()
        if self._held and not self._stale and self._bytes < BUDGET:
            held, self._held = self._held, set()
            for index in held:
                self._kick(index)
        self._tick_later()

    # ---- requests --------------------------------------------------------------------------------

    def serve(self, index: int, queue: Virtqueue) -> None:
        """Take what the driver offers, as far as there is room for it."""
        session = self._session
        while (chain := queue.pop()) is not None:
            try:
                request = parse(chain, self.size, session.seg_max, session.features)
                if session.readonly and request.kind == spec.T_OUT:
                    raise RequestError(spec.S_IOERR, "write to a read-only disk")
            except RequestError as error:
                session.stats.failed(session.name, error.why)
                answer(queue, chain, error.status)
                continue
            if request.kind == spec.T_GET_ID:
                fill(request.views, session.identity)
                answer(queue, chain, spec.S_OK, request.length + 1)
                continue
            # The last writes of a driver that is gone must not come after the first of a new one.
            room = BUDGET - self._bytes if self._flights else MAX_REQUEST
            if self._stale or cost(request) > room:
                queue.unpop(chain)
                self._held.add(index)
                break
            flight = take_off(queue, chain, request, time.monotonic() + self._timeout, session.durable)
            self._flights[flight] = None
            self._bytes += cost(request)
            self._issue(flight)
        self.link.watch()
        self.link_settled()

    def _issue(self, flight: Flight) -> None:
        """Give the server what it has not done of a request; nothing while there is no connection."""
        connection = self.link.connection
        if connection is None:
            return
        if flight.request.kind == spec.T_FLUSH:
            flight.covers = self._writes
        for operation in flight.waiting:
            try:
                command = _start(connection, operation)
            except OSError as error:
                if connection.dead:
                    self._worker.call(self.link.step)
                    return
                flight.error = reason(error)
                command = 0
            if command:
                self._commands[command] = (flight, operation)
            else:
                operation.done = True
        if not flight.waiting:
            self._done(flight)

    def _done(self, flight: Flight) -> None:
        """The server did all of a request: once more with a flush, or the answer."""
        if flight.flush_after and not flight.error:
            flight.flush_after = False
            flight.operations = [Operation(spec.T_FLUSH)]
            self._issue(flight)
            return
        if flight.request.kind == spec.T_FLUSH:
            if not flight.error:
                self._flushed = max(self._flushed, flight.covers)
        elif flight.request.kind != spec.T_IN:
            self._writes += 1
        self._land(flight)

    def _land(self, flight: Flight) -> None:
        stats, request = self._session.stats, flight.request
        if flight.error:
            stats.failed(self._session.name, flight.error)
        else:
            stats.count(request.kind, request.length)
        flight.land()
        self._pushed.add(flight.queue)
        self._remove(flight)

    def _remove(self, flight: Flight) -> None:
        if flight in self._flights:
            del self._flights[flight]
            self._bytes -= cost(flight.request)
        self._stale.discard(flight)

    def drop(self) -> None:
        """The driver is gone; the worker is held still."""
        self._held.clear()
        self._stale = set(self._flights)
        if self.link.connection is None:
            for flight in tuple(self._stale):
                self._remove(flight)

    # ---- time ------------------------------------------------------------------------------------

    def _tick_later(self) -> None:
        if not self._ticking and (self._flights or self.link.busy):
            self._ticking = True
            self._worker.call_later(TICK, self._tick)

    def _tick(self) -> None:
        """Give up what is too old, a server that is silent included; connect again."""
        self._ticking = False
        now = time.monotonic()
        late = list(takewhile(lambda flight: flight.deadline <= now, self._flights))
        if late and self.link.connection is not None:
            self.link.lost(TimeoutError(f"no answer within {self._timeout:g} s"))
        for flight in late:
            flight.error = f"no answer from {self.link.uri} within {self._timeout:g} s"
            self._land(flight)
        self.link.tick(now)
        self.link_settled()

    # ---- the end ---------------------------------------------------------------------------------

    def last_flush(self, timeout: float) -> None:
        """Have the server flush what it was given; the worker has ended. Raises HostError."""
        if self._writes == self._flushed:
            return
        uri, connection = self.link.uri, self.link.connection
        if connection is None:
            raise HostError(f"{uri}: no connection for the last flush")
        if not connection.can_flush:
            return
        deadline = time.monotonic() + timeout
        # Whatever else comes back now, the guest is gone.
        self._commands.clear()
        try:
            wanted = connection.flush()
            while self.link.connection is connection:
                results = dict(connection.retire())
                if wanted in results:
                    if (error := results[wanted]) is not None:
                        raise error
                    self._flushed = self._writes
                    return
                self.link.step_blocking(deadline)
        except OSError as error:
            raise HostError(f"{uri}: the last flush: {error.strerror or error}") from error
        raise HostError(f"{uri}: the connection was lost at the last flush")

    def close(self) -> None:
        """Let go of the connection; idempotent."""
        self._flights.clear()
        self._stale.clear()
        self.link.close()

    def report(self) -> dict[str, object]:
        """For the status; any thread."""
        return {"connected": self.link.connection is not None, "in_flight": len(self._flights)}


def _start(connection: Connection, operation: Operation) -> int:
    """Give the server an operation; the number of the command, 0 when there is nothing to do.

    Raises OSError.
    """
    kind = operation.kind
    if kind in (spec.T_IN, spec.T_OUT) and not operation.length:
        return 0
    if kind == spec.T_IN:
        return connection.read(operation.buffer, operation.offset)
    if kind == spec.T_OUT:
        return connection.write(operation.buffer, operation.offset)
    if kind == spec.T_FLUSH:
        return connection.flush() if connection.can_flush else 0
    if kind == spec.T_DISCARD:
        return connection.trim(operation.offset, operation.length) if connection.can_trim else 0
    if connection.can_zero:
        return connection.zero(operation.offset, operation.length, operation.unmap)
    operation.buffer = bytearray(operation.length)
    return connection.write(operation.buffer, operation.offset)
