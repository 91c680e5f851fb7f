"""Registers and limits of the guest shared memory factory, as QNX documents them. No behaviour."""

from __future__ import annotations

import enum
import struct

PAGE = 4096
SIGNATURE = 0x4D53_4732_474D_5651
MAX_CLIENTS = 16
MAX_NAME = 32

#: Factory page: signature, shmem, vector, status, size, name, find.
FACTORY = struct.Struct(f"<QQIII{MAX_NAME}sI")
FACTORY_SIZE = 0x18
FACTORY_NAME = 0x1C
FACTORY_FIND = FACTORY_NAME + MAX_NAME

# Control page of a region; the shared memory follows in the next page.
CONTROL_STATUS = 0x0
CONTROL_IDX = 0x4
CONTROL_NOTIFY = 0x8
CONTROL_DETACH = 0xC

#: Written to ``notify``: everyone but the writer.
EVERYONE = 0xFFFF_FFFF


class Status(enum.IntEnum):
    """The ``status`` of the factory page: how the last attempt ended."""

    OK = 0
    UNKNOWN_FAILURE = 1
    NO_MEMORY = 2
    CLIENT_MAX = 3
    ILLEGAL_NAME = 4
    NO_PERMISSION = 5
    DOES_NOT_EXIST = 6


class Refused(Exception):
    """An attempt of the guest that cannot be granted."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status
