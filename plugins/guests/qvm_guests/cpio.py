"""A cpio archive in the ``newc`` format the kernel unpacks, made in memory, the same bytes every time.

No maintained library writes this format, and writing it needs no privilege: a device node is only a
header. Owner is root, the time is 0, the order is that of the names.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One member. ``mode`` carries the type bits; ``device`` is (major, minor) of a node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def file(name: str, data: bytes, *, executable: bool = False) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | (0o755 if executable else 0o644), data)


def directory(name: str, mode: int = 0o755) -> Entry:
    """A directory."""
    return Entry(name, stat.S_IFDIR | mode)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def char_device(name: str, major: int, minor: int) -> Entry:
    """A character device node."""
    return Entry(name, stat.S_IFCHR | 0o600, device=(major, minor))


def _record(entry: Entry, inode: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return head + bytes(-len(head) % 4) + entry.data + bytes(-len(entry.data) % 4)


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of ``entries``; parent directories that are missing are added."""
    members: dict[str, Entry] = {}
    for entry in entries:
        for parent in PurePosixPath(entry.name).parents:
            if str(parent) != ".":
                members.setdefault(str(parent), directory(str(parent)))
        members[entry.name] = entry
    records = [_record(members[name], inode) for inode, name in enumerate(sorted(members), start=1)]
    body = b"".join(records) + _record(Entry(_TRAILER, 0), 0)
    return body + bytes(-len(body) % 512)
