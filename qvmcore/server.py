"""What a server of ``qvm serve`` must offer (floor 6): protocols only, no server lives in the core.

A server gives vdevs to guests that live in somebody else's VMM. The core makes a socket for each vdev
and takes the clients, one at a time; the server speaks the protocol. A client counts as a guest: a vdev
that one has used ends with it, by the termination plan, and the next client finds a new one.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from qvmcore.memory import GuestMemory
from qvmcore.pci.function import PciFunction
from qvmcore.types import MmioHandler
from qvmcore.vdev import Vdev


class Served(Protocol):
    """One life of a vdev that is served."""

    @property
    def name(self) -> str:
        """The vdev's name."""

    @property
    def vdev(self) -> Vdev:
        """The configured vdev."""

    @property
    def memory(self) -> GuestMemory:
        """The client's memory, empty at first: the session gives it its regions by ``replace()``.

        What is in there at the end the core unmaps, when the vdev is proven to be out of it.
        """

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """Where the session reports."""

    @property
    def function(self) -> PciFunction | None:
        """What the vdev is on PCI, for a server with ``pci``: to be connected to a FunctionPort."""

    @property
    def config(self) -> MmioHandler | None:
        """Who answers configuration accesses to ``function``; faults of the vdev are caught there."""

    #: Seconds a thread looks for more before it sleeps; 0 unless the user asked for it.
    poll: float
    #: Set by the session at the first message that changes the vdev or its memory. While it is False the
    #: next client gets the same life.
    used: bool

    def fault(self, error: BaseException) -> None:
        """The vdev raised: logged with its traceback, and isolated. Any thread."""

    def reset(self) -> None:
        """Reset the device as its bus would: ``on_reset()`` of the vdev, then the PCI function."""


class Session(Protocol):
    """The protocol's side of one life of a vdev."""

    def serve(self, connection: socket.socket) -> None:
        """Speak with a client until it leaves, or the core shuts the socket down; then return soon.

        Runs on the thread of the vdev's socket, which counts as a vCPU's. Raises ClientError when the
        client breaks the protocol. Every descriptor that came is closed on return, but those of the
        regions in ``Served.memory``; no interrupt is sent any more. Called anew for the next client
        while ``Served.used`` is False.
        """


class Server(Protocol):
    """A protocol of ``qvm serve``, offered by a plugin through ``qvm_servers``."""

    #: ``vhost-user``: the option that asks for it is ``--vhost-user DIR``.
    name: ClassVar[str]
    #: Whether it serves PCI functions.
    pci: ClassVar[bool]

    def refusal(self, cls: type[Vdev]) -> str:
        """Why vdevs of this class cannot be served; empty when they can."""

    def bind(self, served: Served) -> Session:
        """Connect to a configured vdev, before its ``on_starting``. Raises QvmError."""

    def attach_lines(self, vdev: Vdev, path: Path) -> Sequence[tuple[str, str]]:
        """For people: VMMs, and how each one attaches the vdev by its socket at ``path``."""
