"""A plugin host without packages: vdev classes and an engine given directly."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qvmcore.engine import Engine
from qvmcore.machine import Machine
from qvmcore.options import convert_options
from qvmcore.pci.vdev import PciVdev
from qvmcore.plugins import EntryInfo, PluginHost
from qvmcore.types import IntrSpec, LoadSpec, MachineSpec, MemorySpec, PciAddress, Source, VdevSpec
from qvmcore.vdev import Vdev
from qvmcore.virtio.device import VirtioVdev

#: Where :func:`machine` places its vdevs, one every 64 KiB, with interrupts from FIRST_INTR on.
FIRST_LOC = 0x1C0D_0000
FIRST_INTR = 41
STRIDE = 0x1_0000


class StaticHost(PluginHost):
    """Knows exactly the given classes and one engine."""

    def __init__(self, classes: Iterable[type[Vdev]], engine: Engine) -> None:
        super().__init__(distributions=())
        self._classes = {cls.vdev_type: cls for cls in classes}
        self._engine = engine

    def vdev_class(self, vdev_type: str) -> type[Vdev]:
        """A given class; KeyError for any other."""
        return self._classes[vdev_type]

    def engine_names(self) -> dict[str, EntryInfo]:
        """The one engine."""
        return {self._engine.name: EntryInfo(self._engine.name, "qvm.engine.v1", "testing", "0")}

    def engine(self, name: str) -> Engine:
        """The one engine."""
        return self._engine


def machine(
    classes: Iterable[type[Vdev]],
    engine: Engine,
    folder: Path,
    *,
    plugins: Iterable[object] = (),
    on_fault: str = "isolate",
    options: dict[str, dict[str, Any]] | None = None,
    pci: bool = False,
    **system: Any,
) -> Machine:
    """A machine with one vdev of each class, in order, named after its type, on 1 MiB of RAM.

    ``plugins`` are further hook implementations; ``options`` maps a vdev type to its options;
    ``system`` overrides fields of the MachineSpec. A PciVdev is at PCI device number 1 plus its index,
    and with ``pci`` so is a virtio vdev.
    """
    kernel = folder / "kernel.raw"
    kernel.write_bytes(bytes(16))
    vdevs = []
    for index, cls in enumerate(classes := list(classes)):
        converted, problems = convert_options(cls.Options, (options or {}).get(cls.vdev_type, {}), folder)
        if problems:
            raise ValueError("; ".join(problem.message for problem in problems))
        cls = cls.for_options(converted)
        on_pci = issubclass(cls, PciVdev) or (pci and issubclass(cls, VirtioVdev))
        vdevs.append(
            VdevSpec(
                cls.vdev_type,
                cls.vdev_type,
                converted,
                FIRST_LOC + index * STRIDE if cls.windows and not on_pci else None,
                IntrSpec("gic", FIRST_INTR + index) if cls.irqs and not on_pci else None,
                on_fault,
                pci=PciAddress(index + 1) if on_pci else None,
                source=Source(str(folder / "vm.toml")),
                base_dir=folder,
            )
        )
    fields: dict[str, Any] = {
        "name": "test",
        "board": "arm64-virt",
        "engine": "auto",
        "cpus": 1,
        "memory": (MemorySpec(0x4000_0000, 8 << 20),),
        "load": LoadSpec(kernel, format="raw"),
        "vdevs": tuple(vdevs),
        "pci": pci or any(spec.pci is not None for spec in vdevs),
    } | system
    host = StaticHost(classes, engine)
    for plugin in plugins:
        host.register(plugin)
    return Machine.build(MachineSpec(**fields), host)
