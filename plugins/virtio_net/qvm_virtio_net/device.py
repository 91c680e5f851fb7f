"""The virtio network device (virtio 1.4, 5.1): glue between the queues, the filter and the hostdev."""

from __future__ import annotations

from collections.abc import Mapping

from qvm_virtio_net import spec
from qvm_virtio_net.connect import make_hostdev
from qvm_virtio_net.ctrl import COMMAND_BYTES_MAX, execute
from qvm_virtio_net.filter import RxFilter
from qvm_virtio_net.hostdev import HostDev, NoCable
from qvm_virtio_net.mac import format_mac
from qvm_virtio_net.options import NetOptions, address_of
from qvm_virtio_net.pcap import Capture
from qvm_virtio_net.receiver import BUDGET, Agreed, Receiver
from qvm_virtio_net.stats import Stats
from qvm_virtio_net.transmitter import Transmitter
from qvmcore.api import BadDescriptorChain, GuestEnd, VdevContext, VirtioVdev, Virtqueue

QUEUE_SIZE = 256
CONTROL_SIZE = 64

#: What the card can by itself, whatever it is plugged into.
_OWN = (
    spec.F_MAC | spec.F_STATUS | spec.F_MTU | spec.F_MRG_RXBUF | spec.F_CTRL_VQ | spec.F_CTRL_RX
    | spec.F_CTRL_RX_EXTRA | spec.F_CTRL_VLAN | spec.F_CTRL_MAC_ADDR | spec.F_GUEST_ANNOUNCE
)  # fmt: skip


class VirtioNet(VirtioVdev):
    """A network card. Queue 2n receives and 2n+1 transmits for pair n; the last one controls."""

    vdev_type = "virtio-net"
    summary = "a network card on a peer VM, a tap interface or passt"
    Options = NetOptions
    device_id = spec.DEVICE_ID
    queue_sizes: tuple[int, ...] = (QUEUE_SIZE, QUEUE_SIZE, CONTROL_SIZE)

    def __init__(self, ctx: VdevContext, options: NetOptions) -> None:
        self.queue_sizes = (QUEUE_SIZE, QUEUE_SIZE) * options.queues + (CONTROL_SIZE,)
        super().__init__(ctx, options)
        self._mac = address_of(options, ctx.machine, ctx.name)
        self.filter = RxFilter(self._mac)
        self._stats = Stats()
        self._host: HostDev = NoCable()
        self._capture: Capture | None = None
        self._receivers: dict[int, Receiver] = {}
        self._transmitters: dict[int, Transmitter] = {}
        self._announce = False
        self._was_up = False
        self._agreed = Agreed()
        #: Pairs that receive, from the first on (5.1.9.5.6).
        self._receiving = 1

    def on_configured(self) -> None:
        """Open the hostdev and the capture."""
        options: NetOptions = self.options
        ctx = self.ctx
        if options.pcap:
            self._capture = Capture(
                ctx.base_dir / options.pcap,
                options.pcap_limit,
                lambda text: ctx.log.warning("%s: %s", ctx.name, text),
            )
        self._host = make_hostdev(options, ctx, format_mac(self._mac))
        self._host.open(ctx.worker, self)

    def device_features(self) -> int:
        """5.1.3; offloads as far as the hostdev carries their header."""
        features = _OWN | self._host.offloads
        if self._host.offloads & spec.F_GUEST_CSUM:
            features |= spec.F_CTRL_GUEST_OFFLOADS
        if self.options.queues > 1:
            features |= spec.F_MQ
        return features

    def refuse_features(self, features: int) -> str:
        """5.1.3.1."""
        for name, bit, needed, needed_bit in spec.REQUIRES:
            if features & bit and not features & needed_bit:
                return f"VIRTIO_NET_F_{name} needs VIRTIO_NET_F_{needed}"
        return ""

    def config_space(self) -> bytes:
        """struct virtio_net_config (5.1.4). The driver writes none of it."""
        status = (spec.S_LINK_UP if self._host.up else 0) | (spec.S_ANNOUNCE if self._announce else 0)
        return spec.CONFIG.pack(self.filter.mac, status, self.options.queues, self.options.mtu)

    # ---- life of a driver ----------------------------------------------------------------------

    def on_activate(self, features: int) -> None:
        """Receive on the first pair only, until the driver asks for more (5.1.9.5.6)."""
        self._agreed.offloads = features & spec.GUEST_OFFLOADS
        self._host.set_guest_offloads(self._agreed.offloads)
        if features & spec.F_CTRL_VLAN:
            self.filter.filter_vlans()

    def on_queue_stop(self, index: int, queue: Virtqueue) -> None:
        """Buffers in stock for frames to come."""
        pair, transmits = divmod(index, 2)
        if not transmits and pair in self._receivers:
            self._receivers[pair].give_back()

    def on_queue_reset(self, index: int) -> None:
        """The buffers in stock are the driver's again (2.6.1); the worker is idle."""
        pair, transmits = divmod(index, 2)
        if transmits:
            self._transmitters.pop(pair, None)
        elif self._receivers.pop(pair, None) is not None:
            self._host.pause(pair, False)

    def on_deactivate(self) -> None:
        """Back to the first driver's view; the worker is idle."""
        self._receivers, self._transmitters = {}, {}
        self.filter = RxFilter(self._mac)
        self._announce = False
        self._receiving = 1
        self._host.set_pairs(1)
        self._host.set_guest_offloads(0)
        for pair in range(self.options.queues):
            self._host.pause(pair, False)

    # ---- frames and commands, on the worker ---------------------------------------------------------

    @property
    def _pairs(self) -> int:
        """Queue pairs the driver knows of."""
        return self.options.queues if self.virtio.features & spec.F_MQ else 1

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        """Frames one way or the other, or commands. The control queue is behind the last pair (5.1.2)."""
        pairs = self._pairs
        pair, transmits = divmod(index, 2)
        if index == 2 * pairs:
            if self.virtio.features & spec.F_CTRL_VQ:
                self._control(queue)
        elif pair < pairs:
            if transmits:
                self._transmitter(pair, queue).serve(self.ctx.worker)
            elif pair < self._receiving:
                self._pump(pair, queue)

    def _transmitter(self, pair: int, queue: Virtqueue) -> Transmitter:
        """That of a queue, made at its first use."""
        found = self._transmitters.get(pair)
        if found is None:
            found = self._transmitters[pair] = Transmitter(
                pair, queue, self._host, self._stats, mtu=self.options.mtu, capture=self._capture
            )
        return found

    def _pump(self, pair: int, queue: Virtqueue) -> None:
        receiver = self._receivers.get(pair)
        if receiver is None:
            mergeable = bool(self.virtio.features & spec.F_MRG_RXBUF)
            receiver = self._receivers[pair] = Receiver(
                pair, queue, self._host, self.filter, self._stats, mergeable=mergeable,
                agreed=self._agreed, mtu=self.options.mtu, capture=self._capture,
            )  # fmt: skip
        if receiver.pump(self.ctx.worker):
            # More may wait on the host; the transmit queue gets its turn first.
            self.virtio.kick(2 * pair)

    def _control(self, queue: Virtqueue) -> None:
        for chain in queue:
            if not chain.writable:
                raise BadDescriptorChain("control command without room for its answer")
            right = chain.readable <= COMMAND_BYTES_MAX and execute(chain.read(), self.virtio.features, self)
            chain.write(spec.CTRL_OK if right else spec.CTRL_ERR)
            queue.push(chain)

    # ---- what commands act upon (ctrl.Card) --------------------------------------------------------

    def set_mac(self, mac: bytes) -> None:
        """The configuration says so before the command is answered (5.1.9.5.2)."""
        self.filter.mac = mac
        self.virtio.config_changed()

    def acknowledge_announce(self) -> None:
        """5.1.9.5.4."""
        self._announce = False
        self.virtio.config_changed()

    def set_pairs(self, pairs: int) -> bool:
        """5.1.9.5.6: when the command is answered no other pair receives any more."""
        if not 1 <= pairs <= self._pairs or not self._host.set_pairs(pairs):
            return False
        for pair in range(self._receiving, pairs):
            # Its buffers may have come while nobody looked.
            self.virtio.kick(2 * pair)
        self._receiving = pairs
        for pair, receiver in self._receivers.items():
            if pair >= pairs:
                receiver.switch_off()
        return True

    def set_guest_offloads(self, offloads: int) -> bool:
        """5.1.9.5.9."""
        if offloads & ~spec.F_GUEST_CSUM and not offloads & spec.F_GUEST_CSUM:
            return False
        self._agreed.offloads = offloads
        self._host.set_guest_offloads(offloads)
        return True

    # ---- what the hostdev tells (hostdev.Events), on the worker ---------------------------------------

    def readable(self, pair: int) -> None:
        """Frames wait; without a driver, or on a pair that is off, they are lost, as on any card that
        is not up."""
        queue = self.virtio.queue(2 * pair)
        if queue is None or pair >= self._receiving:
            scrap = bytearray(spec.HEADER_BYTES + spec.FRAME_BYTES_MAX)
            for _ in range(BUDGET):
                if not self._host.receive(pair, [scrap]):
                    break
                self._stats.rx_no_driver += 1
            return
        try:
            self._pump(pair, queue)
        except BadDescriptorChain as error:
            self.virtio.needs_reset(error)
        queue.notify()

    def writable(self, pair: int) -> None:
        """The hostdev takes frames again."""
        if pair in self._transmitters:
            self._transmitters[pair].writable()
            self.virtio.kick(2 * pair + 1)

    def link_changed(self) -> None:
        """Tell the driver (5.1.4); a cable that is back may lead elsewhere, so it should announce itself."""
        up = self._host.up
        if up and self._was_up and self.virtio.features & spec.F_GUEST_ANNOUNCE:
            self._announce = True
        self._was_up = self._was_up or up
        self.virtio.config_changed()
        # Frames that were held back for a cable that is out now have nothing to wait for.
        for pair in tuple(self._transmitters):
            self.writable(pair)

    def on_terminate(self, end: GuestEnd) -> None:
        """Unplug."""
        self._host.close()
        if self._capture is not None:
            self._capture.close()

    def status(self) -> Mapping[str, object]:
        """Counters since the start, beside those of the queues."""
        return {
            **super().status(),
            "mac": format_mac(self.filter.mac),
            "link": "up" if self._host.up else "down",
            **self._host.status(),
            **self._stats.report(),
            "filter": self.filter.report(),
        }
