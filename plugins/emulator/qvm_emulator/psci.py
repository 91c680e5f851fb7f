"""PSCI 1.0 for a machine with one CPU, called by HVC (Arm DEN0022)."""

from __future__ import annotations

import enum
from collections.abc import Callable

from qvmcore.api import GuestEnd, Reason

_U64 = (1 << 64) - 1
_SMC64 = 0x4000_0000


class Function(enum.IntEnum):
    """Function identifiers in their 32-bit form; bit 30 marks the 64-bit form."""

    VERSION = 0x8400_0000
    CPU_SUSPEND = 0x8400_0001
    CPU_OFF = 0x8400_0002
    CPU_ON = 0x8400_0003
    AFFINITY_INFO = 0x8400_0004
    MIGRATE_INFO_TYPE = 0x8400_0006
    SYSTEM_OFF = 0x8400_0008
    SYSTEM_RESET = 0x8400_0009
    FEATURES = 0x8400_000A


class Status(enum.IntEnum):
    """Return values."""

    SUCCESS = 0
    NOT_SUPPORTED = -1
    INVALID_PARAMETERS = -2
    DENIED = -3
    ALREADY_ON = -4


_VERSION_1_0 = 0x0001_0000
_NO_TRUSTED_OS = 2
_WITH_64_BIT_FORM = {Function.CPU_SUSPEND, Function.CPU_ON, Function.AFFINITY_INFO}
_AFFINITY = 0xFF_00FF_FFFF


class Psci:
    """Answers calls; ``end`` is called for power-off and reset and must make the vCPU stop."""

    def __init__(self, end: Callable[[GuestEnd], None]) -> None:
        self._end = end

    def call(self, function: int, argument: int) -> int:
        """The value for x0, unsigned 64 bits; ``argument`` is x1. Unknown calls give NOT_SUPPORTED."""
        return self._call(function & 0xFFFF_FFFF, argument) & _U64

    def _call(self, function: int, argument: int) -> int:
        known = _known(function)
        if known is None:
            return Status.NOT_SUPPORTED
        if known is Function.VERSION:
            return _VERSION_1_0
        if known is Function.MIGRATE_INFO_TYPE:
            return _NO_TRUSTED_OS
        if known is Function.FEATURES:
            return Status.NOT_SUPPORTED if _known(argument & 0xFFFF_FFFF) is None else Status.SUCCESS
        if known is Function.CPU_ON:
            return Status.INVALID_PARAMETERS if argument & _AFFINITY else Status.ALREADY_ON
        if known is Function.AFFINITY_INFO:
            return Status.INVALID_PARAMETERS if argument & _AFFINITY else 0  # 0: on
        if known is Function.CPU_SUSPEND:
            return Status.SUCCESS  # a standby that is left at once is allowed
        if known is Function.CPU_OFF:
            return Status.DENIED  # the last CPU stays on
        if known is Function.SYSTEM_OFF:
            self._end(GuestEnd(Reason.GUEST_SHUTDOWN, "the guest powered off (PSCI SYSTEM_OFF)"))
        else:
            self._end(GuestEnd(Reason.GUEST_RESET, "the guest asked for a reset (PSCI SYSTEM_RESET)"))
        return Status.SUCCESS


def _known(function: int) -> Function | None:
    try:
        if function & _SMC64:
            short = Function(function & ~_SMC64)
            return short if short in _WITH_64_BIT_FORM else None
        return Function(function)
    except ValueError:
        return None
