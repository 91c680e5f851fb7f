"""User Mode Linux: a stock Linux kernel with stock virtio drivers as a process, our vhost-user client.

Its root is the host's own, read-only, so mkfs, fsck and fio run inside as they are on the host. A shell
script is its init; what that prints, and how it ends, is all a test sees of it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "linux.uml"
MODULES = Path("/usr/lib/uml/modules")
INSIDE = Path(__file__).with_name("inside.py")
#: Virtio device ids.
NET, BLK, CONSOLE, RNG = 1, 2, 3, 4
#: Seconds until a guest that says nothing is given up; a boot takes 2 on a quiet machine.
LIMIT = 90.0

_PROLOGUE = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/run LANG=C
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /run; cd /run
inside() {{ {python} {inside} "$@"; }}
trap 'code=$?; echo "init ends: $code"; sync; exec {python} {inside} poweroff' EXIT
set -e
inside insmod {modules}
"""

# ---- the processor's state -------------------------------------------------------------------------

_AT_MINSIGSTKSZ = 51
#: Linux 6.1 gives ptrace 2696 bytes for the registers (AVX-512 and protection keys), and panics where the
#: processor's state is larger (AMX): the kernel wants all of it or nothing. Signal frames tell the size.
_LARGEST_FRAME = 4096
_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_SYS_PTRACE, _GETREGSET, _NT_X86_XSTATE = 101, 0x4204, 0x202
_ALLOW, _EINVAL = 0x7FFF0000, 0x00050000 | 22
#: Without the large state UML keeps the x87 and SSE registers only, so nothing inside may use others.
_NO_AVX = (
    "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-AVX512CD,-AVX512DQ,"
    "-AVX_Fast_Unaligned_Load",
    "OPENSSL_ia32cap=~0x1000000000000000:0",
)


def large_state() -> bool:
    """Whether this processor's registers are more than UML can keep."""
    libc = ctypes.CDLL(None)
    libc.getauxval.restype = ctypes.c_ulong
    return int(libc.getauxval(_AT_MINSIGSTKSZ)) > _LARGEST_FRAME


class NoLargeState:
    """Called in a child before exec: ptrace shall not offer it the large state. Made before the fork."""

    def __init__(self) -> None:
        program = [
            (_LOAD, 0, 0, 0), (_IF_EQUAL, 0, 5, _SYS_PTRACE),
            (_LOAD, 0, 0, 16), (_IF_EQUAL, 0, 3, _GETREGSET),
            (_LOAD, 0, 0, 32), (_IF_EQUAL, 0, 1, _NT_X86_XSTATE),
            (_RETURN, 0, 0, _EINVAL), (_RETURN, 0, 0, _ALLOW),
        ]  # fmt: skip
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *each) for each in program))
        head = struct.pack("<H6xQ", len(program), ctypes.addressof(self._code))
        self._head = ctypes.create_string_buffer(head)

    def __call__(self) -> None:
        """Raises OSError."""
        if self._libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or self._libc.prctl(
            _SET_SECCOMP, _MODE_FILTER, self._head, 0, 0
        ):
            raise OSError(ctypes.get_errno(), "seccomp filter for UML")


def memory_folder(size: int) -> dict[str, str]:
    """Where a guest's memory of ``size`` MiB goes: a file that is executed from. A setting of TMPDIR."""
    try:
        shm = os.statvfs("/dev/shm")
    except OSError:
        return {}
    # Containers have a small one, without execution.
    fits = shm.f_bavail * shm.f_frsize > 2 * size << 20
    return {"TMPDIR": "/dev/shm"} if fits and not shm.f_flag & os.ST_NOEXEC else {}


# ---- the guest -------------------------------------------------------------------------------------


def missing() -> str:
    """Why there can be no UML here, or an empty text."""
    if shutil.which(PROGRAM) is None or not MODULES.is_dir():
        return f"no {PROGRAM}: apt-get install user-mode-linux"
    return ""


class GuestError(AssertionError):
    """The guest did not do what the test waits for; the text has all it said."""


class Uml:
    """A running UML. Every process it makes is in a process group of its own, which ends with it."""

    def __init__(
        self, script: str, devices: Sequence[tuple[Path, int]] = (), *, modules: str = "", memory: int = 192
    ) -> None:
        """Start it: ``devices`` are (socket, virtio id), ``modules`` those to load before ``script``."""
        self._folder = Path(tempfile.mkdtemp(prefix="uml-"))
        self._output = bytearray()
        self._news = threading.Condition()
        self._closed = False
        init = self._folder / "init"
        init.write_text(
            _PROLOGUE.format(python=sys.executable, inside=INSIDE, modules=modules) + script + "\n"
        )
        init.chmod(0o755)
        words = [
            PROGRAM, f"mem={memory}M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro",
            f"init={init}", "con=null", "con0=fd:0,fd:1", "panic=1", "quiet", f"uml_dir={self._folder}/",
            *(f"virtio_uml.device={socket}:{number}" for socket, number in devices),
        ]  # fmt: skip
        large = large_state()
        self._process = subprocess.Popen(
            [*words, *(_NO_AVX if large else ())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **memory_folder(memory)},
            start_new_session=True,
            preexec_fn=NoLargeState() if large else None,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while chunk := os.read(self._process.stdout.fileno(), 65536):
            with self._news:
                self._output += chunk
                self._news.notify_all()
        with self._news:
            self._closed = True
            self._news.notify_all()

    @property
    def text(self) -> str:
        """What it has said so far: kernel, script, and what was typed."""
        with self._news:
            return self._output.decode(errors="replace").replace("\r", "")

    def expect(self, pattern: str, limit: float = LIMIT) -> re.Match[str]:
        """Wait for a pattern at the start of a line. Raises GuestError when it does not come."""
        deadline = time.monotonic() + limit
        while (match := re.search(pattern, self.text, re.MULTILINE)) is None:
            with self._news:
                if self._closed or not self._news.wait(deadline - time.monotonic()):
                    raise GuestError(f"no {pattern!r} from the guest, which said:\n{self.text}")
        return match

    def type(self, line: str) -> None:
        """A line for the script's standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def wait(self, limit: float = LIMIT) -> str:
        """Wait until the script has succeeded and the guest has powered off; all it said.

        Raises GuestError when the script failed, or the guest crashed or does not end.
        """
        try:
            code = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        # Not the exit code: on a busy host UML aborts now and then, after its kernel has halted.
        if code is None or not re.search(r"^init ends: 0\n(.*\n)*reboot: System halted$", self.text, re.M):
            raise GuestError(f"the guest failed (exit code {code}):\n{self.text}")
        return self.text

    def kill(self) -> None:
        """SIGKILL to all of it, and wait until it is gone."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended, and so have its children
        self._process.wait()

    def close(self) -> None:
        """End it if it runs; nothing of it is left."""
        self.kill()
        # The last of its children holds the pipe until it is dead.
        self._reader.join(10)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)
