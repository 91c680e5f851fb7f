"""The exception tree of qvm (floor 0). Each class says whose fault it is.

::

    QvmError
     +-- ConfigError       the VM file or the command line     -> exit 65
     +-- PluginError       a plugin distribution               -> exit 64 (65 when the VM file names it)
     +-- HostError         a file, device or call of the host  -> exit 64 before start, 96 after
     +-- NotQuiet          a physical device is not proven quiet -> exit 8
     +-- ClientError       a client of `qvm serve` broke its protocol: its connection ends
     +-- EngineError       the engine cannot run this guest    -> exit 64 before start, 96 after
     +-- GuestError        the guest did something illegal; the device fails, the VM lives
          +-- GuestMemoryError
          +-- BadDescriptorChain

Any other exception that leaves a vdev is a bug of that vdev and is caught in its slot.
"""

from __future__ import annotations

import difflib
import errno
import resource
from collections.abc import Iterable
from dataclasses import dataclass

#: So many exceptions that led to one another are looked at.
_CAUSES = 16


class QvmError(Exception):
    """Base of everything qvm raises on purpose. ``hint`` tells the user what to do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One thing wrong in a VM file: where (``file:line``), what, and what to do.

    ``where`` names the table, e.g. ``vdev[1] (virtio-net)``; ``line`` is 1-based, 0 if unknown.
    """

    file: str
    line: int
    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        subject = f"{place}: {self.where}: " if self.where else f"{place}: "
        return f"{subject}{self.message}" + (f"; {self.hint}" if self.hint else "")


class ConfigError(QvmError):
    """The VM file or the command line is wrong. Carries every problem found, not only the first."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(str(item) for item in self.diagnostics))


class PluginError(QvmError):
    """A plugin cannot be loaded, speaks another API version, or breaks its contract."""


class HostError(QvmError):
    """A host resource failed; the message names the path and the reason of the operating system."""

    @classmethod
    def from_os(cls, action: str, path: object, error: OSError, *, hint: str = "") -> HostError:
        """``cannot <action> <path>: <strerror>``."""
        return cls(f"cannot {action} {path}: {error.strerror or error}", hint=hint)


class NotQuiet(QvmError):
    """A physical device could not be proven quiet: it may still write to memory or interrupt."""


class ClientError(QvmError):
    """A client of ``qvm serve`` broke its protocol; its connection is closed, everybody else goes on."""


class EngineError(QvmError):
    """The engine cannot run this guest, or failed while running it."""


class GuestError(QvmError):
    """The guest broke a rule of the device. Never fatal to the VM."""


class GuestMemoryError(GuestError):
    """A guest-physical range lies outside guest memory, or wraps the address space."""


class BadDescriptorChain(GuestError):
    """A virtqueue descriptor chain breaks the virtio rules."""


def for_people(error: BaseException) -> str:
    """What to tell a user about ``error``; empty when it is a bug of somebody's, which needs its traceback.

    That no more files may be opened is nobody's bug, wherever it was noticed.
    """
    text, hint = (str(error), error.hint) if isinstance(error, QvmError) else ("", "")
    what, limit = _ran_out(error)
    if not what or hint:
        return text
    return f"{text or what}; {limit}"


def _ran_out(error: BaseException) -> tuple[str, str]:
    """What there was none left of, if that is how it came to ``error``, and the limit to raise."""
    cause: BaseException | None = error
    # Bounded, as causes may be set to go in a circle.
    for _ in range(_CAUSES):
        if isinstance(cause, OSError) and cause.errno == errno.EMFILE:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            return "out of file descriptors", (
                f"this process may have {soft} (hard limit {hard}): raise that with ulimit -n in its shell, "
                "or LimitNOFILE= in its systemd unit"
            )
        if isinstance(cause, OSError) and cause.errno == errno.ENFILE:
            return "too many files are open on this host", (
                "end other programs, or raise its limit with sysctl fs.file-max"
            )
        if cause is None:
            break
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "", ""


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint ``did you mean 'x'?`` for a misspelt name, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {match[0]!r}?" if match else ""


class VdevHung(Exception):
    """Raised by the framework inside a register handler that runs for too long; not by a plugin."""
