"""From the guest's transmit queue to the hostdev (virtio 1.4, 5.1.9.2).

A frame goes out straight from guest memory. When the hostdev has no room the frame stays in the
queue, so the driver feels it; after PATIENCE seconds frames are dropped and counted, as a card with
a blocked cable does, until there is room again. Worker thread.
"""

from __future__ import annotations

from qvm_virtio_net import spec
from qvm_virtio_net.buffers import cut
from qvm_virtio_net.hostdev import HostDev, Sent
from qvm_virtio_net.patience import after_patience
from qvm_virtio_net.pcap import Capture
from qvm_virtio_net.stats import Stats
from qvmcore.api import Chain, Virtqueue, Worker

_GSO_TYPE = 1


class Transmitter:
    """The transmit side of one queue pair, from DRIVER_OK to the next reset."""

    def __init__(
        self, pair: int, queue: Virtqueue, host: HostDev, stats: Stats, *, mtu: int, capture: Capture | None
    ) -> None:
        self._pair = pair
        self._queue = queue
        self._host = host
        self._stats = stats
        self._plain_max = mtu + spec.ETHERNET_BYTES + spec.VLAN_BYTES
        self._capture = capture
        self._blocked = self._timing = self._dropping = False

    def serve(self, worker: Worker) -> None:
        """Send what the driver offers, as far as the hostdev takes it."""
        stats, push = self._stats, self._queue.push
        for chain in self._queue:
            frame_bytes = chain.readable - spec.HEADER_BYTES
            if not self._well_formed(chain, frame_bytes):
                stats.tx_malformed += 1
                push(chain, 0)
                continue
            sent = self._host.send(self._pair, chain.readers)
            if sent is Sent.TAKEN:
                self._blocked = self._dropping = False
                stats.tx_frames += 1
                stats.tx_bytes += frame_bytes
                if self._capture is not None:
                    self._capture.record(cut(chain.readers, spec.HEADER_BYTES, chain.readable))
            elif sent is Sent.NO_LINK:
                stats.tx_no_link += 1
            elif sent is Sent.REFUSED:
                stats.tx_malformed += 1
            elif self._dropping:
                stats.tx_stalled += 1
            else:
                self._queue.unpop(chain)
                self._block(worker)
                return
            push(chain, 0)

    def writable(self) -> None:
        """The hostdev has room again; the caller serves the queue."""
        self._blocked = self._dropping = False

    def _well_formed(self, chain: Chain, frame_bytes: int) -> bool:
        """Whether the length can be right; what the header says is checked by who believes it."""
        if frame_bytes <= self._plain_max:
            return frame_bytes >= spec.ETHERNET_BYTES
        gso_type = chain.read(spec.HEADER_BYTES)[_GSO_TYPE]
        return gso_type != spec.GSO_NONE and frame_bytes <= spec.FRAME_BYTES_MAX

    def _block(self, worker: Worker) -> None:
        self._blocked = True
        if not self._timing:
            self._timing = True
            after_patience(worker, self._out_of_patience)

    def _out_of_patience(self, worker: Worker) -> None:
        self._timing = False
        if self._blocked and not self._queue.dead:
            self._dropping = True
            self.serve(worker)
            self._queue.notify()
