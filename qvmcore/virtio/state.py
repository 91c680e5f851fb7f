"""The device status machine of virtio 1.4, shared by all transports (2.1, 2.2, 2.4, 2.5, 3.1).

A transport turns its registers into the calls of :class:`VirtioState`; the state tells it of
interrupts through :class:`Transport`. Features are integers of any width, seen 32 bits at a time.

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

import os
import threading
import time
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

#: Feature bits every device has, because the core implements them.
CORE_FEATURES = (
    1 << spec.VIRTIO_F_VERSION_1
    | 1 << spec.VIRTIO_F_EVENT_IDX
    | 1 << spec.VIRTIO_F_INDIRECT_DESC
    | 1 << spec.VIRTIO_F_RING_PACKED
    | 1 << spec.VIRTIO_F_RING_RESET
)

#: 32-bit feature words a driver may select; the standard allots bits up to 127 (2.2).
FEATURE_WORDS = 32

_DRIVER_BITS = spec.ACKNOWLEDGE | spec.DRIVER | spec.DRIVER_OK | spec.FEATURES_OK | spec.FAILED
_WELCOME = spec.ACKNOWLEDGE | spec.DRIVER


class VirtioState:
    """The life of one virtio device, and the services its author uses as ``self.virtio``."""

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
        self._held = False  # the transport may not reach guest memory

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

    # ---- for transports: registers, on vCPU threads ---------------------------------------

    @property
    def status(self) -> int:
        """The device status field (2.1)."""
        return self._status

    def device_features(self, word: int) -> int:
        """Offered feature bits ``32 * word`` to ``32 * word + 31``; 0 beyond the last."""
        return self.offered >> 32 * word & 0xFFFFFFFF if word < FEATURE_WORDS else 0

    def driver_features(self, word: int) -> int:
        """What the driver accepted of these 32 bits so far; 0 beyond the last word."""
        return self._driver_features >> 32 * word & 0xFFFFFFFF if word < FEATURE_WORDS else 0

    def write_driver_features(self, word: int, value: int) -> None:
        """The driver accepts these 32 bits. Without effect after FEATURES_OK, which took a copy (2.2)."""
        with self._control:
            if word >= FEATURE_WORDS:
                # Nothing is offered up there; remembered, not stored: the word number is the guest's.
                self._beyond = self._beyond or value != 0
                return
            shift = 32 * word
            self._driver_features = self._driver_features & ~(0xFFFFFFFF << shift) | value << shift

    def write_status(self, value: int) -> None:
        """The driver wrote the device status; 0 resets (2.4). Bits are never cleared otherwise (2.1.1)."""
        with self._control:
            if value == 0:
                self.reset()
                return
            if self._ended:
                return
            new = value & _DRIVER_BITS & ~self._status
            with self._lock:
                self._status |= new & (_WELCOME | spec.FAILED)
                if new & spec.FAILED:
                    self._kill_queues()
            if new & spec.FEATURES_OK:
                reason = self._accept_features()
                if reason:
                    self._vdev.ctx.log.debug("FEATURES_OK refused: %s", reason)
            if new & spec.DRIVER_OK and not self._status & (spec.DEVICE_NEEDS_RESET | spec.FAILED):
                self._activate()

    def setup(self, index: int) -> QueueSetup | None:
        """The driver-visible parameters of a queue, None when there is no such queue."""
        return self._setups[index] if index < len(self._setups) else None

    @property
    def configurable(self) -> bool:
        """Whether queues may be set up: between FEATURES_OK and DRIVER_OK (3.1.1 step 7)."""
        return self._status & (spec.FEATURES_OK | spec.DRIVER_OK | spec.FAILED) == spec.FEATURES_OK

    def queue_configurable(self, index: int) -> bool:
        """Whether the driver may set this queue up: during set-up, or after a reset of it (2.6.1.2)."""
        setup = self.setup(index)
        if setup is None or setup.ready:
            return False
        return self.configurable or (setup.reopened and self.active)

    def queue_resetting(self, index: int) -> bool:
        """What the driver reads while it waits for a reset of one queue (4.1.4.3.1, 4.2.2.1)."""
        setup = self.setup(index)
        return setup is not None and setup.resetting

    def write_queue_ready(self, index: int, value: int) -> None:
        """1 checks and enables a queue during set-up or after its reset, 0 stops it and waits for it.

        An unusable queue stays at 0 and puts the device into DEVICE_NEEDS_RESET.
        """
        with self._control:
            setup = self.setup(index)
            if setup is None:
                return
            if value & 1:
                if self.queue_configurable(index):
                    try:
                        setup.enable(self._vdev.ctx.memory, self._features)
                    except GuestError as error:
                        self.needs_reset(type(error)(f"queue {index}: {error}"))
                        return
                    if self._activated:
                        self._make_queue(index, setup)
                        self._serve_queue(index)
                return
            queue = self._queues[index]
            if queue is not None and setup.ready:
                queue.kill()
                if not self._quiesce(lambda: None):
                    return
            setup.ready = False

    def reset_queue(self, index: int) -> None:
        """The driver resets one queue (2.6.1); waits for the worker, bounded. Others go on.

        The queue is then as before its set-up, and may be set up again. Without RING_RESET, or for a
        number without a queue, nothing happens. When the worker does not come, the reset never
        completes and the device is lost, as with :meth:`reset`.
        """
        with self._control:
            setup = self.setup(index)
            negotiated = self._features >> spec.VIRTIO_F_RING_RESET & 1
            if setup is None or not negotiated or self._hung or self._ended:
                return
            setup.resetting = True
            queue = self._queues[index]
            if queue is not None:
                queue.kill()
                if not self._quiesce(partial(self._vdev.on_queue_reset, index)):
                    return
                with self._lock:
                    self._queues[index] = None
            setup.reset()
            setup.reopened = self._activated

    def notify(self, value: int) -> None:
        """The driver notified: ``value`` is what it wrote, the number of a queue and, with
        NOTIFICATION_DATA, the position it filled the ring up to in the upper 16 bits (2.9).

        A number without a queue, or before DRIVER_OK: ignored (2.1.2).
        """
        if self._features >> spec.VIRTIO_F_NOTIFICATION_DATA & 1:
            position, value = value >> 16, value & 0xFFFF
            queue = self._queues[value] if value < len(self._queues) else None
            if queue is not None and queue.reached(position):
                # The worker took it while it was busy with what came before: no need to wake it.
                return
        self.notify_queue(value)

    def notify_queue(self, index: int) -> None:
        """As :meth:`notify`, for a notification without a position."""
        if not self._activated or index >= len(self._doorbells):
            return
        at_once = self._at_once.get(index)
        if at_once is None or not self._vdev.ctx.worker.visit(at_once):
            self._doorbells[index].signal()

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The driver writes the device configuration; dropped unless wholly inside it."""
        with self._control:
            if offset + size > self.config.length or self._ended:
                return
            self._touched = True
            self._vdev.config_write(offset, value.to_bytes(size, "little"))
            self.config.refresh()

    def hold(self, held: bool) -> None:
        """Guest memory is out of the transport's reach, or within it again.

        While held no chain is taken from a queue; when released every queue is looked at, so that no
        notification is lost. Waits, bounded, until the worker has left what it took before; a chain
        that the device serves elsewhere is still handed back. Survives a reset: it is the transport's.
        """
        with self._control:
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

    # ---- for a transport whose driver is elsewhere (vhost-user), on its thread ------------------

    def negotiate(self, features: int) -> None:
        """What a driver does from ACKNOWLEDGE to FEATURES_OK, after a reset if it had chosen others.

        The same features again change nothing. Raises GuestError when they are not acceptable.
        """
        with self._control:
            if self._status & spec.FEATURES_OK and features == self._features:
                return
            self.reset()
            self._check_alive()
            self._status |= _WELCOME
            self._driver_features = features
            reason = self._accept_features()
            if reason:
                raise GuestError(reason)

    def start_queue(
        self,
        index: int,
        size: int,
        desc: int,
        driver: int,
        device: int,
        *,
        position: int | None = None,
        kick: int = -1,
        inflight: Inflight | None = None,
    ) -> None:
        """Serve a queue from ``position`` on, None for a fresh one; the first one activates the device.

        Addresses are guest-physical. ``kick`` is a non-blocking descriptor that rings for the queue
        beside its doorbell; it stays the caller's. ``inflight`` keeps record of the chains in hand.
        Raises GuestError when that is impossible.
        """
        with self._control:
            self._check_alive()
            setup = self.setup(index)
            if setup is None or not self._status & spec.FEATURES_OK:
                wrong = "it has no such queue" if setup is None else "no features were negotiated"
                raise GuestError(f"queue {index}: {wrong}")
            if setup.ready:
                raise GuestError(f"queue {index}: it runs already")
            setup.reset()
            setup.size, setup.desc, setup.driver, setup.device = size, desc, driver, device
            try:
                setup.enable(self._vdev.ctx.memory, self._features)
                self._make_queue(index, setup, position, inflight)
            except GuestError as error:
                setup.reset()
                raise type(error)(f"queue {index}: {error}") from error
            if kick >= 0:
                self._kicks[index] = kick
            if not self._activated:
                self._driver_ok()
            self._serve_queue(index)

    def stop_queue(self, index: int, timeout: float) -> int | None:
        """Serve the queue no longer: its position, None when it does not run.

        No more chains are taken; those in hand get ``timeout`` seconds to be given back, then they are
        void. Nothing touches the rings or the kick descriptor afterwards. Raises HostError when the
        worker does not come, as for a reset; the device is lost then.
        """
        with self._control:
            setup = self.setup(index)
            queue = self._queues[index] if setup is not None else None
            if setup is None or queue is None or self._hung:
                return None
            queue.close()
            if not _drained([queue], timeout):
                self._vdev.ctx.log.warning("queue %d: stopped with %d chains in hand", index, queue.in_hand)
            self._unwatch(index)

            def end() -> None:
                queue.kill()
                self._vdev.on_queue_reset(index)

            if not self._quiesce(end):
                raise HostError(f"queue {index}: the worker still runs and may use guest memory")
            with self._lock:
                self._queues[index] = None
            setup.reset()
            return queue.position

    def remap(self, change: Callable[[], None]) -> None:
        """Call ``change``, which replaces regions of guest memory, with the device out of all of it.

        Queues that run are found again at the same guest-physical addresses; where that is impossible,
        or chains in hand are not given back in time, the device needs a reset. Raises HostError, without
        the call, when the worker does not come; the device is lost then.
        """
        with self._control:
            live = [queue for queue in self._queues if queue is not None and not queue.dead]
            if not live or self._hung:
                change()
                return
            held, self._held = self._held, True
            try:
                # Held, the worker takes nothing new; what others have in hand comes back meanwhile.
                idle = _drained(live, QUIESCE_TIMEOUT)
                if not self._quiesce(change):
                    raise HostError("the worker still runs and may use guest memory")
                if not idle:
                    self.needs_reset(GuestError("memory changed with chains in hand"))
                    return
                for queue in live:
                    try:
                        self._setups[queue.index].rebind(self._vdev.ctx.memory, queue)
                    except GuestError as error:
                        self.needs_reset(type(error)(f"queue {queue.index}: {error}"))
                        return
            finally:
                self._held = held
                for queue in live:
                    self._doorbells[queue.index].signal()

    def _check_alive(self) -> None:
        if self._hung or self._ended or self._status & (spec.DEVICE_NEEDS_RESET | spec.FAILED):
            raise GuestError("the device needs a reset" if not self._hung else "the device hangs")

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
            self.config.refresh()
            self._transport.reset()

    # ---- inside ----------------------------------------------------------------------------

    def _accept_features(self) -> str:
        """Take the driver's choice; why not, if it is not acceptable (2.2.2, 3.1.1 steps 5 and 6; 6.2)."""
        chosen = self._driver_features
        if self._status & _WELCOME != _WELCOME:
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

    def _activate(self) -> None:
        if not self._status & spec.FEATURES_OK or self._activated:
            return
        for index, setup in enumerate(self._setups):
            if setup.ready:
                self._make_queue(index, setup)
        self._driver_ok()
        for index, queue in enumerate(self._queues):
            if queue is not None:
                self._serve_queue(index)

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
            worker.watch(kick, self._server(index, partial(self._drain_kick, kick)))
        if self._serves_now:
            self._at_once[index] = visitor(index, self.queue, self._vdev.serve_now, self.needs_reset)
        # Buffers offered before this came without a notification.
        doorbell.signal()

    def _drain_kick(self, kick: int) -> None:
        try:
            if not os.read(kick, 8):
                # Whoever could ring has gone; what has no end would be readable for ever.
                self._vdev.ctx.worker.unwatch(kick)
        except BlockingIOError:
            pass

    def _server(self, index: int, drain: Callable[[], object]) -> Callable[[], None]:
        """What the worker does for a ring of the doorbell: drain the queue, then one notification."""
        queues, handle = self._queues, self._vdev.handle_queue

        def serve() -> None:
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


def _drained(queues: Sequence[Virtqueue], timeout: float) -> bool:
    """Wait until every chain was given back; False after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while any(queue.in_hand and not queue.dead for queue in queues):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.0005)
    return True


def _checked_sizes(vdev: VirtioVdev) -> tuple[int, ...]:
    """``queue_sizes``, refused when the ring format or IOV_MAX could not follow."""
    for size in vdev.queue_sizes:
        if not 1 <= size <= 1024 or size & (size - 1):
            raise PluginError(f"{vdev.vdev_type}: queue sizes are powers of two up to 1024, not {size}")
    return vdev.queue_sizes
