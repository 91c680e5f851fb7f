"""Descriptors a client should not send for memory, or for wake-ups.

Each function makes one, which is its caller's; what has to stay open beside it goes into ``fds``.
"""

from __future__ import annotations

import os
import random
import socket
import tempfile


def file(fds: list[int]) -> int:
    """A regular file."""
    handle, name = tempfile.mkstemp()
    os.unlink(name)  # noqa: PTH108
    return handle


def folder(fds: list[int]) -> int:
    """A directory."""
    return os.open(tempfile.gettempdir(), os.O_RDONLY)


def null(fds: list[int]) -> int:
    """Always ready, and never empty."""
    return os.open(os.devnull, os.O_RDWR)


def zero(fds: list[int]) -> int:
    """Without end."""
    return os.open("/dev/zero", os.O_RDWR)


def opath(fds: list[int]) -> int:
    """A name, no file."""
    return os.open(tempfile.gettempdir(), os.O_PATH)


def hung_up(fds: list[int]) -> int:
    """A pipe nobody can write to."""
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def reset_socket(fds: list[int]) -> int:
    """A connection whose other side has gone with data unread: reading gives ECONNRESET."""
    one, other = socket.socketpair()
    one.send(b"x")
    other.close()
    return one.detach()


def blocking(fds: list[int]) -> int:
    """An eventfd whose reader would wait."""
    return os.eventfd(0)


def endless(fds: list[int]) -> int:
    """Always something to read."""
    return os.open("/dev/urandom", os.O_RDONLY)


def listener(fds: list[int]) -> int:
    """Cannot be read at all."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"\0qvm-attack-{os.getpid()}-{random.random()}")
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(server.getsockname())
    fds.append(client.detach())
    return server.detach()


def full_event(fds: list[int]) -> int:
    """An eventfd that cannot count further: a writer would wait for ever."""
    fd = os.eventfd(0)
    os.eventfd_write(fd, (1 << 64) - 2)
    return fd


def full_pipe(fds: list[int]) -> int:
    """A pipe without room, whose reader never reads."""
    reader, writer = os.pipe()
    fds.append(reader)
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    return writer


def broken_pipe(fds: list[int]) -> int:
    """A pipe nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def unwritable(fds: list[int]) -> int:
    """Cannot be written."""
    return os.open(os.devnull, os.O_RDONLY)


def pipe(fds: list[int]) -> int:
    """The reading end."""
    reader, writer = os.pipe()
    fds.append(writer)
    return reader


def unix(fds: list[int]) -> int:
    """A socket."""
    one, other = socket.socketpair()
    fds.append(other.detach())
    return one.detach()


def event(fds: list[int]) -> int:
    """An eventfd."""
    return os.eventfd(0)
