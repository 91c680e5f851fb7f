"""Building a flattened device tree (floor 8): a typed face over the PyPI library ``fdt``.

:class:`DeviceTree` holds the tree, :class:`Node` is one node of it and is what a vdev receives in
``describe_fdt`` (:class:`qvmcore.vdev.FdtNode`). Values are stored as the bytes of the devicetree
specification, so a command line in any script and an empty string are written as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import fdt


class Node:
    """One node. ``name`` is the generic name without the unit address, e.g. ``serial``."""

    def __init__(self, tree: DeviceTree, raw: fdt.Node, parent: Node | None) -> None:
        self._tree = tree
        self._raw = raw
        self._parent = parent
        self._children: dict[str, Node] = {}
        self.name: str = raw.name.partition("@")[0]

    @property
    def path(self) -> str:
        """The full path with unit addresses, e.g. ``/serial@9000000``."""
        if self._parent is None:
            return "/"
        return f"{self._parent.path.rstrip('/')}/{self._raw.name}"

    def has(self, name: str) -> bool:
        """Whether the property is there."""
        return bool(self._raw.exist_property(name))

    def set_bytes(self, name: str, value: bytes) -> None:
        """A property of raw bytes; setting a name again replaces the value."""
        if self._raw.exist_property(name):
            self._raw.remove_property(name)
        self._raw.append(fdt.PropBytes(name, data=value) if value else fdt.Property(name))

    def set_string(self, name: str, *values: str) -> None:
        """A property of one or more strings, UTF-8. Raises ValueError when one holds a NUL."""
        for value in values:
            if "\0" in value:
                raise ValueError(f"{self.path}: {name}: a NUL character cannot be in a string")
        self.set_bytes(name, b"".join(value.encode() + b"\0" for value in values))

    def set_cells(self, name: str, *values: int) -> None:
        """A property of 32-bit cells. Raises ValueError when a value does not fit."""
        if any(not 0 <= value < 1 << 32 for value in values):
            raise ValueError(f"{self.path}: {name}: a cell is 32 bits, not {[hex(v) for v in values]}")
        self.set_bytes(name, struct.pack(f">{len(values)}I", *values))

    def set_cells64(self, name: str, *values: int) -> None:
        """A property of 64-bit values, each written as two cells (addresses and sizes in ``reg``)."""
        self.set_bytes(name, struct.pack(f">{len(values)}Q", *values))

    def set_flag(self, name: str) -> None:
        """An empty property: it says something by being there."""
        self.set_bytes(name, b"")

    def reference(self, path: str) -> int:
        """The phandle of the node at ``path``. Raises KeyError when there is none."""
        return self._tree.node(path).phandle()

    def phandle(self) -> int:
        """This node's own phandle, given at the first call."""
        return self._tree.phandle_of(self)

    def sibling(self, name: str) -> Node:
        """The node ``/name`` beside this one at the root, created when missing."""
        return self._tree.root.child(name)

    def child(self, name: str) -> Node:
        """The child ``name`` (with unit address, if it has one), created when missing."""
        found = self._children.get(name)
        if found is None:
            raw = fdt.Node(name)
            self._raw.append(raw)
            found = self._children[name] = Node(self._tree, raw, self)
        return found


class DeviceTree:
    """A device tree under construction; :meth:`to_dtb` gives the blob."""

    def __init__(self) -> None:
        self._fdt = fdt.FDT()
        self._phandles: dict[str, int] = {}
        self.root = Node(self, self._fdt.root, None)

    def node(self, path: str) -> Node:
        """The node at ``path``. Raises KeyError naming the path when there is none."""
        here = self.root
        for name in _parts(path):
            try:
                here = here._children[name]
            except KeyError:
                raise KeyError(f"no device tree node {path}") from None
        return here

    def phandle_of(self, node: Node) -> int:
        """The phandle of ``node``, given at the first call; phandles count from 1."""
        handle = self._phandles.get(node.path)
        if handle is None:
            handle = self._phandles[node.path] = len(self._phandles) + 1
            node.set_cells("phandle", handle)
        return handle

    def to_dtb(self) -> bytes:
        """The flattened device tree, version 17."""
        return bytes(self._fdt.to_dtb(version=17, last_comp_version=16, boot_cpuid_phys=0))


def _parts(path: str) -> Iterable[str]:
    return (part for part in path.split("/") if part)
