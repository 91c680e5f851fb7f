"""Kernel modules: which ones a guest needs, in which order, and the tables modprobe reads.

Debian's packages carry no modules.dep (depmod makes it at installation), so the dependencies come
from where depmod takes them: the ``.modinfo`` section of each module.
"""

from __future__ import annotations

import io
import lzma
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from qvm_guests.debs import DebArchive
from qvmcore.api import HostError, nearest


def canonical(name: str) -> str:
    """The name of a module as the kernel says it: ``virtio-rng`` is ``virtio_rng``."""
    return name.replace("-", "_")


def _stem(path: str) -> str:
    return canonical(PurePosixPath(path).name.split(".ko", 1)[0])


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the closure; ``path`` is below lib/modules/RELEASE, uncompressed."""

    name: str
    path: str
    data: bytes
    depends: tuple[str, ...]
    softdeps: tuple[str, ...]
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Closure:
    """The modules to ship, dependencies first; the wanted ones that are built in, or do not exist."""

    modules: tuple[Module, ...]
    builtin: tuple[str, ...]
    absent: tuple[str, ...]


def modinfo(data: bytes) -> dict[str, list[str]]:
    """The ``key=value`` strings of a module's .modinfo section."""
    info: dict[str, list[str]] = {}
    section = ELFFile(io.BytesIO(data)).get_section_by_name(".modinfo")
    for item in (section.data() if section is not None else b"").split(b"\0"):
        key, separator, value = item.decode(errors="replace").partition("=")
        if separator:
            info.setdefault(key, []).append(value)
    return info


@dataclass(slots=True)
class ModuleTree:
    """The modules of one kernel package."""

    release: str
    deb: DebArchive
    prefix: str
    _paths: dict[str, str] = field(default_factory=dict)
    _builtin: frozenset[str] = frozenset()

    @classmethod
    def of(cls, deb: DebArchive) -> ModuleTree:
        """Find ``lib/modules/RELEASE`` in a kernel package, and what is in it."""
        for name in deb.names():
            path = PurePosixPath(name)
            if path.name == "modules.builtin":
                break
        else:
            raise HostError(f"the package {deb.path} is no kernel: it has no modules.builtin")
        prefix = str(path.parent)
        tree = cls(path.parent.name, deb, prefix)
        tree._builtin = frozenset(_stem(line) for line in deb.read(name).decode().split())
        tree._paths = {
            _stem(item): item for item in deb.names() if item.startswith(prefix + "/") and ".ko" in item
        }
        return tree

    def _load(self, name: str) -> Module:
        path = self._paths[name]
        data = self.deb.read(path)
        if path.endswith(".xz"):
            data = lzma.decompress(data)
        try:
            info = modinfo(data)
        except ELFError as error:
            raise HostError(f"cannot read the kernel module {path} in {self.deb.path}: {error}") from error
        soft = [word for line in info.get("softdep", []) for word in _pre_softdeps(line)]
        return Module(
            name=name,
            path=path.removeprefix(self.prefix + "/").removesuffix(".xz"),
            data=data,
            depends=tuple(canonical(word) for word in ",".join(info.get("depends", [])).split(",") if word),
            softdeps=tuple(canonical(word) for word in soft),
            aliases=tuple(info.get("alias", [])),
        )

    def closure(self, wanted: Iterable[str], *, required: Iterable[str] = ()) -> Closure:
        """``wanted`` (skipped if absent) and ``required`` (an error if absent) with all they depend on."""
        must = [canonical(name) for name in required]
        modules: dict[str, Module] = {}
        builtin: list[str] = []
        absent: list[str] = []

        def visit(name: str) -> None:
            if name in modules or name in self._builtin or name not in self._paths:
                return
            module = self._load(name)
            for needed in (*module.softdeps, *module.depends):
                visit(needed)
            modules.setdefault(name, module)

        for name in dict.fromkeys([*map(canonical, wanted), *must]):
            if name in self._builtin:
                builtin.append(name)
            elif name in self._paths:
                visit(name)
            elif name in must:
                raise HostError(
                    f"the kernel {self.release} has no module {name!r}", hint=nearest(name, self._paths)
                )
            else:
                absent.append(name)
        return Closure(tuple(modules.values()), tuple(builtin), tuple(absent))


def _pre_softdeps(line: str) -> list[str]:
    """The names after ``pre:`` in ``pre: a b post: c``."""
    names: list[str] = []
    section = ""
    for word in line.split():
        if word.endswith(":"):
            section = word
        elif section == "pre:":
            names.append(word)
    return names


def dependency_tables(closure: Closure) -> dict[str, str]:
    """modules.dep, modules.alias and modules.builtin for the closure: what depmod would have made."""
    by_name = {module.name: module for module in closure.modules}

    def needs(module: Module, seen: dict[str, None]) -> dict[str, None]:
        for name in module.depends:
            if name in by_name and by_name[name].path not in seen:
                needs(by_name[name], seen)
                seen[by_name[name].path] = None
        return seen

    depends = [f"{m.path}: {' '.join(reversed(needs(m, {})))}".rstrip() for m in closure.modules]
    aliases = [f"alias {alias} {m.name}" for m in closure.modules for alias in m.aliases]
    return {
        "modules.dep": "".join(line + "\n" for line in depends),
        "modules.alias": "".join(line + "\n" for line in aliases),
        "modules.builtin": "".join(f"kernel/{name}.ko\n" for name in closure.builtin),
    }
