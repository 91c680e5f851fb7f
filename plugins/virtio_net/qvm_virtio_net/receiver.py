"""From the hostdev into the guest's receive queue (virtio 1.4, 5.1.9.3 and 5.1.9.4).

A frame is received straight into guest memory: the queue's buffers are popped in stock, the hostdev
scatters the next frame over them, and those it filled are pushed. Header and addresses come into a
small buffer of our own first and are copied, so what is decided upon cannot be changed by the
guest meanwhile. A frame that does not fit, or that the driver cannot take as it is, goes through a
copy instead.

When the driver gives no buffers the hostdev is not read: its own bounded queue fills and the sender
feels it. After PATIENCE seconds frames are read and dropped until there are buffers again.
Worker thread.
"""

from __future__ import annotations

from collections import deque

from qvm_virtio_net import header as headers
from qvm_virtio_net import offload, partial, spec
from qvm_virtio_net.buffers import cut, fill
from qvm_virtio_net.filter import RxFilter
from qvm_virtio_net.header import Header, Malformed
from qvm_virtio_net.hostdev import HostDev
from qvm_virtio_net.patience import after_patience
from qvm_virtio_net.pcap import Capture
from qvm_virtio_net.stats import Stats
from qvmcore.api import BadDescriptorChain, Chain, Virtqueue, Worker

#: Frames taken from the host in one go before others get a turn.
BUDGET = 64
#: Views in one readv; IOV_MAX is 1024.
_VIEWS_MAX = 1000
#: The header, and what the filter looks at: two addresses, a VLAN tag.
_HEAD = spec.HEADER_BYTES + spec.ETHERNET_BYTES + spec.VLAN_BYTES
_LONGEST = spec.HEADER_BYTES + spec.FRAME_BYTES_MAX


class Agreed:
    """What the driver takes: its GUEST_OFFLOADS now, which the control queue may change. One a card."""

    __slots__ = ("offloads",)

    def __init__(self) -> None:
        self.offloads = 0


class Receiver:
    """The receive side of one queue pair, from the queue's first use to its reset."""

    def __init__(
        self,
        pair: int,
        queue: Virtqueue,
        host: HostDev,
        rx_filter: RxFilter,
        stats: Stats,
        *,
        mergeable: bool,
        agreed: Agreed,
        mtu: int,
        capture: Capture | None,
    ) -> None:
        self._agreed = agreed
        self._pair = pair
        self._queue = queue
        self._host = host
        self._filter = rx_filter
        self._stats = stats
        self._mergeable = mergeable
        self._frame_max = mtu + spec.ETHERNET_BYTES
        self._capture = capture
        self._head = bytearray(_HEAD)
        self._overflow = bytearray(_LONGEST - _HEAD + 1)
        self._stock: list[Chain] = []
        self._room = self._views = 0
        #: Frames that wait for more buffers, each with its header; of one message from the host.
        self._waiting: deque[tuple[Header, bytearray]] = deque()
        self._starving = self._timing = self._dropping = False

    def pump(self, worker: Worker) -> bool:
        """Move frames into the queue; True when the budget ended before the frames did."""
        for _ in range(BUDGET):
            if self._queue.dead:
                return False
            if not (self._deliver_waiting() and self._fill_stock(1)):
                if not self._dropping:
                    self._starve(worker)
                    return False
            else:
                self._thrive()
            if not self._receive():
                return False
        return True

    def switch_off(self) -> None:
        """The driver receives on fewer pairs now: what waits for buffers of this one is lost."""
        self._stats.rx_no_buffer += len(self._waiting)
        self._waiting.clear()
        self._thrive()

    def give_back(self) -> None:
        """The buffers in stock are the driver's again, in their place in the queue."""
        self._queue.unpop_all(self._stock)
        self._stock.clear()
        self._room = self._views = 0

    # ---- one frame -----------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Take one frame from the host; False when there was none."""
        self._fill_stock(self._wanted())
        stock = self._stock
        direct = bool(stock) and stock[0].writable >= _HEAD and self._views < _VIEWS_MAX
        room: list[memoryview] = []
        if direct:
            room = cut(stock[0].writers, _HEAD, stock[0].writable)
            for chain in stock[1:]:
                room += chain.writers
        count = self._host.receive(self._pair, [self._head, *room, self._overflow])
        if not count:
            return False
        stats = self._stats
        frame_bytes = count - spec.HEADER_BYTES
        try:
            if not spec.ETHERNET_BYTES <= frame_bytes <= spec.FRAME_BYTES_MAX:
                raise Malformed(f"a frame of {frame_bytes} bytes")
            header = headers.parse(self._head, frame_bytes)
            if header.gso_type == spec.GSO_NONE and frame_bytes > self._frame_max:
                tagged = self._head[24:26] == b"\x81\x00"
                if not tagged or frame_bytes > self._frame_max + spec.VLAN_BYTES:
                    raise Malformed(f"a frame of {frame_bytes} bytes")
            if self._dropping:
                stats.rx_no_buffer += 1
                return True
            if not self._filter.accepts(memoryview(self._head)[spec.HEADER_BYTES : min(count, _HEAD)]):
                stats.rx_filtered += 1
                return True
            if self._capture is not None:
                pieces = [memoryview(self._head), *room, memoryview(self._overflow)]
                self._capture.record(cut(pieces, spec.HEADER_BYTES, count))
            whole = headers.acceptable(header, self._agreed.offloads)
            if whole and header.flags:
                whole = self._sound(header, room, count)
            if whole and direct and count <= self._room:
                self._commit(headers.trimmed(header, self._agreed.offloads), count)
                return True
            pieces = [memoryview(self._head), *room, memoryview(self._overflow)]
            frame = bytearray().join(cut(pieces, spec.HEADER_BYTES, count))
            self._adapt(header, frame, whole=whole)
        except Malformed:
            stats.rx_malformed += 1
        self._deliver_waiting()
        return True

    def _commit(self, header: Header, count: int) -> None:
        """The stock's first buffers hold a message of ``count`` bytes, but for its head: publish it."""
        self._stats.rx_frames += 1
        self._stats.rx_bytes += count - spec.HEADER_BYTES
        stock = self._stock
        used, left = 0, count
        while left > 0:
            left -= stock[used].writable
            used += 1
        self._head[: spec.HEADER_BYTES] = header.pack(used)
        fill(stock[0].writers, memoryview(self._head)[: min(count, _HEAD)])
        left = count
        filled = []
        for chain in stock[:used]:
            size = chain.writable
            filled.append((chain, min(size, left)))
            left -= size
            self._room -= size
            self._views -= len(chain.writers)
        del stock[:used]
        # A driver that polls must find all buffers of the message or none (5.1.9.4.1).
        self._queue.push_together(filled)

    def _sound(self, header: Header, room: list[memoryview], count: int) -> bool:
        """Whether the driver may be told of the frame's partial checksum."""
        pieces = [memoryview(self._head), *room, memoryview(self._overflow)]
        front = b"".join(cut(pieces, spec.HEADER_BYTES, min(count, spec.HEADER_BYTES + partial.FRONT)))
        return partial.sound(front, count - spec.HEADER_BYTES, header)

    def _adapt(self, header: Header, frame: bytearray, *, whole: bool) -> None:
        """Queue a frame ``whole``, or finished in software: what the driver cannot do, or must not trust."""
        if whole:
            self._waiting.append((headers.trimmed(header, self._agreed.offloads), frame))
            return
        self._stats.rx_finished += 1
        if header.gso_type == spec.GSO_NONE:
            offload.finish_checksum(frame, header)
            self._waiting.append((headers.PLAIN, frame))
        else:
            self._waiting.extend((headers.PLAIN, piece) for piece in offload.segment(frame, header))

    def _deliver_waiting(self) -> bool:
        """Copy waiting frames into buffers; False when buffers are missing."""
        waiting = self._waiting
        while waiting:
            header, frame = waiting[0]
            count = spec.HEADER_BYTES + len(frame)
            if not self._fill_stock(count) and (self._mergeable or not self._stock):
                return False
            waiting.popleft()
            if self._room < count:
                # Without mergeable buffers a frame has one, which is too small.
                self._stats.rx_no_buffer += 1
                continue
            views = [view for chain in self._stock for view in chain.writers]
            fill(cut(views, spec.HEADER_BYTES, count), frame)
            self._head[spec.HEADER_BYTES :] = frame[: _HEAD - spec.HEADER_BYTES].ljust(
                _HEAD - spec.HEADER_BYTES, b"\0"
            )
            self._commit(header, count)
        return True

    # ---- buffers ---------------------------------------------------------------------------------

    def _wanted(self) -> int:
        """Bytes of stock that hold any frame that may come."""
        if self._agreed.offloads & (spec.F_GUEST_TSO4 | spec.F_GUEST_TSO6):
            return _LONGEST
        return spec.HEADER_BYTES + self._frame_max + spec.VLAN_BYTES

    def _fill_stock(self, count: int) -> bool:
        """Pop buffers until they have room for ``count`` bytes; False when there are not enough."""
        stock = self._stock
        while self._room < count:
            if stock and not self._mergeable:
                return False
            chain = self._queue.pop()
            if chain is None:
                return False
            if chain.writable < spec.HEADER_BYTES:
                # 5.1.9.3.1: each buffer has room for the header at least.
                error = BadDescriptorChain(
                    f"queue {self._queue.index}: receive buffer of {chain.writable} bytes"
                )
                raise error
            stock.append(chain)
            self._room += chain.writable
            self._views += len(chain.writers)
        return True

    def _starve(self, worker: Worker) -> None:
        self._starving = True
        self._host.pause(self._pair, True)
        if not self._timing:
            self._timing = True
            after_patience(worker, self._out_of_patience)

    def _out_of_patience(self, worker: Worker) -> None:
        self._timing = False
        if self._starving and not self._queue.dead:
            self._dropping = True
            self._stats.rx_no_buffer += len(self._waiting)
            self._waiting.clear()
            self._host.pause(self._pair, False)

    def _thrive(self) -> None:
        if self._starving:
            self._starving = self._dropping = False
            self._host.pause(self._pair, False)
