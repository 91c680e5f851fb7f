"""The client's eventfd that unmasks INTx, watched by the socket's thread beside the socket.

A VMM with KVM passes one: KVM signals it at the guest's end of interrupt, and the VMM has nothing to do.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from qvm_vfio_user.client_eventfd import check_eventfd


class UnmaskEvents:
    """``ring()`` is called for each signal, while :meth:`wait` waits. One thread."""

    def __init__(self, socket_fd: int, ring: Callable[[], None]) -> None:
        self._socket_fd = socket_fd
        self._ring = ring
        self._fd = -1
        self._epoll: select.epoll | None = None

    def watch(self, fd: int) -> None:
        """Take a descriptor over, instead of the one before. Raises ValueError for one that is no eventfd."""
        check_eventfd(fd)
        self.close()
        self._epoll = select.epoll()
        self._epoll.register(self._socket_fd, select.EPOLLIN)
        # Told of every signal once. It is never read: the client could take a signal away just before, and
        # the read would wait for the next.
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)
        self._fd = fd

    def wait(self) -> None:
        """Wait until the socket can be read; at once when there is nothing to watch beside it."""
        while self._epoll is not None:
            ready = [fd for fd, _ in self._epoll.poll()]
            if self._fd in ready:
                self._ring()
            if self._socket_fd in ready:
                return

    def close(self) -> None:
        """Watch nothing any more; idempotent."""
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
            os.close(self._fd)
            self._fd = -1
