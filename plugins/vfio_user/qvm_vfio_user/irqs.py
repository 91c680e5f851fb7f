"""Interrupts: eventfds of the client for INTx and MSI-X, set up by DEVICE_SET_IRQS.

INTx is a level that masks itself when it has fired: the client unmasks it after the guest's end of
interrupt, and it fires again while the device still asks. The MSI-X table is the client's; the device
says a vector. Messages come on the socket's thread, interrupts from any.
"""

from __future__ import annotations

import errno
import threading

from qvm_vfio_user import spec
from qvm_vfio_user.client_eventfd import ClientEventFd
from qvm_vfio_user.unmask import UnmaskEvents
from qvm_vfio_user.wire import Message, Refused
from qvmcore.api import Bar, PciInterrupts


class Irqs:
    """The interrupts of one function; the :class:`~qvmcore.api.FunctionPort` it hangs on.

    Locks: the function's interrupts may hold theirs when they call, so nothing here calls them.
    """

    def __init__(self, interrupts: PciInterrupts) -> None:
        self._counts = {spec.INTX: int(interrupts.intx), spec.MSIX: interrupts.vectors}
        self._lock = threading.Lock()
        self._signals: dict[tuple[int, int], ClientEventFd] = {}
        self._level = False
        self._pulse = False  # INTx was signalled once while it could not fire
        self._masked = False
        self._early: set[int] = set()  # vectors signalled before they had an eventfd
        self._unmask: UnmaskEvents | None = None
        interrupts.on_vector = self.vector

    # ---- FunctionPort: any thread ------------------------------------------------------------------

    def message(self, address: int, data: int) -> None:
        """Not used: the client keeps the MSI-X table."""

    def set_intx(self, level: bool) -> None:
        """Drive ``INTA#``."""
        with self._lock:
            self._level = level
            self._fire_intx()

    def pulse_intx(self) -> None:
        """Signal ``INTA#`` once."""
        with self._lock:
            self._pulse = True
            self._fire_intx()

    def listen(self, fd: int, address: int, data: int) -> None:
        """Not possible: an eventfd's signals go to the client's by :meth:`vector`."""

    def listen_intx(self, fd: int, resample: int) -> None:
        """Not possible either."""

    def place(self, bar: Bar, address: int | None) -> None:
        """Nothing: the client places BARs."""

    def vector(self, number: int) -> None:
        """The device signals an MSI-X vector. Without an eventfd it is remembered, as a pending bit is."""
        with self._lock:
            signal = self._signals.get((spec.MSIX, number))
            if signal is None:
                self._early.add(number)
            else:
                signal.send()

    # ---- messages: the socket's thread ---------------------------------------------------------------

    def open(self, socket_fd: int) -> UnmaskEvents:
        """A client came. To be waited for by what comes back, before the socket is read."""
        self._unmask = UnmaskEvents(socket_fd, lambda: self._mask(False))
        return self._unmask

    def info(self, payload: bytes) -> bytes:
        """DEVICE_GET_IRQ_INFO. Raises Refused."""
        argsz, _, index, _ = spec.IRQ_INFO.unpack(payload)
        if argsz < spec.IRQ_INFO.size or index >= spec.IRQS:
            raise Refused(errno.EINVAL, f"argsz {argsz}, interrupt type {index}")
        count = self._counts.get(index, 0)
        flags = spec.IRQ_EVENTFD if count else 0
        if count and index == spec.INTX:
            flags |= spec.IRQ_MASKABLE | spec.IRQ_AUTOMASKED
        return spec.IRQ_INFO.pack(spec.IRQ_INFO.size, flags, index, count)

    def set(self, message: Message) -> None:
        """DEVICE_SET_IRQS. Raises Refused."""
        argsz, flags, index, start, count = spec.SET_IRQS.unpack_from(message.payload)
        booleans = message.payload[spec.SET_IRQS.size :]
        data, action = flags & spec.DATA_BITS, flags & spec.ACTION_BITS
        what = f"flags {flags:#x}, type {index}, {count} from {start}"
        if argsz < spec.SET_IRQS.size or index >= spec.IRQS or data | action != flags:
            raise Refused(errno.EINVAL, f"argsz {argsz}, {what}")
        if data.bit_count() != 1 or action.bit_count() != 1:
            raise Refused(errno.EINVAL, f"{what}: expected one kind of data and one action")
        if (len(message.fds) and data != spec.DATA_EVENTFD) or len(booleans) != (
            count if data == spec.DATA_BOOL else 0
        ):
            raise Refused(errno.EINVAL, f"{what}: {len(booleans)} bytes and {len(message.fds)} descriptors")
        if not count:
            if start or flags != spec.DATA_NONE | spec.ACTION_TRIGGER:
                raise Refused(errno.EINVAL, f"{what}: nothing is meant")
            self._disable(index)
            return
        if start + count > self._counts.get(index, 0):
            raise Refused(errno.EINVAL, f"{what}: there are {self._counts.get(index, 0)}")
        chosen = [start + at for at in range(count) if data != spec.DATA_BOOL or booleans[at]]
        if data == spec.DATA_EVENTFD:
            if action == spec.ACTION_TRIGGER:
                self._connect(index, chosen, message)
            elif action == spec.ACTION_UNMASK and index == spec.INTX:
                self._connect_unmask(message)
            else:
                raise Refused(errno.EINVAL, f"{what}: only an unmask of INTx can come by an eventfd")
        elif action == spec.ACTION_TRIGGER:
            self._trigger(index, chosen)
        elif index != spec.INTX:
            raise Refused(errno.EINVAL, f"{what}: only INTx can be masked")
        elif chosen:
            self._mask(action == spec.ACTION_MASK)

    def reset(self) -> None:
        """The device was reset: nothing is masked or pending. Its eventfds stay."""
        with self._lock:
            self._pulse = self._masked = False
            self._early.clear()
            self._fire_intx()

    def close(self) -> None:
        """The client is gone: close its eventfds; interrupts go nowhere from here on."""
        for index in self._counts:
            self._disable(index)
        self._unmask = None

    # ---- inside ------------------------------------------------------------------------------------

    def _fire_intx(self) -> None:
        """Signal INTx if there is a reason and a way; lock held."""
        signal = self._signals.get((spec.INTX, 0))
        if signal is not None and not self._masked and (self._level or self._pulse):
            self._masked, self._pulse = True, False
            signal.send()

    def _connect(self, index: int, numbers: list[int], message: Message) -> None:
        """Give interrupts their eventfds, or take them away when none came."""
        if len(message.fds) not in (0, len(numbers)):
            raise Refused(errno.EINVAL, f"{len(message.fds)} descriptors for {len(numbers)} interrupts")
        signals: list[ClientEventFd] = []
        try:
            while len(message.fds):
                signals.append(ClientEventFd(message.fds.take()))
        except ValueError as error:
            for each in signals:
                each.close()
            raise Refused(errno.EINVAL, str(error)) from error
        with self._lock:
            for number in numbers:
                old = self._signals.pop((index, number), None)
                if old is not None:
                    old.close()
            for number, signal in zip(numbers, signals, strict=False):
                self._signals[index, number] = signal
                if index == spec.MSIX and number in self._early:
                    self._early.discard(number)
                    signal.send()
            if index == spec.INTX:
                self._masked = False
                self._fire_intx()

    def _connect_unmask(self, message: Message) -> None:
        """Have an eventfd unmask INTx, or none when none came."""
        if len(message.fds) > 1 or self._unmask is None:
            raise Refused(errno.EINVAL, f"{len(message.fds)} descriptors to unmask INTx")
        if not message.fds:
            self._unmask.close()
            return
        try:
            self._unmask.watch(message.fds.take())
        except ValueError as error:
            raise Refused(errno.EINVAL, str(error)) from error

    def _disable(self, index: int) -> None:
        with self._lock:
            for key in [key for key in self._signals if key[0] == index]:
                self._signals.pop(key).close()
            if index == spec.MSIX:
                self._early.clear()
            elif index == spec.INTX:
                self._pulse = self._masked = False
        if index == spec.INTX and self._unmask is not None:
            self._unmask.close()

    def _trigger(self, index: int, numbers: list[int]) -> None:
        """The client signals itself, to try the way."""
        with self._lock:
            for number in numbers:
                signal = self._signals.get((index, number))
                if signal is not None:
                    signal.send()

    def _mask(self, masked: bool) -> None:
        with self._lock:
            self._masked = masked
            self._fire_intx()
