"""The signal that makes a vCPU thread leave KVM_RUN, without Python's signal handling noticing.

Its handler is a function of the C library that does nothing; Python's own handlers, its wake-up
descriptor and the main thread are not involved. The first real-time signal with the default action is
taken; it gets that action back when the last guest of the process is closed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

from qvm_kvm.ioctls import libc
from qvmcore.api import EngineError


class _SigAction(ctypes.Structure):
    """struct sigaction of glibc and musl, on x86-64 and aarch64."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


#: ``int abs(int)`` as a handler: no side effects. No SA_RESTART: the point is to interrupt.
_NOTHING = ctypes.cast(libc["abs"], ctypes.c_void_p).value
_DEFAULT = None  # SIG_DFL is a null pointer

_lock = threading.Lock()
_users = 0
_number = 0


def _sigaction(number: int, new: _SigAction | None) -> _SigAction:
    old = _SigAction()
    if libc["sigaction"](number, None if new is None else ctypes.byref(new), ctypes.byref(old)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return old


def acquire() -> int:
    """Install the handler for one more guest; the signal's number. Raises EngineError when none is free."""
    global _users, _number
    with _lock:
        if not _users:
            for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
                if _sigaction(number, None).handler is _DEFAULT:
                    _sigaction(number, _SigAction(handler=_NOTHING))
                    _number = number
                    break
            else:
                raise EngineError("every real-time signal of this process is in use")
        _users += 1
        return _number


def release() -> None:
    """One guest less; its vCPU threads have ended, so that no kick can be pending."""
    global _users
    with _lock:
        _users -= 1
        if not _users:
            _sigaction(_number, _SigAction(handler=_DEFAULT))
