"""What the author of a virtio device subclasses (virtio 1.4, chapters 2 and 3).

The device knows no transport: whether it hangs on MMIO, PCI or a vhost-user socket is the
framework's business. Life of a device, beyond that of every vdev (``qvmcore.vdev``)::

    device_features()      any        what to offer; constant while the VM runs
    config_space()         any        the bytes of the device configuration now; constant length
    config_write(...)      a vCPU     the driver wrote to it
    refuse_features(...)   a vCPU     why a set of features cannot work (default: all can)
    on_activate(features)  a vCPU     DRIVER_OK: the queues exist from here; must return at once
    handle_queue(i, q)     worker     the driver offered buffers; also once after the activation
    serve_now(i, q)        a vCPU     as handle_queue, where it takes no waiting; the worker is idle
    on_queue_reset(i)      a vCPU     the driver reset this queue alone: the worker is idle, its chains
                                      are void, and their memory must not be touched from here on
    on_deactivate()        a vCPU     reset or end, after an activation or a config_write: the worker
                                      is idle, the queues are dead; back to the fresh state, and
                                      guest memory must not be touched from here on
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from qvmcore.types import Trigger, Window
from qvmcore.vdev import FdtNode, Vdev, VdevContext
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.state import VirtioState


class VirtioVdev(Vdev):
    """A virtio device.

    Declared on the class: ``device_id`` (chapter 5) and ``queue_sizes``, the largest size of each
    queue in entries, powers of two up to 1024; a device whose options decide how many there are sets
    it on itself before it calls ``super().__init__``. ``vendor_id`` is the subsystem vendor. The window,
    the interrupt and the FDT node are those of virtio-mmio; another transport ignores them.

    ``self.virtio`` offers ``features``, ``active``, ``queue(index)``, ``kick(index)``,
    ``config_changed()`` and ``needs_reset(error)``: see :class:`~qvmcore.virtio.state.VirtioState`.
    """

    device_id: ClassVar[int]
    queue_sizes: tuple[int, ...]
    vendor_id: ClassVar[int] = 0x1C05
    #: Whether VIRTIO_F_IN_ORDER is offered. Drivers that accept it get every chain back in the order
    #: they offered it, whatever the order of ``push``: clear it when one slow request would hold
    #: back many that are done.
    in_order: bool = True

    # 4.2.1: the suggested binding gives a device 512 bytes; 8-byte accesses are never right (4.2.2.2).
    windows = (Window(0x200, access=frozenset({1, 2, 4})),)
    irqs = 1
    # The line stays up while InterruptStatus is not zero (4.2.3.4).
    trigger = Trigger.LEVEL
    fdt_compatible = ("virtio,mmio",)
    acpi_hid = "LNRO0005"

    def __init__(self, ctx: VdevContext, options: Any) -> None:
        super().__init__(ctx, options)
        own = type(self).serve_now is not VirtioVdev.serve_now
        self.virtio = VirtioState(self, serves_now=own)

    def device_features(self) -> int:
        """The device type's feature bits as one integer, bit n = ``1 << n``.

        The features of the ring and the transport (24 to 40) are the core's and are added by it.
        """
        return 0

    def config_space(self) -> bytes:
        """The device configuration (2.5) as it is now, always of the same length.

        Must be quick and must not call ``self.virtio``.
        """
        return b""

    def config_write(self, offset: int, data: bytes) -> None:
        """The driver wrote ``data`` at ``offset``, wholly inside the configuration; default ignored."""

    def refuse_features(self, features: int) -> str:
        """Why this subset of the offered features cannot work; empty when it can (2.2.2)."""
        return ""

    def on_activate(self, features: int) -> None:
        """The driver set DRIVER_OK with these negotiated features. A vCPU waits: return at once."""

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        """Serve the queue on the worker thread. Nothing is lost by leaving buffers in it.

        GuestError puts the device into DEVICE_NEEDS_RESET; any other exception is a fault of the
        device.
        """
        raise NotImplementedError(f"{type(self).__name__} serves no queue")

    def serve_now(self, index: int, queue: Virtqueue) -> bool:
        """Serve the queue on the vCPU that notified, as far as that is possible without waiting.

        Called instead of :meth:`handle_queue` while the worker is idle, by engines whose notifications
        are calls: for short work the way to the worker and back takes longer than the work. What would
        wait is left in the queue (``queue.unpop``) and False given: the worker's handle_queue then
        gets it. No callback of the worker runs meanwhile. The guest stands still until this returns, and
        after some seconds it is interrupted by an exception: give the chain back then, too.
        """
        return False

    def on_queue_stop(self, index: int, queue: Virtqueue) -> None:
        """The queue is to stand still: give back (``queue.unpop_all``) the chains that wait for others.

        For a device that pops ahead, as buffers for what may come. The worker is idle, ``pop`` gives
        nothing more for now; the queue ends or ``handle_queue`` is called again. Chains of work under way
        are pushed as ever, within seconds.
        """

    def on_queue_reset(self, index: int) -> None:
        """The driver reset one queue (2.6.1), which is dead: forget the chains of it that are held.

        Handled requests need nothing; work in the background on chains of this queue must have ended
        when this returns. The driver may set the queue up again: ``handle_queue`` is then called.
        """

    def on_deactivate(self) -> None:
        """The driver reset the device, or the VM ends: undo what the driver did. Idempotent."""

    def on_reset(self) -> None:
        """The framework resets the device. Authors use :meth:`on_deactivate`."""
        self.virtio.reset()

    def describe_fdt(self, node: FdtNode) -> None:
        """Guest and host see the same cached memory."""
        node.set_flag("dma-coherent")

    def status(self) -> Mapping[str, object]:
        """Status byte, features and queue counters."""
        return self.virtio.counters()
