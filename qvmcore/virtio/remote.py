"""A driver that is elsewhere and sets up the device's queues one by one, by messages (vhost-user).

There is no status register then, perhaps, and queues come and go while the device lives, with a position
to go on from; guest memory is what the other side last said it is. All calls come from one thread, which
counts as a vCPU's; the locks are those of ``life``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qvmcore.errors import GuestError, HostError
from qvmcore.virtio import life, spec
from qvmcore.virtio.life import DeviceLife
from qvmcore.virtio.queue import Virtqueue

if TYPE_CHECKING:
    from qvmcore.virtio.inflight import Inflight


class RemoteDriver(DeviceLife):
    """The driver's side of a device's life, queue by queue."""

    def negotiate(self, features: int) -> None:
        """What a driver does from ACKNOWLEDGE to FEATURES_OK, after a reset if it had chosen others.

        The same features again change nothing. Raises GuestError when they are not acceptable.
        """
        with self._control:
            if self._status & spec.FEATURES_OK and features == self._features:
                return
            self.reset()
            self._check_alive()
            self._status |= life.WELCOME
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

        Addresses are guest-physical. ``kick`` is an eventfd that rings for the queue beside its doorbell;
        it stays the caller's, and nothing is read from it. ``inflight`` keeps record of the chains in hand.
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
            # No message tells a client what size a queue may have: most have one size for all.
            setup.size_max = life.LARGEST_QUEUE
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
            self._recall([queue])
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

    def remap(self, change: Callable[[], None], *, in_parts: bool = False) -> None:
        """Call ``change``, which replaces regions of guest memory, with the device out of all of it.

        Queues that run are found again at the same guest-physical addresses; where that is impossible,
        or chains in hand are not given back in time, the device needs a reset. Raises HostError, without
        the call, when the worker does not come; the device is lost then.

        ``in_parts``: memory may go before it comes back, by several calls. While a queue has no rings
        the device stays out of memory, as by :meth:`hold`, and the next call looks for them again.
        """
        with self._control:
            live = [queue for queue in self._queues if queue is not None and not queue.dead]
            if not live or self._hung:
                change()
                return
            self._held = True
            try:
                self._recall(live)
                # Held, the worker takes nothing new; what others have in hand comes back meanwhile.
                idle = _drained(live, life.QUIESCE_TIMEOUT)
                if not self._quiesce(change):
                    raise HostError("the worker still runs and may use guest memory")
                if not idle:
                    self.needs_reset(GuestError("memory changed with chains in hand"))
                    return
                self._incomplete = False
                for queue in live:
                    try:
                        self._setups[queue.index].rebind(self._vdev.ctx.memory, queue)
                    except GuestError as error:
                        if not in_parts:
                            self.needs_reset(type(error)(f"queue {queue.index}: {error}"))
                            return
                        self._incomplete = True
            finally:
                self._held = self._out_of_reach or self._incomplete
                for queue in live:
                    self._doorbells[queue.index].signal()

    def _recall(self, queues: Sequence[Virtqueue]) -> None:
        """Have the device give back what it popped ahead."""
        waiting = [queue for queue in queues if queue.in_hand]

        def recall() -> None:
            for queue in waiting:
                self._vdev.on_queue_stop(queue.index, queue)

        if waiting and not self._quiesce(recall):
            raise HostError("the worker still runs and may use guest memory")

    def _check_alive(self) -> None:
        if self._hung or self._ended or self._status & (spec.DEVICE_NEEDS_RESET | spec.FAILED):
            raise GuestError("the device needs a reset" if not self._hung else "the device hangs")


def _drained(queues: Sequence[Virtqueue], timeout: float) -> bool:
    """Wait until every chain was given back; False after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while any(queue.in_hand and not queue.dead for queue in queues):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.0005)
    return True
