"""The few calls of libnbd that a disk needs, asynchronous, over ctypes. Knows no virtio.

libnbd is a C library without a package on PyPI; Debian has it as ``libnbd0``. It is loaded when the
first disk needs it. A :class:`Connection` belongs to one thread at a time.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from functools import cache

from qvmcore.api import HostError

_LIBRARY = "libnbd.so.0"
_FLAG_NO_HOLE = 0x02
_SIZE_MINIMUM = 0
READ, WRITE = 1, 2


class _Completion(ctypes.Structure):
    """nbd_completion_callback; all zero is NBD_NULL_COMPLETION."""

    _fields_ = (("callback", ctypes.c_void_p), ("user_data", ctypes.c_void_p), ("free", ctypes.c_void_p))


_HANDLE = ctypes.c_void_p
_I64, _U64, _U32, _INT = ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int
_DATA = (_HANDLE, ctypes.c_void_p, ctypes.c_size_t, _U64, _Completion, _U32)
_RANGE = (_HANDLE, _U64, _U64, _Completion, _U32)
_PLAIN = (_HANDLE,)
#: Name without "nbd_" -> (result, arguments); a result of -1 is an error.
_CALLS: dict[str, tuple[object, tuple[object, ...]]] = {
    "create": (_HANDLE, ()),
    "close": (None, _PLAIN),
    "get_error": (ctypes.c_char_p, ()),
    "get_errno": (_INT, ()),
    "get_size": (_I64, _PLAIN),
    "get_block_size": (_I64, (_HANDLE, _INT)),
    "is_read_only": (_INT, _PLAIN),
    "can_flush": (_INT, _PLAIN),
    "can_trim": (_INT, _PLAIN),
    "can_zero": (_INT, _PLAIN),
    "aio_connect_uri": (_INT, (_HANDLE, ctypes.c_char_p)),
    "aio_disconnect": (_INT, (_HANDLE, _U32)),
    "aio_get_fd": (_INT, _PLAIN),
    "aio_get_direction": (ctypes.c_uint, _PLAIN),
    "aio_notify_read": (_INT, _PLAIN),
    "aio_notify_write": (_INT, _PLAIN),
    "aio_is_ready": (_INT, _PLAIN),
    "aio_is_processing": (_INT, _PLAIN),
    "aio_is_dead": (_INT, _PLAIN),
    "aio_is_closed": (_INT, _PLAIN),
    "aio_pread": (_I64, _DATA),
    "aio_pwrite": (_I64, _DATA),
    "aio_flush": (_I64, (_HANDLE, _Completion, _U32)),
    "aio_trim": (_I64, _RANGE),
    "aio_zero": (_I64, _RANGE),
    "aio_peek_command_completed": (_I64, _PLAIN),
    "aio_command_completed": (_INT, (_HANDLE, _U64)),
}
_NONE = _Completion()


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise HostError(
            f"an NBD disk needs the library libnbd: {error}", hint="on Debian: apt-get install libnbd0"
        ) from None
    for name, (result, arguments) in _CALLS.items():
        function = getattr(library, f"nbd_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class Connection:
    """One connection to an NBD server, being made at first: see :attr:`ready` and :attr:`dead`.

    ``size``, ``minimum_block``, ``readonly`` and ``can_...`` are right once it is ready. The buffers
    given to a command must stay where they are until it is retired or the connection is closed.
    Raises HostError without the library, OSError otherwise; what libnbd says is its strerror.
    """

    def __init__(self, uri: str) -> None:
        self._library = _library()
        self._handle = self._library.nbd_create()
        if not self._handle:
            raise self._error()
        try:
            self._call("aio_connect_uri", uri.encode())
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """The socket to wait for; another one while one address after the other is tried."""
        return self._call("aio_get_fd")

    @property
    def direction(self) -> int:
        """What to wait for: READ, WRITE or both."""
        return int(self._library.nbd_aio_get_direction(self._handle))

    @property
    def ready(self) -> bool:
        """Whether commands may be given."""
        return self._is("ready") or self._is("processing")

    @property
    def dead(self) -> bool:
        """Whether the connection is lost; no command will come back."""
        return self._is("dead") or self._is("closed")

    def notify(self, readable: bool, writable: bool) -> None:
        """The socket is readable or writable: go on. Raises OSError when that kills the connection."""
        direction = self.direction
        # One step may change the direction, and it must be one that was waited for.
        if readable and direction & READ:
            self._call("aio_notify_read")
        elif writable and direction & WRITE:
            self._call("aio_notify_write")

    def describe(self) -> None:
        """Ask for the properties of the export, once it is ready."""
        self.size = self._call("get_size")
        self.minimum_block = max(1, self._call("get_block_size", _SIZE_MINIMUM))
        self.readonly = bool(self._call("is_read_only"))
        self.can_flush, self.can_trim, self.can_zero = (
            bool(self._call(f"can_{name}")) for name in ("flush", "trim", "zero")
        )

    def read(self, buffer: bytearray, offset: int) -> int:
        """Start filling ``buffer``; the number of the command."""
        return self._data("aio_pread", buffer, offset)

    def write(self, buffer: bytearray, offset: int) -> int:
        """Start storing ``buffer``; the number of the command."""
        return self._data("aio_pwrite", buffer, offset)

    def flush(self) -> int:
        """Start a flush; the number of the command."""
        return self._call("aio_flush", _NONE, 0)

    def trim(self, offset: int, length: int) -> int:
        """Start a discard; the number of the command."""
        return self._call("aio_trim", length, offset, _NONE, 0)

    def zero(self, offset: int, length: int, hole: bool) -> int:
        """Start zeroing, as a ``hole`` if the server likes; the number of the command."""
        return self._call("aio_zero", length, offset, _NONE, 0 if hole else _FLAG_NO_HOLE)

    def retire(self) -> Iterator[tuple[int, OSError | None]]:
        """Number and error of every command that came back since the last time."""
        while (command := self._library.nbd_aio_peek_command_completed(self._handle)) > 0:
            done = self._library.nbd_aio_command_completed(self._handle, command)
            yield command, (self._error() if done < 0 else None)

    def close(self) -> None:
        """Say goodbye as far as that needs no waiting, and let everything go. Idempotent."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.nbd_aio_disconnect(handle, 0)
            self._library.nbd_close(handle)

    def _data(self, name: str, buffer: bytearray, offset: int) -> int:
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        return self._call(name, address, len(buffer), offset, _NONE, 0)

    def _call(self, name: str, *arguments: object) -> int:
        if not self._handle:
            raise OSError(errno.ENOTCONN, "the connection is closed")
        result = int(getattr(self._library, f"nbd_{name}")(self._handle, *arguments))
        if result < 0:
            raise self._error()
        return result

    def _is(self, state: str) -> bool:
        return bool(self._handle) and getattr(self._library, f"nbd_aio_is_{state}")(self._handle) == 1

    def _error(self) -> OSError:
        """What libnbd says about the call that failed last on this thread."""
        code = self._library.nbd_get_errno() or errno.EIO
        text = self._library.nbd_get_error()
        return OSError(code, text.decode(errors="replace") if text else os.strerror(code))
