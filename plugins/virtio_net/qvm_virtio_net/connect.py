"""From the options to the hostdev they name; only the chosen one is imported."""

from __future__ import annotations

from qvm_virtio_net.hostdev import HostDev, NoCable
from qvm_virtio_net.options import NetOptions
from qvmcore.api import VdevContext


def make_hostdev(options: NetOptions, ctx: VdevContext, mac: str) -> HostDev:
    """The hostdev, not opened yet. Raises HostError."""
    if options.peer:
        from qvm_virtio_net.hello import VERSION, Hello
        from qvm_virtio_net.link import link_path
        from qvm_virtio_net.peer import PeerLink

        path = link_path(options.peer, ctx.base_dir)
        hello = Hello(VERSION, path.name, ctx.machine, ctx.name, mac, options.mtu)
        return PeerLink(path, hello, ctx.log)
    if options.tap:
        from qvm_virtio_net.tap import Tap

        return Tap(options.tap, options.queues, ctx.log, ctx.name)
    if options.user:
        from qvm_virtio_net.user import Passt

        return Passt(options.passt_options, ctx.log, ctx.name)
    return NoCable()
