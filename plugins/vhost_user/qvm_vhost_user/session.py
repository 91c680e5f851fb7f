"""One life of a vdev behind vhost-user: the loop over a client's messages, and the way back to it.

What breaks the protocol raises ClientError and ends the connection. What a guest may have done wrong, such
as a ring outside its memory, is answered (REPLY_ACK) and logged: the connection lives, the ring does not run.
"""

from __future__ import annotations

import socket

from qvm_vhost_user.channel import BackendChannel
from qvm_vhost_user.messages import Messages
from qvm_vhost_user.protocol import (
    ANSWERED,
    BROKEN,
    F_IN_ORDER,
    F_RING_RESET,
    NEEDS,
    U64,
    ProtocolFeature,
    Request,
)
from qvm_vhost_user.vrings import LEAVE_TIMEOUT, Vrings
from qvm_vhost_user.wire import Message, receive, reply
from qvmcore.api import ClientError, GuestError, QvmError, Served, VirtioVdev

#: Features no message of the protocol can carry: there is none that resets a single queue, and the
#: in-flight buffer has no format for a device that gives back one of many for all of them.
WITHHELD = 1 << F_RING_RESET | 1 << F_IN_ORDER


class VhostUserSession:
    """A Session of qvm serve, and the Transport of its vdev."""

    def __init__(self, served: Served) -> None:
        assert isinstance(served.vdev, VirtioVdev)
        self._served = served
        self._vdev = served.vdev
        self._rings: Vrings | None = None
        self._channel: BackendChannel | None = None
        self._untold = False  # the configuration changed while no ring ran
        self._vdev.virtio.attach(self, fast_doorbells=True, withheld=WITHHELD)

    def serve(self, connection: socket.socket) -> None:
        """See Session."""
        channel = BackendChannel(self._served.log)
        messages = Messages(self._served, self._vdev, channel)
        self._channel, self._rings = channel, messages.rings
        try:
            while (message := receive(connection)) is not None:
                with message:
                    self._handle(connection, message, messages)
        finally:
            self._leave(messages)

    # ---- see Transport -------------------------------------------------------------------------------

    def interrupt_queue(self, index: int) -> None:
        """The call descriptor of the ring."""
        rings = self._rings
        if rings is not None:
            rings.call(index)

    def interrupt_config(self) -> None:
        """CONFIG_CHANGE, from a device that runs; a broken one also signals the error descriptors."""
        rings, channel = self._rings, self._channel
        if rings is None or channel is None:
            return
        if self._vdev.virtio.status & BROKEN:
            rings.fail()
        # A device without a running ring is suspended, and says nothing. Noted before the look: a ring that
        # starts meanwhile is started by a thread that looks at the note afterwards.
        self._untold = True
        if rings.running:
            self._untold = False
            channel.config_changed()

    def reset(self) -> None:
        """An event descriptor cannot be taken back."""
        self._untold = False

    # ---- inside --------------------------------------------------------------------------------------

    def _handle(self, connection: socket.socket, message: Message, messages: Messages) -> None:
        request = message.request
        self._served.log.debug("%s %s", request.name, message.payload.hex())
        needed = NEEDS.get(request)
        if needed is not None and not messages.has(needed):
            raise ClientError(f"{request.name} without the protocol feature {needed.name}")
        answer, failed = self._perform(message, messages)
        if answer is not None:
            reply(connection, request, *answer)
        elif message.need_reply and messages.has(ProtocolFeature.REPLY_ACK):
            reply(connection, request, U64.pack(failed))
        if self._untold and messages.rings.running:
            self.interrupt_config()

    def _perform(self, message: Message, messages: Messages) -> tuple[tuple[bytes, int] | None, bool]:
        """Do what it asks: its own answer, if it has one, and whether it failed."""
        request = message.request
        acknowledged = message.need_reply and messages.has(ProtocolFeature.REPLY_ACK)
        try:
            return messages.perform(message), False
        except GuestError as error:
            if request is Request.SET_FEATURES and not acknowledged:
                # It would go on with features that are not in force.
                raise ClientError(f"its features are refused: {error}") from error
            messages.refused(request, error)
        except ClientError:
            raise
        except QvmError as error:
            raise ClientError(f"{request.name} failed: {error}") from error
        except Exception as error:
            # As in a register handler: the vdev raised, and ends in its slot.
            self._served.fault(error)
            if request in ANSWERED:
                raise ClientError(f"{request.name} has no answer: the device failed") from error
        return None, True

    def _leave(self, messages: Messages) -> None:
        """The client has gone, or is made to go: nothing of it is used any more."""
        try:
            messages.rings.release()
            messages.rings.stop_all(LEAVE_TIMEOUT)
        except QvmError as error:
            # The vdev has been reported as faulty by then; its memory stays mapped.
            self._served.log.error("%s", error)
        finally:
            self._rings = self._channel = None
            messages.close()
