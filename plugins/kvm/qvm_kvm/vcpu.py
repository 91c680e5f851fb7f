"""One vCPU: its thread, and the loop that lets the guest run and answers its exits.

The loop looks at requests (pause, stop) only when KVM_RUN was interrupted: whoever has one sets
``immediate_exit`` and sends the kick signal. KVM completes an access that was just answered before it
looks at ``immediate_exit``, so a vCPU at rest always stands between two instructions.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

from qvm_kvm import runpage
from qvm_kvm.arch import Backend
from qvm_kvm.exits import EXIT_IO, EXIT_IRQ_WINDOW_OPEN, EXIT_MMIO
from qvm_kvm.ioctls import RUN, untyped_ioctl
from qvm_kvm.runpage import RunPage
from qvm_kvm.vm import Vm

Read = Callable[[int, int], int]
Write = Callable[[int, int, int], None]

_ALL_BITS = (1 << 64) - 1


class Accesses(NamedTuple):
    """Where the guest's accesses go: ``read(address, size)``, ``write(address, size, value)``."""

    read: Read
    write: Write
    read_port: Read
    write_port: Write


class Hooks(NamedTuple):
    """What the thread of a vCPU calls.

    ``check(vcpu)`` at first and when it was interrupted: may wait, and says whether to go on;
    ``rare(vcpu, reason)`` for an exit that is no access: says the same;
    ``failed(vcpu, error)`` for an exception that ends the thread; ``gone()`` as its last act.
    """

    check: Callable[[Vcpu], bool]
    rare: Callable[[Vcpu, int], bool]
    failed: Callable[[Vcpu, BaseException], None]
    gone: Callable[[], None]


class Vcpu:
    """A vCPU. Raises OSError when KVM does not give one."""

    def __init__(self, vm: Vm, backend: Backend, index: int, accesses: Accesses) -> None:
        self.index = index
        self._backend = backend
        self._accesses = accesses
        self.fd = vm.create_vcpu(index)
        try:
            backend.prepare_vcpu(self.fd, index)
            self.page = RunPage(self.fd, vm.run_size)
        except BaseException:
            os.close(self.fd)
            raise
        self.counts: dict[int, int] = {EXIT_IO: 0, EXIT_MMIO: 0}
        self.interrupted = 0
        self._thread: threading.Thread | None = None
        self._signal = 0
        #: Held while a kick is under way and when the thread ends: no signal to a thread that is gone.
        self._life = threading.Lock()
        self._running = False
        #: At rest in ``check``; written on the vCPU thread.
        self.parked = False
        self._last: Mapping[str, int] = {}

    # ---- any thread ----------------------------------------------------------------------------

    def start(self, number: int, hooks: Hooks) -> None:
        """Start the thread; ``number`` is the kick signal. Raises RuntimeError when there is no thread."""
        self._signal = number
        self._thread = threading.Thread(
            target=self._run, args=(hooks,), name=f"qvm-vcpu{self.index}", daemon=True
        )
        self._running = True
        try:
            self._thread.start()
        except BaseException:
            self._running = False
            self._thread = None
            raise

    def kick(self) -> None:
        """Have it call ``check`` soon. Nothing when its thread has ended; one kick is enough."""
        with self._life:
            if not self._running:
                return
            self.page.u8[runpage.IMMEDIATE_EXIT] = 1
            ident = self._thread.ident if self._thread is not None else None
            if ident is not None and ident != threading.get_ident():
                try:
                    signal.pthread_kill(ident, self._signal)
                except OSError:
                    pass  # no room for one more: one is pending already

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self._running

    @property
    def is_current(self) -> bool:
        """Whether the caller is on the vCPU's thread."""
        return self._thread is threading.current_thread()

    def join(self, timeout: float) -> bool:
        """Wait for the thread to end; False when it runs on after ``timeout`` seconds."""
        if self._thread is not None:
            self._thread.join(max(0.0, timeout))
            return not self._thread.is_alive()
        return True

    def registers(self) -> Mapping[str, int]:
        """By name, of a vCPU at rest; of another one those of its last rest, as asking KVM would wait."""
        if self.fd >= 0 and (self.parked or not self._running):
            return self._backend.registers(self.fd)
        return self._last

    def close(self) -> None:
        """Give it back; its thread has ended. Idempotent."""
        if self.fd >= 0:
            self.page.close()
            os.close(self.fd)
            self.fd = -1

    # ---- the vCPU thread -----------------------------------------------------------------------

    def rest(self) -> None:
        """Note the registers; before a wait and at the end."""
        try:
            self._last = self._backend.registers(self.fd)
        except OSError:
            pass  # a VM whose memory is gone; the registers of the last rest remain

    def _run(self, hooks: Hooks) -> None:
        try:
            # Asked once before: a request from before this thread was there has not kicked it.
            if hooks.check(self):
                self._loop(hooks)
        except BaseException as error:
            hooks.failed(self, error)
        finally:
            self.rest()
            with self._life:
                self._running = False
            hooks.gone()

    def _loop(self, hooks: Hooks) -> None:
        fd, run, enter, counts = ctypes.c_int(self.fd), ctypes.c_ulong(RUN), untyped_ioctl, self.counts
        u8, u16, u32, u64 = self.page.u8, self.page.u16, self.page.u32, self.page.u64
        read, write, read_port, write_port = self._accesses
        by_size = {1: u8, 2: u16, 4: u32, 8: u64}
        while True:
            if enter(fd, run, None) < 0:
                if not self._not_entered(ctypes.get_errno(), hooks):
                    return
                continue
            reason = u32[runpage.REASON]
            if reason == EXIT_MMIO:
                counts[EXIT_MMIO] += 1
                size = u32[runpage.MMIO_LENGTH]
                if u8[runpage.MMIO_IS_WRITE]:
                    view = by_size.get(size)
                    if view is not None:
                        write(u64[runpage.MMIO_ADDRESS], size, view[runpage.MMIO_DATA // size])
                    else:
                        write(u64[runpage.MMIO_ADDRESS], size, _odd(u8, size))
                else:
                    # The kernel takes as many bytes of it as it asked for.
                    u64[runpage.MMIO_DATA // 8] = read(u64[runpage.MMIO_ADDRESS], size) & _ALL_BITS
            elif reason == EXIT_IO:
                counts[EXIT_IO] += 1
                size, port = u8[runpage.IO_SIZE], u16[runpage.IO_PORT]
                view = by_size[size]
                first = u64[runpage.IO_OFFSET] // size
                # A string instruction comes as one exit for many elements, at most a page of them.
                for place in range(first, first + u32[runpage.IO_COUNT]):
                    if u8[runpage.IO_DIRECTION]:
                        write_port(port, size, view[place])
                    else:
                        view[place] = read_port(port, size) & (1 << 8 * size) - 1
            elif reason != EXIT_IRQ_WINDOW_OPEN and not self._rare(reason, hooks):
                return

    def _not_entered(self, error: int, hooks: Hooks) -> bool:
        if error == errno.EINTR:
            self.interrupted += 1
            # Cleared before the requests are looked at, and set after they are made: none is lost.
            self.page.u8[runpage.IMMEDIATE_EXIT] = 0
            return hooks.check(self)
        if error == errno.EAGAIN:
            return True  # another vCPU has just started this one
        raise OSError(error, f"KVM_RUN of vCPU {self.index}: {os.strerror(error)}")

    def _rare(self, reason: int, hooks: Hooks) -> bool:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        return hooks.rare(self, reason)


def _odd(u8: memoryview, size: int) -> int:
    """A store of 3, 5, 6 or 7 bytes: a part of one across two pages."""
    return int.from_bytes(u8[runpage.MMIO_DATA : runpage.MMIO_DATA + min(size, 8)], "little")
