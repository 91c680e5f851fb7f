"""One life of a served vdev: clients come and go, their messages are answered.

Everything here runs on the socket's thread. Nothing waits for the client inside an access, and the
server never asks the client for anything: DMA by messages from a handler would wait for a client that
waits for the handler.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from contextlib import suppress

from qvm_vfio_user import spec
from qvm_vfio_user.dma import DmaMaps
from qvm_vfio_user.irqs import Irqs
from qvm_vfio_user.regions import Regions
from qvm_vfio_user.spec import Command
from qvm_vfio_user.version import Proposal
from qvm_vfio_user.wire import Connection, Disconnected, Message, Refused
from qvmcore.api import ClientError, PluginError, Served


class VfioUserSession:
    """The protocol's side of ``served``, whose function hangs on it from here on."""

    def __init__(self, served: Served) -> None:
        function, config = served.function, served.config
        if function is None or config is None:
            raise PluginError(f"{served.name}: vfio-user serves PCI functions only")
        self._served = served
        self._dma = DmaMaps(served, function)
        self._irqs = Irqs(function.interrupts)
        self._regions = Regions(function, config)
        self._proposal: Proposal | None = None
        self._told: set[int] = set()
        self._handlers: dict[int, Callable[[Message], bytes]] = {
            Command.REGION_WRITE: self._region_write,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE_MULTI: self._region_write_multi,
            Command.VERSION: self._version,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma.unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: lambda message: self._regions.info(message.payload),
            Command.DEVICE_GET_IRQ_INFO: lambda message: self._irqs.info(message.payload),
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.DEVICE_RESET: self._reset,
        }
        function.connect(self._irqs)

    def serve(self, connection: socket.socket) -> None:
        """Speak with one client until it leaves. Raises ClientError when it breaks the protocol."""
        wait = self._irqs.open(connection.fileno()).wait
        link = Connection(connection, wait, self._served.poll)
        self._proposal = None
        self._told.clear()
        try:
            while (message := link.receive()) is not None:
                try:
                    self._answer(link, message)
                finally:
                    message.fds.close()
        except Disconnected:
            pass  # as if it had been seen to leave
        finally:
            link.close()
            self._irqs.close()
            self._dma.end()

    # ---- inside ------------------------------------------------------------------------------------

    def _answer(self, link: Connection, message: Message) -> None:
        handler = self._handlers.get(message.command)
        try:
            if self._proposal is None and message.command != Command.VERSION:
                raise ClientError(f"{message.name} came before VERSION")
            if handler is None:
                raise Refused(errno.ENOTSUP, "not a command of this server")
            payload = handler(message)
        except Refused as error:
            self._tell(message, error)
            link.refuse(message, error.errno)
        except ClientError:
            with suppress(Disconnected):
                link.refuse(message, errno.EINVAL)
            raise
        else:
            link.reply(message, payload)

    def _tell(self, message: Message, error: Refused) -> None:
        """Once per connection and command at INFO, so that no client fills the log; QEMU asks for more
        types of interrupts than there are, and gets no line at all."""
        log = self._served.log
        if message.command in self._told or message.command == Command.DEVICE_GET_IRQ_INFO:
            log.debug("%s refused: %s", message.name, error)
        else:
            self._told.add(message.command)
            log.info("%s refused (said once): %s", message.name, error)

    def _version(self, message: Message) -> bytes:
        if self._proposal is not None:
            raise ClientError("VERSION came twice")
        self._proposal = Proposal(message.payload)
        return self._proposal.answer(len(message.payload))

    def _dma_map(self, message: Message) -> bytes:
        self._dma.map(message)
        return b""

    def _device_info(self, message: Message) -> bytes:
        argsz = spec.DEVICE_INFO.unpack(message.payload)[0]
        if argsz < spec.DEVICE_INFO.size:
            raise Refused(errno.EINVAL, f"argsz {argsz}")
        try:
            self._dma.check_shared()
        except ClientError as error:
            # QEMU, which has told all its memory by now, ends well with an error to this message; a
            # connection that closes while it looks at the device makes it abort.
            self._told.add(message.command)
            self._served.log.warning("client refused: %s", error)
            raise Refused(errno.EINVAL, str(error)) from error
        flags = spec.DEVICE_RESETS | spec.DEVICE_PCI
        return spec.DEVICE_INFO.pack(spec.DEVICE_INFO.size, flags, spec.REGIONS, spec.IRQS)

    def _region_read(self, message: Message) -> bytes:
        self._use()
        return self._regions.read(message.payload)

    def _region_write(self, message: Message) -> bytes:
        if not self._dma.shared:  # nearly every message of a running guest comes here
            self._use()
        return self._regions.write(message.payload)

    def _region_write_multi(self, message: Message) -> bytes:
        if self._proposal is None or not self._proposal.write_multiple:
            raise Refused(errno.ENOTSUP, "write_multiple was not negotiated")
        self._use()
        return self._regions.write_multi(message.payload)

    def _set_irqs(self, message: Message) -> bytes:
        self._irqs.set(message)
        return b""

    def _reset(self, message: Message) -> bytes:
        self._use()
        self._served.reset()
        self._dma.after_reset()
        self._irqs.reset()
        return b""

    def _use(self) -> None:
        """The message reaches the device, and most of them change it."""
        self._served.used = True
        self._dma.check_shared()
