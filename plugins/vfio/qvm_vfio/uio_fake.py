"""A host with UIO devices that are not there: for tests. The device file is a plain file that holds its maps.

A second process that opens the same folder, or gets the file, sees the same device.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvm_vfio.uio import UioHardware, UioKernel
from qvm_vfio.uio import adopt as adopt_with

#: Map ``n`` starts at ``n << MAP_SHIFT`` of the file; whether the interrupt is on is behind the last one.
MAP_SHIFT = 20
_CONTROL = 5 << MAP_SHIFT


class FakeUio(UioKernel):
    """A host below ``root`` with one device, ``uio0``; ``maps``: number -> (size, offset in its page).

    ``errors``: name of a method -> errno it shall fail with.
    """

    adopt = "qvm_vfio.uio_fake:adopt"

    def __init__(
        self, root: Path, maps: Mapping[int, tuple[int, int]] | None = None, label: str = "motor"
    ) -> None:
        self.sys, self.dev = root / "sys", root / "dev"
        self._root = root
        self.errors: dict[str, int] = {}
        self.opened: set[int] = set()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        if maps is not None:
            self._make(maps, label)

    # -- what a test does ------------------------------------------------------------------------------

    def register(self, offset: int, number: int = 0) -> int:
        """A register of the device, 4 bytes."""
        with (self.dev / "uio0").open("rb") as file:
            return int.from_bytes(os.pread(file.fileno(), 4, (number << MAP_SHIFT) + offset), "little")

    def poke(self, offset: int, value: int, number: int = 0) -> None:
        """The device changes a register, 4 bytes."""
        with (self.dev / "uio0").open("r+b") as file:
            os.pwrite(file.fileno(), value.to_bytes(4, "little"), (number << MAP_SHIFT) + offset)

    @property
    def enabled(self) -> bool:
        """Whether the interrupt is unmasked."""
        return bool(self.register(_CONTROL))

    def fire(self, *, anyhow: bool = False) -> bool:
        """The device interrupts: it is counted, masked and told, unless it is masked."""
        if not self.enabled and not anyhow:
            return False
        path = self.sys / "class/uio/uio0/event"
        path.write_text(str(int(path.read_text()) + 1))
        self.poke(_CONTROL, 0)
        os.eventfd_write(self._bell, 1)
        return True

    def close_all(self) -> None:
        """The host is gone."""
        os.close(self._bell)

    # -- UioKernel -------------------------------------------------------------------------------------

    def open(self, path: Path) -> int:
        """The device file."""
        self._fail("open")
        fd = super().open(path)
        self.opened.add(fd)
        return fd

    def close(self, fd: int) -> None:
        """Closed."""
        self.opened.discard(fd)
        super().close(fd)

    def waitable(self, fd: int) -> int:
        """An eventfd: a plain file is always readable."""
        return self._bell

    def take(self, fd: int) -> None:
        """As the kernel has it."""
        self._fail("take")
        os.eventfd_read(self._bell)

    def control(self, fd: int, on: bool) -> None:
        """In the file, so that every process sees it."""
        self._fail("control")
        os.pwrite(fd, int(on).to_bytes(4, "little"), _CONTROL)

    def map(self, fd: int, number: int, size: int) -> mmap.mmap:
        """The part of the file."""
        self._fail("map")
        return self.mmap(fd, size, number << MAP_SHIFT)

    def more(self) -> dict[str, Any]:
        """Where this host is."""
        return {"root": str(self._root)}

    def _fail(self, name: str) -> None:
        if name in self.errors:
            raise OSError(self.errors[name], os.strerror(self.errors[name]))

    def _make(self, maps: Mapping[int, tuple[int, int]], label: str) -> None:
        place = self.sys / "class/uio/uio0"
        place.mkdir(parents=True)
        (place / "name").write_text(f"{label}\n")
        (place / "event").write_text("0\n")
        for number, (size, offset) in maps.items():
            (place / f"maps/map{number}").mkdir(parents=True)
            (place / f"maps/map{number}/size").write_text(f"{size:#018x}\n")
            (place / f"maps/map{number}/offset").write_text(f"{offset:#x}\n")
        self.dev.mkdir()
        (self.dev / "uio0").write_bytes(b"")
        os.truncate(self.dev / "uio0", _CONTROL + mmap.PAGESIZE)
        self.poke(_CONTROL, 1)


def adopt(values: dict[str, Any], fds: Sequence[int]) -> UioHardware:
    """A device of another process's FakeUio."""
    return adopt_with(values, fds, FakeUio(Path(values["root"])))
