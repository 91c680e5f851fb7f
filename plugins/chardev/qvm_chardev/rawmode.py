"""Raw mode of a terminal, entered and left without ever stopping the process.

A process in the background that changes its terminal is stopped by SIGTTOU; one that reads it, by
SIGTTIN. Both are asked about first, and SIGTTOU is blocked in the calling thread for the change.
"""

from __future__ import annotations

import os
import signal
import termios
import threading

_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6

#: What termios.tcgetattr gives: flags, speeds and control characters.
Modes = list[int | list[bytes | int]]


def raw_modes(modes: Modes, *, shared: bool = False) -> Modes:
    """``modes`` made raw: every key goes to the guest, Ctrl-C and Ctrl-Z too.

    On a terminal ``shared`` with qvm's own messages, output processing stays as it is: without it
    log lines would form a staircase.
    """
    raw = list(modes)
    raw[_IFLAG] = _flags(raw[_IFLAG]) & ~(
        termios.BRKINT | termios.ICRNL | termios.INLCR | termios.IGNCR | termios.INPCK
        | termios.ISTRIP | termios.IXON | termios.PARMRK
    )  # fmt: skip
    if not shared:
        raw[_OFLAG] = _flags(raw[_OFLAG]) & ~termios.OPOST
    raw[_CFLAG] = (_flags(raw[_CFLAG]) & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
    raw[_LFLAG] = _flags(raw[_LFLAG]) & ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
    control = raw[_CC]
    assert isinstance(control, list)
    control = list(control)
    control[termios.VMIN], control[termios.VTIME] = 1, 0
    raw[_CC] = control
    return raw


def in_foreground(fd: int) -> bool:
    """Whether this process may use the terminal; True when it is not its controlling terminal."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        # ENOTTY: some other terminal, no job control applies.
        return True


class RawMode:
    """Raw mode of the terminal behind ``fd``; remembers the modes it found.

    :meth:`enter` and :meth:`leave` may be called from any thread and any number of times; after
    the first :meth:`leave` the terminal is never made raw again.
    """

    def __init__(self, fd: int, *, shared: bool = False) -> None:
        self._fd = fd
        self._shared = shared
        self._saved: Modes | None = None
        self._raw: Modes | None = None
        self._left = False
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Make the terminal raw; again after a shell took it back (SIGTSTP and SIGCONT)."""
        with self._lock:
            if self._left:
                return
            modes = termios.tcgetattr(self._fd)
            if self._saved is None:
                self._saved = modes
            if modes != self._raw:
                _set(self._fd, raw_modes(self._saved, shared=self._shared))
                # Drivers may refuse single bits; what was reached is what later looks compare with.
                self._raw = termios.tcgetattr(self._fd)

    def leave(self) -> None:
        """Put back the modes found at first, unless a shell in the foreground has set its own."""
        with self._lock:
            self._left = True
            saved, self._saved = self._saved, None
            if saved is None:
                return
            try:
                if in_foreground(self._fd) or termios.tcgetattr(self._fd) == self._raw:
                    _set(self._fd, saved)
            except termios.error:
                # The terminal is gone (hung up): nothing is left to restore.
                pass


def _set(fd: int, modes: Modes) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        termios.tcsetattr(fd, termios.TCSANOW, modes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _flags(value: int | list[bytes | int]) -> int:
    assert isinstance(value, int)
    return value
