"""The engine: says whether KVM can be used here, builds guests."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, ClassVar

from qvmcore.api import EngineError, Guest, GuestConfig

if TYPE_CHECKING:
    from qvm_kvm.arch import Backend


class KvmEngine:
    """Runs guests of the host's architecture by /dev/kvm."""

    name: ClassVar[str] = "kvm"
    native: ClassVar[bool] = True

    def unusable(self, arch: str) -> str:
        """Why a guest of ``arch`` cannot run here, and what to do; empty when it can.

        Opens /dev/kvm and makes an empty VM to be sure; that takes a few milliseconds.
        """
        try:
            from qvm_kvm.system import KvmSystem
            from qvm_kvm.vm import Vm

            with KvmSystem(_backend(arch).needed) as system:
                Vm(system).close()
        except EngineError as error:
            return str(error)
        except OSError as error:
            return f"KVM fails: {error.strerror or error}"
        return ""

    def create_guest(self, config: GuestConfig) -> Guest:
        """Build a guest. Raises EngineError with the reason when that is impossible."""
        from qvm_kvm.guest import KvmGuest
        from qvm_kvm.system import KvmSystem

        backend = _backend(config.arch)
        with KvmSystem(backend.needed) as system:
            return KvmGuest(config, system, backend)


def _backend(arch: str) -> type[Backend]:
    """The part for guests of ``arch``. Raises EngineError when KVM here has none."""
    host = platform.machine()
    if arch != host:
        raise EngineError(f"KVM runs guests of the host's architecture, {host}, not {arch}")
    if arch != "x86_64":
        raise EngineError(f"the kvm engine is built for x86_64 so far, not {arch}")
    from qvm_kvm.x86.backend import X86Backend

    return X86Backend
