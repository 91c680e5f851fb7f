"""One IOMMU address space and who uses it: all functions of a group that this process has.

The kernel opens a group once and puts it into one container. So the functions share what is mapped: memory
is mapped with the first of them, and unmapped when none of them may write to it any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from qvm_vfio.errors import VfioError
from qvm_vfio.iommu import Container, Group
from qvm_vfio.kernel import Kernel

#: (I/O virtual address, size, address in this process), bytes.
Range = tuple[int, int, int]


class _Space:
    """What the members share."""

    def __init__(self, container: Container, group: Group) -> None:
        self.container = container
        self.group = group
        self.lock = threading.Lock()
        self.members: set[Member] = set()
        #: Who may write to what is mapped, and what that is.
        self.mapped: set[Member] = set()
        self.ranges: list[Range] = []


class Member:
    """One function's share of the container and the group of :func:`join`. Any thread."""

    def __init__(self, space: _Space, key: tuple[Path, int]) -> None:
        self._space = space
        self._key = key

    @property
    def container(self) -> Container:
        """The address space."""
        return self._space.container

    @property
    def group(self) -> Group:
        """The group."""
        return self._space.group

    def adopt(self, ranges: Iterable[Range]) -> None:
        """These are mapped already, by another process, for this function too."""
        with self._space.lock:
            self._space.ranges = list(ranges)
            self._space.mapped.add(self)

    def map(self, ranges: Iterable[Range]) -> None:
        """Map memory for the function. All of it or, with a VfioError, none."""
        space, ranges = self._space, list(ranges)
        with space.lock:
            if space.mapped and space.ranges != ranges:
                raise VfioError(f"two functions of IOMMU group {self.group.number} cannot have unlike memory")
            if not space.mapped:
                with ExitStack() as undo:
                    for iova, size, address in ranges:
                        self.container.map_dma(iova, size, address)
                        undo.callback(self.container.unmap_dma, iova, size)
                    undo.pop_all()
                space.ranges = ranges
            space.mapped.add(self)

    def unmap(self) -> None:
        """The function is done with the memory: it is taken away when it was the last one. Idempotent."""
        space = self._space
        with space.lock:
            if space.mapped == {self}:
                for iova, size, _ in space.ranges:
                    self.container.unmap_dma(iova, size)
            space.mapped.discard(self)

    def leave(self) -> None:
        """The function is given back: the last one closes the group, and the kernel unmaps all. Idempotent.

        What was not unmapped before stays mapped as long as another function is there.
        """
        with _lock:
            self._space.members.discard(self)
            if not self._space.members:
                _open.pop(self._key, None)
                self.group.close()
                self.container.close()


#: The open ones, by the folder of the device files and the group's number.
_open: dict[tuple[Path, int], _Space] = {}
_lock = threading.Lock()


def join(kernel: Kernel, number: int, make: Callable[[], tuple[Container, Group]]) -> tuple[Member, bool]:
    """A share of a group, and whether ``make`` was called, because this process had it not open."""
    key = (kernel.dev, number)
    with _lock:
        space = _open.get(key)
        new = space is None
        if space is None:
            space = _open[key] = _Space(*make())
        member = Member(space, key)
        space.members.add(member)
    return member, new
