"""Hostdev ``tap``: a tap interface of the host, which its administrator bridges or routes.

The kernel takes and gives frames with struct virtio_net_hdr (IFF_VNET_HDR), so unfinished checksums
and 64 KiB segments pass as they are. With several queue pairs each has a descriptor of its own
(IFF_MULTI_QUEUE), and the kernel steers a flow to the pair it was sent from.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from functools import partial

from qvm_virtio_net import spec
from qvm_virtio_net.hostdev import Events, Interest, Sent
from qvmcore.api import HostError, Worker

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_TUNSETQUEUE = 0x400454D9
_TUNSETVNETLE = 0x400454DC
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
_IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE = 0x0200, 0x0400
_TUN_F = {spec.F_GUEST_CSUM: 1, spec.F_GUEST_TSO4: 2, spec.F_GUEST_TSO6: 4}
_IFREQ = struct.Struct("16sH22x")
_INT = struct.Struct("=i")
_DEVICE = "/dev/net/tun"


class Tap:
    """The host's interface ``name``, with ``pairs`` queues."""

    offloads = spec.OFFLOADS

    def __init__(self, name: str, pairs: int, log: logging.LoggerAdapter[logging.Logger], vdev: str) -> None:
        self._name = name
        self._pairs = pairs
        self._log = log
        self._vdev = vdev
        self._fds: list[int] = []
        self._interests: list[Interest] = []
        self._attached = pairs
        self._gone = False

    @property
    def up(self) -> bool:
        """See HostDev."""
        return bool(self._fds) and not self._gone

    def open(self, worker: Worker, events: Events) -> None:
        """Attach to the interface; with the privilege to, make it. Raises HostError."""
        self._events = events
        for _ in range(self._pairs):
            self._fds.append(self._attach())
        for pair, fd in enumerate(self._fds):
            interest = Interest(worker, fd, partial(events.readable, pair), partial(self._writable, pair))
            self._interests.append(interest)
        self.set_guest_offloads(0)
        self.set_pairs(1)

    def _attach(self) -> int:
        try:
            fd = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            hint = "load the module: modprobe tun; in a container: --device /dev/net/tun"
            if error.errno in (errno.EACCES, errno.EPERM):
                hint = "it is usually open to everybody (mode 0666); ask the administrator"
            raise HostError.from_os("open", _DEVICE, error, hint=hint) from error
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if self._pairs > 1 else 0)
        try:
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(self._name.encode(), flags))
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, _INT.pack(spec.HEADER_BYTES))
            fcntl.ioctl(fd, _TUNSETVNETLE, _INT.pack(1))
        except OSError as error:
            os.close(fd)
            raise HostError.from_os(
                "use the tap interface", self._name, error, hint=self._hint(error)
            ) from error
        return fd

    def _hint(self, error: OSError) -> str:
        multi = " multi_queue" if self._pairs > 1 else ""
        make = f"ip tuntap add dev {self._name} mode tap user $USER{multi} && ip link set {self._name} up"
        if error.errno == errno.EPERM:
            return f"it is missing, or another user's; have root make it: {make}"
        if error.errno == errno.EBUSY:
            return "another program, or another vdev, has it"
        if error.errno == errno.EINVAL:
            wanted = "with" if multi else "without"
            return (
                f"there is an interface of this name that is no tap, or not made {wanted} multi_queue; {make}"
            )
        return make

    # ---- frames ----------------------------------------------------------------------------------

    def send(self, pair: int, message: Sequence[memoryview]) -> Sent:
        """See HostDev."""
        if self._gone:
            return Sent.NO_LINK
        # A pair that is not attached may still have frames: they go out on the first.
        fd = self._fds[pair if pair < self._attached else 0]
        try:
            os.writev(fd, message)
        except BlockingIOError:
            self._interests[pair].want(write=True)
            return Sent.BUSY
        except OSError as error:
            if error.errno == errno.EBADFD:
                self._lost()
                return Sent.NO_LINK
            # EIO: the host has set the interface down.
            return Sent.NO_LINK if error.errno == errno.EIO else Sent.REFUSED
        return Sent.TAKEN

    def receive(self, pair: int, buffers: Sequence[bytearray | memoryview]) -> int:
        """See HostDev."""
        if self._gone:
            return 0
        try:
            return os.readv(self._fds[pair], buffers)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._log.debug("%s: reading %s: %s", self._vdev, self._name, error)
            self._lost()
            return 0

    def _writable(self, pair: int) -> None:
        self._interests[pair].want(write=False)
        self._events.writable(pair)

    def _lost(self) -> None:
        if not self._gone:
            self._gone = True
            for interest in self._interests:
                interest.want(read=False, write=False)
            self._log.warning(
                "%s: the tap interface %s was removed; the cable is out", self._vdev, self._name
            )
            self._events.link_changed()

    def pause(self, pair: int, paused: bool) -> None:
        """See HostDev."""
        if pair < self._attached and not self._gone:
            self._interests[pair].want(read=not paused)

    # ---- settings --------------------------------------------------------------------------------

    def set_guest_offloads(self, offloads: int) -> None:
        """Without the kernel's help the card finishes frames itself, so a refusal harms nobody."""
        wanted = sum(flag for bit, flag in _TUN_F.items() if offloads & bit)
        for fd in self._fds:
            try:
                fcntl.ioctl(fd, _TUNSETOFFLOAD, wanted)
            except OSError as error:
                self._log.debug("%s: offloads of %s: %s", self._vdev, self._name, error)

    def set_pairs(self, pairs: int) -> bool:
        """Attach the first ``pairs`` descriptors for receiving, detach the others."""
        if self._gone or not self._fds:
            return False
        for pair in range(self._pairs):
            attach = pair < pairs
            if attach == (pair < self._attached):
                continue
            if not attach:
                # A detached descriptor reports an error for ever.
                self._interests[pair].want(read=False, write=False)
            flags = _IFF_ATTACH_QUEUE if attach else _IFF_DETACH_QUEUE
            try:
                fcntl.ioctl(self._fds[pair], _TUNSETQUEUE, _IFREQ.pack(b"", flags))
            except OSError as error:
                self._log.warning("%s: queues of %s: %s", self._vdev, self._name, error)
                return False
        self._attached = pairs
        for pair in range(pairs):
            self._interests[pair].want(read=True)
        return True

    def close(self) -> None:
        """See HostDev."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def status(self) -> Mapping[str, object]:
        """See HostDev."""
        return {"hostdev": f"tap {self._name}", "pairs": self._attached}
