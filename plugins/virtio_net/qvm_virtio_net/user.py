"""Hostdev ``user``: the host's own network without privilege, by Debian's ``passt`` as a child.

passt translates the guest's connections into sockets of its own. It talks over a Unix stream socket:
each frame behind its length, 32 bits, most significant byte first. There is no room for a
struct virtio_net_hdr in it, so the card offers no offloads.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO

from qvm_virtio_net import spec
from qvm_virtio_net.buffers import cut, fill
from qvm_virtio_net.hostdev import Events, Interest, Sent
from qvmcore.api import HostError, Worker

_LENGTH_BYTES = 4
#: Bytes read at a time; what waits of one is at most this and a frame.
_CHUNK = 256 * 1024
#: Seconds passt may take to end before it is killed.
_END_SECONDS = 1.0
_NO_HEADER = bytes(spec.HEADER_BYTES)


class Passt:
    """A passt process on the other end of a socket pair; ``words`` are further arguments for it."""

    offloads = 0

    def __init__(self, words: Sequence[str], log: logging.LoggerAdapter[logging.Logger], vdev: str) -> None:
        self._words = tuple(words)
        self._log = log
        self._vdev = vdev
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._up = False
        #: What was read and not given away: the part [_start, end) of _input.
        self._input = bytearray()
        self._start = 0
        #: The rest of a frame of which the socket took a part.
        self._output = b""

    @property
    def up(self) -> bool:
        """See HostDev."""
        return self._up

    def open(self, worker: Worker, events: Events) -> None:
        """Start passt. Raises HostError when it is not installed or does not start."""
        self._events = events
        program = shutil.which("passt")
        if program is None:
            raise HostError(
                "user = true needs the program passt, which is not installed", hint="apt-get install passt"
            )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = ours
        # passt says on standard error why it ends; a pipe nobody reads could fill.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        with theirs:
            command = [program, "--foreground", "--quiet", "--fd", str(theirs.fileno()), *self._words]
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors,
                    pass_fds=(theirs.fileno(),), start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise HostError.from_os("start", program, error) from error
        ours.setblocking(False)
        self._up = True
        self._interest = Interest(worker, ours.fileno(), lambda: events.readable(0), self._writable)
        self._interest.want(read=True)

    # ---- frames ----------------------------------------------------------------------------------

    def send(self, pair: int, message: Sequence[memoryview]) -> Sent:
        """See HostDev. Of a frame taken in part the rest is kept; it goes first."""
        if not self._up or self._socket is None:
            return Sent.NO_LINK
        if self._output and not self._flush():
            return Sent.BUSY if self._up else Sent.NO_LINK
        total = sum(map(len, message))
        frame = cut(message, spec.HEADER_BYTES, total)
        length = total - spec.HEADER_BYTES
        pieces: list[bytes | memoryview] = [length.to_bytes(_LENGTH_BYTES, "big"), *frame]
        try:
            done = self._socket.sendmsg(pieces)
        except BlockingIOError:
            self._interest.want(write=True)
            return Sent.BUSY
        except OSError as error:
            self._lost(str(error))
            return Sent.NO_LINK
        if done < _LENGTH_BYTES + length:
            self._output = b"".join(pieces)[done:]
            self._interest.want(write=True)
        return Sent.TAKEN

    def _flush(self) -> bool:
        """Send the rest of a frame; whether nothing is left of it."""
        assert self._socket is not None
        try:
            self._output = self._output[self._socket.send(self._output) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lost(str(error))
            return False
        self._interest.want(write=bool(self._output))
        return not self._output

    def _writable(self) -> None:
        if self._up and (not self._output or self._flush()):
            self._interest.want(write=False)
            self._events.writable(0)

    def receive(self, pair: int, buffers: Sequence[bytearray | memoryview]) -> int:
        """See HostDev."""
        frame = self._next()
        if frame is None and self._up and self._read():
            frame = self._next()
        if frame is None:
            return 0
        views = [memoryview(buffer) for buffer in buffers]
        room = sum(map(len, views))
        fill(views, _NO_HEADER)
        with memoryview(self._input) as data:
            fill(cut(views, spec.HEADER_BYTES, room), data[frame.start : frame.stop])
        self._start = frame.stop
        return spec.HEADER_BYTES + len(frame)

    def _next(self) -> range | None:
        """Where the next whole frame lies in the input, None when there is none."""
        begin = self._start + _LENGTH_BYTES
        if len(self._input) < begin:
            return None
        length = int.from_bytes(self._input[self._start : begin], "big")
        if length > spec.FRAME_BYTES_MAX:
            # In a stream nothing behind a wrong length can be believed.
            self._lost(f"it sent a frame of {length} bytes")
            return None
        return range(begin, begin + length) if len(self._input) >= begin + length else None

    def _read(self) -> bool:
        """Read more; whether something came."""
        assert self._socket is not None
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            self._lost(str(error))
            return False
        if not data:
            self._lost("it ended")
            return False
        del self._input[: self._start]
        self._start = 0
        self._input += data
        return True

    def pause(self, pair: int, paused: bool) -> None:
        """See HostDev."""
        if self._up:
            self._interest.want(read=not paused)

    def _lost(self, why: str) -> None:
        if not self._up:
            return
        self._up = False
        self._interest.want(read=False, write=False)
        said = ""
        if self._errors is not None:
            self._errors.seek(0)
            lines = self._errors.read(4096).decode(errors="replace").strip().splitlines()
            said = f"; its last words: {lines[-1]}" if lines else ""
        self._log.warning("%s: passt: %s; the cable is out%s", self._vdev, why, said)
        self._events.link_changed()

    # ---- settings and end ------------------------------------------------------------------------

    def set_guest_offloads(self, offloads: int) -> None:
        """None were offered."""

    def set_pairs(self, pairs: int) -> bool:
        """See HostDev."""
        return pairs == 1

    def close(self) -> None:
        """Close the socket, at which passt ends; a passt that does not is killed."""
        self._up = False
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                # passt makes a session of its own, so nobody else is hit.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        errors, self._errors = self._errors, None
        if errors is not None:
            errors.close()

    def status(self) -> Mapping[str, object]:
        """See HostDev."""
        pid = self._process.pid if self._process is not None else 0
        return {"hostdev": "user (passt)", "passt_pid": pid}
