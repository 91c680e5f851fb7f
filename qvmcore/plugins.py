"""Discovery of plugins by entry points, and the typed face of pluggy (floor 7).

Names come from package metadata; a module is imported only when a VM file, a command or
``qvm plugins --load`` names it. What a VM file names must load, or the VM refuses to start; what
nobody names cannot break anything.

The API major version is part of the group name, so a plugin for another one is recognised without
an import.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import importlib_metadata
import pluggy

from qvmcore import hookspecs
from qvmcore.api import API_VERSION
from qvmcore.engine import Engine, Guest
from qvmcore.errors import PluginError, nearest
from qvmcore.irq import IrqLine
from qvmcore.server import Server
from qvmcore.termination import TerminationCallback
from qvmcore.types import IntrSpec, MmioHandler, PciAddress, VdevSpec, Window
from qvmcore.vdev import Vdev, VdevContext

if TYPE_CHECKING:
    import click

MAJOR = API_VERSION[0]
VDEV_GROUP = f"qvm.vdev.v{MAJOR}"
ENGINE_GROUP = f"qvm.engine.v{MAJOR}"
SERVER_GROUP = f"qvm.server.v{MAJOR}"
COMMAND_GROUP = f"qvm.command.v{MAJOR}"
_GROUP = re.compile(r"qvm\.(vdev|engine|server|command)\.v(\d+)")

#: Which distribution brings what, for the hint of an error; the project's own, and no others.
KNOWN = {
    "virtio-blk": "qvm-virtio-blk",
    "virtio-console": "qvm-virtio-console",
    "virtio-net": "qvm-virtio-net",
    "virtio-entropy": "qvm-virtio-entropy",
    "shmem": "qvm-shmem",
    "pci-dummy": "qvm-pci-dummy",
    "pl011": "qvm-primecell",
    "pl061": "qvm-primecell",
    "ser8250": "qvm-pc",
    "mc146818": "qvm-pc",
    "acpi-pm": "qvm-pc",
    "pass": "qvm-pass",
    "pass-uio": "qvm-pass",
    "quiesce": "qvm-quiesce",
    "emulated": "qvm-emulator",
    "kvm": "qvm-kvm",
    "vhost-user": "qvm-vhost-user",
    "vfio-user": "qvm-vfio-user",
    "guest": "qvm-guests",
}


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """One entry point as its metadata tells it. ``problem`` says why it cannot be used, if so."""

    name: str
    group: str
    distribution: str
    version: str
    summary: str = ""
    problem: str = ""

    @property
    def kind(self) -> str:
        """``vdev``, ``engine``, ``server`` or ``command``."""
        return self.group.split(".")[1]

    @property
    def origin(self) -> str:
        """``distribution version``."""
        return f"{self.distribution} {self.version}"


class PluginHost:
    """The plugins of one process: discovery, loading, conflicts, and calls of their hooks.

    ``distributions`` replaces the installed ones in tests. All methods run on the main thread.
    """

    def __init__(self, distributions: Iterable[importlib_metadata.Distribution] | None = None) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._points: dict[tuple[str, str], list[tuple[EntryInfo, Any]]] = {}
        self._modules: dict[str, object] = {}
        self._failures: dict[str, str] = {}
        seen: set[str] = set()
        for dist in importlib_metadata.distributions() if distributions is None else distributions:
            # The first distribution of a name on sys.path is the one that imports would find.
            name = dist.metadata["Name"] or "unknown"
            if name in seen:
                continue
            seen.add(name)
            self._read(name, dist)

    def _read(self, name: str, dist: Any) -> None:
        for point in dist.entry_points:
            match = _GROUP.fullmatch(point.group)
            if match is None:
                continue
            problem = ""
            if int(match[2]) != MAJOR:
                problem = (
                    f"made for plugin API v{match[2]}, this qvm has v{MAJOR}; "
                    f"install a version of {name} for API v{MAJOR}"
                )
            # A distribution without a description has no such field, and asking for one raises.
            summary = dist.metadata.get("Summary") or ""
            info = EntryInfo(point.name, point.group, name, dist.version, summary, problem)
            self._points.setdefault((match[1], point.name), []).append((info, point))

    def register(self, plugin: object) -> None:
        """Add a plugin that is no entry point: the core's own hook implementations, and tests'."""
        self._manager.register(plugin)
        self._manager.check_pending()

    # -- what there is -------------------------------------------------------------------------

    def vdev_types(self) -> Mapping[str, EntryInfo]:
        """The installed vdev types by name."""
        return self._named("vdev")

    def engine_names(self) -> Mapping[str, EntryInfo]:
        """The installed engines by name."""
        return self._named("engine")

    def server_names(self) -> Mapping[str, EntryInfo]:
        """The installed servers of ``qvm serve`` by name."""
        return self._named("server")

    def command_names(self) -> Mapping[str, EntryInfo]:
        """The installed sub-commands by name."""
        return self._named("command")

    def _named(self, kind: str) -> dict[str, EntryInfo]:
        return {
            name: self._checked(points)
            for (entry_kind, name), points in sorted(self._points.items())
            if entry_kind == kind
        }

    def _checked(self, points: list[tuple[EntryInfo, Any]]) -> EntryInfo:
        usable = [info for info, _ in points if not info.problem] or [points[0][0]]
        info = usable[0]
        if len(usable) > 1:
            owners = " and ".join(item.origin for item in usable)
            return replace(info, problem=f"{info.name!r} comes from {owners}; uninstall one of them")
        failure = self._failures.get(f"{info.group}:{info.name}", "")
        return replace(info, problem=failure) if failure else info

    def catalogue(self, *, load: bool = False) -> list[EntryInfo]:
        """Every entry point of every API version, for ``qvm plugins``; ``load`` tries the imports."""
        if load:
            loaders: tuple[tuple[str, Callable[[str], object]], ...] = (
                ("vdev", self.vdev_class),
                ("engine", self.engine),
                ("server", self.server),
                ("command", self.command),
            )
            for kind, get in loaders:
                for name in self._named(kind):
                    try:
                        get(name)
                    except PluginError:
                        continue  # recorded in _failures and shown as the entry's problem
        rows: list[EntryInfo] = []
        for points in self._points.values():
            if sum(not info.problem for info, _ in points) > 1:
                owners = " and ".join(info.origin for info, _ in points if not info.problem)
                rows += [replace(info, problem=info.problem or f"duplicate: {owners}") for info, _ in points]
            else:
                rows += [
                    replace(info, problem=info.problem or self._failures.get(f"{info.group}:{info.name}", ""))
                    for info, _ in points
                ]
        return sorted(rows, key=lambda row: (row.kind, row.name, row.distribution))

    # -- strict loading of what somebody names -------------------------------------------------

    def vdev_class(self, vdev_type: str) -> type[Vdev]:
        """The class of a vdev type. Raises PluginError with what to install or repair."""
        info, module = self._load("vdev", vdev_type)
        for cls in self._declared(info, module, "qvm_vdev_types"):
            if getattr(cls, "vdev_type", None) == vdev_type:
                return self._fitting(info, cls)
        raise self._fail(info, f"its qvm_vdev_types() does not return a class with vdev_type = {vdev_type!r}")

    def engine(self, name: str) -> Engine:
        """The engine called ``name``. Raises PluginError with what to install or repair."""
        engine: Engine = self._named_object("engine", name)
        return engine

    def server(self, name: str) -> Server:
        """The server called ``name``. Raises PluginError with what to install or repair."""
        server: Server = self._named_object("server", name)
        return server

    def _named_object(self, kind: str, name: str) -> Any:
        info, module = self._load(kind, name)
        hook = f"qvm_{kind}s"
        for each in self._declared(info, module, hook):
            if getattr(each, "name", None) == name:
                return each() if isinstance(each, type) else each
        raise self._fail(info, f"its {hook}() does not return a {kind} named {name!r}")

    def command(self, name: str) -> click.Command:
        """The sub-command ``name`` of a plugin. Raises PluginError."""
        info, module = self._load("command", name)
        found: dict[str, click.Command] = {}
        try:
            getattr(module, "qvm_cli_commands")(found.__setitem__)  # noqa: B009 - hooks are looked up by name
        except Exception as error:
            raise self._fail(info, f"{type(error).__name__}: {error}") from error
        if name not in found:
            raise self._fail(info, f"its qvm_cli_commands() does not register {name!r}")
        return found[name]

    def _load(self, kind: str, name: str) -> tuple[EntryInfo, object]:
        points = self._points.get((kind, name))
        if points is None:
            raise self._unknown(kind, name)
        info = self._checked(points)
        if info.problem:
            raise PluginError(f"{kind} {name!r} ({info.origin}) cannot be used: {info.problem}")
        point = next(point for item, point in points if item.distribution == info.distribution)
        key = f"{point.module}:{point.attr}"
        if key not in self._modules:
            module = None
            try:
                module = point.load()
                self._manager.register(module)
                self._manager.check_pending()
            except Exception as error:
                # Whatever a foreign module raises at import is that plugin's problem alone.
                if self._manager.is_registered(module):
                    self._manager.unregister(module)
                raise self._fail(info, f"{type(error).__name__}: {error}") from error
            self._modules[key] = module
        return info, self._modules[key]

    def _declared(self, info: EntryInfo, module: object, hook: str) -> list[Any]:
        function = getattr(module, hook, None)
        if function is None:
            raise self._fail(info, f"the module has no {hook}()")
        try:
            return list(function())
        except Exception as error:
            raise self._fail(info, f"{hook}() raised {type(error).__name__}: {error}") from error

    def _fitting(self, info: EntryInfo, cls: type[Vdev]) -> type[Vdev]:
        if not issubclass(cls, Vdev):
            raise self._fail(info, f"{cls.__name__} is not a subclass of qvmcore.api.Vdev")
        if tuple(cls.api) > API_VERSION or cls.api[0] != MAJOR:
            need, have = ".".join(map(str, cls.api)), ".".join(map(str, API_VERSION))
            raise self._fail(info, f"needs plugin API {need}, this qvm has {have}; upgrade qvmcore")
        return cls

    def _fail(self, info: EntryInfo, why: str) -> PluginError:
        self._failures[f"{info.group}:{info.name}"] = why
        return PluginError(
            f"{info.kind} {info.name!r} ({info.origin}) cannot be used: {why}",
            hint=f"repair or reinstall it: pip install --force-reinstall {info.distribution}",
        )

    def _unknown(self, kind: str, name: str) -> PluginError:
        installed = [entry_name for entry_kind, entry_name in self._points if entry_kind == kind]
        subject = f"unknown vdev type {name!r}" if kind == "vdev" else f"unknown {kind} {name!r}"
        if name in KNOWN:
            return PluginError(subject, hint=f"it comes with {KNOWN[name]}: pip install {KNOWN[name]}")
        close = nearest(name, installed)
        missing = nearest(name, [known for known in KNOWN if known not in installed])
        if close:
            return PluginError(subject, hint=close)
        if missing:
            wanted = missing.split("'")[1]
            return PluginError(
                subject, hint=f"{missing} it comes with {KNOWN[wanted]}: pip install {KNOWN[wanted]}"
            )
        return PluginError(subject, hint=f"installed: {', '.join(sorted(installed)) or 'none'}")

    # -- the hooks, typed ----------------------------------------------------------------------

    def create_vdev(self, spec: VdevSpec, cls: type[Vdev], ctx: VdevContext) -> Vdev:
        """qvm_create_vdev."""
        created: Vdev = self._manager.hook.qvm_create_vdev(spec=spec, cls=cls, ctx=ctx)
        return created

    def bind_mmio(self, vdev: Vdev, index: int, window: Window) -> MmioHandler:
        """qvm_bind_mmio."""
        handler: MmioHandler = self._manager.hook.qvm_bind_mmio(vdev=vdev, index=index, window=window)
        return handler

    def bind_pci_config(self, vdev: Vdev, address: PciAddress) -> MmioHandler:
        """qvm_bind_pci_config."""
        handler: MmioHandler = self._manager.hook.qvm_bind_pci_config(vdev=vdev, address=address)
        return handler

    def bind_irq(self, vdev: Vdev, index: int, intr: IntrSpec, guest: Guest) -> IrqLine:
        """qvm_bind_irq."""
        line: IrqLine = self._manager.hook.qvm_bind_irq(vdev=vdev, index=index, intr=intr, guest=guest)
        return line

    def termination_callbacks(self, machine: object) -> list[TerminationCallback]:
        """qvm_termination_callbacks of every loaded plugin."""
        results = self._manager.hook.qvm_termination_callbacks(machine=machine)
        return [callback for callbacks in results for callback in callbacks or ()]
