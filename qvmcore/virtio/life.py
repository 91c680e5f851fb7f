"""The life of a virtio device, whoever drives it: activation, queues, worker, reset, end (2.1, 2.4).

Threads. Register calls come from any vCPU thread, ``handle_queue`` runs on the device's worker, and
termination has a thread of its own. ``serve_now`` runs on a vCPU thread as the worker's visitor:
whoever waits for the worker waits for it too. Locks, in the order they are taken:

1. ``_control``: whoever changes the life of the device: status writes, queue stop, reset, end.
   Held while the worker is waited for, so the worker must never take it;
2. ``_lock``: status bits and queue table. Short; the device is not called inside;
3. those of the configuration snapshot and of the transport's interrupt, never together.

Reset quiesces first: the queues die, the doorbells fall silent, then the worker is waited for and
held still while ``on_deactivate`` runs. A worker that does not come within :data:`QUIESCE_TIMEOUT`
may sit in ``preadv`` into guest memory, so the driver must never see such a reset completed: the
device stays in DEVICE_NEEDS_RESET|FAILED and is reported as faulty.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from qvmcore.errors import GuestError, HostError, PluginError
from qvmcore.events import EventFd
from qvmcore.termination import Phase
from qvmcore.types import GuestEnd
from qvmcore.virtio import spec
from qvmcore.virtio.at_once import visitor
from qvmcore.virtio.config import ConfigSnapshot
from qvmcore.virtio.park import parked
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.queue_setup import QueueSetup
from qvmcore.virtio.transport import NoTransport, Transport

if TYPE_CHECKING:
    from qvmcore.virtio.device import VirtioVdev
    from qvmcore.virtio.inflight import Inflight

#: Seconds a reset waits for the worker to leave the device's code.
QUIESCE_TIMEOUT = 1.0
#: Entries; a chain is at most as long, and has to fit into one preadv (IOV_MAX).
LARGEST_QUEUE = 1024

#: Feature bits every device has, because the core implements them.
CORE_FEATURES = (
    1 << spec.VIRTIO_F_VERSION_1
    | 1 << spec.VIRTIO_F_EVENT_IDX
    | 1 << spec.VIRTIO_F_INDIRECT_DESC
    | 1 << spec.VIRTIO_F_RING_PACKED
    | 1 << spec.VIRTIO_F_RING_RESET
)

#: Status bits every driver sets first (3.1.1).
WELCOME = spec.ACKNOWLEDGE | spec.DRIVER


class DeviceLife:
    """What all drivers of a device have in common; see :class:`~qvmcore.virtio.state.VirtioState`."""

    def __init__(self, vdev: VirtioVdev, *, serves_now: bool = False) -> None:
        self._vdev = vdev
        self._serves_now = serves_now  # the device has a serve_now of its own
        #: The driver's view of ``config_space()``, for transports.
        self.config = ConfigSnapshot(lambda: vdev.config_space())
        self._transport: Transport = NoTransport()
        self._transport_features = self._withheld = 0
        self._control = threading.RLock()
        self._lock = threading.Lock()
        self._status = 0
        self._driver_features = 0
        self._beyond = False
        self._features = 0
        self._setups = tuple(QueueSetup(size) for size in _checked_sizes(vdev))
        self._queues: list[Virtqueue | None] = [None] * len(self._setups)
        self._doorbells: tuple[EventFd, ...] = ()
        self._kicks: dict[int, int] = {}  # descriptors of the transport that ring for a queue, too
        self._at_once: dict[int, Callable[[], bool]] = {}
        self._activated = False
        self._touched = False  # the device has something to undo at a reset
        self._hung = False
        self._ended = False
        self._out_of_reach = False  # the transport may not reach guest memory
        self._incomplete = False  # guest memory is without some rings, until more of it comes
        self._held = False  # one of these

    # ---- services for the device -----------------------------------------------------------

    @property
    def features(self) -> int:
        """The negotiated features; 0 before FEATURES_OK. Any thread."""
        return self._features

    @property
    def active(self) -> bool:
        """Whether the driver runs the device: DRIVER_OK and no error since. Any thread."""
        status = self._status
        return self._activated and not status & (spec.DEVICE_NEEDS_RESET | spec.FAILED)

    def queue(self, index: int) -> Virtqueue | None:
        """The live queue, or None when the device is not active, the driver set no such queue up, or
        guest memory is out of reach (:meth:`hold`)."""
        queue = self._queues[index]
        return None if queue is None or queue.dead or self._held else queue

    def kick(self, index: int) -> None:
        """Have ``handle_queue`` called for a queue, as if the driver had notified. Any thread.

        For work that starts on the host side, e.g. input that arrived. Ignored when not active.
        """
        if self._activated and index < len(self._doorbells):
            self._doorbells[index].signal()

    def config_changed(self, *, always: bool = False) -> None:
        """``config_space()`` returns something new: tell the driver (2.5, 3.2.1). Any thread.

        The driver sees the new bytes and the new generation at once, never a mixture. When the
        bytes are the same nothing happens, unless ``always`` asks for the notification itself. It
        is sent from DRIVER_OK on (2.1.2).
        """
        if (self.config.refresh() or always) and self._activated and not self._ended:
            self._transport.interrupt_config()

    def needs_reset(self, error: BaseException) -> None:
        """An error only a reset can mend: DEVICE_NEEDS_RESET, the queues die (2.1.2). Any thread."""
        with self._lock:
            if self._status & spec.DEVICE_NEEDS_RESET:
                return
            self._status |= spec.DEVICE_NEEDS_RESET
            live = bool(self._status & spec.DRIVER_OK)
            self._kill_queues()
        # Once per life of the device, so a hostile guest cannot fill the log faster than it resets.
        self._vdev.ctx.log.warning("device needs a reset: %s", error)
        if live:
            self._transport.interrupt_config()

    def counters(self) -> dict[str, object]:
        """Status byte, features and per-queue counters, JSON-able. Any thread."""
        queues = [{} if queue is None else queue.counters() for queue in self._queues]
        return {"status": self._status, "features": f"{self._features:#x}", "queues": queues}

    # ---- for transports: set-up -----------------------------------------------------------

    def attach(
        self, transport: Transport, features: int = 0, *, fast_doorbells: bool = False, withheld: int = 0
    ) -> None:
        """Connect the one transport, before the guest starts; allocates the doorbells.

        ``features`` are those the transport adds to the offer: NOTIFICATION_DATA when it passes
        all 32 bits of a notification to :meth:`notify`; ``withheld`` those it cannot carry.
        ``fast_doorbells``: a notification signals a doorbell instead of being a call on a vCPU thread,
        where the device may serve the queue at once.
        """
        self._transport = transport
        self._transport_features = features
        self._withheld = withheld
        self._serves_now &= not fast_doorbells
        self._doorbells = tuple(EventFd() for _ in self._setups)
        ctx = self._vdev.ctx
        ctx.on_terminate(self._stop_dma, phase=Phase.STOP_DMA, deadline=QUIESCE_TIMEOUT + 1.0)
        ctx.on_terminate(self._release, phase=Phase.RELEASE)

    @property
    def doorbells(self) -> Sequence[EventFd]:
        """One wake-up per queue: signal it to notify the device, from any thread or process."""
        return self._doorbells

    @property
    def offered(self) -> int:
        """The features offered: the device's own, the core's and the transport's."""
        in_order = self._vdev.in_order << spec.VIRTIO_F_IN_ORDER
        features = self._vdev.device_features() | CORE_FEATURES | self._transport_features | in_order
        return features & ~self._withheld

    @property
    def status(self) -> int:
        """The device status field (2.1)."""
        return self._status

    def setup(self, index: int) -> QueueSetup | None:
        """The driver-visible parameters of a queue, None when there is no such queue."""
        return self._setups[index] if index < len(self._setups) else None

    # ---- for transports: life ----------------------------------------------------------------

    def hold(self, held: bool) -> None:
        """Guest memory is out of the transport's reach, or within it again.

        While held no chain is taken from a queue; when released every queue is looked at, so that no
        notification is lost. Waits, bounded, until the worker has left what it took before; a chain
        that the device serves elsewhere is still handed back. Survives a reset: it is the transport's.
        """
        with self._control:
            self._out_of_reach = held
            held = held or self._incomplete
            if held == self._held:
                return
            self._held = held
            if not self._activated or self._ended:
                return
            if held:
                with parked(self._vdev.ctx.worker, QUIESCE_TIMEOUT):
                    return
            for queue, doorbell in zip(self._queues, self._doorbells, strict=True):
                if queue is not None:
                    doorbell.signal()

    def reset(self) -> None:
        """Back to the fresh state (2.4). Any thread; waits for the worker, bounded."""
        with self._control:
            if self._hung or self._ended:
                return
            self._silence()
            if self._touched and not self._quiesce(self._vdev.on_deactivate):
                return
            with self._lock:
                self._activated = self._touched = False
                self._status = 0
                self._driver_features = self._features = 0
                self._beyond = False
                self._queues = [None] * len(self._setups)
                for setup in self._setups:
                    setup.reset()
                self._incomplete, self._held = False, self._out_of_reach
            self.config.refresh()
            self._transport.reset()

    # ---- inside ----------------------------------------------------------------------------

    def _accept_features(self) -> str:
        """Take the driver's choice; why not, if it is not acceptable (2.2.2, 3.1.1 steps 5 and 6; 6.2)."""
        chosen = self._driver_features
        if self._status & WELCOME != WELCOME:
            return "ACKNOWLEDGE and DRIVER are not set"
        if self._beyond or chosen & ~self.offered:
            return f"features {chosen & ~self.offered:#x} were not offered"
        if not chosen >> spec.VIRTIO_F_VERSION_1 & 1:
            return "VIRTIO_F_VERSION_1 was not accepted"
        reason = self._vdev.refuse_features(chosen)
        if not reason:
            with self._lock:
                self._features = chosen
                self._status |= spec.FEATURES_OK
        return reason

    def _driver_ok(self) -> None:
        with self._lock:
            self._status |= spec.DRIVER_OK
            self._activated = self._touched = True
        try:
            self._vdev.on_activate(self._features)
        except Exception as error:
            self.needs_reset(error)
            raise

    def _make_queue(
        self, index: int, setup: QueueSetup, position: int | None = None, inflight: Inflight | None = None
    ) -> None:
        queue = setup.make(
            index,
            self._vdev.ctx.memory,
            self._features,
            partial(self._transport.interrupt_queue, index),
            self.needs_reset,
            self._doorbells[index].signal,
            position=position,
            inflight=inflight,
        )
        with self._lock:
            self._queues[index] = queue
            if self._status & (spec.DEVICE_NEEDS_RESET | spec.FAILED):
                # The device broke while the driver was setting this queue up again.
                queue.kill()

    def _serve_queue(self, index: int) -> None:
        """Have the worker listen to a queue."""
        doorbell, worker = self._doorbells[index], self._vdev.ctx.worker
        worker.watch(doorbell.fd, self._server(index, doorbell.drain))
        kick = self._kicks.get(index)
        if kick is not None:
            # It is not ours, and nothing is read from it: its owner could make a read wait.
            worker.watch(kick, self._server(index), edge=True)
        if self._serves_now:
            visit = visitor(index, self.queue, self._vdev.serve_now, self.needs_reset)
            self._at_once[index] = partial(worker.visit, visit)
        # Buffers offered before this came without a notification.
        doorbell.signal()

    def _server(self, index: int, drain: Callable[[], object] | None = None) -> Callable[[], None]:
        """What the worker does for a ring of the doorbell: drain the queue, then one notification."""
        queues, handle = self._queues, self._vdev.handle_queue

        def serve() -> None:
            if drain is not None:
                drain()
            queue = queues[index]
            if queue is None or queue.dead or self._held:
                return
            try:
                handle(index, queue)
            except GuestError as error:
                self.needs_reset(error)
            finally:
                queue.notify()

        return serve

    def _kill_queues(self) -> None:
        for queue in self._queues:
            if queue is not None:
                queue.kill()

    def _silence(self) -> None:
        self._kill_queues()
        if self._activated:
            for index in range(len(self._doorbells)):
                self._unwatch(index)

    def _unwatch(self, index: int) -> None:
        worker = self._vdev.ctx.worker
        worker.unwatch(self._doorbells[index].fd)
        kick = self._kicks.pop(index, None)
        if kick is not None:
            worker.unwatch(kick)

    def _quiesce(self, then: Callable[[], None]) -> bool:
        """Run ``then`` with the worker idle; False, and the device is lost, when it does not come."""
        vdev = self._vdev
        with parked(vdev.ctx.worker, QUIESCE_TIMEOUT) as idle:
            if idle:
                then()
                return True
        self._hung = True
        with self._lock:
            self._status |= spec.DEVICE_NEEDS_RESET | spec.FAILED
            self._kill_queues()
        vdev.ctx.fault(HostError(f"the device did not stop within {QUIESCE_TIMEOUT:g} s of its reset"))
        return False

    def _stop_dma(self, end: GuestEnd) -> None:
        """The VM ends: no access to guest memory and no interrupt after this returns."""
        with self._control:
            if self._ended:
                return
            self._ended = True
            self._silence()
            if self._activated and not self._hung and not self._quiesce(self._vdev.on_deactivate):
                raise HostError(f"{self._vdev.ctx.name}: the worker still runs and may use guest memory")

    def _release(self, end: GuestEnd) -> None:
        for doorbell in self._doorbells:
            doorbell.close()
        # The queues hold views of guest memory, which can be unmapped only without them.
        self._queues = [None] * len(self._queues)


def _checked_sizes(vdev: VirtioVdev) -> tuple[int, ...]:
    """``queue_sizes``, refused when the ring format or IOV_MAX could not follow."""
    for size in vdev.queue_sizes:
        if not 1 <= size <= LARGEST_QUEUE or size & (size - 1):
            raise PluginError(
                f"{vdev.vdev_type}: queue sizes are powers of two up to {LARGEST_QUEUE}, not {size}"
            )
    return vdev.queue_sizes
