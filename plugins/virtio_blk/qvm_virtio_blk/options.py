"""Options of virtio-blk: what a ``[[vdev]]`` table may say. Pure: opens nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

import msgspec
from msgspec import Meta

from qvm_virtio_blk.spec import ID_BYTES, SECTOR
from qvmcore.api import Size, nearest

#: Most virtqueues; a driver uses one per CPU.
MAX_QUEUES = 16

#: nbds is NBD with TLS.
NBD_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_NBD_FORMS = "nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH"

_URI = re.compile(r"[a-z]+(\+[a-z]+)?://|nbds?:", re.IGNORECASE)
_MEMORY = re.compile(r"memory:\s*(?P<number>\d+)\s*(?P<unit>[KMGT]?)", re.IGNORECASE)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}

#: physical_block_exp is one byte in the configuration, but nobody has blocks over 64 KiB.
_MAX_PHYSICAL = 64 * 1024
#: min_io_size has 16 bits, opt_io_size 32, both in logical blocks.
_MAX_MIN_IO, _MAX_OPT_IO = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Disk:
    """A parsed ``hostdev``: a ``path``, ``memory`` bytes of RAM disk if not 0, or an ``nbd`` URI."""

    path: Path
    memory: int = 0
    nbd: str = ""
    readonly: bool = False


def parse_hostdev(text: str) -> Disk:
    """``"disk.img"``, QNX's ``"<disk.img"`` (read only), ``"memory:16M"`` or an NBD URI. ValueError."""
    text = text.strip()
    readonly = text.startswith("<")
    name = text.removeprefix("<").strip()
    if name.startswith(">"):
        raise ValueError("hostdev: a disk has no '>'; write the path alone, or '<PATH' for read only")
    if not name:
        raise ValueError(
            "hostdev names no disk; expected a path, '<PATH' (read only), 'memory:SIZE' or a URI"
        )
    if "\0" in name:
        raise ValueError("hostdev must not contain a zero byte")
    if _URI.match(name):
        _check_nbd(name)
        return Disk(Path(name), nbd=name, readonly=readonly)
    if not name.startswith("memory:"):
        try:
            return Disk(Path(name).expanduser(), readonly=readonly)
        except RuntimeError as error:
            raise ValueError(f"hostdev: there is no home directory for {name.partition('/')[0]!r}") from error
    match = _MEMORY.fullmatch(name)
    size = int(match["number"]) << _UNITS[match["unit"].upper()] if match else 0
    if not size or size % SECTOR:
        raise ValueError(f"hostdev {text!r}: expected 'memory:SIZE', a multiple of {SECTOR}, as memory:16M")
    return Disk(Path(name), memory=size, readonly=readonly)


def _check_nbd(uri: str) -> None:
    """Raises ValueError, in people's words, for what cannot be the URI of an NBD server."""
    try:
        parts = urlsplit(uri)
        query = parse_qs(parts.query)
        host = parts.hostname
        parts.port  # noqa: B018 - raises for a port that is no number
    except ValueError as error:
        raise ValueError(f"hostdev {uri!r}: {error}") from None
    if parts.scheme not in NBD_SCHEMES:
        raise ValueError(f"hostdev {uri!r}: {nearest(parts.scheme, NBD_SCHEMES) or 'expected ' + _NBD_FORMS}")
    if parts.scheme.endswith("+unix") and not (query.get("socket") and not host):
        raise ValueError(f"hostdev {uri!r} names no socket; expected nbd+unix:///EXPORT?socket=PATH")
    if not parts.scheme.endswith("+unix") and not host:
        raise ValueError(f"hostdev {uri!r} names no host; expected nbd://HOST:PORT/EXPORT")


class BlkOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the guest's disk is, and what it looks like."""

    hostdev: Annotated[
        str, Meta(description="raw image, block device, nbd:// URI, or memory:SIZE; '<' before it: read only")
    ]
    readonly: Annotated[bool, Meta(description="the guest cannot write; VMs may share the image")] = False
    serial: Annotated[
        str, Meta(description="serial the guest sees, at most 20 ASCII characters; default: the vdev's name")
    ] = ""
    cache: Annotated[
        Literal["writeback", "writethrough"],
        Meta(description="writeback: durable after the guest's flush; writethrough: after every write"),
    ] = "writeback"
    dio: Annotated[
        Literal["disable", "enable", "read"],
        Meta(description="direct I/O, past the host's page cache; read: for reads only"),
    ] = "disable"
    delayed: Annotated[
        Annotated[int, Meta(ge=0)] | Literal["forever"] | None,
        Meta(description="open hostdev when the guest's driver starts; retry so many seconds; 0: try once"),
    ] = None
    nbd_timeout: Annotated[
        int, Meta(ge=1, le=3600, description="seconds until a request to a silent NBD server fails")
    ] = 30
    queues: Annotated[
        int, Meta(ge=1, le=MAX_QUEUES, description="request queues the guest may use, one per CPU")
    ] = 1
    block_size: Annotated[Size, Meta(description="logical block size, bytes: 512, 1K, 2K or 4K")] = Size(512)
    physical_block_size: Annotated[
        Size, Meta(description="physical block size, bytes: a power of two times block_size; 0: the same")
    ] = Size(0)
    min_io_size: Annotated[Size, Meta(description="smallest efficient request, bytes; 0: not told")] = Size(0)
    opt_io_size: Annotated[Size, Meta(description="best request size, bytes; 0: not told")] = Size(0)

    def __post_init__(self) -> None:
        disk = parse_hostdev(self.hostdev)
        block = self.block_size
        if block not in (512, 1024, 2048, 4096):
            raise ValueError(f"block_size is 512, 1024, 2048 or 4096, not {block}")
        if disk.memory % block:
            raise ValueError(f"hostdev {self.hostdev!r} is not a multiple of block_size {block}")
        physical = self.physical_block_size
        if physical and (physical < block or physical & (physical - 1) or physical > _MAX_PHYSICAL):
            raise ValueError(
                f"physical_block_size is a power of two from block_size to {_MAX_PHYSICAL}, not {physical}"
            )
        for name, value, most in (
            ("min_io_size", self.min_io_size, _MAX_MIN_IO),
            ("opt_io_size", self.opt_io_size, _MAX_OPT_IO),
        ):
            if value % block or value // block > most:
                raise ValueError(f"{name} is a multiple of block_size, at most {most * block}, not {value}")
        if self.serial and not (self.serial.isascii() and self.serial.isprintable()):
            raise ValueError("serial holds printable ASCII characters only")
        if self.dio != "disable" and (disk.memory or disk.nbd):
            raise ValueError("dio is for files and block devices only")
        if len(self.serial) > ID_BYTES:
            raise ValueError(f"serial has {len(self.serial)} characters, more than {ID_BYTES}")

    @property
    def disk(self) -> Disk:
        """What ``hostdev`` and ``readonly`` say together."""
        disk = parse_hostdev(self.hostdev)
        return replace(disk, readonly=disk.readonly or self.readonly)

    @property
    def physical_block_exponent(self) -> int:
        """log2 of logical blocks per physical block."""
        return ((self.physical_block_size or self.block_size) // self.block_size).bit_length() - 1


def identity(options: BlkOptions, name: str) -> bytes:
    """The 20 bytes answered to GET_ID: the serial, or the vdev's name as far as it fits."""
    text = options.serial or name
    return text.encode("ascii", "replace")[:ID_BYTES].ljust(ID_BYTES, b"\0")
