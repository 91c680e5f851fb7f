"""Every fuzz target by name: a plain function of the input that raises when something is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import devices, kernel, net, pci, registers, rings, text

Target = Callable[[bytes], None]

#: Inputs kept for each target: ``seed-*`` for what it should know, ``crash-*`` for what it once found.
CORPUS = Path(__file__).parent / "corpus"

TARGETS: dict[str, Target] = {
    "toml": text.toml,
    "vm-file": text.vm_file,
    "options": text.options,
    "units": text.units,
    "hostdevs": text.hostdevs,
    "kernel": kernel.kernel,
    "kernel-x86": kernel.kernel_x86,
    "split-ring": rings.split,
    "packed-ring": rings.packed,
    "blk-request": rings.blk_request,
    "gicv2": registers.gicv2,
    "pl011": registers.pl011,
    "pl061": registers.pl061,
    "pci-function": pci.pci_function,
    "pci-bus": pci.pci_bus,
    "shmem": pci.shmem,
    "virtio-echo": devices.echo,
    "virtio-blk": devices.blk,
    "virtio-console": devices.console,
    "virtio-entropy": devices.entropy,
    "virtio-net": devices.net,
    "net-hello": net.hello,
    "net-frame": net.frame,
    "net-control": net.control,
    "net-peer": net.peer,
}


def kept(name: str) -> list[Path]:
    """The inputs kept for a target."""
    return sorted((CORPUS / name).glob("*"))
