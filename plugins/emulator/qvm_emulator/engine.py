"""The engine: says whether it can run here, decides the mode, builds guests."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from qvmcore.api import EngineError, Guest, GuestConfig

if TYPE_CHECKING:
    from qvm_emulator.cpu import Cpu

MODE_VARIABLE = "QVM_EMULATOR_MODE"


class EmulatedEngine:
    """Runs an aarch64 guest in this process. Needs no KVM and no privilege."""

    name: ClassVar[str] = "emulated"
    native: ClassVar[bool] = False

    def unusable(self, arch: str) -> str:
        """Why a guest of ``arch`` cannot run here; empty when it can."""
        if arch != "aarch64":
            return f"the emulated engine runs aarch64 guests, not {arch}"
        if find_spec("unicorn") is None:
            return "the Python package 'unicorn' is not installed (pip install unicorn==2.1.4)"
        return ""

    def create_guest(self, config: GuestConfig) -> Guest:
        """Build a guest. Raises EngineError with the reason when that is impossible."""
        reason = self.unusable(config.arch)
        if reason:
            raise EngineError(reason)
        if config.cpus != 1:
            raise EngineError(
                f"the emulated engine has one CPU per guest, not {config.cpus}", hint="set cpus = 1"
            )
        try:
            from qvm_emulator.guest import EmulatedGuest
        except ImportError as error:
            raise EngineError(f"the emulated CPU cannot be loaded: {error}") from error
        return EmulatedGuest(config, choose_cpu())


_reported = False


def choose_cpu() -> type[Cpu]:
    """Fast mode when the self-test passes here, else safe mode; says so once on stderr."""
    global _reported
    from qvm_emulator.safe import SafeCpu
    from qvm_emulator.selftest import fast_mode_problem

    wanted = os.environ.get(MODE_VARIABLE, "")
    if wanted not in ("", "fast", "safe"):
        raise EngineError(f"{MODE_VARIABLE} is 'fast' or 'safe', not {wanted!r}")
    if wanted == "safe":
        problem = f"{MODE_VARIABLE}=safe"
    else:
        problem = fast_mode_problem()
        if not problem:
            from qvm_emulator.fast import FastCpu

            return FastCpu
        if wanted == "fast":
            raise EngineError(f"the fast mode of the emulated CPU does not work here: {problem}")
    if not _reported:
        _reported = True
        print(f"qvm: emulated CPU in safe mode, several times slower ({problem})", file=sys.stderr)
    return SafeCpu
