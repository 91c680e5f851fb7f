"""The rings of one connection: what the client said of each, and when it runs.

A ring runs when it has a kick descriptor, addresses and a size, and is enabled; GET_VRING_BASE stops it.
The text has it start at the first kick: what was offered before that is found a little earlier here, and
nothing else differs. A disabled ring is not touched at all. Thread: the session's, but for
:meth:`Vring.call`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qvm_vhost_user import notifier
from qvm_vhost_user.notifier import Notifier
from qvm_vhost_user.wire import Fd
from qvmcore.api import ClientError, GuestError, VirtioVdev, Worker

#: Seconds that chains in hand get to come back when a ring stops, and when the client has gone.
STOP_TIMEOUT = 3.0
LEAVE_TIMEOUT = 1.0


class Addresses(NamedTuple):
    """Client addresses of the three areas of a ring."""

    desc: int
    driver: int
    device: int


class Vring:
    """One ring; ``worker()`` is the thread that serves it."""

    def __init__(self, index: int, worker: Callable[[], Worker]) -> None:
        self.index = index
        self.size = 0
        self.addresses: Addresses | None = None
        #: As SET_VRING_BASE has it; None for a ring that nobody has served.
        self.position: int | None = None
        self.enabled = False
        self.running = False
        self.kick: Fd | None = None
        self.calls = Notifier(worker)
        self.errors = Notifier(worker, rarely=True)

    @property
    def complete(self) -> bool:
        """Whether it could run."""
        return bool(self.kick is not None and self.addresses is not None and self.size and self.enabled)

    def set_kick(self, fd: Fd | None) -> None:
        """Be woken by another descriptor; the old one is closed. Only while it does not run."""
        if self.kick is not None:
            self.kick.close()
        self.kick = fd

    def close(self) -> None:
        """Close every descriptor; idempotent."""
        self.set_kick(None)
        self.calls.set(None)
        self.errors.set(None)


class Vrings:
    """All rings of a device.

    ``translate(address)`` gives the guest-physical address of a client one; ``inflight(index, size)`` what
    keeps record of a ring's chains. Both raise GuestError.
    """

    def __init__(
        self,
        vdev: VirtioVdev,
        translate: Callable[[int], int],
        inflight: Callable[[int, int], Any],
    ) -> None:
        self._state = vdev.virtio
        self._translate = translate
        self._inflight = inflight
        ctx = vdev.ctx
        self._rings = tuple(Vring(index, lambda: ctx.worker) for index in range(len(vdev.queue_sizes)))
        self._calls = tuple(ring.calls.signal for ring in self._rings)

    def __getitem__(self, index: int) -> Vring:
        """The ring a message names. Raises ClientError when there is none."""
        if index >= len(self._rings):
            raise ClientError(f"ring {index} does not exist; the device has {len(self._rings)}")
        return self._rings[index]

    def call(self, index: int) -> None:
        """Tell the client of used buffers; any thread."""
        self._calls[index]()

    @property
    def running(self) -> Sequence[Vring]:
        """Those that run."""
        return [ring for ring in self._rings if ring.running]

    # ---- messages ------------------------------------------------------------------------------------

    def set_size(self, index: int, size: int) -> None:
        """SET_VRING_NUM. Raises GuestError for a ring that runs, and for no size."""
        ring = self._refuse_running(index, "its size")
        if not size:
            raise GuestError(f"ring {index}: a size of 0")
        ring.size = size

    def set_position(self, index: int, position: int) -> None:
        """SET_VRING_BASE. Raises GuestError for a ring that runs."""
        self._refuse_running(index, "its position").position = position

    def set_addresses(self, index: int, addresses: Addresses) -> None:
        """SET_VRING_ADDR; a ring that runs moves there. Raises GuestError when it cannot be there."""
        ring = self[index]
        if ring.addresses != addresses:
            self.stop(ring)
            ring.addresses = addresses
        self.settle(ring)

    def set_kick(self, index: int, fd: Fd) -> None:
        """SET_VRING_KICK. Raises GuestError when the ring cannot start."""
        ring = self[index]
        notifier.check_kick(fd, f"the kick descriptor of ring {index}")
        self.stop(ring)
        # The worker watches the number, so it may be closed only once the ring is stopped.
        ring.set_kick(Fd(fd.take()))
        self.settle(ring)

    def set_call(self, index: int, fd: Fd | None) -> None:
        """SET_VRING_CALL; None: the client looks for itself."""
        self[index].calls.set(_writable(fd, f"the call descriptor of ring {index}"))

    def set_error(self, index: int, fd: Fd | None) -> None:
        """SET_VRING_ERR."""
        self[index].errors.set(_writable(fd, f"the error descriptor of ring {index}"))

    def enable(self, index: int, enabled: bool) -> None:
        """SET_VRING_ENABLE. Raises GuestError when the ring cannot start."""
        ring = self[index]
        ring.enabled = enabled
        self.settle(ring)

    def enable_all(self) -> None:
        """SET_FEATURES without PROTOCOL_FEATURES: there is no SET_VRING_ENABLE for such a client."""
        for ring in self._rings:
            ring.enabled = True

    def take_base(self, index: int) -> int:
        """GET_VRING_BASE: stop a ring; where it stands. It needs new kick and call descriptors."""
        ring = self[index]
        self.stop(ring, STOP_TIMEOUT)
        ring.set_kick(None)
        ring.calls.set(None)
        return ring.position or 0

    # ---- start and stop --------------------------------------------------------------------------------

    def settle(self, ring: Vring) -> None:
        """Run the ring if it can, stop it if it must not. Raises GuestError when it cannot start."""
        if not ring.complete:
            self.stop(ring)
            return
        if ring.running:
            return
        assert ring.addresses is not None and ring.kick is not None
        try:
            desc, driver, device = self._guest_addresses(ring.index, ring.addresses)
            self._state.start_queue(
                ring.index,
                ring.size,
                desc,
                driver,
                device,
                position=ring.position,
                kick=ring.kick.number,
                inflight=self._inflight(ring.index, ring.size),
            )
        except GuestError:
            ring.errors.signal()
            raise
        ring.running = True

    def _guest_addresses(self, index: int, addresses: Addresses) -> Addresses:
        try:
            return Addresses(*map(self._translate, addresses))
        except GuestError as error:
            raise GuestError(f"queue {index}: {error}") from error

    def settle_all(self) -> Sequence[GuestError]:
        """As :meth:`settle`, for every ring; the errors of those that cannot start."""
        errors = []
        for ring in self._rings:
            try:
                self.settle(ring)
            except GuestError as error:
                errors.append(error)
        return errors

    def stop(self, ring: Vring, timeout: float = STOP_TIMEOUT) -> None:
        """Stop it, and remember where it stands; after this nothing touches it."""
        if ring.running:
            position = self._state.stop_queue(ring.index, timeout)
            ring.running = False
            if position is not None:
                ring.position = position

    def stop_all(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop every ring, in ``timeout`` seconds altogether."""
        deadline = time.monotonic() + timeout
        for ring in self._rings:
            self.stop(ring, max(0.0, deadline - time.monotonic()))

    def disable_all(self) -> None:
        """Stop every ring until it is enabled again."""
        self.stop_all()
        for ring in self._rings:
            ring.enabled = False

    def silence(self) -> None:
        """The device was reset: no ring starts before it gets another kick descriptor."""
        for ring in self._rings:
            ring.set_kick(None)

    def begin_anew(self) -> None:
        """As :meth:`silence`, for another driver: its rings begin at their beginning."""
        self.silence()
        for ring in self._rings:
            ring.position = None

    def release(self) -> None:
        """Let go every thread that a client keeps waiting at its call descriptor; it is leaving."""
        for ring in self._rings:
            ring.calls.release()

    def fail(self) -> None:
        """Tell the client that the device is broken, for every ring; any thread."""
        for ring in self._rings:
            ring.errors.signal()

    def close(self) -> None:
        """Close every descriptor; idempotent."""
        for ring in self._rings:
            ring.close()

    def _refuse_running(self, index: int, what: str) -> Vring:
        ring = self[index]
        if ring.running:
            raise GuestError(f"ring {index} runs, {what} cannot change; GET_VRING_BASE stops it")
        return ring


def _writable(fd: Fd | None, what: str) -> Fd | None:
    if fd is None:
        return None
    notifier.check_call(fd, what)
    return Fd(fd.take())
